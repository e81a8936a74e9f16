"""`xact export`: a Megatron checkpoint becomes a Hugging Face folder.

Tensors go one by one from the checkpoint's files into safetensors shards: no model is built, and memory is that of the
largest tensor. The folder appears under its name when it is complete, read back, and (unless --no-verify) its logits
have been compared with those of the Megatron model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_xact.checkpoints import safetensors_io, tokenizer_files
from megatron_xact.checkpoints.architecture import Architecture, family, from_megatron, to_hf
from megatron_xact.checkpoints.folders import whole_folder
from megatron_xact.checkpoints.mapping import Rule, check_names, hf_shapes, megatron_shapes, table
from megatron_xact.checkpoints.megatron_io import Checkpoint, LegacyCheckpoint, open_undamaged
from megatron_xact.checkpoints.model_card import card
from megatron_xact.checkpoints.modeling import MODELING_FILE, modeling_source
from megatron_xact.checkpoints.options import DTYPES, SHARD_SIZE, size_in_bytes
from megatron_xact.checkpoints.tokenizer_files import TokenizerFiles
from megatron_xact.pretraining.data.progress import Progress


@dataclass(frozen=True)
class Exported:
    folder: Path
    architecture: Architecture
    class_name: str
    dtype: str
    files: int
    bytes: int
    seconds: float
    verified: str
    """What the comparison of logits said, or why there was none."""


def main(args: argparse.Namespace) -> int:
    done = export(
        args.checkpoint,
        args.out,
        step=args.step,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer,
        overwrite=args.overwrite,
        verify=not args.no_verify,
    )
    print(f"model       {done.class_name}, {done.architecture.activation.name}, {done.dtype}")
    print(f"weights     {done.bytes / 1e6:,.1f} MB in {done.files} file(s), read back, {done.seconds:.1f} s")
    print(f"verified    {done.verified}")
    print(f"exported    {done.folder}")
    return 0


def export(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = SHARD_SIZE,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Exported:
    """Raises ValueError or OSError, one line, for all that cannot be exported; then nothing is left under `out`.

    dtype: fp32, bf16 or fp16. Activation parameters are written in it too, since transformers makes them in the
    model's dtype and would round them on loading: an fp32 export is the exact one.
    """
    started = time.monotonic()
    max_bytes = size_in_bytes(max_shard_size)
    source = open_undamaged(checkpoint, step)
    if isinstance(source, LegacyCheckpoint):
        raise ValueError(f"{source.folder} is in Megatron's old format (mp_rank_*); make it a new one with xact import")
    if tokenizer is not None:
        files = tokenizer_files.of_folder(tokenizer)
    else:
        files = tokenizer_files.of_checkpoint(source.args, source.folder)
    a = from_megatron(source.args, files.size)
    if files.size > a.padded_vocab_size:
        raise ValueError(
            f"the tokenizer in {files.folder} has {files.size} ids, the model's embedding {a.padded_vocab_size} "
            "rows: it is not this model's; name the right one with --tokenizer"
        )
    rules = table(a)
    check_names(megatron_shapes(rules), source.shapes(rules), f"checkpoint {source.folder}")

    name = DTYPES[dtype] if dtype else str(source.dtype()).removeprefix("torch.")
    torch_dtype = safetensors_io.DTYPES[name]
    shards = safetensors_io.plan(hf_shapes(rules), torch_dtype, max_bytes)
    total = sum(prod(shape) for shard in shards for shape in shard.shapes.values()) * torch_dtype.itemsize
    effective: dict[str, list[float]] = {q.name: [] for q in a.activation.trainable}

    with whole_folder(out, total + 2**26, overwrite) as folder:
        with Progress("export", total) as progress:
            stream = _exported(source, a, rules, effective)
            checksums = safetensors_io.write(folder, shards, stream, torch_dtype, progress.update)
        _write_configs(folder, a, name, files)
        run = source.folder.parent if (source.folder.parent / "progress.jsonl").is_file() else None
        text = card(out.absolute().name, a, source.args, source.iteration, name, effective, run)
        (folder / "README.md").write_text(text, encoding="utf-8")
        safetensors_io.verify_checksums(folder, shards, checksums)
        verified = _verify(source.folder, folder, files.folder) if verify else "no (--no-verify)"
    return Exported(out, a, family(a).class_name, name, len(shards), total, time.monotonic() - started, verified)


def _exported(
    source: Checkpoint, a: Architecture, rules: list[Rule], effective: dict[str, list[float]]
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor in order; notes the activation's effective values on the way."""
    for rule in rules:
        tensors = [source.read(t) for t in rule.megatron]
        if rule.activation and rule.megatron:
            for name, value in _effective_values(a, tensors, rule).items():
                effective[name].append(value)
        yield from zip(rule.hf, rule.export(*tensors), strict=True)


def _write_configs(folder: Path, a: Architecture, dtype: str, tokenizer: TokenizerFiles) -> None:
    """All that a client needs besides the weights."""
    tokenizer.copy(folder)
    _write_json(folder / "config.json", to_hf(a, dtype) | tokenizer.special)
    if not (folder / tokenizer_files.GENERATION).is_file():  # else it came with the tokenizer, from an import
        generation = {key: value for key, value in tokenizer.special.items() if value is not None}
        _write_json(folder / tokenizer_files.GENERATION, {"_from_model_config": True, **generation})
    if family(a).model_type == "xact":
        (folder / MODELING_FILE).write_text(modeling_source(a.activation), encoding="utf-8")


def _effective_values(a: Architecture, raw: list[Tensor], rule: Rule) -> dict[str, float]:
    """Of a layer's trained parameters, by name. ValueError: out of range."""
    names = [q.name for q in a.activation.trainable]
    p = a.activation.effective({name: t.float() for name, t in zip(names, raw, strict=True)})
    values = {q.name: float(p[q.symbol]) for q in a.activation.trainable}
    for t, (name, value) in zip(rule.megatron, values.items(), strict=True):
        if not -1e6 < value < 1e6:
            raise ValueError(f"{t.name}: {name} has the effective value {value}: out of range, training diverged")
    return values


def _verify(checkpoint: Path, folder: Path, tokenizer: Path) -> str:
    """Compare with Megatron's own model. ValueError: they are not the same. Returns what was found, in one line."""
    from megatron_xact.checkpoints import verify

    report = verify.verify(checkpoint, folder, tokenizer=tokenizer)
    if not report.same:
        raise ValueError(
            f"the exported model is not the checkpoint's: {report.summary()} (A: the checkpoint, B: the export; with "
            "--no-verify it is written uncompared)"
        )
    return report.summary()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
