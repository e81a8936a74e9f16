"""`xact plan` against the real thing, without a GPU: sharded models of 1,024 ranks, the memory of real passes."""

import json

import pytest
from kept import CASES
from planned import COPY, LAYOUTS, MODELS, ROOT, measured, runnable, total

from megatron_xact.pretraining.planning.counts import GROUPS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def real():
    return measured()


def test_a_model_copy_spread_over_1024_ranks_adds_up_to_the_model(real):
    copy, whole = real["big"], real["models"]["paper/3b-xielu"]
    assert all(rank.agrees for rank in copy)
    # split parameters add up; replicated ones count once per stage
    split = sum(total(rank.parameters) - total(rank.replicated) for rank in copy)
    once = sum(total(rank.replicated) for rank in copy if rank.coordinates["tensor"] == (0, 8))
    assert split + once == total(whole)
    assert [rank.rank for rank in copy] == COPY


def test_ranks_know_their_places_and_layers(real):
    by_rank = {rank.rank: rank for rank in [*real["big"], real["last"]]}
    first, middle, last = by_rank[0], by_rank[512], by_rank[1023]
    assert first.coordinates == {"tensor": (0, 8), "pipeline": (0, 4), "context": (0, 1), "data": (0, 32)}
    assert middle.coordinates == {"tensor": (0, 8), "pipeline": (2, 4), "context": (0, 1), "data": (0, 32)}
    assert last.coordinates == {"tensor": (7, 8), "pipeline": (3, 4), "context": (0, 1), "data": (31, 32)}
    assert (first.layers, middle.layers, last.layers) == (
        tuple(range(1, 10)), tuple(range(19, 28)), tuple(range(28, 37))
    )  # fmt: skip
    vocabulary = 147456 // 8 * 2048
    assert (first.parameters["embedding"], middle.parameters["embedding"]) == (vocabulary, 0)
    assert (first.parameters["head"], last.parameters["head"]) == (0, vocabulary)
    assert (first.parameters["activation"], first.replicated["activation"]) == (18, 18)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_other_layouts_is_as_planned(real, layout):
    ranks = real["layouts"][layout]
    assert all(rank.agrees for rank in ranks), [(rank.parameters, rank.planned) for rank in ranks]
    layers = sorted({layer for rank in ranks for layer in rank.layers})
    assert layers == list(range(1, len(layers) + 1)) and len(layers) >= 3


def test_a_tied_embedding_is_on_both_ends_of_the_pipeline(real):
    first, middle, last = real["layouts"]["tied over stages"]
    assert first.parameters["embedding"] == last.parameters["head"] == last.replicated["head"] == 256 * 128
    assert total(middle.parameters) == middle.parameters["attention"] + middle.parameters["mlp"] + 2 * 2 * 128 + 2


@pytest.mark.parametrize("model", MODELS)
def test_the_real_model_has_the_parameters_planned(real, model):
    from megatron_xact.pretraining import config
    from megatron_xact.pretraining.planning import counts, job

    planned = counts.parameters(job.read(config.load(ROOT / f"configs/{model}.toml"), 8, 8).shape)
    assert real["models"][model] == planned and set(planned) == set(GROUPS)


@pytest.mark.parametrize("case", CASES)
def test_what_forward_keeps_and_the_peak_are_within_10_percent(real, case):
    kept = real["kept"][case]
    assert kept.held_planned == pytest.approx(kept.held, rel=0.1)
    assert kept.peak_planned == pytest.approx(kept.peak, rel=0.1)


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in runnable()])
def test_megatron_accepts_the_config_on_an_8_gpu_server(real, path):
    assert real["accepted"][path] == ""


def test_the_command_builds_a_rank(real):
    code, output = real["command"]
    said = json.loads(output)
    assert code == 0 and said["agrees"] and said["parameters"] == said["planned"]
    assert said["coordinates"]["tensor"] == [5, 8] and said["layers"] == list(range(19, 28))
