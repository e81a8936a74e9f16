"""The README.md of an exported model: what it is, how it was trained and how well, how to load it."""

from __future__ import annotations

import re
from argparse import Namespace
from math import exp, prod
from pathlib import Path

from megatron_xact import __version__
from megatron_xact.checkpoints.architecture import HF_XIELU_EPS, Architecture, family
from megatron_xact.checkpoints.mapping import hf_shapes, table
from megatron_xact.pretraining import report


def card(
    name: str,
    a: Architecture,
    args: Namespace,
    iteration: int,
    dtype: str,
    effective: dict[str, list[float]],
    run: Path | None,
) -> str:
    """Markdown. effective: parameter name -> effective value by layer. run: the training run's folder with its
    progress.jsonl, if it is there."""
    f = family(a)
    remote = f.model_type == "xact"
    size = sum(prod(shape) for shape in hf_shapes(table(a)).values())
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megatron-xact\n"
        f"- {a.activation.name}\n---",
        f"# {name}",
        f"A language model of {_count(size)} parameters, pretrained with Megatron and megatron-xact {__version__} "
        f"(checkpoint of step {iteration:,}), for transformers' `{f.class_name}`"
        + (", whose code is in `modeling_xact.py` here." if remote else "."),
        _usage(remote),
        _servers(a, remote),
        "## Architecture\n\n" + _rows(_architecture(a, dtype)),
        "## Activation\n\n" + _activation(a, effective),
        "## Training\n\n" + _rows(_training(args, iteration)),
    ]
    results = _results(run, iteration)
    if results:
        parts.append("## Losses\n\n" + _rows(results))
    if run is not None and (run / "config.toml").is_file():
        parts.append(f"## Recipe\n\n```toml\n{_recipe((run / 'config.toml').read_text(encoding='utf-8'))}\n```")
    return "\n\n".join(parts) + "\n"


def _usage(remote: bool) -> str:
    trust = ", trust_remote_code=True" if remote else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})\n'
        'tokens = model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=50)\n'
        "print(tokenizer.decode(tokens[0]))\n"
        "```"
    )


def _servers(a: Architecture, remote: bool) -> str:
    """What vLLM 0.32 and SGLang 0.5.23 need and do; their Apertus has xIELU only."""
    apertus, xielu = family(a).model_type == "apertus", a.activation.name == "xielu"
    words = " --trust-remote-code" if remote else " --model-impl transformers" if apertus and not xielu else ""
    rounding = " Both round alpha_p and alpha_n to bfloat16, whatever `--dtype` says." if apertus and xielu else ""
    return f"In vLLM: `vllm serve .{words}`; in SGLang: `sglang serve --model-path .{words}`.{rounding}"


def _architecture(a: Architecture, dtype: str) -> dict[str, object]:
    rope = f"theta {a.rope_theta:g}" + (f", Llama 3 scaling by {a.rope_factor:g}" if a.rope_factor else "")
    return {
        "layers": a.num_layers,
        "hidden size": a.hidden_size,
        "MLP size": f"{a.ffn_hidden_size} ({'gated' if a.activation.gated else 'not gated'})",
        "attention": f"{a.num_heads} heads of {a.head_dim}, {a.num_groups} key-value heads",
        "norm": f"{a.norm}, eps {a.norm_eps:g}" + (", also on queries and keys" if a.qk_norm else ""),
        "biases": a.bias,
        "rotary embedding": rope,
        "positions": a.max_positions,
        "vocabulary": f"{a.vocab_size}, output layer {'tied to' if a.tied else 'apart from'} the embedding",
        "weights": dtype,
    }


def _activation(a: Architecture, effective: dict[str, list[float]]) -> str:
    lines = [f"{a.activation.name}: `{a.activation.formula}` ({a.activation.source})."]
    if a.activation.parameters:
        rows = {
            q.name: f"`{q.symbol}`, trained per layer: {min(effective[q.name]):.4f} to {max(effective[q.name]):.4f}"
            if q.trainable
            else f"`{q.symbol}`, fixed at {q.init:g}"
            for q in a.activation.parameters
        }
        lines.append(_rows(rows))
    if family(a).model_type == "apertus" and a.activation.name == "xielu":
        lines.append(
            f"transformers computes expm1(min(x, {HF_XIELU_EPS:g})) where training computed expm1(min(x, 0)): a "
            "difference of at most 1e-6 times `a_n`. Its optional CUDA kernel ignores `beta` and `eps` and assumes 0.5 "
            "and -1e-6. Releases before 5.1 do not load it as it is: 4.56 and 4.57 round its parameters to bfloat16, "
            "5.0 fails."
        )
    return "\n\n".join(lines)


def _recipe(config: str) -> str:
    """The tables of a run's config.toml that make the model; the others say where things lay on one machine."""
    kept = ("model", "parallel", "optimizer", "schedule", "activation")
    tables = (table.strip() for table in re.split(r"^(?=\[)", config, flags=re.MULTILINE))
    return "\n\n".join(table for table in tables if table.startswith(tuple(f"[{name}]" for name in kept)))


def _training(args: Namespace, iteration: int) -> dict[str, object]:
    """What of the run's arguments one asks first."""
    batch, length = getattr(args, "global_batch_size", None), getattr(args, "seq_length", None)
    seen = getattr(args, "consumed_train_samples", None)
    rows = {
        "steps": f"{iteration:,}",
        "tokens": f"{seen * length:,}" if seen and length else None,
        "batch": f"{batch} sequences of {length} tokens" if batch else None,
        "optimizer": getattr(args, "optimizer", None),
        "learning rate": getattr(args, "lr", None),
        "schedule": getattr(args, "lr_decay_style", None),
        "weight decay": getattr(args, "weight_decay", None),
        "precision": "bf16" if getattr(args, "bf16", False) else "fp16" if getattr(args, "fp16", False) else "fp32",
        "seed": getattr(args, "seed", None),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _results(run: Path | None, iteration: int) -> dict[str, object]:
    if run is None:
        return {}
    found = report.read(run)
    rows: dict[str, object] = {}
    for kind, curve in (("training", found.loss), ("validation", found.validation)):
        past = [(step, loss) for step, loss in curve if step <= iteration]
        if past:
            step, loss = past[-1]
            rows[f"{kind} loss"] = f"{loss:.4f} nats per token at step {step:,} (perplexity {exp(min(loss, 700)):,.1f})"
    return rows


def _rows(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _count(size: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size >= unit:
            return f"{size / unit:.2f}{name}"
    return str(size)
