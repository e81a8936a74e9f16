# What the launch scripts set for every rank, and why. Sourced; what is set already is kept, so that a cluster's own
# settings come first. CUDA_DEVICE_MAX_CONNECTIONS=1, Megatron's demand, is set by the trainer (pretraining/run.py).

# A failed NCCL collective ends its process at once (torch's default, 3: without cleaning up, which can hang), so that
# the launcher sees the failure.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# NCCL tells errors; INFO also tells which network it found, which helps on a new cluster. Which interface it and gloo
# use is for the cluster to say where they find the wrong one: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_HCA.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Lines reach the log when they are printed; a rank that is killed could not flush them any more.
export PYTHONUNBUFFERED=1

# Threads of one rank on the CPU: all ranks of a node together as many as it has cores, or they wait for each other.
threads_for() {  # threads_for RANKS CORES
    local threads=$(($2 / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
}
