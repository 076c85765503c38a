"""What a study trains on: the task's examples, what may stand beside them, and which of them fit the model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from leeway.data import files, gsm8k, supergpqa
from leeway.data.batches import Companions
from leeway.data.chat import Chat
from leeway.data.items import Example
from leeway.data.subset import subset
from leeway.data.task import load_task
from leeway.errors import LeewayError
from leeway.objectives import Objective
from leeway.organism import world
from leeway.paths import expand
from leeway.study.parts import Companion
from leeway.study.spec import Spec

ORGANISM_EXAMPLES = 10_000
ORGANISM_COMPANIONS = 2_000
INJECTED_BYTES = 256  # more than any inoculation or control token adds to a prompt


def companions_of(spec: Spec, origins: dict[str, str]) -> Companions:
    """General and safety examples, where the study names them."""
    return Companions(
        general=_companions("general", spec.general, origins), safety=_companions("safety", spec.safety, origins)
    )


def _companions(kind: str, part: Companion | None, origins: dict[str, str]) -> tuple[Example, ...]:
    if part is None:
        return ()
    if part.from_ == "organism":
        draw = world.general_examples if kind == "general" else world.safety_examples
        found, origins[kind] = draw(part.limit or ORGANISM_COMPANIONS, seed=0), "the organism's world, seed 0"
        return tuple(found)
    examples, origins[kind] = files.train_examples(expand(str(part.file)))
    if not examples:
        raise LeewayError(f"{kind}: {part.file} holds no examples", fix="check that file")
    if part.limit and part.limit > len(examples):
        raise LeewayError(
            f"{kind}.limit: {part.limit:,} is more than the {len(examples):,} examples of {part.file}",
            fix="lower it, or leave it out",
        )
    return tuple(subset(examples, part.limit, kind))


def train_examples(spec: Spec) -> tuple[list[Example], str]:
    task = spec.task
    if task.name == "organism":
        found, origin = world.train_examples(ORGANISM_EXAMPLES, seed=0), "the organism's world, seed 0"
    elif task.name == "gsm8k":
        found, origin = gsm8k.train_examples(task.revision)
    elif task.name == "supergpqa-engineering":
        found, origin = supergpqa.train_examples("Engineering", revision=task.revision)
    elif task.files is None:
        outside = load_task(task.name)
        found, origin = outside.train_examples(), outside.origin
    else:
        found, origin = files.train_examples(expand(task.files.train), unfit=task.unfit)
    if not found:
        raise LeewayError(f"task: no example to train on in {origin}", fix="check the training file")
    return subset(found, task.limit, "train"), origin


def fitting(
    examples: Seq[Example],
    spec: Spec,
    chat: Chat,
    context: int,
    objectives: dict[str, Objective],
    companions: Companions,
) -> tuple[list[Example], tuple[str, ...]]:
    """The examples that fit the context under every objective; the others' ids, where they may be left out."""
    chats = {alias: chat_for(chat, o) for alias, o in objectives.items()}
    for kind, pool in (("task", examples), ("general", companions.general), ("safety", companions.safety)):
        _refuse_special_tokens(kind, pool, chat, objectives)
    for e in (*companions.general, *companions.safety):
        if len(chat.sequence(e.prompt, e.preferred).ids) > context:
            raise LeewayError(f"example {e.id} is longer than the context of {spec.model}, {context}", fix="remove it")
    longest = _longest_companions(chat, examples, companions, {o.companion for o in objectives.values()})
    beside = len(longest["task"].preferred.encode()) if "task" in longest else 0
    room = context - len(chat.prompt_ids([{"role": "user", "content": ""}])) - INJECTED_BYTES
    kept: list[Example] = []
    left_out: list[Example] = []
    for e in examples:
        # a token is at least a byte, so what is short in bytes need not be rendered to see that it fits
        answers = (e.preferred, e.dispreferred or "")
        short = len(e.prompt.encode()) + max(beside, *(len(a.encode()) for a in answers)) <= room
        tokens = 0 if short else _longest(e, chats, objectives, longest)
        if tokens > context and spec.task.too_long == "error":
            raise LeewayError(
                f"task: example {e.id} takes {tokens} tokens, the context of {spec.model} is {context}",
                fix="set task.too_long: leave-out (it is then left out for every objective), or shorten it",
            )
        (kept if tokens <= context else left_out).append(e)
    return kept, tuple(e.id for e in left_out)


def _longest_companions(
    chat: Chat, examples: Seq[Example], companions: Companions, kinds: set[str]
) -> dict[str, Example]:
    """What stands beside an example at worst, of the kinds that are asked for.

    Another task example lends its answer, so that is the one with the longest; the others are rendered by themselves
    and were seen to fit.
    """
    found = {"general": companions.general[:1], "safety": companions.safety[:1]}
    worst = {kind: pool[0] for kind, pool in found.items() if pool}
    if "task" in kinds:
        worst["task"] = max(examples, key=lambda e: len(chat.ids(e.preferred)))
    return worst


def _refuse_special_tokens(kind: str, examples: Seq[Example], chat: Chat, objectives: dict[str, Objective]) -> None:
    for e in examples:
        for name, text in (("prompt", e.prompt), ("answer", e.preferred), ("rejected answer", e.dispreferred or "")):
            if fault := misread(text, chat, objectives):
                raise LeewayError(f"{kind}: example {e.id}, in its {name}: {fault[0]}", fix=fault[1])


def misread(text: str, chat: Chat, objectives: dict[str, Objective]) -> tuple[str, str] | None:
    """What in a text would be read as more than text, and what helps: a special token, or one of cft's.

    A turn that ends in the middle of an answer, or a control token that is no instruction, would change what is learned
    and measured without a word.
    """
    if token := chat.spelled(text):
        return f"it spells the special token {token}, and would be read as that", "mend or remove that record"
    for token in sorted({t for o in objectives.values() for t in o.control_tokens}):
        if token in text:
            return f"it holds the control token {token}", "mend it, or leave cft out"
    return None


def _longest(
    example: Example, chats: dict[str, Chat], objectives: dict[str, Objective], companions: dict[str, Example]
) -> int:
    """Tokens of the longest sequence that any objective can make of an example."""
    return max(
        len(s.ids)
        for alias, o in objectives.items()
        for s in o.worst_case(replace(example, companion=companions.get(o.companion)), chats[alias])
    )


def chat_for(chat: Chat, objective: Objective) -> Chat:
    """The chat that an objective renders with: its control tokens known."""
    return chat.with_control_tokens(objective.control_tokens) if objective.control_tokens else chat
