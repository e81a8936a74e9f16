"""Which way an MLP runs: unfused, or with the activation inside its matrix products. Measured once, and remembered.

No rule tells it: fusion wins by a few per cent where the hidden size is small, and loses where the fused kernel reaches
too little of the library's speed; nor which tile of a fused kernel is the best. So the tiles of each backend are timed
at the shape in question, on the GPU in question, then the ways that are there with the best of them, and the fastest is
taken; where it does not win, fusion is not used. The timings lie on disk, one file per key, in $XACT_CACHE, else
$XDG_CACHE_HOME/megatron-xact, else ~/.cache/megatron-xact: a run that is started again takes the same way. A file that
cannot be read, or is of other versions, another GPU or other candidates (backends or tiles), is measured anew.

The way decides in which order gradients are summed over tokens. Where it comes from the cache, a run that is started
again has the same bits; measured anew (--refresh, another GPU, a cache that is gone), two ways may be nearly as fast,
and another one be taken: gradients of activation parameters and biases can then differ in their last bits. Ranks that
measure at the same time take what the first of them has written, if they have the cache in common.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_xact import installed
from megatron_xact.activations import Activation
from megatron_xact.kernels import backends, linear, source
from megatron_xact.kernels.keys import key_of
from megatron_xact.kernels.mlp_timing import Measured, Shape, Tiles, fastest, measure, tiles_of
from megatron_xact.whole import write_text

FP8 = "fp8"  # other numbers, not another way to the same ones: never chosen for its speed
CHOICES = ("auto", linear.UNFUSED, *linear.BACKENDS, FP8)
Measure = Callable[[Activation, Shape, torch.device, Sequence[str]], Measured]
_selected = linear.UNFUSED


@dataclass(frozen=True)
class Choice:
    """`way` has names of tiles, unless it is unfused; `reason`: a phrase that says why, with the numbers."""

    way: linear.Way
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)  # forward + backward of every candidate that was timed
    tiles: dict[str, Tiles] = field(default_factory=dict)  # of every fused one of them


_made: dict[str, Choice] = {}  # by key; in this process


def select_mlp(name: str) -> None:
    """For the whole process: "auto" (the fastest, measured), "unfused", one of `linear.BACKENDS`, or FP8.

    A backend or FP8 that is named is used, or there is an error.

    ValueError for another name. Whether a named backend can run is for who knows the model to ask, before training.
    """
    global _selected
    if name not in CHOICES:
        raise ValueError(f"mlp = {name!r} is not one of {', '.join(CHOICES)}")
    _selected = name


def selected() -> str:
    return _selected


def unavailable_reasons(activation: Activation, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Why a fused backend cannot run here, by name; those that can are left out."""
    found = {}
    for backend in linear.BACKENDS:
        if device.type != "cuda":
            found[backend] = "it needs a GPU"
        elif backends.selected() == "reference":
            found[backend] = "kernels = 'reference' asks for torch's own operations"
        elif reason := linear.unavailable_reason(backend, activation, dtype, device):
            found[backend] = reason
    return found


def choose(
    activation: Activation,
    shape: Shape,
    device: torch.device,
    candidates: Sequence[str],
    *,
    refresh: bool = False,
    measure: Measure = measure,
) -> Choice:
    """The fastest of "unfused" and `candidates` (fused backends that can run here) at this shape.

    Never raises: what goes wrong while measuring (no memory, a compiler's error) leaves "unfused", says why, and is not
    remembered on disk. refresh: measures even if it is known. With no candidates, as on a CPU, nothing is measured.
    """
    if not candidates:
        return Choice(linear.Way(linear.UNFUSED), "no fused backend can run here")
    key = _key(activation, shape, device)
    name = json.dumps([key, sorted(candidates)])
    if refresh or name not in _made:
        _made[name] = _remembered_or_measured(key, activation, shape, device, candidates, refresh, measure)
    return _made[name]


def _remembered_or_measured(key, activation, shape, device, candidates, refresh, measure) -> Choice:
    wanted = {
        backend: {way: set(tiles_of(backend, way, activation, shape, device)) for way in linear.DIRECTIONS}
        for backend in candidates
    }
    file = path_of(key)
    if not refresh and (known := _read(file, key, wanted)):
        return _fastest(known, f"measured before, {file}")
    try:
        found = measure(activation, shape, device, candidates)
    except Exception as error:  # out of memory, mostly; nothing here may end a training run
        told = " ".join(str(error).split())[:200] or type(error).__name__
        return Choice(linear.Way(linear.UNFUSED), f"it could not be measured: {told}")
    if not refresh and (known := _read(file, key, wanted)):  # by other ranks of this run: what it will find next time
        return _fastest(known, f"measured by others meanwhile, {file}")
    notes = [f"{what}: {why}" for what, why in found.failed.items()]
    if not found.failed.keys() & set(candidates):  # a backend that failed today may work with the next driver
        notes.append(_write(file, key, found))
    return _fastest(found, "; ".join(notes))


def _fastest(found: Measured, note: str) -> Choice:
    order = sorted(found.seconds, key=found.seconds.__getitem__)
    told = ", ".join(f"{name} {found.seconds[name] * 1e3:.3f} ms" for name in order)
    way = linear.Way(order[0]) if order[0] == linear.UNFUSED else fastest(order[0], found.tiles[order[0]])
    tiles = f", tiles {way.forward} forward, {way.backward} backward" if way.forward else ""
    return Choice(way, f"forward + backward {told}{tiles} ({note})", found.seconds, found.tiles)


def _key(activation: Activation, shape: Shape, device: torch.device) -> dict[str, object]:
    """What the timings depend on."""
    return {
        "activation": key_of(activation),
        "gated": activation.gated,
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "bias": shape.bias,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": installed.version("triton"),
        "quack": installed.version("quack-kernels"),
        "kernels": source.digest(),
    }


def path_of(key: dict[str, object]) -> Path | None:
    """The file of the timings of a key; None where there is no home to put it in."""
    try:
        if own := os.environ.get("XACT_CACHE"):
            root = Path(own)
        elif caches := os.environ.get("XDG_CACHE_HOME"):
            root = Path(caches) / "megatron-xact"
        else:
            root = Path.home() / ".cache" / "megatron-xact"
    except RuntimeError:  # no HOME and no such user, as in some containers
        return None
    return root / "mlp" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


def _read(file: Path | None, key: dict[str, object], wanted: dict[str, dict[str, set[str]]]) -> Measured | None:
    """The timings in a file if they are whole, of this key, and of exactly the wanted candidates and their tiles."""
    if file is None:
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found = Measured(stored["seconds"], stored["tiles"], {})
        names = {b: {direction: set(tiles) for direction, tiles in both.items()} for b, both in found.tiles.items()}
        times = [s for both in found.tiles.values() for tiles in both.values() for s in tiles.values() if s is not None]
        whole = all(math.isfinite(value) and value > 0 for value in [*found.seconds.values(), *times])
        fits = stored["key"] == key and names == wanted and found.seconds.keys() == {linear.UNFUSED, *wanted}
        return found if whole and fits and all(fastest(b, tiles) for b, tiles in found.tiles.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path | None, key: dict[str, object], found: Measured) -> str:
    """Whole or not at all, whoever else writes it at the same time; what to say about it."""
    if file is None:
        return "measured now, and not remembered: there is no home folder; set XACT_CACHE"
    content = {"key": key, "seconds": found.seconds, "tiles": found.tiles}
    try:
        write_text(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        return f"measured now, and not remembered: {file} cannot be written ({error.strerror}); see XACT_CACHE"
    return f"measured now, remembered in {file}"
