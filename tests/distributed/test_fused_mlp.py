"""The MLP as one autograd function on gloo ranks: its tensor-parallel wiring, with kernels that run without a GPU.

As `test_mlp.py`, whose unsharded fp64 twin is the truth here too; and against Megatron's own linears, whose handling of
gradients (main_grad, DDP, recomputation) it must repeat. Which kernels compute is another matter: tests/kernels.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import test_mlp as twins
import torch
from ranks import run_ranks
from test_mlp import Case

pytestmark = pytest.mark.distributed

WORLD = 4
CASES = [
    Case(activation, tp, sequence_parallel, bias)
    for activation in ("xielu", "xielu with beta", "xielu fixed", "xsilu_glu2", "relu2", "swiglu")
    for tp, sequence_parallel in ((1, False), (2, False), (2, True), (4, False), (4, True))
    for bias in (False, True)
]
TRITON = [Case("xielu", 2, True, True), Case("xsilu_glu2", 2, False, True), Case("relu2", 4, True, False)]
TRITON += [Case("swiglu", 1, False, False)]
PLANTED = [Case("xielu", 2, False, True), Case("xsilu_glu2", 4, True, False)]
KINDS = ("plain", "accumulated", "mlp recomputed", "layers recomputed", "params gathered")
EIGHT_BITS = [
    Case(activation, tp, sequence_parallel, bias)
    for activation, bias in (("xielu", True), ("xsilu_glu2", False), ("relu2", False))
    for tp, sequence_parallel in ((1, False), (2, False), (4, True))
]
FP8_SETTINGS = [(False, "e4m3"), (True, "e4m3"), (False, "e5m2")]  # smooth, gradients
# With a bias, Megatron 0.19's own recomputation of an MLP never ends: it returns fc2's bias from a checkpoint.
TRAINED = [(kind, "xielu") for kind in KINDS] + [(kind, "xsilu_glu2") for kind in ("accumulated", "layers recomputed")]


# --- on the ranks -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def fused(backend: str = "unfused"):
    """Every ActivationMLP goes the fused function's way, by default with torch's kernels behind it."""
    from megatron_xact.kernels.linear import Way
    from megatron_xact.layers import fused_mlp

    chosen, calls = fused_mlp.way_for, []

    def always(mlp, hidden_states):
        calls.append(None if fused_mlp.unfit(mlp) else Way(backend))
        return calls[-1]

    fused_mlp.way_for = always
    try:
        yield calls
    finally:
        fused_mlp.way_for = chosen
    assert set(calls) == {Way(backend)}


def in_fp8() -> dict[tuple[Case, bool, str], tuple[dict, bool]]:
    """(case, *settings) -> the whole MLP's outputs and gradients by FP8 products; whether alphas' are replicated."""
    from tiny_gpt import model_parallel

    from megatron_xact.layers import fp8_mlp

    found = {}
    for tp in (1, 2, 4):
        for settings in FP8_SETTINGS:
            fp8_mlp.select(fp8_mlp.Settings(*settings))
            with model_parallel(tp) as groups, fused("fp8"):
                found |= {(case, *settings): twins.ours(case, groups) for case in EIGHT_BITS if case.tp == tp}
    fp8_mlp.select(fp8_mlp.Settings())
    return found


def against_the_twin() -> tuple[dict[Case, tuple], ...]:
    """By torch's kernels, by those with the tensor-parallel sum removed, and by Triton's in its interpreter."""
    from tiny_gpt import model_parallel

    from megatron_xact.layers import activation

    table, planted, triton = {}, {}, {}
    for tp in (1, 2, 4):
        with model_parallel(tp) as groups, fused("triton"):
            triton |= {case: twins.compared(case, groups) for case in TRITON if case.tp == tp}
        with model_parallel(tp) as groups, fused():
            table |= {case: twins.compared(case, groups) for case in CASES if case.tp == tp}
            summed = activation.sum_gradients_over_tensor_parallel
            activation.sum_gradients_over_tensor_parallel = lambda p, group: p
            planted |= {case: twins.compared(case, groups) for case in PLANTED if case.tp == tp}
            activation.sum_gradients_over_tensor_parallel = summed
    return table, planted, triton


@contextlib.contextmanager
def accumulating():
    """apex's kernel, in torch: what Megatron's linears call with gradient accumulation fusion."""
    from megatron.core.tensor_parallel import layers

    def add(x, dy, main_grad):
        main_grad.add_(dy.t() @ x)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        del layers.fused_weight_gradient_mlp_cuda
        layers._grad_accum_fusion_available = False


def gradients(kind: str, name: str, groups) -> tuple[dict, dict]:
    """Of every parameter after two microbatches, and who added those of MLP weights: `grad_added_to_main_grad`."""
    import tiny_gpt

    changes = {"add_bias_linear": name == "xsilu_glu2"} | {
        "accumulated": {"gradient_accumulation_fusion": True},
        "mlp recomputed": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        "layers recomputed": {
            "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        },
    }.get(kind, {})  # fmt: skip
    overlap = kind == "params gathered"
    model = tiny_gpt.build(
        twins.activations.get(name), groups, sequence_parallel=True, distributed_optimizer=overlap,
        ddp_settings={"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 1} if overlap else {},
        **changes,
    )  # fmt: skip
    model.zero_grad_buffer()
    if overlap:  # as after an optimizer step: other ranks' shards of each parameter are still to come, in pre-hooks
        buckets = [bucket for group in model.bucket_groups for bucket in group.buckets]
        assert len(buckets) > 10  # one for nearly every parameter
        for bucket in buckets:
            for rank, shard in enumerate(bucket.param_data.chunk(groups.dp.size())):
                if rank != groups.dp.rank():
                    shard.fill_(torch.nan)
    losses = []
    for step, when in enumerate((model.no_sync(), contextlib.nullcontext())):
        with when:  # gradients go to other ranks after the last microbatch only
            losses.append(model(**tiny_gpt.batch(step)).float().mean())
            losses[-1].backward()
    if overlap:
        model.finish_grad_sync()
    found = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    added = {
        name: parameter.grad_added_to_main_grad
        for name, parameter in model.named_parameters()
        if name.endswith(("linear_fc1.weight", "linear_fc2.weight"))
    }
    return found | {"loss": torch.stack(losses).detach()}, added


def both_ways() -> dict:
    """(kind, activation) -> gradients by Megatron's linears, and by the fused function, of the same model at TP 2."""
    import tiny_gpt

    results = {}
    with tiny_gpt.model_parallel(2) as groups, accumulating():
        for kind, name in TRAINED:
            theirs = gradients(kind, name, groups)
            with fused():
                results[kind, name] = theirs, gradients(kind, name, groups)
        with fused("fp8"):
            results["fp8"] = gradients("plain", "xielu", groups), gradients("accumulated", "xielu", groups)
    return results


def saved_bytes(backend: str | None, name: str, groups) -> dict[str, list[int]]:
    """dtype -> bytes of each tensor that one MLP saves for backward beside its parameters, bf16, sequence parallel."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from tiny_gpt import transformer_config

    from megatron_xact.kernels import linear
    from megatron_xact.layers import fused_mlp
    from megatron_xact.layers.mlp import ActivationMLP

    record = twins.activations.get(name)
    config = transformer_config(
        hidden_size=16, ffn_hidden_size=64, num_attention_heads=4, gated_linear_unit=record.gated,
        sequence_parallel=True, params_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip
    submodules = get_gpt_layer_local_submodules(normalization="RMSNorm").mlp.keywords["submodules"]
    mlp = ActivationMLP(config, submodules, ffn_hidden_size=64, tp_group=groups.tp, activation=record)
    x = torch.randn(8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    storages = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            sizes.setdefault(str(tensor.dtype), []).append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = mlp(x) if backend is None else fused_mlp.run(mlp, x, linear.Way(backend))
    out.sum().backward()
    return sizes


def on_ranks() -> dict:
    import tiny_gpt

    results = {"twin": against_the_twin(), "fp8": in_fp8(), "both": both_ways(), "agreed": agreed(), "hooks": hooks()}
    with tiny_gpt.model_parallel(2) as groups:
        results["saved"] = {
            (name, backend): saved_bytes(backend, name, groups)
            for name in ("xielu", "swiglu", "relu2")
            for backend in (None, "unfused", "fp8")
        }
    return results


def agreed() -> dict:
    """What ranks that lack different backends, and would measure different times, settle on."""
    from tiny_gpt import model_parallel

    from megatron_xact.kernels.linear import Way
    from megatron_xact.kernels.mlp_choice import Choice
    from megatron_xact.layers.fused_mlp import agree

    results = {}
    with model_parallel(2) as groups:
        rank, asked = groups.tp.rank(), []

        def choose(among):
            asked.append(among)
            return Choice(Way(("quack", "triton")[rank], f"tile {rank}", f"tile {rank + 2}"), "measured")

        device = torch.device("cpu")
        for name, here in {
            "all": (["triton", "quack"], ["triton", "quack"]),
            "one has less": (["triton", "quack"], ["quack"]),
            "nothing in common": (["triton"], ["quack"]),
        }.items():
            asked.clear()
            found = agree(groups.tp, device, here[rank], choose)
            results[name] = (rank, found and tuple(found[0]), list(asked))
    return results


def hooks() -> dict:
    """What hooks on the layer's parts see, and which of them rule fusion out."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from tiny_gpt import model_parallel, transformer_config

    from megatron_xact.kernels import linear
    from megatron_xact.layers import fused_mlp
    from megatron_xact.layers.mlp import ActivationMLP

    found = {}
    with model_parallel(2) as groups:
        config = transformer_config(hidden_size=16, ffn_hidden_size=64, num_attention_heads=4, add_bias_linear=True)
        submodules = get_gpt_layer_local_submodules(normalization="RMSNorm").mlp.keywords["submodules"]
        mlp = ActivationMLP(
            config, submodules, ffn_hidden_size=64, tp_group=groups.tp, activation=twins.activations.get("xielu")
        )
        x = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(groups.dp.rank()))
        mlp.linear_fc1.bias.data.normal_(generator=torch.Generator().manual_seed(1))
        seen = []
        handle = mlp.activation_func.register_forward_hook(
            lambda module, args, kwargs, y: seen.append([*args, y]), with_kwargs=True
        )
        mlp(x)
        assert fused_mlp.unfit(mlp) is None
        fused_mlp.run(mlp, x, fused_mlp.UNFUSED)
        handle.remove()
        found["tiles"] = tiles_asked_for(mlp, x, linear.Way("unfused", "ahead", "back"))
        rows = [[t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t for t in tensors] for tensors in seen]
        found["seen alike"] = all(torch.equal(a, b) for a, b in zip(*rows, strict=True)) and len(rows[0]) == 3
        for part in ("linear_fc1", "linear_fc2", "activation_func"):
            handle = getattr(mlp, part).register_forward_pre_hook(lambda module, args: None)
            found[f"pre {part}"] = fused_mlp.unfit(mlp)
            handle.remove()
        handle = mlp.linear_fc2.register_forward_hook(lambda module, args, y: None)
        found["post linear_fc2"] = fused_mlp.unfit(mlp)
        if groups.tp.rank():
            handle.remove()
        found["on one rank"] = way_decided(mlp, x)
        handle.remove()
        for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            handle = getattr(mlp.linear_fc1, register)(lambda module, *gradients: None)
            found[register] = fused_mlp.unfit(mlp)
            handle.remove()
        handle = mlp.activation_func.register_forward_hook(lambda module, args, y: 2 * y)
        try:
            fused_mlp.run(mlp, x, fused_mlp.UNFUSED)
        except RuntimeError as error:
            found["changes y"] = str(error)
        handle.remove()
        for flag, value in (("explicit_expert_comm", True), ("disable_grad_reduce", True), ("gtp_remat_size", 2)):
            before = getattr(mlp.linear_fc1, flag)
            setattr(mlp.linear_fc1, flag, value)
            found[flag] = fused_mlp.unfit(mlp)
            setattr(mlp.linear_fc1, flag, before)
        mlp.linear_fc1.weight.__fsdp_param__ = True  # Megatron FSDP's mark
        found["fsdp"] = fused_mlp.unfit(mlp)
        del mlp.linear_fc1.weight.__fsdp_param__
        found["measured"] = shape_measured(mlp, x)
        mlp.linear_fc1.weight.requires_grad_(False)
        found["frozen"] = fused_mlp.unfit(mlp)
        mlp.linear_fc1.weight.requires_grad_(True)
        found["in the end"] = fused_mlp.unfit(mlp)
        mlp(x)
        found["on a CPU"] = mlp.way.backend
    return found


def way_decided(mlp, x: torch.Tensor) -> str:
    """By `mlp = "auto"`, where every fused backend could run and one of them is the fastest."""
    from megatron_xact.kernels import linear, mlp_choice
    from megatron_xact.layers import fused_mlp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_choice, "_selected", "auto")
        patch.setattr(mlp_choice, "unavailable_reasons", lambda *given: {})
        patch.setattr(mlp_choice, "choose", lambda *given: mlp_choice.Choice(linear.Way("triton"), "it is the fastest"))
        return fused_mlp.decide(mlp, x, fused_mlp.unfit(mlp)).backend


def shape_measured(mlp, x: torch.Tensor) -> tuple | None:
    """Of the matrix products between which `mlp = "auto"` chooses under sequence parallelism, x being a rank's part."""
    from megatron_xact.kernels import linear, mlp_choice
    from megatron_xact.layers import fused_mlp

    shapes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_choice, "_selected", "auto")
        patch.setattr(mlp_choice, "unavailable_reasons", lambda *given: {})
        unfused = mlp_choice.Choice(linear.Way("unfused"), "it is the fastest")
        patch.setattr(mlp_choice, "choose", lambda activation, shape, *given: shapes.append(shape) or unfused)
        patch.setattr(mlp.linear_fc1, "sequence_parallel", True)
        fused_mlp.decide(mlp, x, None)
    return (*vars(shapes[0]).values(),) if shapes else None


def tiles_asked_for(mlp, x: torch.Tensor, way) -> list[str]:
    from megatron_xact.kernels import linear
    from megatron_xact.layers import fused_mlp

    tiles = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            real = getattr(linear, name)
            noted = lambda *args, tile, real=real, **options: tiles.append(tile) or real(*args, **options)  # noqa: E731
            patch.setattr(linear, name, noted)
        fused_mlp.run(mlp, x, way)[0].sum().backward()
    return tiles


def fp8_twin(case: Case, smooth: bool, gradients: str) -> dict[str, torch.Tensor]:
    """The unsharded MLP in fp64, whose six products have operands rounded to FP8; as `test_mlp.twin`."""
    numbers = {name: value.double() for name, value in twins.whole(case).items()}
    formula, learned = twins.FORMULAS[case.activation], [q.name for q in case.record().trainable]
    x, w1, w2, dy = (numbers[name] for name in ("x", "w1", "w2", "dy"))
    z = (rounded(x) @ rounded(w1).T + numbers.get("b1", 0.0)).requires_grad_()
    leaves = {name: numbers[name].requires_grad_() for name in learned}
    gate, up = z.chunk(2, -1) if case.record().gated else (z, 1.0)
    a = formula(gate, **leaves) * up
    m = torch.ones(())
    if smooth:
        peaks = w2.abs().amax(0) / a.detach().abs().amax((0, 1))
        m = torch.where(peaks.isfinite() & (peaks > 0), 2.0 ** (peaks.log2() / 2).round(), 1.0)
    a8 = rounded(a.detach() * m) / m
    out = a8 @ (rounded(w2 / m) * m).T + numbers.get("b2", 0.0)
    kind = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[gradients]
    dy8 = rounded(dy, kind)
    dz, *dlearned = torch.autograd.grad(a, [z, *leaves.values()], dy8 @ rounded(w2))
    dz8 = rounded(dz, kind)
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    found = {"y": out, "dx": dz8 @ rounded(w1), "dw1": flat(dz8).T @ flat(rounded(x)), "dw2": flat(dy8).T @ flat(a8)}
    if case.bias:
        found |= {"db1": flat(dz).sum(0), "db2": flat(dy).sum(0)}
    return {k: v.detach() for k, v in found.items()} | {f"d{n}": g for n, g in zip(learned, dlearned, strict=True)}


def rounded(t: torch.Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """To the FP8 format, after scaling by the largest power of two with which nothing overflows."""
    scale = 2.0 ** math.floor(math.log2(torch.finfo(kind).max / t.abs().max().item()))
    return (t * scale).to(kind).double() / scale


# --- the tests --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results():
    """By rank: what `on_ranks` returns."""
    return run_ranks(on_ranks, WORLD, environment={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_unsharded_twin(results, case):
    for found in results:
        errors, replicated = found["twin"][0][case]
        assert not twins.too_large(errors, twins.learned_gradients(case))
        assert replicated  # alpha's gradients have the same bits on every rank


@pytest.mark.parametrize("case", TRITON, ids=str)
def test_fused_kernels_equal_the_unsharded_twin(results, case):
    """fp32 in Triton's interpreter, which does not round operands to TF32."""
    for found in results:
        errors, replicated = found["twin"][2][case]
        assert not twins.too_large(errors, twins.learned_gradients(case))
        assert replicated


@pytest.mark.parametrize("case", PLANTED, ids=str)
def test_a_missing_sum_is_noticed(results, case):
    for found in results:
        errors, replicated = found["twin"][1][case]
        assert set(twins.too_large(errors, twins.learned_gradients(case))) == twins.learned_gradients(case)
        assert not replicated


@pytest.mark.parametrize("smooth, gradients", FP8_SETTINGS)
@pytest.mark.parametrize("case", EIGHT_BITS, ids=str)
def test_fp8_equals_a_twin_that_rounds_the_same_operands(results, case, smooth, gradients):
    """Every rank scales its own shards: powers of two, so only what is tiny beside their largest can differ."""
    rounded, exact = fp8_twin(case, smooth, gradients), twins.twin(case)
    for found in results:
        ours, replicated = found["fp8"][case, smooth, gradients]
        assert replicated and ours.keys() == rounded.keys()
        for name, value in ours.items():
            error = (value.double() - rounded[name]).norm() / rounded[name].norm()
            assert error <= 1e-4, f"{name}: {error}"
            if value.numel() > 1 and name != "db2":  # of a sum that nearly cancels, FP8 leaves nothing
                assert 1e-3 < (value.double() - exact[name]).norm() / exact[name].norm() < 0.12, name


@pytest.mark.parametrize("kind, name", TRAINED)
def test_trains_as_megatrons_linears(results, kind, name):
    """The same bits in every main_grad of the model after two microbatches, and the same bookkeeping."""
    for found in results:
        (theirs, they_added), (ours, we_added) = found["both"][kind, name]
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        assert we_added == they_added and len(we_added) == 4
        assert set(we_added.values()) == {kind == "accumulated"}
        assert all(gradient.abs().sum() > 0 for gradient in ours.values())


def test_fp8_accumulates_into_main_grad(results):
    """What its hooks add to main_grad from a gradient, and what it adds itself: the same bits in fp32."""
    for found in results:
        (plain, nobody), (ours, added) = found["both"]["fp8"]
        assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []
        assert set(nobody.values()) == {False} and set(added.values()) == {True} and len(added) == 4


@pytest.mark.parametrize("name", ["xielu", "swiglu", "relu2"])
def test_only_input_and_preactivation_are_saved(results, name):
    """8 x 2 tokens of this rank, twice that gathered; F per rank is 32; 2 bytes each. Of relu2, y takes pre's place."""
    x, y, pre = 8 * 2 * 16 * 2, 32 * 32 * 2, 32 * 32 * 2 * (2 if name == "swiglu" else 1)
    for found in results:
        assert sorted(found["saved"][name, None]["torch.bfloat16"]) == sorted([x, pre, y])  # Megatron's linears
        for backend in ("unfused", "fp8"):
            ours = dict(found["saved"][name, backend])
            assert sorted(ours.pop("torch.bfloat16")) == sorted([x, pre])
            assert sum(map(sum, ours.values())) <= 64  # alphas and factors, fp32


def test_ranks_agree_on_what_the_first_measures(results):
    """Rank 1 would have taken triton, and other tiles; it is not asked."""
    first = ("quack", "tile 0", "tile 2")
    for found in results:
        for name, (way, among) in {
            "all": (first, ["triton", "quack"]),
            "one has less": (first, ["quack"]),
            "nothing in common": (None, []),
        }.items():
            rank, agreed_on, asked = found["agreed"][name]
            assert agreed_on == way, name
            assert asked == ([among] if rank == 0 and way else []), name


def test_hooks_see_what_they_would_have_seen_or_rule_fusion_out(results):
    """And kernels are asked for with the tiles of the way."""
    for found in results:
        hooks = found["hooks"]
        assert hooks["seen alike"]
        for part in (
            "pre linear_fc1", "pre linear_fc2", "pre activation_func", "post linear_fc2",
            "register_full_backward_hook", "register_full_backward_pre_hook",
        ):  # fmt: skip
            assert "has hooks" in hooks[part]
        assert "changes the activation's output" in hooks["changes y"]
        for flag in ("explicit_expert_comm", "disable_grad_reduce"):
            assert "in a way of their own" in hooks[flag]
        for mark in ("gtp_remat_size", "fsdp"):
            assert hooks[mark] == "its weights are sharded over data-parallel ranks"
        assert hooks["frozen"] == "a weight is frozen"
        assert hooks["tiles"] == ["ahead", "back"]
        assert hooks["on one rank"] == "unfused"  # and no rank waits for another
        assert hooks["in the end"] is None  # nothing of the above is left
        assert hooks["on a CPU"] == "unfused"
    measured = [found["hooks"]["measured"] for found in results]
    assert measured[0] == (16, 16, 32, torch.float32, True)  # all tokens of both ranks, this rank's half of ffn
    assert measured[1] is None  # the first rank measures for all
