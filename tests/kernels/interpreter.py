"""Runs a test's body in a process of its own, under Triton's interpreter (kernels on CPU tensors, by numpy).

Triton decides at import time whether kernels are interpreted, so this cannot be in the process that compiles them.
What the interpreter gets wrong, and no test here relies on: rounding to bf16 (it truncates) and to fp8.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def in_interpreter(test: Callable) -> Callable:
    @functools.wraps(test)
    def call(*args, **kwargs):
        _worker().submit(_run, test.__module__, test.__name__, args, kwargs).result()

    return call


@functools.cache
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)
    atexit.register(pool.shutdown)
    return pool


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy, of infinities that tl.where then drops


def _run(module: str, name: str, args: tuple, kwargs: dict) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
