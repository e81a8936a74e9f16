"""Trainable activation functions for language-model pretraining in unmodified Megatron."""

__version__ = "0.1.0"
