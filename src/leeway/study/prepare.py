"""From a study file to what it names: data, pairs, schedules, evals, each checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from leeway.data.batches import Companions, Schedule, Slot, schedule
from leeway.data.chat import Chat
from leeway.data.items import Example
from leeway.data.subset import subset
from leeway.errors import LeewayError
from leeway.evals.capability import Capability
from leeway.evals.eval import Eval
from leeway.model.load import load_chat, load_context
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.pairs import PairReport
from leeway.study.asked import evals_of, held_out_test
from leeway.study.drawing import Drawing, pairs_of
from leeway.study.spec import Spec
from leeway.study.training_data import chat_for, companions_of, fitting, train_examples
from leeway.training.renderer import Renderer


@dataclass(frozen=True)
class HeldOut:
    """What learning rates are chosen by: examples set aside from training, and each objective's short schedule."""

    test: Capability
    schedules: dict[str, Schedule]


@dataclass(frozen=True)
class Prepared:
    """A study ready to run: nothing in it depends on a GPU or on weights."""

    spec: Spec
    chat: Chat
    context: int
    objectives: dict[str, Objective]
    companions: Companions
    schedules: dict[tuple[str, int], Schedule]  # by alias and seed
    tuning: HeldOut | None
    evals: tuple[Eval, ...]
    examples: int
    left_out: tuple[str, ...]
    pairs: PairReport | None  # none where they are still to be drawn
    origins: dict[str, str]

    def renderer(self, alias: str, seed: int) -> Renderer:
        objective = self.objectives[alias]
        return Renderer(objective, chat_for(self.chat, objective), seed, self.companions)

    def conditions(self, alias: str, budget: int) -> tuple[Condition, ...]:
        """What an objective's checkpoint at a budget is measured under."""
        conditions, asked = self.objectives[alias].conditions, self.spec.evals.conditions
        everything = asked == "all" or (asked == "last" and budget == self.spec.budgets[-1])
        return conditions if everything else conditions[:1]

    @property
    def base_conditions(self) -> tuple[Condition, ...]:
        """Plain, and all that some objective is measured under: each is compared with the base under its own."""
        return tuple(
            dict.fromkeys(
                [PLAIN, *(c for alias in self.objectives for c in self.conditions(alias, self.spec.budgets[-1]))]
            )
        )


def prepare(spec: Spec, drawing: Drawing | None = None) -> Prepared:
    """Load and check everything that the study names; weights only where `drawing` says that pairs may be drawn."""
    chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    objectives = {o.alias: o.build() for o in spec.objectives}
    origins: dict[str, str] = {}
    raw, origins["train"] = train_examples(spec)
    needed_by = [alias for alias, o in objectives.items() if o.needs_pairs]
    examples, pairs = pairs_of(spec, raw, needed_by, chat, drawing)
    beside = companions_of(spec, origins)
    kept, left_out = fitting(examples, spec, chat, context, objectives, beside)
    kept, held_out = _set_aside(kept, spec)
    companions = replace(beside, task=tuple(kept))
    evals = tuple(evals_of(spec, origins))
    prepared = Prepared(
        spec, chat, context, objectives, companions, {}, None, evals, len(kept), left_out, pairs, origins
    )
    cutter = _Cutter(prepared, kept)
    schedules = {(alias, seed): cutter.cut(alias, seed, spec.budgets) for alias in objectives for seed in spec.seeds}
    tuning = None
    if held_out:
        short = {alias: cutter.cut(alias, spec.seeds[0], (spec.optim.tune.budget,)) for alias in objectives}
        tuning = HeldOut(held_out_test(held_out, spec), short)
    return replace(prepared, schedules=schedules, tuning=tuning)


def _set_aside(examples: list[Example], spec: Spec) -> tuple[list[Example], list[Example]]:
    """(what is trained on, what learning rates are chosen by): apart for every objective alike."""
    if spec.optim.lr != "tuned":
        return examples, []
    n = spec.optim.tune.items
    if n >= len(examples):
        raise LeewayError(
            f"optim.tune.items: {n} examples cannot be set aside, there are {len(examples)}", fix="ask for fewer"
        )
    held_out = subset(examples, n, "tune")
    asked = {_question(e) for e in held_out}
    trained = [e for e in examples if _question(e) not in asked]
    if not trained:
        raise LeewayError(f"optim.tune.items: setting {n} examples aside leaves none to train on", fix="ask for fewer")
    return trained, held_out


def _question(example: Example) -> str:
    """A prompt by its words: one that is asked twice is trained on and held out at once otherwise."""
    return " ".join(example.prompt.casefold().split())


class _Cutter:
    """Cuts the stream into steps: one schedule for all objectives where a budget counts source tokens."""

    def __init__(self, prepared: Prepared, examples: list[Example]) -> None:
        self._prepared, self._examples = prepared, examples
        self._source_tokens = cache(lambda e: len(prepared.chat.sequence(e.prompt, e.preferred).ids))
        self._shared: dict[tuple[int, tuple[int, ...]], Schedule] = {}

    def cut(self, alias: str, seed: int, budgets: tuple[int, ...]) -> Schedule:
        if self._prepared.spec.budget.count == "processed":
            return self._cut(seed, budgets, self._prepared.renderer(alias, seed).compute)
        if (seed, budgets) not in self._shared:
            self._shared[seed, budgets] = self._cut(seed, budgets, None)
        return self._shared[seed, budgets]

    def _cut(self, seed: int, budgets: tuple[int, ...], counted: Callable[[Slot], float] | None) -> Schedule:
        batch = self._prepared.spec.optim.batch
        return schedule(self._examples, self._source_tokens, budgets, batch=batch, seed=seed, counted=counted)
