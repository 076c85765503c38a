"""What is said of a piece while it is carried out, for whoever shows progress: a kind of work, how much of it, what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from leeway.data.batches import Mark
from leeway.evals.eval import Eval
from leeway.evals.likert import Likert
from leeway.evals.persona import Persona
from leeway.objectives.objective import PLAIN
from leeway.study.pieces import BASE, Who
from leeway.training.loop import Step
from leeway.training.trajectory import Trajectory

Kind = Literal["train", "generate", "choose"]
Tell = Callable[[Kind, float, str], None]


def of_steps(tell: Tell, trajectory: Trajectory, mark: Mark) -> Callable[[Step], None]:
    def told(done: Step) -> None:
        tell(
            "train",
            done.processed_tokens + done.reference_tokens / 2,
            f"{trajectory.alias} s{trajectory.seed} step {done.step}/{mark.step} to {mark.budget:,} tokens "
            f"| loss {done.loss:.4f} | {done.processed_tokens / done.seconds:,.0f} tok/s",
        )

    return told


def of_asking(tell: Tell, trajectory: Trajectory) -> Callable[[int, int], None]:
    """Of a reference that is asked beforehand."""

    def told(done: int, of: int) -> None:
        tell("train", 0.0, f"{trajectory.alias} s{trajectory.seed} asking its reference | {done:,}/{of:,} tokens")

    return told


def of_answers(tell: Tell, at: str, e: Eval) -> Callable[[int], None]:
    answered = 0

    def told(n: int) -> None:
        nonlocal answered
        answered += n
        tell(kind_of(e), n, f"{at} | {e.key} {answered}/{len(e)}")

    return told


def said(who: Who) -> str:
    """A checkpoint under its condition, as the progress names it."""
    at = BASE if who.objective == BASE else f"{who.objective} s{who.seed} at {who.budget:,} tokens"
    return at if who.condition == PLAIN else f"{at} under {who.condition.name}"


def kind_of(e: Eval) -> Kind:
    return "choose" if isinstance(e, (Persona, Likert)) else "generate"
