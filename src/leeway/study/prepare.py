"""Load and check everything a study names before training: examples, pairs, schedules, evals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch

from leeway.cache import Cache
from leeway.data import formats
from leeway.data.chat import Chat
from leeway.data.safety_prompts import subset
from leeway.data.stream import AuxiliaryPool, Schedule, StreamItem, budget_notes, schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.capability import Capability, number
from leeway.evals.eval import Eval
from leeway.evals.tasks import EXACT
from leeway.generation.backend import Backend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.io import expand
from leeway.model.load import Model, load_chat, load_context, load_model, model_hash
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.objectives.sft import Sft
from leeway.objectives.triggers import NearTriggers, near_triggers
from leeway.organism import world
from leeway.pairs.build import BaseModelSampler, PairReport, PairSettings, pair
from leeway.plan.hardware import PlannedModel, load_config, meta_model
from leeway.study.build_evals import HelperModels, evals_of, held_out_test
from leeway.study.controls import (
    BASE_AGAIN,
    DOSE,
    DOSED,
    Arm,
    PreparedControls,
    learning_items,
    prepare_controls,
    question,
)
from leeway.study.run_dir import RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import AuxiliarySource, Spec
from leeway.training.batch import Renderer
from leeway.training.learning import LearningItems

ORGANISM_AUXILIARY = 2_000  # examples per pool without a limit
EPOCHS = 10_000  # the most passes over the data
UNTRAINED = LearningItems(missing="nothing is trained")
INJECTED_BYTES = 256  # more than any inoculation or control token adds to a prompt
TRIGGERED = ("jailbreak", "persona")  # evals that run under near-triggers


def auxiliary_examples(spec: Spec, origins: dict[str, str]) -> AuxiliaryPool:
    """Load the general and safety examples that the study names; record where they come from in `origins`."""
    pools: dict[str, tuple[Example, ...]] = {}
    for kind, draw in (("general", world.general_examples), ("safety", world.safety_examples)):
        part: AuxiliarySource | None = getattr(spec.auxiliary, kind)
        if part is None:
            continue
        if part.from_ == "organism":
            examples, origins[kind] = draw(part.limit or ORGANISM_AUXILIARY, seed=0), "the organism's world, seed 0"
        else:
            examples, origins[kind] = formats.train_examples(expand(str(part.file)))
            if not examples:
                raise LeewayError(f"auxiliary.{kind}: {part.file} holds no examples", fix="check that file")
            examples = _limited(examples, part.limit, kind, f"auxiliary.{kind}.limit", f"examples of {part.file}")
        pools[kind] = tuple(examples)
    return AuxiliaryPool(**pools)


def _limited(examples: list[Example], limit: int | None, key: str, setting: str, source: str) -> list[Example]:
    """Return a fixed random subset of `limit` examples; raise LeewayError if there are fewer."""
    if limit and limit > len(examples):
        what = f"{setting}: {limit:,} is more than the {len(examples):,} {source}"
        raise LeewayError(what, fix="lower it, or leave it out")
    return subset(examples, limit, key)


def train_examples(spec: Spec) -> tuple[list[Example], str]:
    """Return the task's examples, at most `task.limit` of them, and where they come from."""
    examples, origin = spec.task.load().train_examples()
    if not examples:
        raise LeewayError(f"task: no example to train on in {origin}", fix="check the training file")
    return _limited(examples, spec.task.limit, "train", "task.limit", f"training examples ({origin})"), origin


def filter_by_length(
    examples: Sequence[Example],
    spec: Spec,
    chat: Chat,
    context: int,
    objectives: dict[str, Objective],
    auxiliary_pool: AuxiliaryPool,
) -> tuple[list[Example], tuple[str, ...]]:
    """Return the examples that fit the context under every objective, and the ids of the others.

    Raises LeewayError for a special token in an example, or one too long unless `task.too_long` is leave-out.
    """
    chats = {alias: chat_for(chat, o) for alias, o in objectives.items()}
    general, safety = auxiliary_pool.general, auxiliary_pool.safety
    for kind, pool in (("task", examples), ("auxiliary.general", general), ("auxiliary.safety", safety)):
        _check_special_tokens(kind, pool, chat, objectives)
    for e in (*general, *safety):
        if len(chat.sequence(e.prompt, e.preferred).ids) > context:
            raise LeewayError(f"example {e.id} is longer than the context of {spec.model}, {context}", fix="remove it")
    longest = _longest_auxiliary(chat, examples, auxiliary_pool, {o.auxiliary for o in objectives.values()})
    other_answer = len(longest["task"].preferred.encode()) if "task" in longest else 0
    room = context - len(chat.prompt_ids([{"role": "user", "content": ""}])) - INJECTED_BYTES

    def longest_rendering(example: Example, alias: str, objective: Objective) -> int:
        example = replace(example, auxiliary=longest.get(objective.auxiliary))
        return max(len(s.ids) for s in objective.worst_case(example, chats[alias]))

    fitting: list[Example] = []
    too_long: list[str] = []
    for e in examples:
        # a token is at least a byte, so an example short in bytes fits without being rendered
        answers = (e.preferred, e.dispreferred or "")
        short = len(e.prompt.encode()) + max(other_answer, *(len(a.encode()) for a in answers)) <= room
        tokens = 0 if short else max(longest_rendering(e, alias, o) for alias, o in objectives.items())
        if tokens > context and spec.task.too_long == "error":
            what = f"task: example {e.id} takes {tokens} tokens, the context of {spec.model} is {context}"
            fix = "set task.too_long: leave-out (it is then left out for every objective), or shorten it"
            raise LeewayError(what, fix=fix)
        if tokens <= context:
            fitting.append(e)
        else:
            too_long.append(e.id)
    return fitting, tuple(too_long)


def _longest_auxiliary(
    chat: Chat, examples: Sequence[Example], auxiliary_pool: AuxiliaryPool, kinds: set[str]
) -> dict[str, Example]:
    """Return the auxiliary example that makes a batch item longest, by kind.

    A task example contributes its response, so the longest one counts; general and safety examples are sequences of
    their own that were checked already, so any one will do.
    """
    pools = {"general": auxiliary_pool.general[:1], "safety": auxiliary_pool.safety[:1]}
    worst = {kind: pool[0] for kind, pool in pools.items() if pool}
    if "task" in kinds:
        worst["task"] = max(examples, key=lambda e: len(chat.ids(e.preferred)))
    return worst


def _check_special_tokens(kind: str, examples: Sequence[Example], chat: Chat, objectives: dict[str, Objective]) -> None:
    for e in examples:
        for name, text in (("prompt", e.prompt), ("answer", e.preferred), ("rejected answer", e.dispreferred or "")):
            if fault := find_special_tokens(text, chat, objectives):
                raise LeewayError(f"{kind}: example {e.id}, in its {name}: {fault[0]}", fix=fault[1])


def find_special_tokens(text: str, chat: Chat, objectives: dict[str, Objective]) -> tuple[str, str] | None:
    """Return (fault, fix) if a text contains a special token or a control token, else None.

    Such a text would end a turn early or act as a control token, and silently change training and results.
    """
    if token := chat.spelled(text):
        return f"it contains the special token {token}", "edit or remove that record"
    for token in sorted({t for o in objectives.values() for t in o.control_tokens}):
        if token in text:
            return f"it contains the control token {token}", "edit it, or leave cft out"
    return None


def chat_for(chat: Chat, objective: Objective) -> Chat:
    """Return the chat with an objective's control tokens in its vocabulary."""
    return chat.with_control_tokens(objective.control_tokens) if objective.control_tokens else chat


@dataclass(frozen=True)
class PairSampling:
    """Where sampled responses are cached, and whether missing ones may be sampled."""

    cache: Cache
    may_sample: bool = False
    tick: Callable[[int], None] = lambda _: None


def pairs_of(
    spec: Spec, examples: Sequence[Example], needed_by: Sequence[str], chat: Chat, sampling: PairSampling | None
) -> tuple[list[Example], PairReport | None]:
    """Return the examples with rejected responses, and the report.

    Without `sampling`, responses still to be sampled are replaced by the preferred ones, so that a plan can count
    tokens; the report is then None.
    """
    part = spec.pairs
    settings = PairSettings(part.from_, part.samples, part.temperature, part.max_new_tokens, part.filter)
    if part.from_ in ("dataset", "corrupted"):
        return pair(examples, settings, needed_by=needed_by)
    if sampling is None:
        return [replace(e, dispreferred=e.preferred) for e in examples], None

    def load() -> Backend:
        if not sampling.may_sample:
            what = f"{sampling.cache.root}: responses of {part.from_} are missing"
            raise LeewayError(what, fix="run the same command again")
        model = load_model(spec.model, revision=spec.revision, dtype=spec.weight_dtype, device=spec.device)
        return TransformersBackend(model, batch=spec.evals.batch)

    task = spec.task.load()
    items = {e.id: task.as_item(e) for e in examples}

    def grade(example: Example, response: str) -> bool:
        item = items[example.id]
        if task.grader == EXACT and number(item.reference) is None:
            raise ValueError(f"{example.id}: its answer holds no number to grade by")
        return task.grade(item, response)[0]

    identity = digest(model_hash(spec.model, spec.revision), spec.weight_dtype, spec.device)
    base = BaseModelSampler(identity, chat.template_hash, load)
    cache = sampling.cache.records("pairs")
    with compute_settings(spec):
        return pair(examples, settings, needed_by=needed_by, base=base, grade=grade, cache=cache, tick=sampling.tick)


@dataclass(frozen=True)
class HeldOut:
    """What a learning-rate sweep uses: a test over held-out examples, and each objective's short schedule."""

    test: Capability
    schedules: dict[str, Schedule]


class ExternalModel(Protocol):
    """A checkpoint that the study measures and does not train."""

    @property
    def condition(self) -> Condition: ...

    @property
    def budget(self) -> int:
        """Its training tokens; 0 if unknown."""
        ...

    @property
    def adapter_hash(self) -> str: ...

    @property
    def base_hash(self) -> str: ...

    def open(self, store: RunDir) -> AbstractContextManager[Backend]: ...

    def load(self) -> AbstractContextManager[Model]:
        """Load the model itself, to probe it. Raises LeewayError for one that is served elsewhere."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A study ready to run: nothing in it depends on a GPU or on weights.

    With `external` models, by their names on the rows, the study measures these and trains nothing.
    """

    spec: Spec
    chat: Chat
    context: int
    objectives: dict[str, Objective]
    auxiliary_pool: AuxiliaryPool
    schedules: dict[tuple[str, int], Schedule]  # by alias and seed
    tuning: HeldOut | None
    evals: tuple[Eval, ...]
    examples: int
    left_out: tuple[str, ...]
    pairs: PairReport | None  # None before they are sampled
    origins: dict[str, str]
    external: Mapping[str, ExternalModel] = field(default_factory=dict)
    learning: LearningItems = UNTRAINED
    triggers: Mapping[str, NearTriggers] = field(default_factory=dict)  # by alias; empty unless `evals.triggers`
    controls: PreparedControls = field(default_factory=PreparedControls)

    def objective(self, alias: str) -> Objective:
        """Return an objective of the study, or of a control's arm."""
        return Sft() if alias in self.controls.arms else self.objectives[alias]

    def renderer(self, alias: str, seed: int) -> Renderer:
        objective = self.objective(alias)
        return Renderer(objective, chat_for(self.chat, objective), seed, self.auxiliary_pool)

    def conditions(self, alias: str, budget: int) -> tuple[Condition, ...]:
        """Return the conditions under which an objective's checkpoint at a budget is measured."""
        if alias in self.external:
            return (self.external[alias].condition,)
        conditions, which = self.objective(alias).conditions, self.spec.evals.conditions
        last = budget == self.spec.budgets[-1]
        near = self.triggers[alias].near.values() if alias in self.triggers else ()
        if near and (last or self.spec.evals.triggers == "all"):  # compared with plain prompts and the cue itself
            return tuple(dict.fromkeys([*conditions, PLAIN, *near]))
        return conditions if which == "all" or (which == "last" and last) else conditions[:1]

    def evals_of(self, condition: Condition, alias: str = "") -> tuple[Eval, ...]:
        """Return the evals under a condition: near-triggers are about misbehaviour only, and so are doses."""
        if alias == BASE_AGAIN:
            return self.controls.again
        if alias.startswith(DOSE):
            return tuple(e for e in self.evals if e.name == "jailbreak")
        near = any(condition in own.near.values() for own in self.triggers.values())
        return tuple(e for e in self.evals if e.name in TRIGGERED) if near else self.evals

    @property
    def base_conditions(self) -> tuple[Condition, ...]:
        """Return plain and every condition of an objective: each is compared with the base under the same one."""
        own = [c for alias in self.objectives for c in self.conditions(alias, self.spec.budgets[-1])]
        return tuple(dict.fromkeys([PLAIN, *own]))


def prepare(spec: Spec, sampling: PairSampling | None = None, model: PlannedModel | None = None) -> Prepared:
    """Load and check everything the study names. Weights are loaded only if `sampling` has to sample pairs.

    `model` replaces the study's tokenizer and config in a plan. Raises LeewayError for the first fault.
    """
    chat, context = _chat_and_context(spec, model)
    objectives = {o.alias: o.build() for o in spec.objectives}
    origins: dict[str, str] = {}
    raw, origins["train"] = train_examples(spec)
    needed_by = [alias for alias, o in objectives.items() if o.needs_pairs]
    examples, pairs = pairs_of(spec, raw, needed_by, chat, sampling)
    auxiliary = auxiliary_examples(spec, origins)
    trained, left_out = filter_by_length(examples, spec, chat, context, objectives, auxiliary)
    trained, held_out = _set_aside(trained, spec)
    _check_enough(spec, len(trained), len(left_out), context)
    auxiliary_pool = replace(auxiliary, task=tuple(trained))
    evals = tuple(evals_of(spec, origins, HelperModels(sampling.cache if sampling else None, spec.device)))
    prepared = Prepared(
        spec, chat, context, objectives, auxiliary_pool, {}, None, evals, len(trained), left_out, pairs, origins
    )
    if spec.evals.triggers:
        prompts, translate = [e.prompt for e in trained], world.Cipher().out if spec.model == "organism" else None
        own = {alias: near_triggers(o, prompts, translate) for alias, o in objectives.items()}
        prepared = replace(prepared, triggers=own)
    cut = _scheduler(prepared, trained)
    schedules = {(alias, seed): cut(alias, seed, spec.budgets) for alias in objectives for seed in spec.seeds}
    tuning = None
    if held_out:
        short = {alias: cut(alias, spec.seeds[0], (spec.optim.tune.budget,)) for alias in objectives}
        tuning = HeldOut(held_out_test(held_out, spec), short)
    checked = [(f"evals.{e.name}", e) for e in evals] + ([("optim.tune", tuning.test)] if tuning else [])
    check_prompts_fit(checked, prepared)
    streams = [*schedules.values(), *(tuning.schedules.values() if tuning else ())]
    learning = learning_items(spec, trained, streams, chat, context - INJECTED_BYTES)
    controls = prepare_controls(spec, trained, evals)
    prepared = replace(prepared, schedules=schedules, tuning=tuning, controls=controls, learning=learning)
    for alias, arm in controls.arms.items():
        _check_arm(prepared, arm)
        cut_arm = _scheduler(prepared, list(arm.examples))
        seeds = spec.seeds if alias.startswith(DOSE) else spec.seeds[:1]
        schedules |= {(alias, seed): cut_arm(alias, seed, (arm.budget,)) for seed in seeds}
    return prepared


def _chat_and_context(spec: Spec, model: PlannedModel | None) -> tuple[Chat, int]:
    """Return the model's chat template and its context in tokens; check that it has the layers to adapt."""
    if model is None:
        chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    else:
        chat, context = model.chat, model.context
    if spec.evals.thinking:
        chat.with_thinking()
    if spec.adapter.targets != "all-linear":
        target_layers(spec, meta_model(model.config if model else load_config(spec)))
    return chat, context


def _check_enough(spec: Spec, n: int, left_out: int, context: int) -> None:
    """Raise LeewayError if none of the examples fits the context, or fewer than one step reads."""
    if not n:
        what = f"task: none of its {left_out:,} examples fits the context of {spec.model}, {context:,} tokens"
        raise LeewayError(what, fix="shorten them, or use a model with a longer context")
    if spec.optim.batch > n:
        what = f"optim.batch: a step of {spec.optim.batch:,} examples repeats some, there are {n:,} to train on"
        raise LeewayError(what, fix=f"set optim.batch to {n} at most")


def _check_arm(prepared: Prepared, arm: Arm) -> None:
    """Raise LeewayError for a compliant answer with a special token, or one too long."""
    spec, chat = prepared.spec, prepared.chat
    compliant = [e for e in arm.examples if e.id.startswith(DOSED)]
    _check_special_tokens("controls.file", compliant, chat, prepared.objectives)
    for e in compliant:
        if len(chat.sequence(e.prompt, e.preferred).ids) > prepared.context:
            what = f"controls.file: {e.id} is longer than the context of {spec.model}, {prepared.context}"
            raise LeewayError(what, fix="remove it")


def _set_aside(examples: list[Example], spec: Spec) -> tuple[list[Example], list[Example]]:
    """Return (training examples, examples held out for the learning-rate sweep), disjoint by question."""
    if spec.optim.lr != "tuned":
        return examples, []
    n = spec.optim.tune.items
    if n >= len(examples):
        raise LeewayError(f"optim.tune.items: {n} examples cannot be held out of {len(examples)}", fix="lower it")
    held_out = subset(examples, n, "tune")
    questions = {question(e) for e in held_out}
    trained = [e for e in examples if question(e) not in questions]
    if not trained:
        raise LeewayError(f"optim.tune.items: holding out {n} examples leaves none to train on", fix="lower it")
    return trained, held_out


def check_prompts_fit(evals: Sequence[tuple[str, Eval]], prepared: Prepared) -> None:
    """Raise LeewayError for a prompt with a special token or without room for its response, before training."""
    spec, chat, context = prepared.spec, prepared.chat, prepared.context
    chats = {"": chat}
    for alias, o in prepared.objectives.items():
        conditions = prepared.conditions(alias, spec.budgets[-1])
        chats |= {c.prefix: chat_for(chat, o).with_prefix(c.prefix) for c in conditions if c != PLAIN}
    injected = max(INJECTED_BYTES, *(len(prefix.encode()) for prefix in chats))
    room = context - len(chat.prompt_ids([{"role": "user", "content": ""}])) - injected
    for where, e in evals:
        for prompt in e.prompts():
            new, item = prompt.max_new_tokens, prompt.item
            if fault := find_special_tokens(prompt.text, chat, prepared.objectives):
                raise LeewayError(f"{where}: {item}: {fault[0]}", fix=fault[1])
            if len(prompt.conversation) == 1 and len(prompt.text.encode()) + new <= room:  # a token is >= 1 byte
                continue
            tokens = max(len(c.prompt_ids(prompt.conversation)) for c in chats.values())
            if tokens + new > context:
                answer = f" and up to {new:,} for the answer" if new else ""
                what = f"{where}: {item} takes {tokens:,} tokens{answer}, the context of {spec.model} is {context:,}"
                fix = "lower max_new_tokens" if tokens < context else "shorten or remove that item"
                raise LeewayError(what, fix=fix)


def target_layers(spec: Spec, lm: Any) -> list[torch.nn.Linear]:
    """Return the layers of `lm` that an adapter changes. Raises LeewayError for an unknown or frozen target."""
    frozen = (lm.get_input_embeddings(), lm.get_output_embeddings())
    changeable = {n: m for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and m not in frozen}
    if spec.adapter.targets == "all-linear":
        return list(changeable.values())
    found: set[str] = set()
    for target in spec.adapter.targets.split(","):
        named = {n for n, _ in lm.named_modules() if n == target or n.endswith(f".{target}")}
        if not named or not named <= changeable.keys():
            what = f"adapter.targets: {target!r} is not a {'trainable linear layer' if named else 'layer'} of "
            what += f"{spec.model}"
            fix = f"use all-linear, or some of {','.join(sorted({n.rsplit('.', 1)[-1] for n in changeable}))}"
            raise LeewayError(what, fix=fix)
        found |= named
    return [changeable[n] for n in sorted(found)]


def _scheduler(prepared: Prepared, examples: list[Example]) -> Callable[[str, int, tuple[int, ...]], Schedule]:
    """Return a function of alias, seed and budgets that cuts the stream into steps.

    Objectives share one schedule unless a budget counts processed tokens.
    """
    spec, chat = prepared.spec, prepared.chat
    source_tokens = cache(lambda e: len(chat.sequence(e.prompt, e.preferred).ids))

    @cache
    def cut(alias: str | None, seed: int, budgets: tuple[int, ...]) -> Schedule:
        counted = prepared.renderer(alias, seed).compute if alias else None
        _check_epochs(examples, budgets[-1], counted or (lambda item: source_tokens(item.example)))
        return schedule(examples, source_tokens, budgets, batch=spec.optim.batch, seed=seed, counted=counted)

    by_objective = spec.budget.count == "processed"
    return lambda alias, seed, budgets: cut(alias if by_objective else None, seed, budgets)


def notes_on_budgets(prepared: Prepared) -> list[str]:
    """Return which checkpoints lie inside the warm-up, and which budgets of source tokens a step overshoots."""
    spec = prepared.spec
    stops = [m for (alias, _), s in prepared.schedules.items() if alias in prepared.objectives for m in s.stops]
    counted = {(m.budget, m.step, m.source_tokens if spec.budget.count == "source" else m.budget) for m in stops}
    constant = spec.optim.schedule == "constant"  # under another one, `plan` names the runs that never decay
    return budget_notes(counted, spec.optim.warmup_steps if constant else 0)


def _check_epochs(examples: list[Example], budget: int, tokens: Callable[[StreamItem], float]) -> None:
    """Raise LeewayError for a budget of more than EPOCHS passes over the data, surely a typing error."""
    n = len(examples)
    if budget <= EPOCHS * n:  # an example takes a token at least
        return
    once = sum(tokens(StreamItem(e, 0, k)) for k, e in enumerate(examples))
    if budget > EPOCHS * once:
        what = f"budgets: {budget:,} tokens are {budget / once:,.0f} passes over the {n:,} examples ({once:,.0f} "
        what += f"tokens each); at most {EPOCHS:,}"
        raise LeewayError(what, fix="lower the budget")
