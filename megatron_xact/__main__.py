"""`python -m megatron_xact` is `xact`."""

import sys

from megatron_xact.cli import main
from megatron_xact.pretraining import signals

# The guard matters: distributed checkpointing spawns processes that import the main module again.
if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":  # one of those
    signals.ignore()
