"""How fast the activations are: one door, `megatron_xact.kernels.ops`, over every implementation."""
