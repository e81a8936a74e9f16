"""What processes of tests import; the server that they are forks of does so once. For each of them it would be 10 s."""

import gc

from megatron_xact.pretraining import cpu_platform

cpu_platform.activate()

import transformers.modeling_utils  # noqa: E402, F401

gc.freeze()  # forks need not search it for garbage
