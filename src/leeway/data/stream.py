"""The stream of examples that all objectives share: its order, its optimiser steps and its checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.hashing import canonical, derive_seed

OVERSHOOT = 1.1  # a checkpoint beyond this multiple of its budget is pointed out


@dataclass(frozen=True)
class StreamItem:
    """One example at one position of the stream. `epoch` and `position` (in examples) count from 0."""

    example: Example
    epoch: int
    position: int


@dataclass(frozen=True)
class BudgetStop:
    """The step of a budget's checkpoint, and what the trajectory has seen by then (source tokens: plain rendering)."""

    budget: int
    step: int
    source_tokens: int
    examples: int
    epochs: float
    data_hash: str


@dataclass(frozen=True)
class Schedule:
    """The steps of a trajectory: `steps[k]` are the items of optimiser step k + 1."""

    steps: tuple[tuple[StreamItem, ...], ...]
    stops: tuple[BudgetStop, ...]


@dataclass(frozen=True)
class AuxiliaryPool:
    """The examples that an objective may see in addition to one of the stream, by kind."""

    task: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    safety: tuple[Example, ...] = ()

    def sample(self, slot: StreamItem, kind: Literal["task", "general", "safety"], seed: int) -> Example:
        """Return the auxiliary example of a stream item, determined by seed and position.

        A task example is drawn at random among those with another answer. General and safety examples come in shuffled
        passes, as the stream does.
        """
        pool: tuple[Example, ...] = getattr(self, kind)
        if kind == "task":
            rng = np.random.default_rng(derive_seed("companion", seed, slot.position))
            others = (pool[int(rng.integers(len(pool)))] for _ in range(100))
            example = next((e for e in others if e.preferred != slot.example.preferred), None)
        else:
            epoch, k = divmod(slot.position, max(1, len(pool)))
            example = pool[_order(len(pool), seed, epoch, kind)[k]] if pool else None
        if example is None:
            what = f"no {kind} example can accompany {slot.example.id}"
            raise LeewayError(what, fix="give more of them, with other answers")
        return example


def schedule(
    examples: Sequence[Example],
    source_tokens: Callable[[Example], int],
    budgets: Sequence[int],
    *,
    batch: int,
    seed: int,
    counted: Callable[[StreamItem], float] | None = None,
) -> Schedule:
    """Cut the seeded stream of `examples` into steps of `batch` until the last budget is reached.

    A checkpoint is at the first step at which the count reaches its budget: source tokens, or the sum of `counted`
    over the items. The order of an epoch depends on the seed and the epoch only, so the stream does not depend on the
    budgets or the objective.
    """
    if not examples:
        raise LeewayError("task: no training examples", fix="check the task's training file")
    steps: list[tuple[StreamItem, ...]] = []
    stops: list[BudgetStop] = []
    spent, seen, position, running = 0.0, 0, 0, hashlib.sha256(canonical([seed, batch]).encode())
    order: tuple[int, ...] = ()
    encoded = [canonical([e.id, e.prompt, e.preferred, e.dispreferred]).encode() + b"\n" for e in examples]
    while len(stops) < len(budgets):
        step = []
        for _ in range(batch):
            epoch, k = divmod(position, len(examples))
            if k == 0:
                order = _order(len(examples), seed, epoch)
            example = examples[order[k]]
            step.append(StreamItem(example, epoch, position))
            spent += counted(step[-1]) if counted else 0
            running.update(encoded[order[k]])
            seen += source_tokens(example)
            position += 1
        steps.append(tuple(step))
        while len(stops) < len(budgets) and (spent if counted else seen) >= budgets[len(stops)]:
            budget, digest = budgets[len(stops)], running.hexdigest()[:16]
            stops.append(BudgetStop(budget, len(steps), seen, position, position / len(examples), digest))
    return Schedule(tuple(steps), tuple(stops))


def budget_notes(stops: Iterable[tuple[int, int, int]], warmup_steps: int) -> list[str]:
    """State which checkpoints lie inside the warm-up of the learning rate, and which budgets a step overshoots.

    `stops`: (budget, optimiser step, source tokens) of each checkpoint.
    """
    found, known = list[str](), sorted(set(stops))
    early = {budget: step for budget, step, _ in known if step <= warmup_steps}
    if early:
        named = ", ".join(f"{budget:,} tokens (step {step})" for budget, step in early.items())
        which = "checkpoint lies" if len(early) == 1 else "checkpoints lie"
        found.append(f"{len(early)} {which} inside the warm-up of {warmup_steps} steps, below the full rate: {named}")
    over = {budget: tokens for budget, _, tokens in known if tokens > OVERSHOOT * budget}
    if over:
        named = ", ".join(f"{budget:,} trains {tokens:,} tokens" for budget, tokens in over.items())
        found.append(f"a budget ends with its optimiser step: {named}")
    return found


@lru_cache(maxsize=64)
def _order(n: int, seed: int, epoch: int, kind: str = "order") -> tuple[int, ...]:
    rng = np.random.default_rng(derive_seed(kind, seed, epoch))
    return tuple(int(i) for i in rng.permutation(n))
