"""The processes that train one trajectory together, as the one optimiser loop sees them: one rank, or several.

What several ranks compute is what one computes, to rounding: the examples of an optimiser step are dealt out, losses
and gradients are summed. A step's dropout is another draw for each number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.hashing import derive_seed
from leeway.model import sharded
from leeway.model.layout import Examples, longest
from leeway.model.load import Dtype, Model
from leeway.model.reference import Reference

Micro = Seq[Seq[Sequence]]
Cut = Callable[[Examples], Iterable[Micro]]  # into micro-batches


@dataclass(frozen=True)
class Ranks:
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
            f"{index}.{name}": sharded.whole(value).detach().cpu().contiguous()
            for index, p in enumerate(parameters)
            for name, value in optimiser.state[p].items()
        }

    def wait(self) -> None:
        """Until every rank is here."""


ALONE = Ranks()


@dataclass(frozen=True)
class Together(Ranks):
    """One of several ranks, on `device`; the process group is there, and every rank does the same in the same order."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def loading(self, dtype: Dtype, device: str) -> tuple[Dtype, str]:  # noqa: ARG002
        """In main memory: a GPU gets its shards alone."""
        return "bfloat16" if dtype == "auto" and self.device.type == "cuda" else dtype, "cpu"

    def shard(self, model: Model, optimiser: torch.optim.Optimizer, reference: Reference) -> None:
        if any(sharded.is_shard(p) for p in model.lm.parameters()):
            return
        taken = sharded.shard(model, self.size, self.device)
        for group in optimiser.param_groups:
            state = [optimiser.state.pop(p, {}) for p in group["params"]]
            group["params"] = [taken.get(p, p) for p in group["params"]]
            group["foreach"] = False  # sharded and whole tensors cannot go through one kernel
            for p, values in zip(group["params"], state, strict=True):
                if values:
                    optimiser.state[p] = {k: sharded.like(v, p) if v.shape == p.shape else v for k, v in values.items()}
        if reference.frozen is not None:
            reference.frozen = {taken.get(p, p): self._spread(v, taken.get(p, p)) for p, v in reference.frozen.items()}

    def _spread(self, value: Tensor, parameter: torch.nn.Parameter) -> Tensor:
        if sharded.is_shard(parameter):
            return sharded.like(value, parameter)
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
            if sharded.is_shard(grad):
                squares += torch.linalg.vector_norm(sharded.local(grad)).double() ** 2
        self._summed(squares)
        for grad in grads:
            if not sharded.is_shard(grad):
                squares += torch.linalg.vector_norm(self._summed(grad)).double() ** 2
        norm = float(squares.sqrt())
        for grad in grads:
            sharded.local(grad).mul_(min(1.0, bound / (norm + 1e-6)))
        return norm

    def whole(self, model: Model) -> dict[str, Tensor] | None:
        found: dict[Tensor, Tensor] = {}  # a tied weight is one tensor with two names, and stays one
        named = {n: t for n, t in model.lm.state_dict(keep_vars=True).items() if t.requires_grad}
        for tensor in dict.fromkeys(named.values()):
            full = sharded.whole(tensor.detach())
            if self.leads:
                found[tensor] = full.cpu()
        return {name: found[tensor] for name, tensor in named.items() if tensor in found}

    def wait(self) -> None:
        torch.distributed.barrier()

    def _summed(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor
