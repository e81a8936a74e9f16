"""`python -m megatron_xact` is `xact`."""

import sys

from megatron_xact.cli import main

# The guard matters: distributed checkpointing spawns processes that import the main module again.
if __name__ == "__main__":
    sys.exit(main())
