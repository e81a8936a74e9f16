"""`xact bench mlp`: an MLP forward and backward at the shapes of a run, each way it can go, and the way a run chooses.

Of the fused backends every tile of the two kernels is shown too, fastest first: the MLP is timed with the first ones.
The choice is the run's own (`kernels.mlp_choice`): what is measured here is remembered for it, and what it has measured
is shown here, unless --refresh measures it anew. Peers are measured each time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.argument_types import positive
from megatron_xact.whole import write_text

DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = ["xielu", "relu2", "swiglu"]  # what is measured where none is named


@dataclass(frozen=True)
class Row:
    """One shape: seconds forward + backward by contender, what a run takes, and why."""

    activation: str
    tokens: int
    hidden: int
    ffn: int
    tp: int
    dtype: str
    bias: bool
    flops: int
    seconds: dict[str, float]
    chosen: str
    reason: str
    tiles: dict[str, dict[str, dict[str, float | None]]]  # backend -> direction -> tile -> seconds of the kernel alone

    @property
    def name(self) -> str:
        words = [self.activation, f"{self.tokens} x {self.hidden} x {self.ffn}"]
        words += ([f"TP {self.tp}"] if self.tp > 1 else []) + [self.dtype] + (["bias"] if self.bias else [])
        return " ".join(words)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations", nargs="+", default=ACTIVATIONS, metavar="NAME", help=f"default: {' '.join(ACTIVATIONS)}"
    )
    parser.add_argument("--tokens", type=positive(int),
                        help="of one microbatch (default: 16384 on a GPU, 256 on a CPU)")  # fmt: skip
    parser.add_argument("--hidden", type=positive(int), help="hidden size (default: 2048 on a GPU, 128 on a CPU)")
    parser.add_argument(
        "--ffn", type=positive(int), help="ffn width (default: 6 times the hidden size; two thirds of that where gated)"
    )
    parser.add_argument("--tp", nargs="+", type=positive(int), default=[1], metavar="N",
                        help="tensor-parallel sizes that divide it (default: 1)")  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--bias", action="store_true", help="with a bias in fc1")
    parser.add_argument("--repeats", type=positive(int), default=5,
                        help="timings of each peer, in threes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--refresh", action="store_true", help="measure again what is remembered, and remember that")


def main(args: argparse.Namespace, device, where: dict) -> None:
    """`where`: what the numbers depend on, see command.machine."""
    import torch

    from megatron_xact import activations

    records = [activations.get(name) for name in args.activations]  # a wrong name ends here, in words
    on_gpu = device.type == "cuda"
    tokens, hidden = args.tokens or (16384 if on_gpu else 256), args.hidden or (2048 if on_gpu else 128)
    dtypes = [getattr(torch, name) for name in args.dtypes or ["bfloat16" if on_gpu else "float32"]]
    widths = {record.name: args.ffn or (4 if record.gated else 6) * hidden for record in records}
    for tp in args.tp:
        for width in widths.values():
            if width % tp:
                raise ValueError(f"--tp {tp} must divide the ffn width, {width}; change one of them")
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}", flush=True)
    rows = []
    for record in records:
        for dtype in dtypes:
            for tp in args.tp:
                rows.append(_row(record, tokens, hidden, widths[record.name], tp, dtype, args, device))
                print(table(rows[-1:], header=len(rows) == 1), flush=True)
    result = where | {"shapes": [vars(row) for row in rows]}
    write_text(args.out / "mlp.json", json.dumps(result, indent=1) + "\n")
    plot(rows, where["device"], args.out / "mlp.png")
    print(f"wrote {args.out / 'mlp.json'} and mlp.png")


def _row(record, tokens, hidden, ffn, tp, dtype, args, device) -> Row:
    from megatron_xact.kernels import linear, mlp_choice, mlp_timing

    shape = mlp_timing.Shape(tokens, hidden, ffn // tp, dtype, args.bias)
    reasons = mlp_choice.unavailable_reasons(record, dtype, device)
    candidates = [backend for backend in linear.BACKENDS if backend not in reasons]
    choice = mlp_choice.choose(record, shape, device, candidates, refresh=args.refresh)
    why = "; ".join([choice.reason, *(f"{backend}: {reason}" for backend, reason in reasons.items())])
    # Unfused is measured in any case: without candidates nothing was to be chosen, and nothing was measured.
    seconds = choice.seconds or mlp_timing.measure(record, shape, device, [], args.repeats).seconds
    seconds = mlp_timing.peers(record, shape, device, args.repeats) | seconds
    return Row(
        record.name, tokens, hidden, shape.ffn, tp, str(dtype).removeprefix("torch."), args.bias,
        shape.flops(record), seconds, choice.way.backend, why, choice.tiles,
    )  # fmt: skip


def table(rows: Sequence[Row], header: bool = True) -> str:
    """Milliseconds, TFLOP/s of the GEMMs, and how much slower than the GEMMs alone; * is what a run chooses."""
    lines = [f"{'':18}{'ms':>10}{'TFLOP/s':>10}{'of GEMMs':>10}"] if header else []
    for row in rows:
        lines.append(row.name)
        floor = next(iter(row.seconds.values()))
        for contender, seconds in row.seconds.items():
            mark = "*" if contender == row.chosen else " "
            lines.append(
                f" {mark}{contender:16}{seconds * 1e3:10.3f}{row.flops / seconds / 1e12:10.2f}{seconds / floor:9.2f}x"
            )
        for backend, directions in row.tiles.items():
            for direction, tiles in directions.items():
                order = sorted(tiles, key=lambda tile: tiles[tile] or math.inf)
                told = ", ".join(f"{t} {tiles[t] * 1e3:.3f} ms" if tiles[t] else f"{t} left out" for t in order)
                lines.append(f"  {backend} {direction}: {told}")
        lines.append(f"  {row.chosen}: {row.reason}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contenders = list(dict.fromkeys(contender for row in rows for contender in row.seconds))
    figure, axes = plt.subplots(figsize=(max(6.0, 2.2 * len(rows)), 4.5), layout="constrained")
    width = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        places = [at + (i - (len(contenders) - 1) / 2) * width for at in range(len(rows))]
        bars = axes.bar(places, [row.seconds.get(contender, 0.0) * 1e3 for row in rows], width, label=contender)
        for bar, row in zip(bars, rows, strict=True):
            if contender == row.chosen:
                bar.set(edgecolor="black", linewidth=1.5)
    axes.set_xticks(range(len(rows)), [row.name.replace(" ", "\n", 1) for row in rows], fontsize=8)
    axes.set(ylabel="ms forward + backward", title=f"MLP, {device}; framed: what a run chooses")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
