"""How models leave Megatron and come back: the Hugging Face mapping, export, import, verification."""

import torch.utils._device

# torch keeps a set of the factories that `with torch.device(...)` redirects, made when first asked for. The CPU
# platform of `pretraining` replaces factories by wrappers; were the set made after that, transformers'
# `with torch.device("meta")` would redirect none of them and leave buffers such as RoPE's frequencies uninitialised.
torch.utils._device._device_constructors()
