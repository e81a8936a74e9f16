"""Real `xact pretrain` runs of a tiny model on gloo ranks, each started once per session and shared by its tests.

A run takes seconds, so tests name runs (`JOBS`) and compare what they left behind. All are of one config (`CONFIG`) and
differ by the words of their job: what a test compares is plain to see here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from warm import warm

from megatron_xact.pretraining.data.preprocess import prepare

ROOT = Path(__file__).parents[2]
MARKS = [
    pytest.mark.distributed,
    pytest.mark.alone,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is not None,
        reason="these train on the CPU platform, where TransformerEngine's optimizer cannot run",
    ),
]
STEPS = 12
SAVED = (4, 8, 12)

# 512 tokens need no padding at any tensor-parallel size here; padding would change the draws of the weights.
CONFIG = """
base = "{root}/configs/llama.toml"
[model]
num-layers = 2
hidden-size = 32
ffn-hidden-size = 64
num-attention-heads = 4
seq-length = 32
max-position-embeddings = 32
[data]
train-data-path = ["{data}/train_text_document"]
valid-data-path = ["{data}/validation_text_document"]
tokenizer-type = "HuggingFaceTokenizer"
tokenizer-model = "{data}/tokenizer"
num-workers = 0
[optimizer]
lr = 1e-2
[schedule]
micro-batch-size = 2
global-batch-size = 4
train-iters = {steps}
lr-warmup-iters = 2
lr-wsd-decay-iters = 4
eval-interval = 6
eval-iters = 1
[checkpoint]
save-interval = 4
[logging]
log-interval = 1
tensorboard-log-interval = 1
[activation]
name = "xielu"
[xact]
guard-interval = 5
telemetry-interval = 1
"""

# The command, with something done on each rank before every step's update; `step` steps are complete by then.
HOOKED = """
import os, signal, sys
from megatron_xact import cli

if __name__ == "__main__":
    from megatron.training import get_args
    from megatron_xact.pretraining.monitor import Monitor

    stock = Monitor.finalize_model_grads

    def hooked(self, *args, **kwargs):
        step, rank = get_args().curr_iteration, get_args().rank
        {hook}
        stock(self, *args, **kwargs)

    Monitor.finalize_model_grads = hooked
    sys.exit(cli.main(sys.argv[1:]))
"""

# What upstream's pretrain_gpt.py does, with what this project adds to Megatron reduced to --spec.
UPSTREAM = """
import os
from megatron_xact.pretraining import cpu_platform

if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's demand, for tensor parallelism
    cpu_platform.activate()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron_xact.pretraining import gpt

    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, gpt.datasets_provider, ModelType.encoder_or_decoder, gpt.forward_step)
"""

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
DISTRIBUTED = ("--use-distributed-optimizer",)
VIRTUAL = (*PP2, "--num-layers", "4", "--num-layers-per-virtual-pipeline-stage", "1")
RESHARDABLE = (*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable")
GATED = ("--set", "activation.name=xsilu_glu1")
BIASES = ("--set", "model.disable-bias-linear=false")
RECOMPUTED = ("--recompute-granularity", "selective", "--recompute-modules", "mlp")
POLICY = ("--set", "activation.lr-mult=10", "--set", "activation.weight-decay=0.5")
# 0.98^n as n - 1 products in fp32 is none of 0.98^n rounded once from n = 3 on.
ON_HOST = ("--set", "deepspeed.offload-optimizer=true", "--adam-beta2", "0.98")


def zero(stage: int, *words: str) -> tuple[str, ...]:
    """The words for DeepSpeed's ZeRO of this stage."""
    return ("--set", "xact.engine=deepspeed", "--set", f"deepspeed.zero-stage={stage}", *words)


@dataclass(frozen=True)
class Job:
    words: tuple[str, ...] = ()
    ranks: int = 1
    loads: tuple[str, int] | None = None  # (name of another run, one of its checkpoints)
    config_of: str = ""  # another run, whose saved config.toml is trained again
    hook: str = ""
    again_after: str = ""  # another run: the same command in the same folder, once that one has ended
    ends_well: bool = True
    pictures: bool = False
    typed: bool = False  # the command as one types it, launcher and all; else its ranks alone, forked (warm.py)


JOBS = {
    "one": Job(typed=True),
    "tp2": Job(TP2, 2, typed=True),
    "one dropout": Job(("--hidden-dropout", "0.1")),
    "tp2 dropout": Job((*TP2, "--hidden-dropout", "0.1"), 2),
    "tp2 sp": Job((*TP2, "--sequence-parallel"), 2),
    "dp2": Job(DISTRIBUTED, 2),
    # Megatron seeds every pipeline stage differently, so these start from another run's checkpoint, resharded.
    "one@4 to pp2": Job(PP2, 2, ("one", 4)),
    "one@4 to tp2 pp2": Job((*TP2, *PP2), 4, ("one", 4), pictures=True),
    "gated": Job(GATED),
    "gated tp2": Job((*GATED, *TP2), 2),
    "biases": Job(BIASES),
    "biases recomputed tp2": Job((*BIASES, *RECOMPUTED, *TP2), 2),
    "bf16": Job(("--bf16", *DISTRIBUTED)),
    "bf16 vp": Job(("--bf16", *DISTRIBUTED, *VIRTUAL), 2),
    "bf16 tp2 dp2": Job(("--bf16", *TP2, *DISTRIBUTED), 4),
    "tp2@8 to pp2": Job(PP2, 2, ("tp2", 8)),
    "tp2 distributed": Job((*TP2, *RESHARDABLE), 2),
    "tp2 distributed@8 to pp2": Job((*PP2, *RESHARDABLE), 2, ("tp2 distributed", 8)),
    "one's config.toml": Job(config_of="one"),
    "one@8": Job((), 1, ("one", 8)),
    "dp2@8": Job(DISTRIBUTED, 2, ("dp2", 8)),
    "dp2@8 by dali": Job((*DISTRIBUTED, "--num-workers", "1", "--set", "xact.loader=dali"), 2, ("dp2", 8)),
    "bf16 tp2 dp2@8": Job(("--bf16", *TP2, *DISTRIBUTED), 4, ("bf16 tp2 dp2", 8)),
    "killed": Job(TP2, 2, hook="if (step, rank) == (10, 1): os.kill(os.getpid(), signal.SIGKILL)", ends_well=False),
    "killed, again": Job(TP2, 2, again_after="killed", typed=True),
    "perturbed": Job(
        TP2,
        2,
        hook="if (step, rank) == (9, 1): next(iter(self.activation_parameters())).data += 1e-3",
        ends_well=False,
    ),
    "perturbed, again": Job(TP2, 2, again_after="perturbed"),
    "policy": Job(POLICY),
    "zero1 tp2": Job(zero(1, *TP2), 2),
    "zero2 dp2": Job(zero(2), 2),
    "zero3 tp2 dp2": Job(zero(3, *TP2), 4),
    "zero2 gated dp2": Job(zero(2, *GATED), 2),
    "zero3 bf16 dp2": Job(zero(3, "--bf16"), 2),
    "zero2 policy tp2": Job(zero(2, *POLICY, *TP2), 2),
    "zero2 dp2@8 to zero3 tp2": Job(zero(3, *TP2), 2, ("zero2 dp2", 8)),
    "zero3 bf16 dp2@8": Job(zero(3, "--bf16"), 2, ("zero3 bf16 dp2", 8)),
    "zero1 offload": Job(zero(1, *ON_HOST)),
    "zero1 offload@8": Job(zero(1, *ON_HOST), 1, ("zero1 offload", 8)),
    "zero3 tp2 dp2@8 by megatron": Job(("--no-load-optim",), 1, ("zero3 tp2 dp2", 8)),
}


@dataclass(frozen=True)
class Run:
    folder: Path
    code: int
    output: str = field(repr=False)

    @property
    def losses(self) -> dict[int, float]:
        """Step -> loss in full precision; of a step that was repeated, the last."""
        return {record["step"]: record["loss"] for record in self.records("progress.jsonl")}

    @property
    def alphas(self) -> dict[int, dict[str, dict[str, float]]]:
        """Steps completed -> layer -> parameter -> effective value."""
        return {record["step"]: record["alphas"] for record in self.records("alphas.jsonl")}

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def scalars(self, tag: str) -> dict[int, float]:
        """What TensorBoard shows under `tag`, by step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}


@functools.cache
def trainings(folder: Path) -> Trainings:
    """The session's runs; `folder`: the session's temporary folder, the same for every module."""
    return Trainings(folder / "trainings")


class Trainings:
    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.data = prepare(folder / "data", source="stdlib", vocab_size=512, max_bytes=300_000)
        self.config = folder / "tiny.toml"
        self.config.write_text(CONFIG.format(root=ROOT, data=folder / "data", steps=STEPS))
        self.server = warm(folder.parent)
        self._futures: dict = {}
        # Most of these threads wait, for a core or for another run.
        self._threads = ThreadPoolExecutor(len(JOBS))
        self._cores = _Cores(max(2, min(os.cpu_count() or 1, 8)))

    def start(self, *names: str) -> Trainings:
        """Starts these runs where they have not been, side by side as far as there are cores."""
        for name in names:
            self._start(name)
        return self

    def __getitem__(self, name: str) -> Run:
        """A run that has been started, once it has ended; AssertionError with its output if it ended otherwise."""
        return self._futures[name].result()

    def _start(self, name: str) -> None:
        job = JOBS[name]
        before = job.loads[0] if job.loads else job.again_after or job.config_of
        if before:
            self._start(before)
        if name not in self._futures:
            self._futures[name] = self._threads.submit(self._train, name, job)

    def _train(self, name: str, job: Job) -> Run:
        folder = load = self.folder / re.sub(r"[^\w@.]+", "-", name)
        words = list(job.words)
        if job.again_after:
            folder = load = self._futures[job.again_after].result().folder
        if job.loads:
            source, step = job.loads
            load = self._futures[source].result().folder
            words += ["--ckpt-step", str(step)]
        config = self._futures[job.config_of].result().folder / "config.toml" if job.config_of else self.config
        words += ["--data-cache-path", f"{folder}-cache"]  # Megatron does not expect others to fill it meanwhile
        words = ["--save", str(folder), "--load", str(load), *words]
        if not (job.typed or job.hook):
            with self._cores.taken(job.ranks):
                said = self.server.run(str(config), *words, ranks=job.ranks, pictures=job.pictures)
            return Run(folder, 0, said)
        command = self.command(*words, ranks=job.ranks, config=config)
        if job.hook:
            script = self.folder / f"{folder.name}.py"
            script.write_text(HOOKED.format(hook=job.hook))
            command = [*_ranks(job.ranks), str(script), *command[3:]]
        with self._cores.taken(job.ranks):
            done = execute(command)
        output = done.stdout + done.stderr
        told = f"{name}: exit code {done.returncode}\n{output[-6000:]}"
        assert (done.returncode == 0) == job.ends_well, told
        return Run(folder, done.returncode, output)

    def command(self, *words: str, ranks: int = 1, config: Path | None = None) -> list[str]:
        head = [sys.executable, "-m", "megatron_xact"]
        return [*head, "pretrain", str(config or self.config), "--nproc-per-node", str(ranks), *words]

    def upstream(self, name: str, *words: str, ranks: int = 1) -> Run:
        """Megatron's trainer called as its pretrain_gpt.py calls it, with these arguments of its own."""
        script, folder = self.folder / "upstream.py", self.folder / name
        script.write_text(UPSTREAM)
        saving = ["--save", str(folder), "--tensorboard-dir", str(folder / "tensorboard")]
        saving += ["--data-cache-path", f"{folder}-cache"]
        with self._cores.taken(ranks):
            done = execute([*_ranks(ranks), str(script), *words, *saving])
        return Run(folder, done.returncode, done.stdout + done.stderr)


def deviations(run: Run, reference: Run) -> tuple[float, float]:
    """Largest |difference| of the losses, and of the alphas, over the steps of `run`, which `reference` has too."""
    assert run.losses and run.alphas
    losses = [abs(loss - reference.losses[step]) for step, loss in run.losses.items()]
    theirs = reference.alphas
    alphas = [
        abs(value - theirs[step][layer][name])
        for step, layers in run.alphas.items()
        for layer, values in layers.items()
        for name, value in values.items()
    ]
    return max(losses), max(alphas)


def copy_of(run: Run, folder: Path) -> Path:
    """A copy of a run's folder, to be damaged."""
    return shutil.copytree(run.folder, folder)


def _ranks(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def execute(command: list[str], timeout: float = 300.0) -> subprocess.CompletedProcess:
    """The command, from the repository's root, without a GPU, with its two outputs; nothing of it is left running."""
    mark = uuid.uuid4().hex
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "XACT_TRACEBACK")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "XACT_TEST": mark,
    }
    # Files, not pipes: what a killed rank leaves behind (Megatron's checkpoint queue has a process) would hold these.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        ended = process.poll() is not None
        _end_all(mark)
        process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    assert ended, f"{' '.join(command)}: no end after {timeout} s\n{texts[0][-4000:]}\n{texts[1][-4000:]}"
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _end_all(mark: str) -> None:
    """Kill every process that was started, by whatever way, with this mark in its environment."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("XACT_TEST") == mark:
                process.kill()
        except psutil.Error:
            continue  # it has ended, or is not ours to look at


class _Cores:
    """Cores to share; whoever wants more than there are takes them all."""

    def __init__(self, number: int):
        self._number = self._free = number
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        wanted = min(wanted, self._number)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()
