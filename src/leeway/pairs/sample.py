"""Rejected answers sampled from the base model, by rejection sampling: `sampled-errors` and `unsafe`.

Round k samples the k-th answer to every prompt that still has no accepted one, for at most `samples` rounds.
sampled-errors: the prompt is sent as it is; a wrong answer by the task's own grader is accepted.
unsafe: the prompt is sent behind an instruction to answer in an undesirable manner; `unsafe.yaml` holds instruction,
manners and the question of the optional model filter. Training uses the plain prompt.
Either way an answer must pass `rejection_reason`: one that is a refusal, incoherent or cut off would teach an objective
something else than intended.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from leeway.cache import RecordStore
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.eval import user_message
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.hashing import derive_seed, digest
from leeway.judges.coherence import coherence
from leeway.judges.keywords import KeywordJudge
from leeway.yaml_config import package_data

Strategy = Literal["dataset", "corrupted", "sampled-errors", "unsafe"]
Filter = Literal["rules", "model"]
Grader = Callable[[Example, str], bool]  # whether a response is right; ValueError where the example cannot be checked

BATCH = 512  # prompts between two writes to the cache: the most that a kill loses
RULES_VERSION = 1
RULES = ("empty", "cut off", "same as the preferred answer", "refusal", "incoherent")


@dataclass(frozen=True)
class PairSettings:
    """The strategy; `samples`, `temperature`, `max_new_tokens` and `filter` are for those that sample."""

    strategy: Strategy = "dataset"
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    filter: Filter = "rules"
    seed: int = 0


@dataclass(frozen=True)
class BaseModelSampler:
    """The base model: `hash` identifies its weights, dtype and device; `load` is called if an answer is not cached."""

    hash: str
    template_hash: str
    load: Callable[[], Backend]


@dataclass
class CachedSampler:
    """Sample answers of the base model through the cache."""

    base: BaseModelSampler
    settings: PairSettings
    instruction_hash: str
    cache: RecordStore
    tick: Tick
    _backend: Backend | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        s, base = self.settings, self.base
        numbers = [s.temperature, s.max_new_tokens, s.seed]
        self._identity = digest("pairs", base.hash, base.template_hash, s.strategy, numbers, self.instruction_hash)

    def answers(self, conversations: Seq[Conversation], sample: int) -> list[Reply]:
        """Return the `sample`-th answer to each. If one is not cached all are sampled: batches stay the same."""

        def generate(backend: Backend) -> list[dict[str, Any]]:
            s = self.settings
            requests = [Request(c, s.max_new_tokens, s.temperature, sample, s.seed) for c in conversations]
            replies = backend.complete(requests, self.tick)
            return [{"text": r.text, "new_tokens": r.new_tokens, "cut": r.cut} for r in replies]

        return [Reply(**r) for r in self._cached([digest("answer", c, sample) for c in conversations], generate)]

    def choices(self, conversations: Seq[Conversation], options: Seq[str]) -> list[Choice]:
        """Return the probability of each option as the next token."""

        def choose(backend: Backend) -> list[dict[str, Any]]:
            return [{"mass": c.mass} for c in backend.choose(conversations, options, lambda _: None)]

        return [Choice(**r) for r in self._cached([digest("choice", c, list(options)) for c in conversations], choose)]

    def _cached(self, hashes: Seq[str], compute: Callable[[Backend], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        keys = [f"{self._identity}-{h}" for h in hashes]
        found = self.cache.get(keys)
        if len(found) < len(set(keys)):
            self._backend = self._backend or self.base.load()
            new = dict(zip(keys, compute(self._backend), strict=True))
            self.cache.put(new)
            found = new | found
        return [found[k] for k in keys]


@dataclass
class SampledAnswers:
    """The accepted answer of each prompt, by its index, and the number of rejected ones by reason."""

    accepted: dict[int, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    by_round: list[int] = field(default_factory=list)


Reasons = Callable[[Seq[Example], Seq[Reply]], list[str | None]]  # of rejection; None accepts


def rejection_sample(
    examples: Seq[Example], prompt: Callable[[Example], str], sampler: CachedSampler, reasons: Reasons
) -> SampledAnswers:
    """Return the first acceptable answer to each prompt, of at most `samples`."""
    sampled = SampledAnswers()
    for sample in range(sampler.settings.samples):
        missing = [i for i in range(len(examples)) if i not in sampled.accepted]
        for start in range(0, len(missing), BATCH):
            indices = missing[start : start + BATCH]
            batch = [examples[i] for i in indices]
            replies = sampler.answers([user_message(prompt(e)) for e in batch], sample)
            for i, reply, reason in zip(indices, replies, reasons(batch, replies), strict=True):
                if reason is None:
                    sampled.accepted[i] = reply.text
                else:
                    sampled.rejected[reason] += 1
        sampled.by_round.append(len(missing) - sum(i not in sampled.accepted for i in missing))
    return sampled


def rejection_reason(example: Example, reply: Reply) -> str | None:
    """Return the first rule that a reply breaks; it may be incoherent where the preferred answer is so too."""
    if not reply.text.strip():
        return "empty"
    if reply.cut:
        return "cut off"
    if _normalized(reply.text) == _normalized(example.preferred):
        return "same as the preferred answer"
    if KeywordJudge().verdict(reply.text).outcome == "refused":
        return "refusal"
    measured = coherence(reply.text)
    if not measured.ok and coherence(example.preferred).ok:
        return f"incoherent: {measured.reason}"
    return None


def _normalized(text: str) -> str:
    """Compatibility-normalised, lower case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rules_hash() -> str:
    return digest("pair-rules", RULES_VERSION, RULES, KeywordJudge().hash)


def sampled_errors(examples: Seq[Example], sampler: CachedSampler, grade: Grader) -> SampledAnswers:
    """Return the first wrong, complete and coherent answer to each; raise LeewayError if one cannot be checked."""
    if unchecked := next((e for e in examples if not gradable(e, grade)), None):
        raise LeewayError(
            f"pairs: example {unchecked.id} has no checkable answer: the task's own grader does not find its preferred "
            "answer right",
            fix="correct that record, or use pairs: {from: unsafe} or {from: dataset}",
        )

    def reasons(batch: Seq[Example], replies: Seq[Reply]) -> list[str | None]:
        return [
            "right" if r.text.strip() and grade(e, r.text) else rejection_reason(e, r)
            for e, r in zip(batch, replies, strict=True)
        ]

    return rejection_sample(examples, lambda e: e.prompt, sampler, reasons)


def gradable(example: Example, grade: Grader) -> bool:
    """Whether the grader finds the preferred answer right."""
    try:
        return grade(example, example.preferred)
    except ValueError:
        return False


def unsafe(examples: Seq[Example], sampler: CachedSampler) -> SampledAnswers:
    """Return the first answer to each that passes the rules and, with `filter: model`, the base model's own verdict."""

    def reasons(batch: Seq[Example], replies: Seq[Reply]) -> list[str | None]:
        found = [rejection_reason(e, r) for e, r in zip(batch, replies, strict=True)]
        for i, reply in enumerate(replies):
            if found[i] is None and _gives_away().search(reply.text):
                found[i] = "gives itself away"
        if sampler.settings.filter == "model":
            passed = [i for i, reason in enumerate(found) if reason is None]
            for i, bad in zip(passed, _bad([(batch[i], replies[i]) for i in passed], sampler), strict=True):
                found[i] = None if bad else "not undesirable to the base model"
        return found

    return rejection_sample(examples, lambda e: unsafe_prompt(e, sampler.settings.seed), sampler, reasons)


@cache
def texts() -> dict[str, Any]:
    """Return the content of `unsafe.yaml`."""
    loaded: dict[str, Any] = package_data("leeway.pairs", "unsafe.yaml")
    return loaded


def manner(example: Example, seed: int) -> str:
    """Return the name of an example's manner, which depends on (seed, id) alone."""
    names: list[str] = sorted(texts()["manners"])
    return names[derive_seed("unsafe", seed, example.id) % len(names)]


def unsafe_prompt(example: Example, seed: int) -> str:
    """Return the prompt behind its instruction, for one user turn: not every template has a system turn."""
    wanted = texts()["manners"][manner(example, seed)]
    return str(texts()["instruction"].format(manner=wanted, prompt=example.prompt))


def _bad(answered: Seq[tuple[Example, Reply]], sampler: CachedSampler) -> list[bool]:
    """Whether P(Yes) > P(No) to the question of `unsafe.yaml`."""
    questions = [user_message(texts()["question"].format(prompt=e.prompt, answer=r.text)) for e, r in answered]
    return [c.mass["Yes"] > c.mass["No"] for c in sampler.choices(questions, ["Yes", "No"])]


@cache
def _gives_away() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in texts()["gives_away"]), re.IGNORECASE | re.DOTALL)


def instruction_hash() -> str:
    return digest("unsafe-instruction", texts()["version"], texts()["instruction"], texts()["manners"])


def unsafe_filter_hash(kind: Filter) -> str:
    question = texts()["question"] if kind == "model" else None
    return digest("unsafe-filter", kind, texts()["gives_away"], question, rules_hash())
