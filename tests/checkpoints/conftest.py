"""The fixtures of this folder. Nothing is imported from here: other folders have a conftest too."""

from saved import hf_models, runs  # noqa: F401
