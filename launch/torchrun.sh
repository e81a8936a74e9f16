#!/usr/bin/env bash
# One run on 1..N machines without a scheduler: the same command on each of them.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/torchrun.sh [options] CONFIG [overrides]

Pretrains CONFIG (see `xact pretrain --help`) with one rank per GPU on 1..N machines, through torchrun. On one machine:

  bash launch/torchrun.sh configs/quickstart.toml --save runs/a --load runs/a

On several, the same command on each, with its number; all must see the same --save folder and the same data:

  bash launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr node-a CONFIG ...     # on node-a
  bash launch/torchrun.sh --nnodes 2 --node-rank 1 --master-addr node-a CONFIG ...     # on node-b

  --nnodes N              machines (default: $NNODES or 1)
  --node-rank R           this machine's number, from 0 (default: $NODE_RANK or 0)
  --master-addr HOST      an address of machine 0 that the others reach (default: $MASTER_ADDR)
  --master-port PORT      a free port there (default: $MASTER_PORT or 29400)
  --nproc-per-node N      ranks on each machine (default: its GPUs; without GPUs, what the config is split into)
  overrides               any flag of `xact pretrain`, e.g. --train-iters 100 --set launch.max-restarts=5

A rank that is killed, a hang or a lost machine is told in one line, and all machines start again together from the last
complete checkpoint, as [launch] in CONFIG says. SIGTERM or SIGUSR1 to this command, on any machine, saves and ends the
run on all of them (exit code 75: the same command goes on); Ctrl-C ends it without saving (130). Exit codes:
megatron_xact/pretraining/exits.py. Other settings of ranks: launch/ranks.sh. Interpreter: $PYTHON or .venv/bin/python.
END
}

fail() { echo "torchrun.sh: error: $*" >&2; exit 2; }

nodes=${NNODES:-1} rank=${NODE_RANK:-0} address=${MASTER_ADDR:-} port=${MASTER_PORT:-29400} per_node=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --nnodes | --node-rank | --master-addr | --master-port | --nproc-per-node)
            [ $# -ge 2 ] || fail "$1 needs a value (--help)" ;;
        *) break ;;  # CONFIG
    esac
    case $1 in
        --nnodes) nodes=$2 ;;
        --node-rank) rank=$2 ;;
        --master-addr) address=$2 ;;
        --master-port) port=$2 ;;
        --nproc-per-node) per_node=(--nproc-per-node "$2") ;;
    esac
    shift 2
done
[ $# -ge 1 ] || fail "which config? (--help)"
for number in "$nodes" "$rank" "$port"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "--nnodes, --node-rank and --master-port are numbers, not '$number'"
done
many=()
if [ "$nodes" -gt 1 ]; then
    [ -n "$address" ] || fail "several machines meet at machine 0: name it with --master-addr or \$MASTER_ADDR"
    many=(--nnodes "$nodes" --node-rank "$rank" --rendezvous "$address:$port")
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/ranks.sh
source "$root/launch/ranks.sh"
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || fail "no $python: make it by bash launch/env.sh, or name another by \$PYTHON"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT  # of this script, or of another job: torchrun gives new ones
# Signals go to that process, which passes them on to torchrun (megatron_xact/pretraining/agent.py), and that to the
# ranks, with time for a checkpoint.
exec "$python" -m megatron_xact pretrain "$@" "${many[@]}" "${per_node[@]}"
