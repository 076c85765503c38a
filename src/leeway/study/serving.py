"""vLLM as a study uses it: one server for the checkpoints of a piece, in the memory that training has left."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch

from leeway.generation.vllm import VllmServer, VllmSettings
from leeway.study.pieces import Who
from leeway.study.spec import Spec


@contextmanager
def serving(spec: Spec, asked: Seq[Who]) -> Iterator[VllmServer]:
    """A server of the study's base model, ended with the context; none is started where nobody is to be asked."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    settings = VllmSettings(spec.model, spec.revision, spec.dtype, spec.adapter.r, args=spec.evals.vllm_args)
    server = VllmServer(settings)
    if not asked:
        yield server
        return
    with server:
        yield server
