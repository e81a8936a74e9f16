"""Peak memory and time of `xact export` on a synthetic checkpoint of 3B (or, with --size 8B, 8B) parameters.

    python tools/export_memory.py --folder /somewhere/with/room --out tools/results/export_memory.json

The checkpoint is bf16, in Megatron's distributed format, of an Apertus-shaped xIELU model; it is written layer by layer
too, so neither half needs the model in memory. The export runs in a process of its own under a hard limit
(RLIMIT_DATA: private writable memory; the page cache does not count), without the comparison of logits, which needs
the whole model. Reported: peak of RssAnon in /proc/self/status (sampled) and of all resident memory, seconds, sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # layers, hidden, ffn, heads, key-value heads
    "tiny": (2, 64, 96, 4, 2),
    "3B": (28, 3072, 10240, 24, 8),
    "8B": (32, 4096, 21504, 32, 8),  # Apertus 8B
}
VOCABULARY = 131072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3B")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder); 4 bytes a parameter")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the export (default: bf16)")
    parser.add_argument("--limit-gb", type=float, default=4.0, help="hard limit for the exporting process (default: 4)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # the process that writes the checkpoint
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)  # the exporting process
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(args.make, args.size)))
        return
    if args.measure:
        print(json.dumps(measured_export(*args.measure, args.dtype)))
        return
    folder = Path(tempfile.mkdtemp(prefix="export_memory.", dir=args.folder))
    try:
        result = run(folder, args)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def run(folder: Path, args: argparse.Namespace) -> dict:
    made = in_own_process([__file__, "--size", args.size, "--make", str(folder)], None)
    command = [__file__, "--measure", str(folder / "run"), str(folder / "hf")]
    command += ["--dtype", args.dtype] if args.dtype else []
    found = in_own_process(command, args.limit_gb)
    import torch

    return {
        "size": args.size,
        **made,
        **found,
        "limit_gb": args.limit_gb,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def in_own_process(words: list[str], limit_gb: float | None) -> dict:
    def limited() -> None:
        if limit_gb is not None:
            size = int(limit_gb * 1e9)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=limited)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measured_export(source: Path, out: Path, dtype: str | None) -> dict:
    from megatron_xact.checkpoints.export import export

    with Peak() as peak:
        done = export(source, out, dtype=dtype, verify=False)
    return {
        "dtype": done.dtype,
        "class": done.class_name,
        "written_gb": round(done.bytes / 1e9, 3),
        "files": done.files,
        "seconds": round(done.seconds, 1),
        "anonymous_before_gb": round(peak.before, 3),
        "anonymous_peak_gb": round(peak.highest, 3),
        "resident_peak_with_mapped_files_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }


class Peak:
    """Highest RssAnon (GB) while the block runs, sampled every 10 ms, and that of before."""

    def __enter__(self) -> Peak:
        self.before = self.highest = anonymous_gb()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.highest = max(self.highest, anonymous_gb())

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()


def anonymous_gb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def make(folder: Path, size: str) -> dict:
    """A checkpoint and its tokenizer in `folder`/run."""
    import torch

    from megatron_xact import activations
    from megatron_xact.checkpoints import megatron_io
    from megatron_xact.checkpoints.architecture import from_megatron, identity
    from megatron_xact.checkpoints.mapping import table
    from megatron_xact.pretraining import arguments
    from megatron_xact.pretraining.checkpointing.folder import TRACKER

    layers, hidden, ffn, heads, groups = SIZES[size]
    started = time.monotonic()
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    words = (
        f"--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads {heads} "
        f"--kv-channels {hidden // heads} --group-query-attention --num-query-groups {groups} --normalization RMSNorm "
        "--qk-layernorm --position-embedding-type rope --rotary-base 500000 --disable-bias-linear --bf16 "
        "--max-position-embeddings 4096 --untie-embeddings-and-output-weights "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
    )
    args = arguments.parse(words.split())
    args.padded_vocab_size, args.layernorm_epsilon = VOCABULARY, 1e-5
    args.xact_activation = identity(activations.get("xielu"))
    rules = table(from_megatron(args, VOCABULARY))
    tensors = [t for rule in rules for t in rule.megatron]
    is_alpha = {t.name for rule in rules if rule.activation for t in rule.megatron}
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def produce(tensor):
        if tensor.name in is_alpha:
            return torch.full(tensor.shape, 0.2)
        repeats = -(-prod(tensor.shape) // len(noise))
        return noise.repeat(repeats)[: prod(tensor.shape)].clone().view(tensor.shape)

    dtypes = {t.name: torch.float32 if t.name in is_alpha else torch.bfloat16 for t in tensors}
    megatron_io.write(folder / "run" / "release", tensors, dtypes, produce, args)
    (folder / "run" / TRACKER).write_text("release")
    return {
        "parameters": sum(prod(t.shape) for t in tensors),
        "largest_tensor_gb": round(max(prod(t.shape) for t in tensors) * 2 / 1e9, 3),
        "seconds_to_make_it": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    main()
