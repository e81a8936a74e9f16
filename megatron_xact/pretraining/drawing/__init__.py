"""The pictures of runs, each a function from reports to a matplotlib figure; where they go is `plot`'s business."""

from megatron_xact.pretraining.drawing.layers import (
    alphas,
    alphas_of_runs,
    alphas_over_depth,
    function,
    statistics,
    statistics_over_depth,
)
from megatron_xact.pretraining.drawing.steps import loss, progress

__all__ = [
    "alphas",
    "alphas_of_runs",
    "alphas_over_depth",
    "function",
    "loss",
    "progress",
    "statistics",
    "statistics_over_depth",
]
