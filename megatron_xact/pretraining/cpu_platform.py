"""Megatron without a GPU: a stand-in for the CUDA calls of `megatron.training` 0.19 (gloo, CPU tensors).

A development and test platform: it is what lets the quickstart, the tests and studies of tiny models run anywhere, with
the same trainer, parallelism and checkpoints as on GPUs. Beside `mends` it is the one place where this project replaces
symbols of torch and Megatron at run time; importing it does nothing, `activate()` does, and refuses where CUDA is.

What stands in for what:
* tensors asked for on "cuda" are made on the CPU: the factories that take `device=` are wrapped (a TorchFunctionMode
  would do the same at the cost of a Python call on every operation);
* the CUDA generator is a CPU generator of its own. It must not be the default one: tensor-parallel seeding would then
  change the weight initialisation, and TP=2 would no longer equal TP=1. Dropout draws from it, as on a GPU, so that
  tensor-parallel ranks share a mask where they share activations: of the default one, a rank with data loaders, which
  draw their seeds from it, would be ahead of the others;
* streams, events, memory statistics and nvtx ranges do nothing; CUDA type names are answered for CPU tensors.

Weights must be initialised by `--use-cpu-initialization` (master weight, then sharded): kernels here draw from the
default generator, so Megatron's per-rank CUDA initialisation would give every shard the same values.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from types import SimpleNamespace

import torch
import torch.utils._device
from torch.nn import functional

from megatron_xact.pretraining import mends

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip
_TENSOR_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def activate() -> None:
    """Make this process able to run `megatron.training` on the CPU. Idempotent; RuntimeError where CUDA is present."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform is for machines without a GPU, and torch sees one here")
    if is_active():
        return
    torch.cuda._xact_cpu_platform = True
    # First of all: dynamo reads its tables of torch.cuda functions once, on the first torch.compile decorator.
    import megatron.training.training  # noqa: F401

    _redirect_devices()
    _stand_in_for_torch_cuda()
    _stand_in_for_cuda_generator()
    _adapt_megatron()


def is_active() -> bool:
    return getattr(torch.cuda, "_xact_cpu_platform", False)


def _on_cpu(device) -> torch.device | str | int | None:
    """`device` with every spelling of a CUDA device answered by the CPU; anything else unchanged."""
    is_cuda = isinstance(device, int) or str(device).startswith("cuda")
    return _CPU if is_cuda and not isinstance(device, bool) else device


def _redirect_devices() -> None:
    # torch keeps a set of the factories that `with torch.device(...)` redirects, made when first asked for. Made after
    # the factories are replaced, transformers' `with torch.device("meta")` would redirect none of them and leave
    # buffers such as RoPE's frequencies uninitialised.
    torch.utils._device._device_constructors()

    def redirected(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if kwargs.get("device") is not None:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return function(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, redirected(getattr(torch, name)))
    for name in _TENSOR_METHODS:
        setattr(torch.Tensor, name, redirected(getattr(torch.Tensor, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        args = tuple(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def type_(self, dtype=None, *args, **kwargs):
        # The optimizers sort parameters by the names of CUDA tensor types.
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


class _OnlyQueue:
    """A CUDA stream or event where there is only one queue: every wait is over before it begins."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def record_event(self, *args):
        return _Event()

    def record(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


class _Stream(_OnlyQueue):
    pass


class _Event(_OnlyQueue):
    pass


def _stand_in_for_torch_cuda() -> None:
    def nothing():
        # A function of its own for each name: dynamo keeps a rule per function and refuses one under two rules.
        return lambda *args, **kwargs: None

    properties = SimpleNamespace(name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=1)
    stand_ins = {
        # Once DeepSpeed is imported, as transformers does where it is installed, torch counts devices to answer this.
        "is_available": lambda: False,
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,  # 0 makes Megatron skip its model-parallel set-up
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "CPU",
        "memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
        "memory_reserved": lambda *args, **kwargs: 0,
        "max_memory_reserved": lambda *args, **kwargs: 0,
        "memory_stats": lambda *args, **kwargs: _ZeroStatistics(),
        "reset_peak_memory_stats": nothing(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "set_stream": nothing(),
        "stream": lambda *args: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, nothing())


class _ZeroStatistics(dict):
    def __missing__(self, key: str) -> int:
        return 0


def _stand_in_for_cuda_generator() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    generator = torch.Generator()

    def get_state(device="cuda", clone=False, graph_safe=False) -> torch.Tensor:
        return generator.get_state()

    def set_state(new_state, device=-1, graph_safe=False) -> None:
        generator.set_state(new_state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: generator.manual_seed(seed)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state

    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    @contextlib.contextmanager
    def as_the_default():
        default = torch.get_rng_state()
        torch.set_rng_state(generator.get_state())
        try:
            yield
            generator.set_state(torch.get_rng_state())
        finally:
            torch.set_rng_state(default)

    @functools.wraps(dropout)
    def dropout_of_cuda(input, p=0.5, training=True, inplace=False):
        with as_the_default() if training and p else contextlib.nullcontext():
            return dropout(input, p, training, inplace)

    @functools.wraps(attention)
    def attention_of_cuda(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        with as_the_default() if dropout_p else contextlib.nullcontext():
            return attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)

    functional.dropout, functional.scaled_dot_product_attention = dropout_of_cuda, attention_of_cuda


def _adapt_megatron() -> None:
    from megatron.training import initialize, training

    # `pretrain` has no argument for allow_no_cuda.
    training.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    # Megatron's small fusions are torch.compile'd for GPUs and warmed up at start: minutes of C++ compilation here,
    # for nothing. Give back the plain functions.
    training.set_jit_fusion_options = lambda *args, **kwargs: None
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.")]:
        for name, value in list(vars(module).items()):
            if (plain := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
                setattr(module, name, plain)
    _gather_each_bucket_by_itself()
    _mend_async_saves()
    mends.apply()


def _gather_each_bucket_by_itself() -> None:
    """Of virtual pipeline stages after the first, Megatron gathers all buckets at once, alphas' fp32 and bf16 ones.

    NCCL can do that. Torch's gloo makes garbage of two dtypes that are gathered at once, and says nothing.
    """
    from megatron.core.distributed import distributed_data_parallel

    stock = distributed_data_parallel.partition_buckets

    def partition_buckets(buffers, force_single_bucket_group=False, **kwargs):
        return stock(buffers, force_single_bucket_group=False, **kwargs)

    distributed_data_parallel.partition_buckets = partition_buckets


def _mend_async_saves() -> None:
    """Let a worker process write checkpoints while training goes on.

    It is forked, so that it has this platform, too. And what it is given is copied before training goes on, as from a
    GPU: CPU tensors come to it as shared memory, which the next step would change while it writes.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import initialize

    stock_worker, stock_preload = initialize.init_persistent_async_worker, FileSystemWriterAsync.preload_tensors

    @functools.wraps(stock_preload)
    def preload_tensors(*args, **kwargs):
        buckets = stock_preload(*args, **kwargs)
        return [(*names, (data, [(i, t.clone()) for i, t in tensors])) for *names, (data, tensors) in buckets]

    FileSystemWriterAsync.preload_tensors = staticmethod(preload_tensors)
    initialize.init_persistent_async_worker = lambda rank, mp_mode: stock_worker(rank, "fork")
