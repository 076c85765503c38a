"""One fixed order for all objectives, cut into optimiser steps, and the checkpoint each budget falls on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from leeway.data.items import Example
from leeway.errors import LeewayError
from leeway.hashing import canonical, derive_seed


@dataclass(frozen=True)
class Slot:
    """One example's place in the stream: `epoch` counts whole passes, `position` counts examples from 0."""

    example: Example
    epoch: int
    position: int


@dataclass(frozen=True)
class Mark:
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

    steps: tuple[tuple[Slot, ...], ...]
    marks: tuple[Mark, ...]

    @property
    def examples(self) -> list[Example]:
        """Every distinct example that is trained on, in first-seen order."""
        return list({slot.example.id: slot.example for step in self.steps for slot in step}.values())


def schedule(
    examples: Seq[Example],
    source_tokens: Callable[[Example], int],
    budgets: Seq[int],
    *,
    batch: int,
    seed: int,
) -> Schedule:
    """Cut the seeded stream of `examples` into steps of `batch` until the last budget is reached.

    A checkpoint falls on the first step whose cumulative source-token count reaches its budget. Each epoch has an order
    of its own, drawn from (seed, epoch) alone, so that the stream never depends on the budgets or the objective.
    """
    if not examples:
        raise LeewayError("task: there is nothing to train on", fix="check the task's training file")
    steps: list[tuple[Slot, ...]] = []
    marks: list[Mark] = []
    seen, position, running = 0, 0, hashlib.sha256(canonical([seed, batch]).encode())
    order: list[int] = []
    while len(marks) < len(budgets):
        step = []
        for _ in range(batch):
            epoch, k = divmod(position, len(examples))
            if k == 0:
                order = _order(len(examples), seed, epoch)
            example = examples[order[k]]
            step.append(Slot(example, epoch, position))
            running.update(_fingerprint(example))
            seen += source_tokens(example)
            position += 1
        steps.append(tuple(step))
        while len(marks) < len(budgets) and seen >= budgets[len(marks)]:
            budget, digest = budgets[len(marks)], running.hexdigest()[:16]
            marks.append(Mark(budget, len(steps), seen, position, position / len(examples), digest))
    return Schedule(tuple(steps), tuple(marks))


def _order(n: int, seed: int, epoch: int) -> list[int]:
    rng = np.random.default_rng(derive_seed("order", seed, epoch))
    return [int(i) for i in rng.permutation(n)]


def _fingerprint(example: Example) -> bytes:
    return canonical([example.id, example.prompt, example.preferred, example.dispreferred]).encode() + b"\n"
