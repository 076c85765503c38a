"""From a study file to what it names: data, pairs, schedules, evals, each checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from leeway.attacks import WRAPPERS, Attack, Zulu
from leeway.data import files, forbidden, gsm8k, persona
from leeway.data.batches import Companions, Schedule, schedule
from leeway.data.chat import Chat
from leeway.data.items import CapabilityItem, Example, ForbiddenPrompt, PersonaItem
from leeway.data.pairs import make_pairs
from leeway.errors import LeewayError
from leeway.evals import exact
from leeway.evals import gsm8k as gsm8k_grader
from leeway.evals.capability import Capability, Grade
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.persona import Persona
from leeway.hashing import derive_seed
from leeway.judges import load_judge
from leeway.model.load import load_chat, load_context
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.organism import world
from leeway.study.parts import CapabilitySpec, Companion
from leeway.study.spec import Spec
from leeway.training.renderer import Renderer

T = TypeVar("T")
ORGANISM_EXAMPLES = 10_000
ORGANISM_COMPANIONS = 2_000
INJECTED_BYTES = 256  # more than any inoculation or control token adds to a prompt
NEW_TOKENS = {"organism": 64, "gsm8k": 400, "files": 256}


@dataclass(frozen=True)
class Prepared:
    """A study ready to run: nothing in it depends on a GPU or on weights."""

    spec: Spec
    chat: Chat
    context: int
    objectives: dict[str, Objective]
    companions: Companions
    schedules: dict[tuple[str, int], Schedule]  # by alias and seed
    evals: tuple[Eval, ...]
    examples: int
    left_out: tuple[str, ...]
    origins: dict[str, str]

    def renderer(self, alias: str, seed: int) -> Renderer:
        objective = self.objectives[alias]
        return Renderer(objective, chat_for(self.chat, objective), seed, self.companions)

    def conditions(self, alias: str) -> tuple[Condition, ...]:
        """What an objective's checkpoints are measured under."""
        conditions = self.objectives[alias].conditions
        return conditions if self.spec.evals.conditions == "all" else conditions[:1]

    @property
    def base_conditions(self) -> tuple[Condition, ...]:
        """Plain, and all that some objective is measured under: each is compared with the base under its own."""
        return tuple(dict.fromkeys([PLAIN, *(c for alias in self.objectives for c in self.conditions(alias))]))


def prepare(spec: Spec) -> Prepared:
    """Load and check everything that the study names, weights aside."""
    chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    objectives = {o.alias: o.build() for o in spec.objectives}
    origins: dict[str, str] = {}
    raw, origins["train"] = _train_examples(spec)
    needed_by = [alias for alias, o in objectives.items() if o.needs_pairs]
    assert spec.pairs.from_ in ("dataset", "corrupted")
    examples = make_pairs(raw, spec.pairs.from_, needed_by=needed_by)
    kept, left_out = _fitting(examples, spec, chat, context, objectives)

    @cache
    def source_tokens(example: Example) -> int:
        return len(chat.sequence(example.prompt, example.preferred).ids)

    companions = Companions(tuple(kept), *(_companions(spec, kind, origins) for kind in ("general", "safety")))

    def cut(alias: str, seed: int) -> Schedule:
        counted = None
        if spec.budget.count == "processed":
            objective = objectives[alias]
            counted = Renderer(objective, chat_for(chat, objective), seed, companions).processed
        return schedule(kept, source_tokens, spec.budgets, batch=spec.optim.batch, seed=seed, counted=counted)

    # matched by source tokens, all objectives share one schedule
    shared = {seed: cut("", seed) for seed in spec.seeds} if spec.budget.count == "source" else {}
    schedules = {(alias, seed): shared.get(seed) or cut(alias, seed) for alias in objectives for seed in spec.seeds}
    evals = tuple(_evals(spec, origins))
    return Prepared(spec, chat, context, objectives, companions, schedules, evals, len(kept), left_out, origins)


def _companions(spec: Spec, kind: str, origins: dict[str, str]) -> tuple[Example, ...]:
    """General or safety examples, where the study names them."""
    part: Companion | None = getattr(spec, kind)
    if part is None:
        return ()
    if part.from_ == "organism":
        draw = world.general_examples if kind == "general" else world.safety_examples
        found, origins[kind] = draw(part.limit or ORGANISM_COMPANIONS, seed=0), "the organism's world, seed 0"
        return tuple(found)
    examples, origins[kind] = files.train_examples(Path(str(part.file)).expanduser())
    return tuple(subset(examples, part.limit, kind))


def chat_for(chat: Chat, objective: Objective) -> Chat:
    """The chat that an objective renders with: its control tokens known."""
    return chat.with_control_tokens(objective.control_tokens) if objective.control_tokens else chat


def _train_examples(spec: Spec) -> tuple[list[Example], str]:
    task = spec.task
    if task.name == "organism":
        return world.train_examples(ORGANISM_EXAMPLES, seed=0), "the organism's world, seed 0"
    if task.name == "gsm8k":
        return gsm8k.train_examples(task.revision)
    assert task.files is not None
    return files.train_examples(Path(task.files.train).expanduser())


def _fitting(
    examples: Seq[Example], spec: Spec, chat: Chat, context: int, objectives: dict[str, Objective]
) -> tuple[list[Example], tuple[str, ...]]:
    """The examples that fit the context under every objective; the others' ids, where they may be left out."""
    room = context - len(chat.prompt_ids([{"role": "user", "content": ""}])) - INJECTED_BYTES
    chats = {alias: chat_for(chat, o) for alias, o in objectives.items()}
    _refuse_control_tokens(examples, objectives)
    kept: list[Example] = []
    left_out: list[Example] = []
    for e in examples:
        # a token is at least a byte, so what is short in bytes need not be rendered to see that it fits
        answer = max(len(e.preferred.encode()), len((e.dispreferred or "").encode()))
        longest = 0 if len(e.prompt.encode()) + answer <= room else _longest(e, chats, objectives)
        if longest > context and spec.task.too_long == "error":
            raise LeewayError(
                f"task: example {e.id} takes {longest} tokens, the context of {spec.model} is {context}",
                fix="set task.too_long: leave-out (it is then left out for every objective), or shorten it",
            )
        (kept if longest <= context else left_out).append(e)
    return kept, tuple(e.id for e in left_out)


def _refuse_control_tokens(examples: Seq[Example], objectives: dict[str, Objective]) -> None:
    """A control token inside a text would be read as the token, and could never be predicted."""
    for token in sorted({t for o in objectives.values() for t in o.control_tokens}):
        for e in examples:
            if token in e.prompt or token in e.preferred or token in (e.dispreferred or ""):
                raise LeewayError(
                    f"task: example {e.id} holds the control token {token}", fix="mend it, or leave cft out"
                )


def _longest(example: Example, chats: dict[str, Chat], objectives: dict[str, Objective]) -> int:
    """Tokens of the longest sequence that any objective can make of an example."""
    return max(len(s.ids) for alias, o in objectives.items() for s in o.worst_case(example, chats[alias]))


def _evals(spec: Spec, origins: dict[str, str]) -> list[Eval]:
    evals: list[Eval] = []
    for part in spec.evals.capability:
        items, origins[f"capability {part.name}"] = _capability_items(part, spec)
        grader, grade = _grader(part.name)
        evals.append(Capability(part.name, items, grader, grade, part.max_new_tokens or NEW_TOKENS[part.name]))
    jailbreak = spec.evals.jailbreak
    if jailbreak is not None:
        prompts, origins["jailbreak"] = _forbidden(jailbreak.prompts, jailbreak.limit)
        attacks = [_attack(name) for name in jailbreak.attacks]
        evals.append(Jailbreak(prompts, attacks, load_judge(jailbreak.judge), jailbreak.max_new_tokens))
    if spec.evals.persona is not None:
        evals.append(Persona(_persona(spec, origins)))
    return evals


def _capability_items(part: CapabilitySpec, spec: Spec) -> tuple[list[CapabilityItem], str]:
    if part.name == "organism":
        return world.capability_items(part.limit or 200), "the organism's world, held out"
    if part.name == "gsm8k":
        items, origin = gsm8k.held_out_items(spec.task.revision if spec.task.name == "gsm8k" else None)
    else:
        assert spec.task.files is not None
        items, origin = files.held_out_items(Path(spec.task.files.test).expanduser())
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    return subset(items, part.limit, "capability"), origin


def _grader(name: str) -> tuple[str, Grade]:
    if name == "organism":
        return "organism", lambda item, response: (world.capability_score(item, response), "")
    if name == "gsm8k":
        return "gsm8k-flexible", lambda item, response: gsm8k_grader.grade(item.reference, response)
    return "exact", lambda item, response: exact.grade(item.reference, response)


def _forbidden(name: str, limit: int | None) -> tuple[list[ForbiddenPrompt], str]:
    if name == "organism":
        return world.forbidden_prompts(limit or 100), "the organism's world, held out"
    prompts, origin = forbidden.strongreject()
    return subset(prompts, limit, "jailbreak"), origin


def _attack(name: str) -> Attack:
    return Zulu(world.Cipher()) if name == "zulu" else WRAPPERS[name]


def _persona(spec: Spec, origins: dict[str, str]) -> list[PersonaItem]:
    part = spec.evals.persona
    assert part is not None
    chosen: list[PersonaItem] = []
    for trait in part.traits:
        if part.source == "organism":
            items, origin = world.persona_items(trait, part.limit or 40), "the organism's world, held out"
        else:
            items, origin = persona.anthropic(trait)
        origins[f"persona {trait}"] = origin
        chosen += items if part.source == "organism" else balanced(items, part.limit, trait)
    return chosen


def subset(items: Seq[T], limit: int | None, key: str) -> list[T]:
    """A fixed random subset in the source's order; a larger limit's holds a smaller one's."""
    if limit is None or limit >= len(items):
        return list(items)
    order = np.random.default_rng(derive_seed("subset", key)).permutation(len(items))
    return [items[i] for i in sorted(int(i) for i in order[:limit])]


def balanced(items: Seq[PersonaItem], limit: int | None, key: str) -> list[PersonaItem]:
    """As many Yes-keyed as No-keyed items, so that a mere inclination to Yes endorses nothing."""
    if limit is None or limit >= len(items):
        return list(items)
    halves = [[i for i in items if i.match == answer] for answer in ("Yes", "No")]
    return [i for half, n in zip(halves, (limit - limit // 2, limit // 2), strict=True) for i in subset(half, n, key)]
