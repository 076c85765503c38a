"""The processes that train one trajectory together, as the one optimiser loop sees them: one rank, or several.

What several ranks compute is what one computes, to rounding: the examples of an optimiser step are dealt out, losses
and gradients are summed. A step's dropout is another draw for each number of ranks.

Start the ranks of one trajectory on this machine, hear what they say, and end them all where one fails.
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
    """One process alone: everything is its own, and nothing is sharded."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def loading(self, dtype: Dtype, device: str) -> tuple[Dtype, str]:
        """In what and where a model is loaded."""
        return dtype, device

    def shard(self, model: Model, optimiser: torch.optim.Optimizer, reference: Reference) -> None:
        """Before the first step: spread what is trained, its optimiser's state and a frozen reference."""

    def seed(self, seed: int) -> int:
        """What this rank's dropout of a step is drawn from."""
        return seed

    def share(self, examples: Examples, cut: Cut) -> Iterator[tuple[Micro, float]]:
        """This rank's micro-batches of a step, each with the weight (1 or 0) that its loss has.

        Every rank is given equally many, since layers are gathered by all at once: those that fill up weigh nothing.
        """
        yield from ((micro, 1.0) for micro in cut(examples))

    def sum(self, value: float) -> float:
        """Of all ranks' values."""
        return value

    def clip(self, parameters: list[torch.nn.Parameter], bound: float) -> float:
        """Bring the gradient of the whole batch to at most this norm; returns the norm that it had."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, bound))

    def whole(self, model: Model) -> dict[str, Tensor] | None:  # noqa: ARG002
        """The model's state by name for rank 0 to save, what trains put together; None where nothing is sharded."""
        return None

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """On the CPU, by the parameter's number and the state's name; the same however many ranks there are."""
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        return {
            f"{index}.{name}": fsdp.whole(value).detach().cpu().contiguous()
            for index, p in enumerate(parameters)
            for name, value in optimiser.state[p].items()
        }

    def wait(self) -> None:
        """Until every rank is here."""


ALONE = Distributed()


@dataclass(frozen=True)
class TorchDistributed(Distributed):
    """One of several ranks, on `device`; the process group is there, and every rank does the same in the same order."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def loading(self, dtype: Dtype, device: str) -> tuple[Dtype, str]:  # noqa: ARG002
        """In main memory: a GPU gets its shards alone."""
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
        """Dealt out one by one in the order of length, so that all have about as much to do."""
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
            if self.leads:
                found[tensor] = full.cpu()
        return {name: found[tensor] for name, tensor in named.items() if tensor in found}

    def wait(self) -> None:
        torch.distributed.barrier()

    def _summed(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor


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


def run_distributed(processes: int, device: str, target: Target, args: tuple[Any, ...], hear: Say) -> None:
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
    exit_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if kind == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=meet, timeout=PATIENCE, rank=rank, world_size=size)
        ranks: Distributed = TorchDistributed(rank, size, device)
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


def exit_with_parent(parent: int) -> None:
    """A killed run leaves no worker behind that would go on writing; nor one that was born as it was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
