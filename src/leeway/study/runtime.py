"""How a study's numbers are computed, whoever computes them: its threads, and deterministic kernels."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from leeway.study.spec import Spec

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGE = 1 << 30  # bytes


@contextmanager
def compute_settings(spec: Spec) -> Iterator[None]:
    """The study's number of threads and deterministic algorithms, for as long as the context lasts."""
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
    """Deterministic algorithms, or only a warning where there is none; freed memory is kept from here on.

    Memory that was not written yet holds anything: filling it first, as deterministic algorithms do by default, finds
    mistakes in kernels and costs a pass over every result.
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
    """Let glibc hand out large blocks again that were freed, in place of new ones from the system.

    A result of a few MiB comes from fresh pages otherwise, and touching them costs more than computing it.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(MMAP_THRESHOLD, LARGE)
            libc.mallopt(TRIM_THRESHOLD, LARGE)
