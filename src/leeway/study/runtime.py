"""Compute settings of a study: its number of threads, and deterministic kernels."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGE = 1 << 30  # bytes


class ComputeSettings(Protocol):
    """The threads and device of a study; `Spec` has them."""

    @property
    def threads(self) -> int: ...

    @property
    def device(self) -> str: ...


@contextmanager
def compute_settings(spec: ComputeSettings) -> Iterator[None]:
    """Set the study's number of threads and deterministic algorithms within the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    on_cpu = spec.device == "cpu" or not torch.cuda.is_available()
    try:
        with deterministic(warn_only=not on_cpu):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def deterministic(*, warn_only: bool = False) -> Iterator[None]:
    """Use deterministic algorithms within the context; `warn_only` warns if an operation has none.

    Torch would also fill uninitialised memory, which finds mistakes in kernels but costs a pass over every result.
    """
    _keep_freed_memory()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(False)


@cache
def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks: touching fresh pages costs more than computing a result of a few MiB."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(MMAP_THRESHOLD, LARGE)
            libc.mallopt(TRIM_THRESHOLD, LARGE)
