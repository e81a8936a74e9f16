"""How models leave Megatron and come back: the Hugging Face mapping, export, import, verification."""
