"""Where the activations live: Megatron modules, layer specs and the tensor-parallel rule."""
