"""How activations train: TOML config -> Megatron's arguments -> Megatron's own `pretrain`, and its data."""
