"""From a study file to what it names: data, pairs, schedules, evals, each checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from leeway.attacks import Wrapper
from leeway.data.batches import Companions, Schedule, Slot, schedule
from leeway.data.chat import Chat
from leeway.data.items import Example
from leeway.data.subset import subset
from leeway.errors import LeewayError
from leeway.evals.capability import Capability
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.openended import OpenEnded
from leeway.evals.overrefusal import OverRefusal
from leeway.evals.persona import Persona
from leeway.model.load import load_chat, load_context, resolve
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.pairs import PairReport
from leeway.study.asked import evals_of, held_out_test
from leeway.study.drawing import Drawing, pairs_of
from leeway.study.spec import Spec
from leeway.study.standin import Subject
from leeway.study.training_data import INJECTED_BYTES, chat_for, companions_of, fitting, misread, train_examples
from leeway.study.voices import Voices
from leeway.training.renderer import Renderer

EPOCHS = 10_000  # at most over the data


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


def prepare(spec: Spec, drawing: Drawing | None = None, model: Subject | None = None) -> Prepared:
    """Load and check everything that the study names; weights only where `drawing` says that pairs may be drawn.

    `model` stands in for the study's own where a plan has been told that it is not at hand.
    """
    if model is None:
        chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    else:
        chat, context = model.chat, model.context
    if spec.adapter.targets != "all-linear" and spec.adapter.kind != "full":
        targeted(spec, model.skeleton() if model else skeleton(spec))
    objectives = {o.alias: o.build() for o in spec.objectives}
    origins: dict[str, str] = {}
    raw, origins["train"] = train_examples(spec)
    needed_by = [alias for alias, o in objectives.items() if o.needs_pairs]
    examples, pairs = pairs_of(spec, raw, needed_by, chat, drawing)
    beside = companions_of(spec, origins)
    kept, left_out = fitting(examples, spec, chat, context, objectives, beside)
    kept, held_out = _set_aside(kept, spec)
    if not kept:
        raise LeewayError(
            f"task: none of its {len(left_out):,} examples fits the context of {spec.model}, {context:,} tokens",
            fix="shorten them, or use a model with a longer context",
        )
    if spec.optim.batch > len(kept):
        raise LeewayError(
            f"optim.batch: a step of {spec.optim.batch:,} examples would meet some twice, there are {len(kept):,} to "
            "train on",
            fix=f"set optim.batch to {len(kept)} at most",
        )
    companions = replace(beside, task=tuple(kept))
    evals = tuple(evals_of(spec, origins, Voices(drawing.kept if drawing else None, spec.device)))
    prepared = Prepared(
        spec, chat, context, objectives, companions, {}, None, evals, len(kept), left_out, pairs, origins
    )
    cutter = _Cutter(prepared, kept)
    schedules = {(alias, seed): cutter.cut(alias, seed, spec.budgets) for alias in objectives for seed in spec.seeds}
    tuning = None
    if held_out:
        short = {alias: cutter.cut(alias, spec.seeds[0], (spec.optim.tune.budget,)) for alias in objectives}
        tuning = HeldOut(held_out_test(held_out, spec), short)
    asked = [(f"evals.{e.name}", e) for e in evals] + ([("optim.tune", tuning.test)] if tuning else [])
    refuse_unanswerable(asked, prepared)
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


def refuse_unanswerable(asked: Seq[tuple[str, Eval]], prepared: Prepared) -> None:
    """Questions that would be misread, or leave no room for an answer: here, and not after the training."""
    spec, chat, context = prepared.spec, prepared.chat, prepared.context
    asking = {"": chat}
    for alias, o in prepared.objectives.items():
        conditions = prepared.conditions(alias, spec.budgets[-1])
        asking |= {c.prefix: chat_for(chat, o).with_prefix(c.prefix) for c in conditions if c != PLAIN}
    room = context - len(chat.prompt_ids([{"role": "user", "content": ""}])) - INJECTED_BYTES
    for where, e in asked:
        new = getattr(e, "max_new_tokens", 0)
        for item, text in questions(e):
            if fault := misread(text, chat, prepared.objectives):
                raise LeewayError(f"{where}: {item}: {fault[0]}", fix=fault[1])
            if len(text.encode()) + new <= room:  # a token is at least a byte
                continue
            tokens = max(len(c.prompt_ids([{"role": "user", "content": text}])) for c in asking.values())
            if tokens + new > context:
                answer = f" and up to {new:,} for the answer" if new else ""
                raise LeewayError(
                    f"{where}: {item} takes {tokens:,} tokens{answer}, the context of {spec.model} is {context:,}",
                    fix="lower max_new_tokens" if tokens < context else "shorten or remove that item",
                )


def questions(e: Eval) -> Iterator[tuple[str, str]]:
    """(which item, the first message) of everything that an eval asks, where that is known beforehand."""
    if isinstance(e, Capability):
        yield from ((f"item {i.id}", "\n".join(m["content"] for m in e.conversation(i))) for i in e.items)
    elif isinstance(e, OpenEnded):
        yield from ((f"item {i.id}", i.prompt) for i in e.items)
    elif isinstance(e, OverRefusal):
        yield from ((f"prompt {p.id}", p.text) for p in e.items)
    elif isinstance(e, Persona):
        yield from ((f"item {i.id}", i.question) for i in e.items)
    elif isinstance(e, Jailbreak):
        wrappers = [a for a in e.attacks if isinstance(a, Wrapper)]
        for p in e.prompts:
            yield f"prompt {p.id}", p.text
            yield from ((f"prompt {p.id} under {a.name}", a.wrap(p.text)) for a in wrappers)


def skeleton(spec: Spec) -> Any:
    """The model's layers without weights, from its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(resolve(spec.model), revision=spec.revision, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def targeted(spec: Spec, lm: Any) -> list[torch.nn.Linear]:
    """The layers of `lm` that an adapter changes; raises LeewayError for a target that is none or may not change."""
    frozen = (lm.get_input_embeddings(), lm.get_output_embeddings())
    changeable = {n: m for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and m not in frozen}
    if spec.adapter.targets == "all-linear":
        return list(changeable.values())
    found: set[str] = set()
    for target in spec.adapter.targets.split(","):
        named = {n for n, _ in lm.named_modules() if n == target or n.endswith(f".{target}")}
        if not named or not named <= changeable.keys():
            raise LeewayError(
                f"adapter.targets: {target!r} is no {'linear layer that may change' if named else 'layer'} of "
                f"{spec.model}",
                fix=f"use all-linear, or some of {','.join(sorted({n.rsplit('.', 1)[-1] for n in changeable}))}",
            )
        found |= named
    return [changeable[n] for n in sorted(found)]


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
        self._refuse_endless(budgets[-1], counted)
        batch = self._prepared.spec.optim.batch
        return schedule(self._examples, self._source_tokens, budgets, batch=batch, seed=seed, counted=counted)

    def _refuse_endless(self, budget: int, counted: Callable[[Slot], float] | None) -> None:
        """A budget of so many passes over the data is a slip of the pen."""
        n = len(self._examples)
        if budget <= EPOCHS * n:  # an example takes a token at least
            return
        slots = [Slot(e, 0, k) for k, e in enumerate(self._examples)]
        once = sum(counted(s) if counted else self._source_tokens(s.example) for s in slots)
        if budget > EPOCHS * once:
            raise LeewayError(
                f"budgets: {budget:,} tokens are {budget / once:,.0f} passes over the {n:,} examples ({once:,.0f} "
                f"tokens each); at most {EPOCHS:,}",
                fix="lower the budget",
            )
