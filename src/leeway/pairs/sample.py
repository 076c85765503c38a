"""sampled-errors: the base model's own wrong answers to the training prompts, where a grader can tell.

The base model as pairs need it: who it is, and itself only where something is not in the cache yet.

Ask, look, ask again: round k draws the k-th answer to every prompt that still lacks an acceptable one.

What an answer of the base model has to be before it may stand as a rejected one, whatever the strategy.

A rejected answer that refuses would teach an objective to refuse less, one that is not language would teach it to write
language, and one that was cut off to end its turn: each a lesson that the study did not ask for.

unsafe: the base model's answer to the same prompt, asked for in an undesirable manner; the trained prompt is plain.

Instruction, manners and the sifting question stand in `unsafe.yaml`, versioned and hashed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.hashing import derive_seed, digest
from leeway.judges.coherence import coherence
from leeway.judges.keywords import KeywordJudge
from leeway.pairs.cache import Cache, Record
from leeway.pairs.types import Filter, PairSettings
from leeway.yaml_config import package_data


class NotDrawn(Exception):
    """An answer is not in the cache, and the caller did not want it drawn."""


def not_to_be_drawn() -> Backend:
    """A `Base.load` for callers that must touch no weights: raises NotDrawn."""
    raise NotDrawn


@dataclass(frozen=True)
class BaseModelSampler:
    """The model that a study starts from: `hash` identifies its weights and the dtype it answers in."""

    hash: str
    template_hash: str
    load: Callable[[], Backend]


@dataclass
class Asker:
    """Asks the base model what it was never asked before; all else comes from the cache."""

    base: BaseModelSampler
    settings: PairSettings
    cache: Cache
    tick: Tick
    _backend: Backend | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, base: BaseModelSampler, settings: PairSettings, instruction_hash: str, folder: Path, tick: Tick
    ) -> Asker:
        """With the one file that holds what this model said under these settings."""
        drawn = [settings.temperature, settings.max_new_tokens, settings.seed]
        identity = digest("pairs", base.hash, base.template_hash, settings.strategy, drawn, instruction_hash)
        return cls(base, settings, Cache(folder / f"{settings.strategy}-{identity}.jsonl"), tick)

    def answers(self, conversations: Seq[Conversation], sample: int) -> list[Reply]:
        """Drawn answers; where one is missing all of them are asked, so that a resumed batch is the same batch."""
        keys = [digest("answer", c, sample) for c in conversations]
        if any(self.cache.get(k) is None for k in keys):
            s = self.settings
            requests = [Request(c, s.max_new_tokens, s.temperature, sample, s.seed) for c in conversations]
            replies = self._asked().complete(requests, self.tick)
            lines = [{"text": r.text, "new_tokens": r.new_tokens, "cut": r.cut} for r in replies]
            self.cache.add(dict(zip(keys, lines, strict=True)))
        return [Reply(r["text"], r["new_tokens"], r["cut"]) for r in map(self._kept, keys)]

    def choices(self, conversations: Seq[Conversation], options: Seq[str]) -> list[Choice]:
        """How likely each option is to come next."""
        keys = [digest("choice", c, list(options)) for c in conversations]
        if any(self.cache.get(k) is None for k in keys):
            choices = self._asked().choose(conversations, options, lambda _: None)
            self.cache.add({k: {"mass": c.mass} for k, c in zip(keys, choices, strict=True)})
        return [Choice(self._kept(k)["mass"]) for k in keys]

    def _kept(self, key: str) -> Record:
        record = self.cache.get(key)
        assert record is not None
        return record

    def _asked(self) -> Backend:
        if self._backend is None:
            self._backend = self.base.load()
        return self._backend


BATCH = 512  # prompts between two writes to the cache: a kill loses no more


@dataclass(frozen=True)
class Ask:
    """An example and the conversation that the base model is to answer."""

    example: Example
    conversation: Conversation


Reasons = Callable[[Seq[Ask], Seq[Reply]], list[str | None]]  # why an answer is rejected; None accepts it


@dataclass
class Drawn:
    """The accepted answer of each ask, by its place, and what became of the others."""

    accepted: dict[int, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    by_round: list[int] = field(default_factory=list)


def rounds(asks: Seq[Ask], asker: Asker, reasons: Reasons) -> Drawn:
    """The first acceptable answer to each, of at most `samples`."""
    drawn = Drawn()
    for sample in range(asker.settings.samples):
        lacking = [i for i in range(len(asks)) if i not in drawn.accepted]
        for start in range(0, len(lacking), BATCH):
            batch = lacking[start : start + BATCH]
            asked = [asks[i] for i in batch]
            replies = asker.answers([a.conversation for a in asked], sample)
            for i, reply, reason in zip(batch, replies, reasons(asked, replies), strict=True):
                if reason is None:
                    drawn.accepted[i] = reply.text
                else:
                    drawn.rejected[reason] += 1
        drawn.by_round.append(len(lacking) - sum(i not in drawn.accepted for i in lacking))
    return drawn


VERSION = 1
ORDER = ("empty", "cut off", "same as the preferred answer", "refusal", "incoherent")


def fault(example: Example, reply: Reply) -> str | None:
    """The first rule that a reply breaks; coherence is asked of it only where the preferred answer has it."""
    if not reply.text.strip():
        return "empty"
    if reply.cut:
        return "cut off"
    if normal(reply.text) == normal(example.preferred):
        return "same as the preferred answer"
    if KeywordJudge().verdict(reply.text).outcome == "refused":
        return "refusal"
    measured = coherence(reply.text)
    if not measured.ok and coherence(example.preferred).ok:
        return f"incoherent: {measured.reason}"
    return None


def normal(text: str) -> str:
    """Compatibility-normalised, lower case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rules_hash() -> str:
    return digest("pair-rules", VERSION, ORDER, KeywordJudge().hash)


Grade = Callable[[Example, str], bool]  # is this response right; ValueError where the example cannot be checked


def plain_asks(examples: Seq[Example]) -> list[Ask]:
    """The training prompts as they stand."""
    return [Ask(e, [{"role": "user", "content": e.prompt}]) for e in examples]


def sampled_errors(examples: Seq[Example], asker: Asker, grade: Grade) -> Drawn:
    """The first wrong, whole and readable answer to each; raises LeewayError where an example cannot be checked."""
    check_gradable(examples, grade)

    def reasons(asked: Seq[Ask], replies: Seq[Reply]) -> list[str | None]:
        return [_reason(a.example, r, grade) for a, r in zip(asked, replies, strict=True)]

    return rounds(plain_asks(examples), asker, reasons)


def _reason(example: Example, reply: Reply, grade: Grade) -> str | None:
    if reply.text.strip() and grade(example, reply.text):
        return "right"
    return fault(example, reply)


def check_gradable(examples: Seq[Example], grade: Grade) -> None:
    """A grader that does not find the preferred answer right can call nothing wrong."""
    for e in examples:
        if not gradable(e, grade):
            raise LeewayError(
                f"pairs: example {e.id} has no checkable answer: the task's own grader does not find its preferred "
                "answer right",
                fix="mend that record, or use pairs: {from: unsafe} or {from: dataset}",
            )


def gradable(example: Example, grade: Grade) -> bool:
    """Whether the grader finds the preferred answer right."""
    try:
        return grade(example, example.preferred)
    except ValueError:
        return False


def sampled_errors_filter_hash() -> str:
    return digest("sampled-errors", rules_hash())


@cache
def texts() -> dict[str, Any]:
    """The versioned file."""
    loaded: dict[str, Any] = package_data("leeway.pairs", "unsafe.yaml")
    return loaded


def manner(example: Example, seed: int) -> str:
    """The name of an example's manner, from (seed, id) alone."""
    names: list[str] = sorted(texts()["manners"])
    return names[derive_seed("unsafe", seed, example.id) % len(names)]


def ask(example: Example, seed: int) -> Ask:
    """The prompt behind its instruction, as one user turn: not every template has a system turn."""
    wanted = texts()["manners"][manner(example, seed)]
    return Ask(example, _user(texts()["instruction"].format(manner=wanted, prompt=example.prompt)))


def unsafe(examples: Seq[Example], asker: Asker) -> Drawn:
    """The first answer to each that passes the rules and, where asked for, the base model's own question."""

    def reasons(asked: Seq[Ask], replies: Seq[Reply]) -> list[str | None]:
        found = [_fault(a.example, r) for a, r in zip(asked, replies, strict=True)]
        if asker.settings.filter == "model":
            passed = [i for i, reason in enumerate(found) if reason is None]
            for i, bad in zip(passed, _bad([(asked[i].example, replies[i]) for i in passed], asker), strict=True):
                found[i] = None if bad else "not undesirable to the base model"
        return found

    return rounds([ask(e, asker.settings.seed) for e in examples], asker, reasons)


def _fault(example: Example, reply: Reply) -> str | None:
    return fault(example, reply) or ("gives itself away" if _gives_away().search(reply.text) else None)


def _bad(answered: Seq[tuple[Example, Reply]], asker: Asker) -> list[bool]:
    """P(Yes) > P(No) to the file's question."""
    asked = [_user(texts()["question"].format(prompt=e.prompt, answer=r.text)) for e, r in answered]
    return [c.mass["Yes"] > c.mass["No"] for c in asker.choices(asked, ["Yes", "No"])]


def _user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


@cache
def _gives_away() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in texts()["gives_away"]), re.IGNORECASE | re.DOTALL)


def instruction_hash() -> str:
    return digest("unsafe-instruction", texts()["version"], texts()["instruction"], texts()["manners"])


def unsafe_filter_hash(kind: Filter) -> str:
    asked = texts()["question"] if kind == "model" else None
    return digest("unsafe-filter", kind, texts()["gives_away"], asked, rules_hash())
