"""What is added to a config for the machine it runs on, beside what Megatron says it needs."""

from __future__ import annotations

import pytest
from megatron.core.tensor_parallel import layers

from megatron_xact.pretraining import arguments
from megatron_xact.pretraining.platform import missing_arguments


@pytest.mark.parametrize("has_te", [True, False], ids=["TransformerEngine", "local"])
def test_weight_gradients_are_accumulated_by_a_kernel_only_where_megatrons_own_linear_has_one(has_te):
    """Such a linear is the output layer beside TransformerEngine's layers, too; without apex it raises."""
    added = missing_arguments(has_gpu=True, has_te=has_te)
    args = arguments.parse(arguments.command_line(added))
    assert args.gradient_accumulation_fusion == layers._grad_accum_fusion_available
