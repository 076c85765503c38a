"""Start the ranks of one trajectory on this machine, hear what they say, and end them all where one fails."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from leeway.errors import LeewayError
from leeway.training.ranks import Ranks, Together

Say = Callable[[Any], None]
Target = Callable[..., None]  # a function of a module: (ranks, say, *args)

PATIENCE = timedelta(hours=2)  # that a rank waits for the others, of which one may be writing a large model


def check(processes: int, device: str) -> None:
    """Raise LeewayError where this machine cannot hold so many ranks."""
    if processes == 1 or not _on_gpu(device):
        return
    if (there := torch.cuda.device_count()) < processes:
        raise LeewayError(
            f"processes: {processes} ranks need a GPU each, and {there} {'is' if there == 1 else 'are'} visible",
            fix=f"set processes: {max(1, there)}, or device: cpu",
        )


def in_ranks(processes: int, device: str, target: Target, args: tuple[Any, ...], hear: Say) -> None:
    """Run `target(ranks, say, *args)` in every one of `processes` new processes; `hear` gets what the first says.

    Ranks meet over gloo on a CPU, and over NCCL with one GPU each. The first failure is raised here, and ends all.
    """
    check(processes, device)
    context = multiprocessing.get_context("spawn")
    said: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        begin = (processes, "cuda" if _on_gpu(device) else "cpu", f"file://{folder}/meet", os.getpid(), said)
        ranks = [context.Process(target=_rank, args=(r, *begin, target, args)) for r in range(processes)]
        try:
            for rank in ranks:
                rank.start()
            failure = None
            while failure is None and any(r.is_alive() for r in ranks) and not any(r.exitcode for r in ranks):
                failure = _listen(said, hear, 0.2)
            failure = failure or _listen(said, hear, 0.5)
            _judge(failure, [r.exitcode or 0 for r in ranks])
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _judge(failure: Exception | None, codes: list[int]) -> None:
    """Raise what went wrong first: what a rank says of another's death says less than the death."""
    dead = [r for r, code in enumerate(codes) if code < 0]
    silent = [r for r, code in enumerate(codes) if code > 0 and failure is None]
    if isinstance(failure, LeewayError) or (failure is not None and not dead):
        raise failure
    for rank in dead or silent:
        raise LeewayError(
            f"processes: rank {rank} was killed, by the system for want of memory perhaps",
            fix="run the same command again, it carries on",
        ) from failure


def _listen(said: Any, hear: Say, patience: float) -> Exception | None:
    """Pass on what has been said; the first failure that a rank tells of comes back."""
    while True:
        try:
            event = said.get(timeout=patience)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            return event
        hear(event)


def _rank(
    rank: int, size: int, kind: str, meet: str, parent: int, said: Any, target: Target, args: tuple[Any, ...]
) -> None:
    from leeway.study.executor import _die_with

    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if kind == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=meet, timeout=PATIENCE, rank=rank, world_size=size)
        ranks: Ranks = Together(rank, size, device)
        target(ranks, said.put if ranks.leads else _silent, *args)
        ranks.wait()
        torch.distributed.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
        ours = isinstance(error, LeewayError)
        said.put(error if ours else RuntimeError("".join(traceback.format_exception(error))))
        said.close()
        said.join_thread()
        os._exit(1)


def _silent(event: Any) -> None:
    """Ranks do the same: one of them speaks."""
