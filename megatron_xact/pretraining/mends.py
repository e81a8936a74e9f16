"""Two mends of Megatron 0.19.2, on every device: what keeps its wheel alone from starting, and from resuming.

These and the CPU platform are the only places where something of Megatron's is replaced at run time. Neither does
anything where Megatron does not need it: with a checkout of Megatron-LM, with TransformerEngine or with apex.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache
def apply() -> None:
    from megatron.core import optimizer

    _start_without_makefile()
    if optimizer.Adam is torch.optim.AdamW:
        _resume_with_adamw()


def _start_without_makefile() -> None:
    """Megatron compiles its dataset helper at start by a Makefile, which the wheel lacks; the wheel has it compiled."""
    from megatron.core import datasets
    from megatron.training import initialize

    has_makefile = (Path(datasets.__file__).parent / "Makefile").exists()
    if not has_makefile and importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        initialize._compile_dependencies = lambda: None


def _resume_with_adamw() -> None:
    """Let the distributed optimizer resume with torch's AdamW, all there is without TransformerEngine or apex.

    Megatron 0.19.2 asserts that AdamW already has state while it builds the structure to load into, and then hands
    one and the same `step` tensor to every parameter, so that each update would count as many steps as there are
    parameters. Loading the fully reshardable format, it looks for a `step` per parameter that it left out when it
    saved. Loading the other one (dp_reshardable), it puts the step of before the load, 0, over the loaded one, and in
    fp32 it copies into views of parameters that require a gradient, which torch refuses.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock_sharded_state_dict = DistributedOptimizer.sharded_state_dict
    stock_load_state_dict = DistributedOptimizer.load_state_dict
    stock_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(stock_sharded_state_dict)
    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, *args, **kwargs):
        if is_loading and not self.optimizer.state:
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                moments = {key: torch.zeros_like(parameter) for key in self.optimizer_state_keys}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return stock_sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    @functools.wraps(stock_load_state_dict)
    def load_state_dict(self, state_dict):
        stock_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(stock_set_states)
    @torch.no_grad()
    def set_states(self, model_param, tensors):
        stock_set_states(self, model_param, tensors | {"step": None})  # None: keep what the parameter group says

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load_state_dict
