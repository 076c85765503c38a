"""Where a checkpoint's own answers are kept while a study runs, and under which identity."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from leeway.evals.eval import Eval
from leeway.evals.lm_eval import LmEval
from leeway.generation.answers import AnsweredBackend, Answers
from leeway.generation.backend import Backend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.paths import expand

SHARED = "LEEWAY_ANSWERS"  # a folder that several runs on this machine share
BATCHES = 4  # in a portion: what a kill loses at most


def kept(backend: TransformersBackend, adapter_hash: str, own: Path) -> AnsweredBackend:
    """The same answers, asked only once: kept in the run's `own` folder, or in the one that runs share.

    The identity is of all that the bits depend on beside the requests: weights, adapter, what stands before a prompt,
    dtype, decoder, batch, device and its arithmetic, threads, versions.
    """
    model = backend.model
    made_by = digest(
        "transformers",
        model.hash,
        adapter_hash,
        backend.prefix,
        [backend.batch, backend.overlong, backend.fused],
        [str(model.head.weight_VD.dtype), str(model.device), torch.get_num_threads()],
        torch.backends.cpu.get_cpu_capability(),
        [version(p) for p in ("leeway", "torch", "transformers")],
    )
    return AnsweredBackend(backend, Answers(folder(own)), made_by, BATCHES * backend.batch)


def folder(own: Path) -> Path:
    shared = os.environ.get(SHARED)
    return expand(shared).absolute() if shared else own


def forget(own: Path) -> None:
    """A finished run has all of its answers in its rows."""
    shutil.rmtree(own, ignore_errors=True)


def asked_of(backend: Backend, e: Eval) -> Backend:
    """Whom an eval asks: the model itself where it needs more of it than its answers."""
    return backend.backend if isinstance(e, LmEval) and isinstance(backend, AnsweredBackend) else backend
