"""One fixed order for all objectives, cut into optimiser steps, and the checkpoint each budget falls on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.hashing import canonical, derive_seed


@dataclass(frozen=True)
class StreamItem:
    """One example's place in the stream: `epoch` counts whole passes, `position` counts examples from 0."""

    example: Example
    epoch: int
    position: int


@dataclass(frozen=True)
class BudgetStop:
    """Where a budget's checkpoint is taken, and what had been seen by then (source tokens: plain rendering)."""

    budget: int
    step: int
    source_tokens: int
    examples: int
    epochs: float
    data_hash: str


@dataclass(frozen=True)
class Schedule:
    """The steps of a trajectory: `steps[k]` holds the slots of optimiser step k + 1."""

    steps: tuple[tuple[StreamItem, ...], ...]
    marks: tuple[BudgetStop, ...]

    @property
    def examples(self) -> list[Example]:
        """Every distinct example that is trained on, in first-seen order."""
        return list({slot.example.id: slot.example for step in self.steps for slot in step}.values())


@dataclass(frozen=True)
class AuxiliaryPool:
    """The examples that an objective may see in addition to one of the stream, by kind."""

    task: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    safety: tuple[Example, ...] = ()

    def sample(self, slot: StreamItem, kind: Literal["task", "general", "safety"], seed: int) -> Example:
        """One example of `kind`, from (seed, position) alone; of the task's, never one answered like the slot's own.

        General and safety examples come in passes, each in an order of its own, as the task's do.
        """
        pool: tuple[Example, ...] = getattr(self, kind)
        if kind == "task":
            rng = np.random.default_rng(derive_seed("companion", seed, slot.position))
            others = (pool[int(rng.integers(len(pool)))] for _ in range(100))
            found = next((e for e in others if e.preferred != slot.example.preferred), None)
        else:
            epoch, k = divmod(slot.position, max(1, len(pool)))
            found = pool[_order(len(pool), seed, epoch, kind)[k]] if pool else None
        if found is None:
            raise LeewayError(
                f"no {kind} example can accompany {slot.example.id}",
                fix="give more of them, with other answers",
            )
        return found


def schedule(
    examples: Seq[Example],
    source_tokens: Callable[[Example], int],
    budgets: Seq[int],
    *,
    batch: int,
    seed: int,
    counted: Callable[[StreamItem], float] | None = None,
) -> Schedule:
    """Cut the seeded stream of `examples` into steps of `batch` until the last budget is reached.

    A checkpoint falls on the first step whose cumulative count reaches its budget: of source tokens, or of what
    `counted` says of each slot. Each epoch has an order of its own, drawn from (seed, epoch) alone, so that the stream
    never depends on the budgets or the objective.
    """
    if not examples:
        raise LeewayError("task: there is nothing to train on", fix="check the task's training file")
    steps: list[tuple[StreamItem, ...]] = []
    marks: list[BudgetStop] = []
    spent = 0.0
    seen, position, running = 0, 0, hashlib.sha256(canonical([seed, batch]).encode())
    order: tuple[int, ...] = ()
    prints = [_fingerprint(e) for e in examples]
    while len(marks) < len(budgets):
        step = []
        for _ in range(batch):
            epoch, k = divmod(position, len(examples))
            if k == 0:
                order = _order(len(examples), seed, epoch)
            example = examples[order[k]]
            step.append(StreamItem(example, epoch, position))
            spent += counted(step[-1]) if counted else 0
            running.update(prints[order[k]])
            seen += source_tokens(example)
            position += 1
        steps.append(tuple(step))
        while len(marks) < len(budgets) and (spent if counted else seen) >= budgets[len(marks)]:
            budget, digest = budgets[len(marks)], running.hexdigest()[:16]
            marks.append(BudgetStop(budget, len(steps), seen, position, position / len(examples), digest))
    return Schedule(tuple(steps), tuple(marks))


@lru_cache(maxsize=64)
def _order(n: int, seed: int, epoch: int, kind: str = "order") -> tuple[int, ...]:
    rng = np.random.default_rng(derive_seed(kind, seed, epoch))
    return tuple(int(i) for i in rng.permutation(n))


def _fingerprint(example: Example) -> bytes:
    return canonical([example.id, example.prompt, example.preferred, example.dispreferred]).encode() + b"\n"
