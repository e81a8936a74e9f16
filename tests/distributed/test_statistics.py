"""Statistics of activations on gloo ranks, against numpy in fp64 on the joined pre-activations.

The model is trained through Megatron's own schedules with the monitor in place, as `xact pretrain` does it: two
microbatches a step, statistics of the first, at every second step.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from megatron_xact import activations
from megatron_xact.pretraining.statistics import NEAR_ZERO, STATISTICS, finite

pytestmark = pytest.mark.distributed

STEPS, INTERVAL, ROWS, LAYERS = 3, 2, 2, 2
MEASURED = 100  # the seed of the first microbatch on the last data-parallel rank
TOLERANCE = 1e-6  # relative; the model's post-activations are fp32
SILENCED = 16  # every 16th row of fc1 starts at zero: dead units

# name: what else the model has
MODELS = {"xielu": {"add_bias_linear": True}, "relu2": {}, "xsilu_glu1": {}}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}" + "-sp" * self.sequence_parallel + "-recompute" * self.recompute


LAYOUTS = [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True), Layout(tp=2, recompute=True), Layout(pp=2)]
CASES = [(name, layout) for name in MODELS for layout in LAYOUTS]


# -- on the ranks -----------------------------------------------------------------------------------------------------


def loss_of(output: torch.Tensor):
    total, tokens = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(batches, model):
    return model(**next(batches)), loss_of


def joined(tensor: torch.Tensor, gated: bool, group) -> torch.Tensor:
    """[..., F/tp or 2 F/tp] of all tensor-parallel ranks as the unsharded one."""
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(shards, tensor.contiguous(), group=group)
    halves = [shard.chunk(2 if gated else 1, -1) for shard in shards]
    return torch.cat([shard[i] for i in range(len(halves[0])) for shard in halves], -1)


def prepare(model: torch.nn.Module, stage_offset: int, weights: dict[str, torch.Tensor]) -> None:
    """Zero some units' rows, set some biases; then the same weights in every layout: the first one's, in `weights`."""
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if "layers" in words:
            at = words.index("layers") + 1
            words[at] = str(int(words[at]) + stage_offset)
        name = ".".join(words)
        if name.endswith("linear_fc1.weight"):
            parameter.data[::SILENCED] = 0.0
        if name.endswith("linear_fc1.bias"):
            parameter.data[::2] = 0.1
        if parameter.shape == weights.setdefault(name, parameter.data.clone()).shape:
            parameter.data.copy_(weights[name])


def trained(name: str, layout: Layout, interval: int, folder: Path, groups, weights: dict) -> dict:
    """Losses and final parameters of this rank; pre-activations of the first microbatch by (step, layer), joined."""
    import tiny_gpt
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config
    from megatron.training import get_args

    from megatron_xact.pretraining.monitor import Monitor, _activations_of

    folder.mkdir(parents=True, exist_ok=True)
    activation = activations.get(name)
    changes = MODELS[name] | (RECOMPUTED if layout.recompute else {})
    model = tiny_gpt.build(activation, groups, num_layers=LAYERS, sequence_parallel=layout.sequence_parallel, **changes)
    prepare(model, groups.pp.rank() if layout.pp > 1 else 0, weights)
    optimizer, scheduler = tiny_gpt.optimizer_of(model)

    seen = {}

    def keep(layer, module, args):
        seen.setdefault((get_args().curr_iteration, layer), [a.detach().clone() for a in args if a is not None])

    modules = _activations_of([model])
    for layer, module in modules.items():
        module.register_forward_pre_hook(partial(keep, layer))
    monitor = Monitor(folder, io.StringIO(), guard_interval=0, telemetry_interval=0, statistics_interval=interval)
    monitor.model = [model]
    config = get_model_config(model)
    config.finalize_model_grads_func, config.grad_scale_func = monitor.finalize_model_grads, optimizer.scale_loss
    is_measured = groups.dp.rank() == groups.dp.size() - 1
    seeds = (MEASURED, MEASURED + 1) if is_measured else (0, 1)
    losses = []
    for step in range(STEPS):
        get_args().curr_iteration = step
        optimizer.zero_grad()
        losses += get_forward_backward_func()(
            forward_step_func=monitor.watch_loss(forward_step),
            data_iterator=iter([tiny_gpt.batch(seed, ROWS) for seed in seeds]),
            model=[model],
            num_microbatches=2,
            seq_length=tiny_gpt.SEQUENCE,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
    return {
        "losses": [loss["lm loss"] for loss in losses],  # on the last pipeline stage
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "hooks": [len(module._forward_hooks) for module in modules.values()],
        "seen": {
            key: sum(joined(t, activation.gated, groups.tp).double() for t in inputs).flatten(0, -2).numpy()
            for key, inputs in seen.items()
        }
        if is_measured
        else {},
    }


def tokens_shared() -> dict:
    """The probe where ranks hold different tokens of the same units, as with context parallelism."""
    from megatron_xact.layers.activation import TrainableActivation
    from megatron_xact.pretraining.statistics import Probe

    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    alone = [torch.distributed.new_group([r]) for r in range(2)][rank]
    module = TrainableActivation(activations.get("relu2"), alone)
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    x[:12, :8] = -1.0  # dead on rank 0 only
    x[:, 8:11] = -1.0
    probe = Probe(world, world)
    with probe.watching({5: module}):
        module(x.chunk(2)[rank].unsqueeze(1))
    with probe.watching({5: module}):  # once each
        module(torch.zeros(1, 1, 64))
    module(torch.zeros(1, 1, 64))  # not watched
    return {"x": x.double().numpy(), "found": probe.take(), "then": probe.take()}


def degenerate() -> dict:
    """What a layer comes to whose post-activations are all 0, and one that holds a nan."""
    from megatron_xact.layers.activation import TrainableActivation
    from megatron_xact.pretraining.statistics import Probe

    alone = [torch.distributed.new_group([r]) for r in range(2)][torch.distributed.get_rank()]
    probe = Probe(alone, alone)
    zeros, nan = (TrainableActivation(activations.get("relu2"), alone) for _ in range(2))
    with probe.watching({1: zeros, 2: nan}):
        zeros(-torch.ones(3, 1, 8))
        nan(torch.full((3, 1, 8), float("nan")))
    return probe.take()


def launches() -> list[int]:
    """Operations of torch, each about one kernel on a GPU, that measuring 1, 2 and 3 blocks of a layer takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_xact.layers.activation import TrainableActivation
    from megatron_xact.pretraining.statistics import BLOCK, Probe

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            counts[-1] += not operation.is_view
            return operation(*args, **kwargs or {})

    alone = [torch.distributed.new_group([r]) for r in range(2)][torch.distributed.get_rank()]
    module, counts = TrainableActivation(activations.get("xielu"), alone), []
    for blocks in (1, 2, 3):
        counts.append(0)
        with Probe(alone, alone).watching({1: module}):
            x = torch.randn(blocks, 1, BLOCK).bfloat16()
            with torch.no_grad(), Counting():
                module(x)
    return counts


def on_ranks(folder: str) -> dict:
    import tiny_gpt
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import global_vars

    from megatron_xact.pretraining import statistics

    statistics.BLOCK = 1000  # a microbatch of these models is several, of unequal size
    global_vars.set_args(SimpleNamespace(log_interval=100, train_iters=100, consumed_train_samples=0, spec=None))
    init_num_microbatches_calculator(0, global_batch_size=2 * ROWS, micro_batch_size=ROWS, data_parallel_size=1)
    results, weights = {}, {name: {} for name in MODELS}
    for layout in LAYOUTS:
        with tiny_gpt.model_parallel(layout.tp, layout.pp) as groups:
            for name in MODELS:
                for interval in (INTERVAL, 0):
                    where = Path(folder) / f"{name}-{layout}-{interval}"
                    results[name, layout, interval] = trained(name, layout, interval, where, groups, weights[name])
    return results | {"tokens": tokens_shared(), "degenerate": degenerate(), "launches": launches()}


# -- in the test's process --------------------------------------------------------------------------------------------


def function(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pre-activations, their slopes, post-activations) at the initial parameters, from the papers' formulas."""
    if name == "xielu":
        slope = np.where(x > 0, 1.6 * x + 0.5, 0.8 * np.expm1(x) + 0.5)
        return x, slope, np.where(x > 0, 0.8 * x * x + 0.5 * x, 0.8 * (np.expm1(x) - x) + 0.5 * x)
    if name == "relu2":
        return x, 2 * np.maximum(x, 0), np.maximum(x, 0) ** 2
    gate, up = np.split(x, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate, sigmoid * (1 - sigmoid), sigmoid * up


def in_e4m3(y: np.ndarray) -> np.ndarray:
    """y under the power of two that maps its largest magnitude closest to, not beyond, 448, rounded to 1 + 3 bits."""
    scale = 2.0 ** np.floor(np.log2(448 / np.abs(y).max()))
    exponent = np.maximum(np.floor(np.log2(np.abs(y * scale), where=y != 0, out=np.full(y.shape, -np.inf))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(y * scale / step) * step / scale  # to even


def expected(x: np.ndarray, slope: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All [tokens, units], fp64."""
    rms = np.sqrt((y**2).mean())
    near = np.abs(y) <= NEAR_ZERO * rms
    q = in_e4m3(y)
    return {
        "preact_negative": (x < 0).mean(),
        "preact_negative_slope": (slope < 0).mean(),
        "preact_rms": np.sqrt((x**2).mean()),
        "preact_max": np.abs(x).max(),
        "postact_zero": (y == 0).mean(),
        "postact_near_zero": near.mean(),
        "postact_dead": near.all(axis=0).mean(),
        "postact_rms": rms,
        "postact_max": np.abs(y).max(),
        "postact_max_over_rms": np.abs(y).max() / rms,
        "postact_kurtosis": (y**4).mean() / (y**2).mean() ** 2,
        "postact_fp8_error": np.sqrt(((q - y) ** 2).sum() / (y**2).sum()),
        "postact_fp8_flushed": ((q == 0) & (y != 0)).sum() / (y != 0).sum(),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    return folder, run_ranks(on_ranks, 2, str(folder))


def records(runs, name: str, layout: Layout) -> dict[int, dict]:
    """Step -> what that layout's run wrote for it, once."""
    path = runs[0] / f"{name}-{layout}-{INTERVAL}" / "statistics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line for line in lines}


def seen(runs, name: str, layout: Layout) -> dict[tuple[int, int], np.ndarray]:
    return {key: x for rank in runs[1] for key, x in rank[name, layout, INTERVAL]["seen"].items()}


@pytest.mark.parametrize("name, layout", CASES, ids=str)
def test_equal_those_of_the_unsharded_preactivations_in_numpy(runs, name, layout):
    """At step 0: the parameters are then known. relu2 has none, so its later step is compared too."""
    found, inputs = records(runs, name, layout), seen(runs, name, layout)
    assert set(found) == {0, 2}
    for step in (0, 2) if name == "relu2" else (0,):
        assert set(found[step]["statistics"]) == {"1", "2"}
        for layer in (1, 2):
            x = inputs[step, layer]
            assert x.shape == (ROWS * 16, 256 if name == "xsilu_glu1" else 128)
            wanted = expected(*function(name, x))
            assert found[step]["statistics"][str(layer)] == pytest.approx(wanted, rel=TOLERANCE, abs=1e-12)


@pytest.mark.parametrize("name, layout", [case for case in CASES if case[1] != Layout()], ids=str)
def test_every_layout_tells_what_the_single_process_tells(runs, name, layout):
    """From the same weights, on the same microbatch; in fp32, so that a value may fall on the other side of a bound."""
    one = records(runs, name, Layout())[0]["statistics"]
    split = records(runs, name, layout)[0]["statistics"]
    for layer in one:
        assert split[layer] == pytest.approx(one[layer], rel=1e-5, abs=1.5 / (ROWS * 16 * 128))


def test_the_models_show_what_there_is_to_count(runs):
    values = {name: records(runs, name, Layout())[0]["statistics"]["2"] for name in MODELS}
    assert all(1 / SILENCED <= values[name]["postact_dead"] < 2 / SILENCED for name in ("relu2", "xsilu_glu1"))
    assert 0.3 < values["relu2"]["postact_zero"] < values["relu2"]["postact_near_zero"] < 0.9
    assert 0 < values["xielu"]["preact_negative_slope"] < values["xielu"]["preact_negative"] < 0.7
    assert values["xsilu_glu1"]["preact_negative_slope"] == 0
    assert all(value["postact_kurtosis"] > 2 for value in values.values())
    assert all(0.01 < value["postact_fp8_error"] < 0.04 for value in values.values())  # half of 2^-4 .. 2^-3
    assert 0 < values["relu2"]["postact_fp8_flushed"] < 0.02  # its values crowd at 0


@pytest.mark.parametrize("name, layout", CASES, ids=str)
def test_training_has_the_same_bits_with_and_without(runs, name, layout):
    losses = 0
    for rank in runs[1]:
        on, off = (rank[name, layout, interval] for interval in (INTERVAL, 0))
        assert len(on["losses"]) == len(off["losses"])
        assert all(map(torch.equal, on["losses"], off["losses"]))
        assert all(torch.equal(on["parameters"][n], off["parameters"][n]) for n in off["parameters"])
        assert set(on["hooks"]) == {0}  # none is left behind
        losses += len(on["losses"])
    assert losses == 2 * STEPS * (1 if layout.pp == 2 else 2)  # of two microbatches, by every rank of a last stage
    assert not (runs[0] / f"{name}-{layout}-0" / "statistics.jsonl").exists()


def test_tokens_on_several_ranks_are_one_microbatch(runs):
    for rank in runs[1]:
        found = rank["tokens"]
        wanted = expected(*function("relu2", found["x"]))
        assert wanted["postact_dead"] == 3 / 64
        assert found["found"] == {5: pytest.approx(wanted, rel=TOLERANCE)}
        assert found["then"] == {}


def test_a_layer_of_zeros_or_nan_is_told_as_such(runs):
    zeros, nan = (runs[1][0]["degenerate"][layer] for layer in (1, 2))
    assert zeros["postact_zero"] == zeros["postact_near_zero"] == zeros["postact_dead"] == 1
    told = json.loads(json.dumps(finite(zeros), allow_nan=False))
    assert told["postact_kurtosis"] is None and told["postact_rms"] == 0 and told["preact_rms"] == 1
    assert told["postact_fp8_error"] is None and told["postact_fp8_flushed"] is None
    assert finite(nan)["postact_rms"] is None and finite(nan)["preact_max"] is None
    assert set(told) == set(STATISTICS)


def test_a_large_layer_takes_few_kernels(runs):
    """24 layers of 8192 tokens x 8192 units are 24 x 16 blocks: launches would be most of a measurement's time."""
    for rank in runs[1]:
        one, two, three = rank["launches"]
        assert two - one == three - two <= 40 and one <= 90
