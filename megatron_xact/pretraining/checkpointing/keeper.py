"""What happens to checkpoints while Megatron trains: checksums once one is complete, retention, room for the next.

Megatron has no callback after a save, and an asynchronous one is complete some steps later. But it moves the tracker
last of all, so a look at the tracker before each step tells the first rank when there is one more. The work is done in
a thread: it reads what was just written, and training does not wait for it.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.async_utils import maybe_finalize_async_save
from tqdm import tqdm

from megatron_xact.pretraining.checkpointing import checksums, retention, space
from megatron_xact.pretraining.checkpointing.folder import TRACKER, damage, name_of, tracked
from megatron_xact.pretraining.config import XactConfig
from megatron_xact.pretraining.files import why_not
from megatron_xact.whole import sync


class Keeper:
    """One per rank of a run that saves. The first one, which moves the tracker, works; the others hear its verdicts."""

    def __init__(self, folder: Path, settings: XactConfig, terminal: TextIO):
        self.folder = folder
        self.settings = settings
        self.terminal = terminal
        self._seen = self._tracker_time()
        self._needed = 0  # bytes that the next checkpoint takes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="xact-keeper")

    def watch(self, finalize_model_grads: Callable) -> Callable:
        """This function for `config.finalize_model_grads_func`, with a look at the checkpoints after it."""

        def watched(*args, **kwargs) -> None:
            finalize_model_grads(*args, **kwargs)
            self._look()
            if _save_follows(get_args()):
                self._require_room()

        return watched

    def check_start(self, model: list[torch.nn.Module]) -> None:
        """Raise NoSpace, on every rank, if there is no room for a checkpoint of this model. A collective."""
        estimate = space.estimate(_elements(model), get_args())
        if _is_first():
            self._needed = space.size_of_newest(self.folder) or estimate
        if not get_args().finetune:  # it goes on from the newest checkpoint, which a kill may have left to look after
            self._seen = None
        self._require_room()

    def close(self) -> None:
        """Look after the last checkpoint, and wait until that is done; also where training has failed."""
        if torch.distributed.is_initialized():
            self._look()
        self._thread.shutdown()

    def _look(self) -> None:
        if _is_first() and (now := self._tracker_time()) != self._seen:
            self._seen = now
            with contextlib.suppress(OSError, ValueError):  # writing it failed, which the save itself tells
                if isinstance(step := tracked(self.folder), int):
                    self._thread.submit(self._look_after, step)

    def _tracker_time(self) -> int | None:
        try:
            return (self.folder / TRACKER).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _look_after(self, step: int) -> None:
        """In the thread, which must not read the tracker: what is due once the checkpoint of `step` is complete."""
        try:
            checkpoint = self.folder / name_of(step)
            if (problem := damage(checkpoint)) is not None:
                self._tell(f"checkpoint {checkpoint}, which has just been saved, {problem}")
                return
            self._needed = space.size_of(checkpoint)
            # Megatron waits for the disk with its shards alone, and a machine that crashes must find one whole.
            for file in (*filter(Path.is_file, checkpoint.rglob("*")), self.folder / TRACKER):
                sync(file)
            if self.settings.checksums and not checksums.are_there(checkpoint) and (checkpoint / ".metadata").is_file():
                checksums.write(checkpoint)
            retention.sweep(self.folder, step, self.settings.keep_checkpoints, self.settings.keep_every)
        except (OSError, ValueError) as error:  # training need not end for it
            self._tell(f"looking after the checkpoints in {self.folder} failed: {why_not(error)}")

    def _require_room(self) -> None:
        """NoSpace on every rank if the next checkpoint has no room, not even once everything else is settled."""
        if not _said_by_first(lambda: space.shortage(self.folder, self._needed) is not None):
            return
        maybe_finalize_async_save(blocking=True)
        shortage = [None]
        if _is_first():
            self._seen = self._tracker_time()
            if isinstance(step := tracked(self.folder), int):
                self._thread.submit(self._look_after, step).result()  # retention makes what room it can
            shortage = [space.shortage(self.folder, self._needed)]
        torch.distributed.broadcast_object_list(shortage, src=0)  # any rank's words may be those that are told
        if shortage[0] is not None:
            raise space.NoSpace(
                f"no room for the next checkpoint: {shortage[0]}. What was saved before is complete; make room "
                "(keep-checkpoints in [xact] deletes old ones by itself), and the same command goes on"
            )

    def _tell(self, line: str) -> None:
        tqdm.write(f"xact: {line}", file=self.terminal)


def _save_follows(args: Namespace) -> bool:
    """Whether Megatron will save after the step that is under way, as far as one can know beforehand."""
    step = args.curr_iteration + 1
    return step == args.train_iters or bool(args.save_interval) and step % args.save_interval == 0


def _elements(model: list[torch.nn.Module]) -> dict[int, int]:
    """Parameters of the whole model by the bytes that each takes. What tensor parallelism replicates counts often."""
    counts = torch.zeros(9, dtype=torch.int64, device="cuda")
    for parameter in (p for chunk in model for p in chunk.parameters()):
        counts[parameter.element_size()] += parameter.numel()
    torch.distributed.all_reduce(counts, group=mpu.get_model_parallel_group())
    return {size: number for size, number in enumerate(counts.tolist()) if number}


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def _said_by_first(judge: Callable[[], bool]) -> bool:
    """What the first rank judges, on every rank. A collective."""
    verdict = torch.tensor([int(_is_first() and judge())], device="cuda")
    torch.distributed.broadcast(verdict, src=0)
    return bool(verdict.item())
