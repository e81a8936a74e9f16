"""`xact bench kernels`: the activation kernels beside the published formula on this machine; a table, a plot, JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_xact.argument_types import positive
from megatron_xact.whole import write_text

DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = ["xielu", "relu2"]  # what is measured where none is named
DEFAULT_DTYPES = ["float32", "bfloat16"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations", nargs="+", default=ACTIVATIONS, metavar="NAME", help=f"default: {' '.join(ACTIVATIONS)}"
    )
    parser.add_argument("--rows", type=positive(int), help="tokens (default: 16384 on a GPU, 4096 on a CPU)")
    parser.add_argument("--columns", type=positive(int), help="ffn width (default: 12288 on a GPU, 6144 on a CPU)")
    parser.add_argument("--dtypes", nargs="+", default=DEFAULT_DTYPES, choices=DTYPES, metavar="DTYPE",
                        help=f"default: {' '.join(DEFAULT_DTYPES)}")  # fmt: skip
    parser.add_argument("--repeats", type=positive(int), default=10, help="timings of each (default: %(default)s)")


def main(args: argparse.Namespace, device, where: dict) -> None:
    """`where`: what the numbers depend on, see command.machine."""
    import torch

    from megatron_xact import activations
    from megatron_xact.kernels import benchmark

    for name in args.activations:
        activations.get(name)  # a wrong name ends here, in words
    rows = args.rows or (16384 if device.type == "cuda" else 4096)
    columns = args.columns or (12288 if device.type == "cuda" else 6144)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}: {rows} x {columns}", flush=True)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    found = benchmark.compare(args.activations, dtypes, rows, columns, device, args.repeats)
    ceiling = benchmark.copy_ceiling(rows * columns * 4, device, args.repeats)
    print(table(found, ceiling))
    ratios = benchmark.speedups(found)
    for (name, dtype, peer), ratio in ratios.items():
        print(f"{name} {dtype}: {ratio:.2f} x the speed of {peer}, forward + backward")
    result = where | {
        "copy_bytes_per_second": ceiling,
        "speedups": [{"activation": n, "dtype": d, "peer": p, "ratio": r} for (n, d, p), r in ratios.items()],
        "measurements": [m.as_dict() for m in found],
    }
    write_text(args.out / "kernels.json", json.dumps(result, indent=1) + "\n")
    plot(found, ceiling, where["device"], args.out / "kernels.png")
    print(f"wrote {args.out / 'kernels.json'} and kernels.png")


def table(found: list, ceiling: float) -> str:
    lines = [f"{'activation':16}{'dtype':10}{'':10}{'':16}{'ms':>9}{'GB/s':>9}{'of copy':>9}"]
    for m in found:
        speed = m.bytes_per_second
        lines.append(
            f"{m.activation:16}{m.dtype:10}{m.direction:10}{m.contender:16}"
            f"{m.median * 1e3:9.3f}{speed / 1e9:9.1f}{speed / ceiling:9.0%}"
        )
    return "\n".join([*lines, f"a copy of {ceiling / 1e9:.1f} GB/s is the ceiling"])


def plot(found: list, ceiling: float, device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((m.activation, m.dtype, m.direction) for m in found))
    contenders = list(dict.fromkeys(m.contender for m in found))
    speeds = {(m.activation, m.dtype, m.direction, m.contender): m.bytes_per_second / 1e9 for m in found}
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.5), layout="constrained")
    width = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        places = [at + (i - (len(contenders) - 1) / 2) * width for at in range(len(groups))]
        axes.bar(places, [speeds[(*group, contender)] for group in groups], width, label=contender)
    axes.axhline(ceiling / 1e9, ls="--", color="gray", label="copy")
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=8)
    axes.set(ylabel="GB/s of the bytes that must move", title=f"Activation kernels, {device}")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
