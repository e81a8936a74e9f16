"""What every rank imports. The server that ranks are forks of imports it once: for each of them it would be 8 s."""

from megatron_xact.pretraining import cpu_platform

cpu_platform.activate()
