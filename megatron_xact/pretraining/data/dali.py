"""NVIDIA DALI as the loader of Megatron's own samples, in Megatron's own order: `[xact] loader = "dali"`.

What a batch holds is decided by Megatron's datasets and by the arithmetic of its sampler; DALI only fetches ahead, in
`num-workers` processes of its own (0: in this one). So batches equal the default loader's bit for bit, and resuming
is starting at the number of consumed samples. Text is small: expect no gain in throughput over the default loader.
The pipeline runs on the CPU; where CUDA is, batches come pinned, and forward_step copies them asynchronously.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core import mpu
from torch import Tensor
from torch.utils.data import Dataset

from megatron_xact.installed import extra


def loaders(datasets: Sequence[Dataset | None], args: Namespace) -> list[DaliLoader | None]:
    """What Megatron's `--dataloader-type external` takes in place of the (train, validation, test) datasets.

    ImportError: no DALI here.
    """
    _dali()
    train, evaluation = args.micro_batch_size, args.eval_micro_batch_size
    consumed = (args.consumed_train_samples, 0 if args.skip_train else args.consumed_valid_samples, 0)
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    return [
        None if dataset is None else DaliLoader(dataset, start, batch, rank, size, args.num_workers)
        for dataset, start, batch in zip(datasets, consumed, (train, evaluation, evaluation), strict=True)
    ]


class DaliLoader:
    """An iterator over this data-parallel rank's batches: name -> CPU tensor [batch, ...], pinned where CUDA is."""

    def __init__(
        self, dataset: Dataset, consumed_samples: int, batch_size: int, rank: int, size: int, num_workers: int = 0
    ) -> None:
        self._batches = _Batches(dataset, consumed_samples, batch_size, rank, size)
        self._num_workers = num_workers
        self._pipeline = None  # made with the first batch: its processes take seconds to start

    def __iter__(self) -> DaliLoader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._batches.number < 1:
            raise StopIteration
        if self._pipeline is None:
            self._pipeline = self._built()
        arrays = (output.as_array() for output in self._pipeline.run())  # StopIteration: no whole batch is left
        tensors = (torch.from_numpy(array) for array in arrays)  # of memory that DALI uses again: copied below
        copied = (tensor.pin_memory() if torch.cuda.is_available() else tensor.clone() for tensor in tensors)
        return dict(zip(self._batches.names, copied, strict=True))

    def _built(self):
        fn, Pipeline = _dali()
        parallel = self._num_workers > 0
        # spawn: a process with a CUDA context cannot be forked.
        workers = {"py_num_workers": self._num_workers, "py_start_method": "spawn"} if parallel else {}
        ahead = {"prefetch_queue_depth": 2 * self._num_workers} if parallel else {}
        pipeline = Pipeline(batch_size=self._batches.batch_size, num_threads=1, device_id=None, **workers)
        with pipeline:
            outputs = fn.external_source(
                self._batches,
                num_outputs=len(self._batches.names),
                batch=True,
                batch_info=True,
                parallel=parallel,
                **ahead,
            )
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline


class _Batches:
    """Batch number -> arrays [batch, ...]: the samples that Megatron's MegatronPretrainingSampler picks for a rank."""

    def __init__(self, dataset: Dataset, consumed_samples: int, batch_size: int, rank: int, size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.first, self.stride = consumed_samples + rank * batch_size, size * batch_size
        self.number = (len(dataset) - consumed_samples) // self.stride
        self.names = list(dataset[self.first]) if self.number > 0 else []

    def __call__(self, info) -> tuple[np.ndarray, ...]:
        if info.iteration >= self.number:
            raise StopIteration
        start = self.first + info.iteration * self.stride
        samples = [self.dataset[index] for index in range(start, start + self.batch_size)]
        return tuple(np.stack([np.asarray(sample[name]) for sample in samples]) for name in self.names)

    def __getstate__(self) -> dict:
        stream = io.BytesIO()
        _Pickler(stream).dump(self.dataset)
        return self.__dict__ | {"dataset": stream.getvalue()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"dataset": pickle.loads(state["dataset"])}


class _Pickler(pickle.Pickler):
    """Sends the name of a memory-mapped file, not its contents: sample orders have gigabytes."""

    def reducer_override(self, value: object):
        # A part of a mapped array is one too, but with the offset of the whole.
        if not isinstance(value, np.memmap) or isinstance(value.base, np.ndarray):
            return NotImplemented
        return np.memmap, (value.filename, value.dtype, "r", value.offset, value.shape)


def _dali():
    try:
        from nvidia.dali import Pipeline, fn
    except ImportError as error:
        raise ImportError(f'loader = "dali" needs NVIDIA DALI: {extra("dali")} ({error})') from None
    return fn, Pipeline
