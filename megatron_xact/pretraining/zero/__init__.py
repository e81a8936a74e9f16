"""`engine = "deepspeed"`: Megatron's model, data and training loop, with DeepSpeed's ZeRO below them.

ZeRO 1, 2 and 3 over the data-parallel ranks, with offload, beside tensor parallelism. Checkpoints are Megatron's.
"""
