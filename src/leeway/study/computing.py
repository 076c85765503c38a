"""How a study's numbers are computed, whoever computes them: its threads, and deterministic kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leeway.study.spec import Spec


@contextmanager
def computing(spec: Spec) -> Iterator[None]:
    """The study's number of threads and deterministic algorithms, for as long as the context lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    on_cpu = spec.device == "cpu" or not torch.cuda.is_available()
    torch.use_deterministic_algorithms(True, warn_only=not on_cpu)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
