"""The processes (ranks) that train one trajectory together, and how they are started on this machine.

Several ranks compute what one does, to rounding: the examples of an optimiser step are split, losses and gradients
summed. Dropout masks depend on the number of ranks.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.hashing import derive_seed
from leeway.model import fsdp
from leeway.model.load import Dtype, Model
from leeway.model.packing import Examples, longest
from leeway.model.reference import Reference

Micro = Seq[Seq[Sequence]]
Cut = Callable[[Examples], Iterable[Micro]]  # into micro-batches


@dataclass(frozen=True)
class Distributed:
    """A single process: nothing is split or sharded."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes files."""
        return self.rank == 0

    def loading(self, dtype: Dtype, device: str) -> tuple[Dtype, str]:
        """Return the dtype and device to load a model with."""
        return dtype, device

    def shard(self, model: Model, optimiser: torch.optim.Optimizer, reference: Reference) -> None:
        """Shard the trainable parameters, the optimiser state and a frozen reference before the first step."""

    def seed(self, seed: int) -> int:
        """Return this rank's dropout seed of a step."""
        return seed

    def share(self, examples: Examples, cut: Cut) -> Iterator[tuple[Micro, float]]:
        """Yield this rank's micro-batches of a step with a loss weight of 1, or 0 for filler.

        Every rank gets equally many, since all ranks gather each layer together.
        """
        yield from ((micro, 1.0) for micro in cut(examples))

    def sum(self, value: float) -> float:
        """Return the sum over ranks."""
        return value

    def clip(self, parameters: list[torch.nn.Parameter], bound: float) -> float:
        """Clip the norm of the whole batch's gradient; return the norm before clipping."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, bound))

    def whole(self, model: Model) -> dict[str, Tensor] | None:  # noqa: ARG002
        """Return the gathered model state by name on rank 0; None if nothing is sharded."""
        return None

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the optimiser state on the CPU, by parameter index and name, independent of the number of ranks."""
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        return {
            f"{index}.{name}": fsdp.whole(value).detach().cpu().contiguous()
            for index, p in enumerate(parameters)
            for name, value in optimiser.state[p].items()
        }

    def wait(self) -> None:
        """Wait for every rank."""


ALONE = Distributed()


@dataclass(frozen=True)
class TorchDistributed(Distributed):
    """One of several ranks on `device`, within an initialised process group."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def loading(self, dtype: Dtype, device: str) -> tuple[Dtype, str]:  # noqa: ARG002
        """Load into main memory; a GPU receives its shards only."""
        return "bfloat16" if dtype == "auto" and self.device.type == "cuda" else dtype, "cpu"

    def shard(self, model: Model, optimiser: torch.optim.Optimizer, reference: Reference) -> None:
        if any(fsdp.is_shard(p) for p in model.lm.parameters()):
            return
        taken = fsdp.shard(model, self.size, self.device)
        for group in optimiser.param_groups:
            state = [optimiser.state.pop(p, {}) for p in group["params"]]
            group["params"] = [taken.get(p, p) for p in group["params"]]
            group["foreach"] = False  # sharded and whole tensors cannot go through one kernel
            for p, values in zip(group["params"], state, strict=True):
                if values:
                    optimiser.state[p] = {k: fsdp.like(v, p) if v.shape == p.shape else v for k, v in values.items()}
        if reference.frozen is not None:
            reference.frozen = {taken.get(p, p): self._spread(v, taken.get(p, p)) for p, v in reference.frozen.items()}

    def _spread(self, value: Tensor, parameter: torch.nn.Parameter) -> Tensor:
        if fsdp.is_shard(parameter):
            return fsdp.like(value, parameter)
        value.data = value.data.to(self.device)  # in place: the reference's head holds this very tensor
        return value

    def seed(self, seed: int) -> int:
        return derive_seed("rank", seed, self.rank)

    def share(self, examples: Examples, cut: Cut) -> Iterator[tuple[Micro, float]]:
        """Deal examples out in order of length, which balances the ranks."""
        ordered = sorted(examples, key=longest)
        shares = [list(cut(ordered[r :: self.size])) if r < len(ordered) else [] for r in range(self.size)]
        mine = shares[self.rank]
        for k in range(max(map(len, shares))):
            yield (mine[k], 1.0) if k < len(mine) else ((mine or shares[0])[0], 0.0)

    def sum(self, value: float) -> float:
        return float(self._summed(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def clip(self, parameters: list[torch.nn.Parameter], bound: float) -> float:
        grads = [p.grad for p in parameters if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for grad in grads:
            if fsdp.is_shard(grad):
                squares += torch.linalg.vector_norm(fsdp.local(grad)).double() ** 2
        self._summed(squares)
        for grad in grads:
            if not fsdp.is_shard(grad):
                squares += torch.linalg.vector_norm(self._summed(grad)).double() ** 2
        norm = float(squares.sqrt())
        for grad in grads:
            fsdp.local(grad).mul_(min(1.0, bound / (norm + 1e-6)))
        return norm

    def whole(self, model: Model) -> dict[str, Tensor] | None:
        found: dict[Tensor, Tensor] = {}  # a tied weight is one tensor with two names, and stays one
        named = {n: t for n, t in model.lm.state_dict(keep_vars=True).items() if t.requires_grad}
        for tensor in dict.fromkeys(named.values()):
            full = fsdp.whole(tensor.detach())
            if self.is_main:
                found[tensor] = full.cpu()
        return {name: found[tensor] for name, tensor in named.items() if tensor in found}

    def wait(self) -> None:
        torch.distributed.barrier()

    def _summed(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor


Send = Callable[[Any], None]
Target = Callable[..., None]  # a module-level function: (ranks, send, *args)

PATIENCE = timedelta(hours=2)  # timeout of collectives: one rank may be writing a large model


def check(processes: int, device: str) -> None:
    """Raise LeewayError if this machine lacks the GPUs for `processes` ranks."""
    if processes > 1 and _on_gpu(device) and (visible := torch.cuda.device_count()) < processes:
        what = f"processes: {processes} ranks need one GPU each, {visible} visible"
        raise LeewayError(what, fix=f"set processes: {max(1, visible)}, or device: cpu")


def run_distributed(processes: int, device: str, target: Target, args: tuple[Any, ...], on_event: Send) -> None:
    """Run `target(ranks, send, *args)` in `processes` new processes; `on_event` receives the main rank's events.

    Ranks use gloo on a CPU and NCCL with one GPU each. The first failure stops all ranks and is raised here.
    """
    check(processes, device)
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        kind = "cuda" if _on_gpu(device) else "cpu"
        rendezvous = (processes, kind, f"file://{folder}/init_method", os.getpid(), events)
        ranks = [context.Process(target=_rank, args=(r, *rendezvous, target, args)) for r in range(processes)]
        try:
            for rank in ranks:
                rank.start()
            failure = None
            while failure is None and any(r.is_alive() for r in ranks) and not any(r.exitcode for r in ranks):
                failure = _listen(events, on_event, 0.2)
            failure = failure or _listen(events, on_event, 0.5)
            _raise_first(failure, [r.exitcode or 0 for r in ranks])
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _raise_first(failure: Exception | None, codes: list[int]) -> None:
    """Raise the root cause: a killed rank before the errors that its death caused in others."""
    dead = [r for r, code in enumerate(codes) if code < 0]
    silent = [r for r, code in enumerate(codes) if code > 0 and failure is None]
    if isinstance(failure, LeewayError) or (failure is not None and not dead):
        raise failure
    for rank in dead or silent:
        what = f"processes: rank {rank} was killed (probably out of memory)"
        raise LeewayError(what, fix="run the same command again to resume") from failure


def _listen(events: Any, on_event: Send, patience: float) -> Exception | None:
    """Forward events until none arrives for `patience` seconds; return the first failure."""
    while True:
        try:
            event = events.get(timeout=patience)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            return event
        on_event(event)


def _rank(
    rank: int, size: int, kind: str, init_method: str, parent: int, events: Any, target: Target, args: tuple[Any, ...]
) -> None:
    exit_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if kind == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method, PATIENCE, world_size=size, rank=rank)
        ranks: Distributed = TorchDistributed(rank, size, device)
        target(ranks, events.put if ranks.is_main else lambda _: None, *args)
        ranks.wait()
        torch.distributed.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - the parent raises it
        ours = isinstance(error, LeewayError)
        events.put(error if ours else RuntimeError("".join(traceback.format_exception(error))))
        events.close()
        events.join_thread()
        os._exit(1)


def exit_with_parent(parent: int) -> None:
    """Exit when the parent process dies, even if it died before this call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
