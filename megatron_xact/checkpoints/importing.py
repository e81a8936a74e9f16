"""`xact import`: a Hugging Face folder, or an xIELU fork's checkpoint, becomes a Megatron checkpoint to go on from.

What is written is a run's folder: OUT/release with model weights only, the tracker file that makes Megatron load it as
iteration 0, and OUT/config.toml, which builds the architecture and starts from these weights:

    xact pretrain OUT/config.toml --save RUN --load RUN --train-data-path ... --train-iters ... --lr ... \\
        --micro-batch-size ... --global-batch-size ...

The weights come from `pretrained-checkpoint = OUT`, so a second start of the same command resumes RUN instead.
"""

from __future__ import annotations

import argparse
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_xact import activations
from megatron_xact.checkpoints import megatron_io, tokenizer_files
from megatron_xact.checkpoints.architecture import (
    HF_XIELU_EPS,
    Architecture,
    family,
    from_megatron,
    identity,
    is_hf_xielu_eps,
    pad_vocab,
    read_hf,
    record,
    to_megatron,
)
from megatron_xact.checkpoints.folders import whole_folder
from megatron_xact.checkpoints.mapping import (
    XIELU_HF,
    MegatronTensor,
    Rule,
    check_names,
    hf_shapes,
    megatron_shapes,
    table,
)
from megatron_xact.checkpoints.megatron_io import Checkpoint, LegacyCheckpoint, open_undamaged
from megatron_xact.checkpoints.safetensors_io import Weights
from megatron_xact.checkpoints.tokenizer_files import TokenizerFiles
from megatron_xact.pretraining import arguments
from megatron_xact.pretraining.checkpointing import checksums
from megatron_xact.pretraining.checkpointing.folder import TRACKER
from megatron_xact.pretraining.config import EVAL_INTERVAL, ActivationConfig, RunConfig, XactConfig
from megatron_xact.pretraining.data.progress import Progress

TABLE_OF = {
    "tensor-model-parallel-size": "parallel",
    "pipeline-model-parallel-size": "parallel",
    "use-distributed-optimizer": "parallel",
    "tokenizer-type": "data",
    "tokenizer-model": "data",
    "eval-interval": "schedule",
    "ckpt-format": "checkpoint",
    "save-interval": "checkpoint",
    "pretrained-checkpoint": "checkpoint",
}
"""Of what is written into config.toml, the table; [model] otherwise."""


@dataclass(frozen=True)
class Imported:
    folder: Path
    architecture: Architecture
    dtype: str
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    verified: str


@dataclass(frozen=True)
class _Source:
    """What is imported: `read` gives a rule's Megatron tensors, in the source's dtype."""

    architecture: Architecture
    rules: list[Rule]
    dtype: torch.dtype
    read: Callable[[Rule], tuple[Tensor, ...]]
    tokenizer: TokenizerFiles | None
    vocab_size: int | None
    """Rows of the embedding as the source says, which may have more than its tokenizer has ids; None: it does not."""
    notes: tuple[str, ...]


def main(args: argparse.Namespace) -> int:
    done = import_checkpoint(
        args.source,
        args.out,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        step=args.step,
        activation=args.activation,
        alpha_disagreement=args.alpha_disagreement,
        trust_pickle=args.trust_pickle,
        overwrite=args.overwrite,
        verify=not args.no_verify,
    )
    a = done.architecture
    print(f"model       {a.num_layers} layers of {a.hidden_size}, {a.activation.name}, {done.dtype}")
    for note in done.notes:
        print(f"note        {note}")
    print(f"weights     {done.bytes / 1e6:,.1f} MB, {done.seconds:.1f} s")
    print(f"verified    {done.verified}")
    print(f"imported    {done.folder}")
    config = shlex.quote(f"{done.folder}/config.toml")
    print(f"go on with  xact pretrain {config} --save RUN --load RUN --train-data-path PREFIX \\")
    print("                --train-iters N --lr LR --micro-batch-size N --global-batch-size N")
    return 0


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    divisible_by: int = 128,
    step: int | None = None,
    activation: str | None = None,
    alpha_disagreement: str = "refuse",
    trust_pickle: bool = False,
    overwrite: bool = False,
    verify: bool = True,
) -> Imported:
    """Raises ValueError or OSError, one line, for all that cannot be imported; then nothing is left under `out`.

    The parallel sizes are for the checks, the vocabulary padding and config.toml; the weights load at any other too.
    """
    started = time.monotonic()
    if (source / "config.json").is_file():
        found = _hugging_face(source, divisible_by, tensor_parallel)
    else:
        found = _megatron(open_undamaged(source, step, trust_pickle), activation, alpha_disagreement)
    a = found.architecture
    _check_parallel(a, tensor_parallel, pipeline_parallel)
    config = _config(found, out.absolute(), tensor_parallel, pipeline_parallel, divisible_by)
    dtypes = {t.name: torch.float32 if rule.activation else found.dtype for rule in found.rules for t in rule.megatron}
    total = sum(prod(t.shape) * dtypes[t.name].itemsize for rule in found.rules for t in rule.megatron)
    with whole_folder(out, total + 2**26, overwrite) as folder:
        (folder / "release").mkdir()
        with Progress("import", total) as progress:
            produce = _Produce(found, dtypes, progress)
            megatron_io.write(folder / "release", produce.tensors, dtypes, produce, _arguments(config, a))
        checksums.write(folder / "release")
        (folder / TRACKER).write_text("release", encoding="utf-8")
        if found.tokenizer is not None:
            # A copy: what is imported can then be moved or deleted. And a tokenizer beside a config.json with code
            # (auto_map) makes transformers ask on the terminal, on every rank, whether to run that code.
            (folder / "tokenizer").mkdir()
            found.tokenizer.copy(folder / "tokenizer")
            tokenizer_files.keep_ids(source, folder / "tokenizer")
        (folder / "config.toml").write_text(config.dump(), encoding="utf-8")
        verified = _verify(source, folder) if verify else "no (--no-verify)"
    dtype = str(found.dtype).removeprefix("torch.")
    return Imported(out, a, dtype, total, time.monotonic() - started, found.notes, verified)


class _Produce:
    """Gives the writer one tensor at a time; a rule is read when its first tensor is asked for."""

    def __init__(self, source: _Source, dtypes: dict[str, torch.dtype], progress: Progress):
        self.source, self.dtypes, self.progress = source, dtypes, progress
        self.rule_of = {t.name: rule for rule in source.rules for t in rule.megatron}
        self.tensors = [t for rule in source.rules for t in rule.megatron]
        self.ready: dict[str, Tensor] = {}

    def __call__(self, tensor: MegatronTensor) -> Tensor:
        if tensor.name not in self.ready:
            rule = self.rule_of[tensor.name]
            self.ready = dict(zip((t.name for t in rule.megatron), self.source.read(rule), strict=True))
        value = self.ready.pop(tensor.name).to(self.dtypes[tensor.name])
        if not torch.isfinite(value).all():
            raise ValueError(f"{tensor.name} is not finite in what is imported")
        self.progress.update(value.nbytes)
        return value


# From Hugging Face


def _hugging_face(folder: Path, divisible_by: int, tensor_parallel: int) -> _Source:
    weights = Weights(folder)
    a, config = read_hf(folder)
    a = pad_vocab(a, divisible_by, tensor_parallel)
    if a.tied:
        weights.drop_tied_head()
    check_names(hf_shapes(table(a)), weights.shapes, f"{folder}")
    notes = _precision(weights, table(a))
    if family(a).model_type == "apertus" and a.activation.name == "xielu":
        a, about_xielu = _xielu_of_tensors(a, weights, said="xact_activation" in config)
        notes += about_xielu
    rules = table(a)
    dtype = weights.read("model.embed_tokens.weight").dtype
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if not has_tokenizer:
        notes += (f"no tokenizer.json in {folder}; name a tokenizer in config.toml",)
    return _Source(
        architecture=a,
        rules=rules,
        dtype=dtype,
        read=lambda rule: rule.restore(*(weights.read(name) for name in rule.hf)),
        tokenizer=tokenizer_files.of_folder(folder) if has_tokenizer else None,
        vocab_size=a.vocab_size,
        notes=notes,
    )


_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # safetensors' names, bytes


def _precision(weights: Weights, rules: list[Rule]) -> tuple[str, ...]:
    """Notes on tensors that are not of the embedding's dtype, which all but alphas get. ValueError: quantized."""
    for name, dtype in weights.dtypes.items():
        if dtype not in _FLOATS:
            raise ValueError(f"{weights.folder}: {name} is {dtype}: quantized weights are not read")
    main = weights.dtypes["model.embed_tokens.weight"]
    dtypes = [weights.dtypes[name] for rule in rules if not rule.activation for name in rule.hf]
    rounded = [dtype for dtype in dtypes if dtype != main and _FLOATS[dtype] >= _FLOATS[main]]
    if not rounded:
        return ()
    return (f"{len(rounded)} tensor(s) of {' and '.join(sorted(set(rounded)))} are rounded to the embedding's {main}",)


def _xielu_of_tensors(a: Architecture, weights: Weights, said: bool) -> tuple[Architecture, tuple[str, ...]]:
    """Which of xIELU's parameters are fixed, which is in no tensor. The config may say it (ours do); then the tensors
    have to agree in every layer, or what was fixed has been trained since. Else alphas are trained, and beta is if it
    differs between layers."""
    rules = [rule for rule in table(a) if rule.activation]
    stored = [{n: weights.read(h).float() for n, h in zip(XIELU_HF, rule.hf, strict=True)} for rule in rules]
    for rule, layer in zip(rules, stored, strict=True):
        if not is_hf_xielu_eps(layer["eps"]):
            raise ValueError(f"{rule.hf[-1]} = {float(layer['eps']):g}: only {HF_XIELU_EPS:g} is known")
    if said:
        try:
            for rule in rules:
                rule.restore(*(weights.read(name) for name in rule.hf))
            return a, ()
        except ValueError as error:
            note = f"{error}: it is taken as trained"
            learned = tuple(q.name for q in a.activation.parameters)
            trained = record({"name": "xielu", "trainable": learned, "eps": a.activation.eps})
            return replace(a, activation=trained), (note,)
    betas = {float(layer["beta"]) for layer in stored}
    if len(betas) == 1:
        return replace(a, activation=record({"name": "xielu", "fixed": {"beta": betas.pop()}})), ()
    learned = {"name": "xielu", "trainable": ("alpha_p", "alpha_n", "beta")}
    return replace(a, activation=record(learned)), ("beta differs between layers: it is a trained parameter here",)


# From Megatron: forks' checkpoints, and our own


def _megatron(source: Checkpoint, activation: str | None, policy: str) -> _Source:
    if activation is not None:
        source.args.xact_activation = identity(activations.get(activation))
    tokenizer, notes = None, ()
    try:
        tokenizer = tokenizer_files.of_checkpoint(source.args, source.folder)
        size = tokenizer.size
    except ValueError as error:
        size = source.args.padded_vocab_size
        notes = (f"{error}; the vocabulary is taken to be all of the embedding's {size} rows",)
    a = from_megatron(source.args, min(size, source.args.padded_vocab_size))
    rules = table(a)
    check_names(megatron_shapes(rules), source.shapes(rules), f"checkpoint {source.folder}")
    if isinstance(source, LegacyCheckpoint):
        disagreeing = [t for rule in rules if rule.activation for t in rule.megatron if _spread(source, t) > 0]
        if disagreeing:
            worst = max(disagreeing, key=lambda t: _spread(source, t))
            what = (
                f"{len(disagreeing)} activation parameters differ between the {source.tp} tensor-parallel ranks, most "
                f"{worst.name}: {', '.join(f'{float(v):.6g}' for v in source.replicas(worst))}"
            )
            if policy == "refuse":
                raise ValueError(f"{what}; choose with --alpha-disagreement average or rank0")
            notes += (f"{what}; {'their mean' if policy == 'average' else 'that of rank 0'} is taken",)

    def read(rule: Rule) -> tuple[Tensor, ...]:
        if rule.activation and isinstance(source, LegacyCheckpoint):
            copies = [torch.stack([c.float().reshape(1) for c in source.replicas(t)]) for t in rule.megatron]
            return tuple(c.mean(dim=0) if policy == "average" else c[0] for c in copies)
        return tuple(source.read(t) for t in rule.megatron)

    return _Source(
        architecture=a,
        rules=rules,
        dtype=source.dtype(),
        read=read,
        tokenizer=tokenizer,
        vocab_size=getattr(source.args, "vocab_size", None),
        notes=notes,
    )


def _spread(source: LegacyCheckpoint, tensor: MegatronTensor) -> float:
    values = [float(copy) for copy in source.replicas(tensor)]
    if not all(map(isfinite, values)):
        raise ValueError(f"{tensor.name} is not finite on all tensor-parallel ranks: {values}")
    return max(values) - min(values)


# What is written beside the weights


def _check_parallel(a: Architecture, tensor_parallel: int, pipeline_parallel: int) -> None:
    parts = {
        "attention heads": (a.num_heads, tensor_parallel),
        "the MLP's size": (a.ffn_hidden_size, tensor_parallel),
        "layers": (a.num_layers, pipeline_parallel),
        "the padded vocabulary": (a.padded_vocab_size, tensor_parallel),
    }
    for what, (size, ranks) in parts.items():
        if ranks < 1 or size % ranks:
            raise ValueError(f"{size} ({what}) cannot be split over {ranks} ranks; choose another --tp or --pp")
    if a.num_groups % tensor_parallel and tensor_parallel % a.num_groups:
        raise ValueError(f"{a.num_groups} key-value heads cannot be split over {tensor_parallel} ranks; change --tp")


def _config(source: _Source, out: Path, tensor_parallel: int, pipeline_parallel: int, divisible_by: int) -> RunConfig:
    a = source.architecture
    values = to_megatron(a) | {
        "seq-length": min(a.max_positions, 4096),
        "make-vocab-size-divisible-by": divisible_by,
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
        "ckpt-format": "torch_dist",
        "save-interval": 1000,
        "eval-interval": EVAL_INTERVAL,
        "pretrained-checkpoint": str(out),
    }
    if source.dtype in (torch.bfloat16, torch.float16):
        values |= {"bf16" if source.dtype == torch.bfloat16 else "fp16": True, "use-distributed-optimizer": True}
    if source.vocab_size and (source.tokenizer is None or source.tokenizer.size < source.vocab_size):
        # Megatron would make as many rows as the tokenizer has ids, padded, and drop the others as it loads.
        values |= {"vocab-size": source.vocab_size, "padded-vocab-size": a.padded_vocab_size}
    if source.tokenizer is not None:
        values |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(out / "tokenizer")}
    said = identity(a.activation)
    init = {q.name: q.init for q in a.activation.parameters}
    activation = ActivationConfig(said["name"], init, tuple(said["trainable"]), said["eps"])
    homes = {key: TABLE_OF.get(key, "model") for key in values}
    return RunConfig(values, activation, XactConfig(), tables=homes)


def _arguments(config: RunConfig, a: Architecture) -> Namespace:
    """What a run would have saved: Megatron checks some on loading, and export reads the architecture from them."""
    args = arguments.parse(config.arguments())
    args.padded_vocab_size = a.padded_vocab_size
    args.layernorm_epsilon = a.norm_eps
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    args.xact_activation = identity(a.activation)
    args.pretrained_checkpoint = None
    return args


def _verify(source: Path, folder: Path) -> str:
    from megatron_xact.checkpoints import verify

    if not (source / "config.json").is_file():
        return "no: only Hugging Face sources can be compared"
    tokenizer = folder / "tokenizer"
    report = verify.verify(source, folder, tokenizer=tokenizer if tokenizer.is_dir() else None)
    if not report.same:
        raise ValueError(f"the imported model is not the source's: {report.summary()}")
    return report.summary()
