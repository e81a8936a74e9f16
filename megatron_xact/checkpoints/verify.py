"""`xact verify A B`: do two checkpoints, each Megatron's or Hugging Face's, hold the same model? And where not?

Three checks, each against another kind of mistake:
* tensors, through the conversion table, bit for bit (at the coarser of two dtypes), one at a time: a damaged, missing
  or exchanged tensor. It cannot see an error in the table itself;
* logits on real text and a greedy continuation, in fp32: Megatron's own model and loading against transformers'. This
  one sees everything that changes the function: wrong table, wrong config, wrong modeling code;
* where logits differ, what every module computes: names the first layer and module that differ.

The models are loaded one after the other, so memory is that of the larger one in fp32. Where that is not there, logits
are left out, with the numbers, and only tensors are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_xact.checkpoints import model as models
from megatron_xact.checkpoints import trace
from megatron_xact.checkpoints.architecture import Architecture, is_hf_xielu_eps
from megatron_xact.checkpoints.generate import generate
from megatron_xact.checkpoints.report import Report
from megatron_xact.checkpoints.side import Side

TOKENS = 512  # of text
TRACED = 48  # of them, for what modules compute
PROMPT, CONTINUATION = 24, 16  # tokens of the greedy continuation's prompt, and of itself


def main(args: argparse.Namespace) -> int:
    """The subcommand. Exit code 0: the same model; 1: not."""
    text = args.text.read_text(encoding="utf-8") if args.text else None
    report = verify(
        args.a, args.b, text=text, tokenizer=args.tokenizer, tolerance=args.tolerance, logits=not args.tensors_only
    )
    print(report.json() if args.json else report.text())
    return 0 if report.same else 1


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | None = None,
    tokenizer: str | Path | None = None,
    tolerance: float = 1e-4,
    logits: bool = True,
) -> Report:
    """Compare the checkpoints in folders `a` and `b` (a run's last one, one iteration, or a Hugging Face folder).

    text:      what to compare logits on; None: some pages of Python's own manual.
    tokenizer: folder of the tokenizer for it; None: A's, else B's.
    tolerance: largest absolute difference of fp32 logits.
    ValueError or OSError: one of them is no checkpoint, or `text` has no tokenizer. Differences are in the report.
    """
    started = time.monotonic()
    sides = Side(models.locate(a)), Side(models.locate(b))
    for side, other in (sides, sides[::-1]):
        side.settle_vocabulary(other)
    report = Report(str(sides[0]), str(sides[1]), tolerance)
    dtypes = _compare_tensors(*sides, report)
    if not logits:
        report.skipped.append("logits and continuation: tensors only, as asked")
    elif dtypes is None:
        report.skipped.append("logits and continuation: a model with tensors missing or unexpected cannot be loaded")
    elif any(side.source.kind == "legacy" for side in sides):
        report.skipped.append("logits and continuation: Megatron's old format is not loaded as a model")
    elif reason := _too_big(*sides):
        report.skipped.append(reason)
    else:
        _compare_logits(*sides, dtypes, report, text, tokenizer)
    report.seconds = time.monotonic() - started
    return report


# Tensors


def _compare_tensors(a: Side, b: Side, report: Report) -> dict[str, torch.dtype] | None:
    """Fills in the report; returns the dtype that each tensor was compared in.

    None: a tensor is missing, unexpected or of a wrong shape, so that a model cannot be loaded.
    """
    for label, side in (("A", a), ("B", b)):
        expected, found = side.names()
        for name in sorted(expected.keys() - found.keys()):
            report.problems.append(f"{label} lacks {name}")
        for name in sorted(found.keys() - expected.keys()):
            report.problems.append(f"{label} has unexpected {name}")
        for name in sorted(expected.keys() & found.keys()):
            if tuple(expected[name]) != tuple(found[name]):
                shapes = f"{list(found[name])}; its own settings say {list(expected[name])}"
                report.problems.append(f"{label}'s {name} has shape {shapes}")
    if report.problems:
        return None
    dtypes, differing, marks = {}, {}, {}
    for name in _shared(a, b, report):
        x, y = a.read(name), b.read(name)
        if x.shape != y.shape:
            report.problems.append(f"{name}: A's shape is {list(x.shape)}, B's {list(y.shape)}")
            continue
        dtypes[name] = common_dtype(x.dtype, y.dtype)
        if x.dtype != y.dtype:
            coarser = str(dtypes[name]).removeprefix("torch.")
            note = f"dtypes differ: compared after rounding to {coarser}"
            report.notes += [note] if note not in report.notes else []
        x, y = x.to(dtypes[name]), y.to(dtypes[name])
        marks[name] = _mark(x)
        is_eps = a.places[name][0].activation and name.endswith(".eps")
        if not torch.equal(x, y) and not (is_eps and is_hf_xielu_eps(x) and is_hf_xielu_eps(y)):
            differing[name] = _mark(y), _how(name, x, y, a.architecture)
    for name, (mark, how) in differing.items():
        twin = next((other for other, m in marks.items() if m == mark and other != name), None)
        report.problems.append(f"{name}: {how}" + (f"; B has there what A has in {twin}" if twin else ""))
    report.tensors, report.tensors_differing = len(dtypes), list(differing)
    if len(report.problems) > 10:
        report.problems[10:] = [f"and {len(report.problems) - 10} more"]
    return dtypes


def _shared(a: Side, b: Side, report: Report) -> list[str]:
    """Names of the tensors that both have; those that only one has become problems."""
    for side, other, label in ((a, b, "A"), (b, a, "B")):
        for name in (name for name in side.places if name not in other.places):
            # Families differ in which fixed values of an activation they store.
            if side.family is other.family or not side.places[name][0].activation:
                report.problems.append(f"{name} is only in {label}")
    return [name for name in a.places if name in b.places]


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The coarser one; of two 16-bit ones B's, since B is made from A."""
    return a if a.itemsize < b.itemsize else b


def _mark(x: Tensor) -> tuple:
    """A cheap fingerprint, to find where else a tensor is."""
    return tuple(x.shape), float(x.double().sum()), float(x.abs().max()) if x.numel() else 0.0


def _how(name: str, x: Tensor, y: Tensor, architecture: Architecture) -> str:
    leaf = name.rpartition(".")[2]
    learned = {q.name: q for q in architecture.activation.trainable}
    if leaf in learned and learned[leaf].lower is not None and x.numel() == 1:
        softplus = float(torch.nn.functional.softplus(x.float()))
        lower = learned[leaf].lower
        bound = {q.name: q.init for q in architecture.activation.parameters}.get(lower, lower)
        if any(abs(float(y) - v) < 1e-2 for v in (softplus, softplus + float(bound))):
            return f"A has {float(x):.6g} (raw); B's {float(y):.6g} looks like its effective value, stored in its place"
    difference = (x.double() - y.double()).abs()
    count = int((~(difference == 0)).sum())  # ~: nan counts
    return f"largest difference {float(difference.max()):.3g}, in {count:,} of {x.numel():,} elements"


# Logits


@dataclass
class _Run:
    """What one model makes of the text."""

    logits: list[Tensor]  # [s, vocabulary] per row
    continuation: list[int]
    gaps: list[float]  # between the likeliest and the next likeliest token, at each step
    modules: dict[str, Tensor]
    frequencies: Tensor | None  # of the rotary embedding


def _too_big(a: Side, b: Side) -> str | None:
    """Why logits cannot be compared here, if so."""
    largest = max(side.parameters() for side in (a, b))
    vocabulary = max(side.architecture.vocab_size for side in (a, b))
    needed = 4.4 * largest + 3 * 4.0 * TOKENS * vocabulary  # fp32 and a tenth; logits of both, and room to compare
    available = float(psutil.virtual_memory().available)
    if torch.cuda.is_available():
        available = min(available, float(torch.cuda.mem_get_info()[0]))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (word := limit.read_text(encoding="ascii").strip()).isdecimal():
        available = min(available, int(word) - int(used.read_text(encoding="ascii")))
    if needed <= available:
        return None
    return (
        f"logits and continuation: {largest / 1e9:.2f}e9 parameters in fp32 need about {needed / 1e9:.1f} GB, "
        f"{available / 1e9:.1f} GB are free; run xact verify where there is more"
    )


def _compare_logits(
    a: Side,
    b: Side,
    dtypes: dict[str, torch.dtype],
    report: Report,
    text: str | None,
    tokenizer: str | Path | None,
) -> None:
    vocabulary = min(side.architecture.vocab_size for side in (a, b))
    length = min(*(side.architecture.max_positions for side in (a, b)), TOKENS)
    rows, words = _rows(a, b, report, text, tokenizer, vocabulary, length)
    if not rows or len(rows[0]) < 4:
        raise ValueError("the text has fewer than 4 tokens; give --text a longer file")
    first, second = (_run(side, rows, dtypes, vocabulary) for side in (a, b))
    report.text_tokens = sum(len(row) for row in rows)
    differences = torch.cat(
        [(x - y).abs().amax(dim=-1) for x, y in zip(first.logits, second.logits, strict=True)]
    )  # [tokens]
    report.logits_difference = float(differences.max())
    apart = (~(differences <= report.tolerance)).nonzero()  # ~ <=: nan is a difference
    if len(apart):
        largest = f"{report.logits_difference:.3g} (tolerance {report.tolerance:g})"
        report.problems.append(f"logits differ by up to {largest}")
        place = int(apart[0])
        ids = [token for row in rows for token in row]
        report.first_token = f"number {place}, {words([ids[place]])!r}, difference {float(differences[place]):.3g}"
        report.first_module = trace.first_difference(first.modules, second.modules)
        if report.first_module is None:
            report.notes.append("no single module is at fault: the difference grows slowly, as rounding does")
    _compare_frequencies(first, second, report)
    _compare_continuations(first, second, report, words)


def _rows(
    a: Side, b: Side, report: Report, text: str | None, tokenizer: str | Path | None, vocabulary: int, length: int
) -> tuple[list[list[int]], Callable[[list[int]], str]]:
    """Rows of token ids, at most `TOKENS` together and `length` each, and what makes text of ids."""
    folders, why = [], "no tokenizer"
    for side in (a, b):
        try:
            folders.append(models.tokenizer_files_of(side.source, side.args).folder)
        except ValueError as error:
            why = str(error)
    words = text if text is not None else manual_pages()
    if len(folders) == 2:
        _compare_tokenizers(*folders, words, report)
    if tokenizer is not None or folders:
        chosen = models.load_tokenizer(tokenizer or folders[0])
        ids = [token for token in chosen(words)["input_ids"] if token < vocabulary]
        return _cut(ids[:TOKENS], length), chosen.decode
    if text is not None:
        raise ValueError(why)
    report.notes.append(f"logits are of random tokens, not of text: {why}")
    ids = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return _cut(ids, length), str


def _compare_tokenizers(a: Path, b: Path, text: str, report: Report) -> None:
    """transformers may choose a tokenizer class by the model's, whose splitting is not that of tokenizer.json."""
    plain_a, plain_b = (models.load_tokenizer(folder, plain=True)(text)["input_ids"] for folder in (a, b))
    if plain_a != plain_b:
        report.problems.append("the tokenizers of A and B make different tokens of the same text")
        return
    read_a, read_b = (models.load_tokenizer(folder) for folder in (a, b))
    ids_a, ids_b = read_a(text)["input_ids"], read_b(text)["input_ids"]
    if ids_b == ids_a:
        return
    side, kind = ("B", read_b) if ids_b != plain_b else ("A", read_a)
    said = (
        f"transformers reads {side}'s tokenizer.json as a {type(kind).__name__}, which makes other tokens of a text; "
        "PreTrainedTokenizerFast reads the file as it is"
    )
    (report.problems if side == "B" else report.notes).append(said)


def _cut(ids: list[int], length: int) -> list[list[int]]:
    rows = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [row for row in rows if len(row) >= min(length, len(ids)) // 2]


def manual_pages() -> str:
    """Some pages of the manual that comes with Python: real prose and code, the same on every machine."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in ("assert", "break", "lambda", "naming", "comparisons") if name in topics)


def _run(side: Side, rows: list[list[int]], dtypes: dict[str, torch.dtype], vocabulary: int) -> _Run:
    model = side.load(dtypes)
    model.vocab_size = vocabulary
    logits = [model.logits(torch.tensor([row]))[0].cpu() for row in rows]
    prompt = rows[0][:PROMPT][: model.max_length - 1]
    ids, gaps = list(prompt), []
    for token in generate(model, prompt, CONTINUATION):
        top = model.logits(torch.tensor([ids]))[0, -1].topk(2).values
        gaps.append(float(top[0] - top[1]))
        ids.append(token)
    heads = side.architecture.num_heads, side.architecture.num_groups
    size = next(n for n in range(min(TRACED, len(rows[0])), 0, -1) if n not in heads)
    modules = trace.outputs(model, side.architecture, torch.tensor([rows[0][:size]]))
    return _Run(logits, ids[len(prompt) :], gaps, modules, trace.rotary_frequencies(model))


def _compare_frequencies(first: _Run, second: _Run, report: Report) -> None:
    x, y = first.frequencies, second.frequencies
    if x is None or y is None:
        report.notes.append("rotary frequencies were not compared: not found in one of the models")
    elif x.shape != y.shape or not torch.allclose(x, y, rtol=1e-5, atol=0.0):
        lowest = f"the lowest is {float(x.min()):.4g} in A, {float(y.min()):.4g} in B (theta, or the scaling's factor?)"
        report.problems.append(f"rotary frequencies differ: {lowest}")


def _compare_continuations(first: _Run, second: _Run, report: Report, words: Callable[[list[int]], str]) -> None:
    length = min(len(first.continuation), len(second.continuation))
    pairs = zip(first.continuation, second.continuation, strict=False)
    alike = next((i for i, (x, y) in enumerate(pairs) if x != y), length)
    report.continuation = f"{alike} of {length} greedy tokens alike: {words(first.continuation[:alike])!r}"
    if alike == length:
        return
    if first.gaps[alike] <= 2 * report.tolerance:
        report.notes.append(
            f"the continuations part at token {alike}, where the two likeliest tokens are {first.gaps[alike]:.1g} "
            "apart: a tie, within the tolerance"
        )
        return
    ours, theirs = words([first.continuation[alike]]), words([second.continuation[alike]])
    report.problems.append(f"greedy continuations part at token {alike}: {ours!r} in A, {theirs!r} in B")
