"""Tokens per second of `xact pretrain` beside a plain transformers ApertusForCausalLM loop of the same shape.

    python tools/bench_pretrain.py --config configs/quickstart.toml --out tools/results/pretrain_cpu.json

Same machine, shape, batch, dtype, optimizer, clipping and number of threads; one process each (TP=1), taking turns, so
that neither has the machine to itself in a better minute. The config is run as it is but for TP=1 and qk-layernorm,
which Apertus has. The peer is the model class that existing xIELU checkpoints use, with its own Python xIELU (its CUDA
one needs a package that is not on PyPI). Reported: median tokens/s over the measured steps of all rounds, peak resident
memory, the ratio, and every raw timing. transformers trains on random tokens: its speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=ROOT / "configs/quickstart.toml", type=Path)
    parser.add_argument("--steps", default=30, type=int, help="measured steps per round, after --warmup (default 30)")
    parser.add_argument("--warmup", default=10, type=int, help="steps before the clock starts (default 10)")
    parser.add_argument("--rounds", default=3, type=int, help="turns of each (default 3)")
    parser.add_argument("--threads", default=os.cpu_count(), type=int, help="threads of each process (default: all)")
    parser.add_argument("--bf16", action="store_true", help="bf16 model and fp32 master weights, instead of fp32")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # the transformers side, in its own process
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(run_transformers(json.loads(args.peer), args)))
        return

    shape = read_shape(args.config)
    runs: dict[str, list[dict]] = {"xact": [], "transformers": []}
    for round_ in range(args.rounds):
        runs["xact"].append(run_xact(args))
        runs["transformers"].append(in_own_process(shape, args))
        told = "  ".join(f"{name} {statistics.median(r[-1]['tokens_per_second']):,.0f}" for name, r in runs.items())
        print(f"round {round_ + 1}/{args.rounds}: {told} tokens/s", flush=True)

    result = {"shape": shape, "threads": args.threads, "dtype": "bf16" if args.bf16 else "fp32", **versions()}
    for name, rounds in runs.items():
        result[name] = {
            "tokens_per_second": round(statistics.median(v for r in rounds for v in r["tokens_per_second"]), 1),
            "peak_memory_mb": round(max(r["peak_memory_mb"] for r in rounds), 1),
            "rounds": rounds,
        }
    result["ratio"] = round(result["xact"]["tokens_per_second"] / result["transformers"]["tokens_per_second"], 3)
    print(f"\n{'':14}{'tokens/s':>10}{'peak MB':>10}")
    for name in runs:
        print(f"{name:14}{result[name]['tokens_per_second']:>10,.0f}{result[name]['peak_memory_mb']:>10,.0f}")
    print(f"xact / transformers: {result['ratio']:.2f}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def read_shape(config: Path) -> dict:
    """What the transformers twin needs to know of the config."""
    from megatron_xact.checkpoints import tokenizer_files
    from megatron_xact.pretraining.config import load

    values = load(config).megatron
    keys = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "seq-length", "micro-batch-size")
    keys += ("global-batch-size", "rotary-base", "lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2")
    tokens = tokenizer_files.of_folder(Path(values["tokenizer-model"])).size
    tied = not values.get("untie-embeddings-and-output-weights", False)
    padded = -(-tokens // 128) * 128  # Megatron pads to a multiple of 128: the same matrix here
    return {key: values[key] for key in keys} | {"vocab-size": padded, "tied": tied}


def run_xact(args: argparse.Namespace) -> dict:
    """One round of `xact pretrain`, TP=1, as a user would start it."""
    total = args.warmup + args.steps
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "megatron_xact", "pretrain", str(args.config), "--nproc-per-node", "1", "--quiet"),
            *("--tensor-model-parallel-size", "1", "--qk-layernorm", "--train-iters", str(total)),
            *("--lr-warmup-iters", "1", "--lr-wsd-decay-iters", "1", "--log-interval", "1"),
            *("--eval-interval", "1000", "--eval-iters", "0", "--save", folder, "--load", folder),
            *("--save-interval", "1000000", "--set", "xact.sample-tokens=0", "--set", "xact.telemetry-interval=0"),
            *(["--bf16"] if args.bf16 else []),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
        with open(Path(folder) / "stderr", "w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                errors.seek(0)
                sys.exit(f"xact pretrain failed: {errors.read()[-2000:]}")
        steps = [json.loads(line) for line in open(Path(folder) / "progress.jsonl", encoding="utf-8")]
    speeds = [step["tokens_per_second"] for step in steps[args.warmup :]]
    return {"tokens_per_second": speeds, "peak_memory_mb": round(usage.ru_maxrss / 1024, 1)}


def in_own_process(shape: dict, args: argparse.Namespace) -> dict:
    words = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    command = [sys.executable, __file__, "--peer", json.dumps(shape), *words, *(["--bf16"] if args.bf16 else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_transformers(shape: dict, args: argparse.Namespace) -> dict:
    import torch
    from transformers import ApertusConfig, ApertusForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = ApertusConfig(
        vocab_size=shape["vocab-size"],
        hidden_size=shape["hidden-size"],
        intermediate_size=shape["ffn-hidden-size"],
        num_hidden_layers=shape["num-layers"],
        num_attention_heads=shape["num-attention-heads"],
        num_key_value_heads=shape["num-attention-heads"],
        max_position_embeddings=shape["seq-length"],
        rope_parameters={"rope_type": "default", "rope_theta": float(shape["rotary-base"])},
        tie_word_embeddings=shape["tied"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = ApertusForCausalLM(config).train()
    if args.bf16:
        model = model.bfloat16()
    masters = [p.detach().float().requires_grad_() if args.bf16 else p for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        masters,
        lr=shape["lr"],
        betas=(shape["adam-beta1"], shape["adam-beta2"]),
        weight_decay=shape["weight-decay"],
    )
    batch, micro, s = shape["global-batch-size"], shape["micro-batch-size"], shape["seq-length"]
    seconds = []
    for _ in range(args.warmup + args.steps):
        tokens = torch.randint(config.vocab_size, (batch, s))
        start = time.perf_counter()
        for part in tokens.split(micro):
            (model(input_ids=part, labels=part).loss * len(part) / batch).backward()
        if args.bf16:
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, shape["clip-grad"])
        optimizer.step()
        if args.bf16:
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.data.copy_(master)
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return {"tokens_per_second": [round(batch * s / t, 1) for t in seconds[args.warmup :]], "peak_memory_mb": peak}


def versions() -> dict:
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }


if __name__ == "__main__":
    main()
