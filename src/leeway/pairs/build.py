"""From a study's examples to its preference pairs, by any strategy, with a report of what was left out.

`dataset`: the task's own rejected answers. `corrupted`: copies of the preferred answers, made wrong (`corrupt`).
`sampled-errors` and `unsafe`: answers of the base model, by rejection sampling. Round k samples the k-th answer to
every prompt that still has no accepted one, for at most `samples` rounds.

sampled-errors: the prompt is sent as it is; a wrong answer by the task's own grader is accepted.
unsafe: the prompt is sent behind an instruction to answer in an undesirable manner; `unsafe.yaml` holds instruction,
manners and the question of the optional model filter. Training uses the plain prompt.
Either way an answer must pass `rejection_reason`: one that is a refusal, incoherent or cut off would teach an objective
something else than intended.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal, localcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from leeway.cache import RecordStore
from leeway.data.gsm8k import COMMAND, IN_BOX
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
        s, hashes = self.settings, [digest("answer", c, sample) for c in conversations]
        requests = [Request(c, s.max_new_tokens, s.temperature, sample, s.seed) for c in conversations]
        return [Reply(**r) for r in self._cached(hashes, lambda backend: backend.complete(requests, self.tick))]

    def choices(self, conversations: Seq[Conversation], options: Seq[str]) -> list[Choice]:
        """Return the probability of each option as the next token."""
        hashes = [digest("choice", c, list(options)) for c in conversations]
        found = self._cached(hashes, lambda backend: backend.choose(conversations, options, lambda _: None))
        return [Choice(**r) for r in found]

    def _cached(self, hashes: Seq[str], compute: Callable[[Backend], Seq[Reply | Choice]]) -> list[dict[str, Any]]:
        keys = [f"{self._identity}-{h}" for h in hashes]
        found = self.cache.get(keys)
        if len(found) < len(set(keys)):
            self._backend = self._backend or self.base.load()
            new = dict(zip(keys, map(asdict, compute(self._backend)), strict=True))
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


# a minus is a sign unless it follows a number or a word; a number may begin with its point
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
# what may separate a mark and its number
DRESS = re.compile(rf"(?:{COMMAND}|[\s*_\\($:=+])*(?:-(?=[\\$.]))?[\\$]*")
HASHES = re.compile("####")
LAST = (re.compile(r"\\boxed\{(?=" + IN_BOX + r"\})"), re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE))
DROP = 0.5  # probability that a step is dropped, if there are at least two


@dataclass(frozen=True)
class Corruption:
    """A wrong answer, and whether it lacks a step of the right one."""

    text: str
    step_dropped: bool


def corrupt(example: Example, seed: int) -> Corruption:
    """Return a wrong copy of the preferred answer; raise LeewayError if it holds no number.

    The final number is replaced by a wrong one and, half of the time if there are at least two lines of reasoning, one
    of those lines is dropped; both depend on (seed, example id) alone. The final number is the one a grader would read:
    behind the first `####`, else in the last `\\boxed{}`, else behind the last "answer is", else the last number.
    Behind a mark it may be wrapped in \\text{…} or a command like it, and units may follow: `\\boxed{\\text{42}}`
    and `\\boxed{42\\text{ km}}` end on 42. The wrong number differs by value, and keeps sign, decimals and commas.
    Nothing else changes, so the reasoning may still contain the right number.
    """
    rng = np.random.default_rng(derive_seed("corrupted", seed, example.id))
    right = example.preferred
    final = _final_number(right)
    if final is None:
        what = f"pairs: example {example.id} has no number in its answer to corrupt"
        raise LeewayError(what, fix="use pairs: {from: dataset}")
    mark, number = final
    final_line = right.rfind("\n", 0, mark) + 1
    lines = right[:final_line].splitlines(keepends=True)
    steps = [k for k, line in enumerate(lines) if line.strip()]
    dropped = len(steps) > 1 and bool(rng.random() < DROP)
    if dropped:
        del lines[steps[int(rng.integers(len(steps)))]]
    before = "".join(lines) + right[final_line : number.start()]
    return Corruption(before + _wrong(number[0], rng) + right[number.end() :], dropped)


def _final_number(text: str) -> tuple[int, re.Match[str]] | None:
    """Return (start of its mark, match of the number that a grader would read), or None."""
    last = (mark for pattern in LAST for mark in reversed(list(pattern.finditer(text))))
    for mark in itertools.chain(HASHES.finditer(text), last):
        dress = DRESS.match(text, mark.end())
        if number := NUMBER.match(text, dress.end() if dress else mark.end()):
            return mark.start(), number
    numbers = list(NUMBER.finditer(text))
    return (numbers[-1].start(), numbers[-1]) if numbers else None


def _wrong(number: str, rng: np.random.Generator) -> str:
    """Return another number of the same form: off by a little, doubled, or ten times as large; of the same sign."""
    plain = number.replace(",", "")
    if plain.startswith("."):  # stays below one: a digit before the point would join the text before it
        width = len(plain) - 1
        return f".{(int(plain[1:]) + int(rng.integers(1, 10))) % 10**width:0{width}d}"
    decimals = len(plain.partition(".")[2])
    with localcontext(prec=len(plain) + 4):  # exact, however long the number is
        value = Decimal(plain)
        choices = [value + d for d in (1, -1, 2, -2, 10, -10)] + [value * 2, value * 10]
        wrong = [c for c in choices if c != value and (c >= 0 or value < 0)]
        grouping = "," if "," in number else ""
        chosen = wrong[int(rng.integers(len(wrong)))]
        return f"{chosen:{grouping}.{decimals}f}"


@dataclass(frozen=True)
class PairReport:
    """What became of every example and of every sampled answer, for the manifest.

    Of `attempted` answers at most one is `accepted` for each example; the others are `rejected`, by reason. Examples
    without an accepted answer are `left_out` for every objective. `counts` is specific to the strategy.
    """

    strategy: str
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    examples: int
    attempted: int
    accepted: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accepted + sum(self.rejected.values()) != self.attempted:
            raise ValueError(f"{self.attempted} answers: {self.accepted} accepted, {dict(self.rejected)} rejected")
        if self.accepted + len(self.left_out) != self.examples:
            raise ValueError(f"{self.examples} examples: {self.accepted} paired, {len(self.left_out)} left out")

    @property
    def acceptance_rate(self) -> float:
        """The fraction of the attempted answers that was accepted."""
        return self.accepted / self.attempted if self.attempted else 0.0

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self) | {"left_out": {"count": len(self.left_out), "ids": list(self.left_out)}}
        paired_share = self.accepted / self.examples if self.examples else 0.0
        return plain | {"acceptance_rate": self.acceptance_rate, "paired_share": paired_share}


class PairedExamples(NamedTuple):
    """The examples that every objective trains on, in their original order, and the report."""

    examples: list[Example]
    report: PairReport


def pair(
    examples: Seq[Example],
    settings: PairSettings,
    *,
    needed_by: Seq[str],
    base: BaseModelSampler | None = None,
    grade: Grader | None = None,
    cache: RecordStore | None = None,
    tick: Tick = lambda _: None,
) -> PairedExamples:
    """Return the examples with rejected answers made as `settings` say.

    sampled-errors and unsafe need `base` and `cache`; sampled-errors needs `grade`, and with it the report on unsafe
    counts accepted answers that are right. What they sample does not depend on `needed_by`, so a study of SFT alone has
    the same examples as one of SFT and DPO.

    Raises LeewayError where an objective in `needed_by` would lack a rejected answer, where an example cannot be
    checked or corrupted, and where no answer at all is accepted.
    """
    if settings.strategy == "dataset":
        return _from_dataset(examples, needed_by)
    if settings.strategy == "corrupted":
        return _corrupted(examples, needed_by, settings.seed)
    assert base is not None
    assert cache is not None
    identity = {"base": base.hash, "template": base.template_hash}
    if settings.strategy == "unsafe":
        sampled = unsafe(examples, CachedSampler(base, settings, instruction_hash(), cache, tick))
        hashes = {"instruction": instruction_hash(), "filter": unsafe_filter_hash(settings.filter)}
        counts = Counter(f"{manner(examples[i], settings.seed)} accepted" for i in sampled.accepted)
        accepted = [(examples[i], answer) for i, answer in sampled.accepted.items()]
        right = sum(gradable(e, grade) and grade(e, answer) for e, answer in accepted) if grade else 0
        counts += Counter({"accepted, and right by the grader": right})
        return _from_samples(examples, sampled, settings, identity | hashes, counts)
    assert grade is not None
    sampled = sampled_errors(examples, CachedSampler(base, settings, "plain", cache, tick), grade)
    hashes = identity | {"filter": digest("sampled-errors", rules_hash())}
    return _from_samples(examples, sampled, settings, hashes, {})


def _from_dataset(examples: Seq[Example], needed_by: Seq[str]) -> PairedExamples:
    _check_pairs(examples, needed_by)
    n = len(examples)
    given = sum(e.dispreferred is not None for e in examples)
    report = PairReport("dataset", {}, {"answers": _hash(examples)}, n, n, n, counts={"with a rejected answer": given})
    return PairedExamples(list(examples), report)


def _corrupted(examples: Seq[Example], needed_by: Seq[str], seed: int) -> PairedExamples:
    made = [corrupt(e, seed) for e in examples]
    paired = [replace(e, dispreferred=c.text) for e, c in zip(examples, made, strict=True)]
    _check_pairs(paired, needed_by)
    n, counts = len(paired), {"step dropped": sum(c.step_dropped for c in made)}
    report = PairReport("corrupted", {"seed": seed}, {"answers": _hash(paired)}, n, n, n, counts=counts)
    return PairedExamples(paired, report)


def _check_pairs(examples: Seq[Example], needed_by: Seq[str]) -> None:
    """Raise LeewayError where an objective in `needed_by` would lack a rejected answer, or have two equal ones."""
    for e in examples if needed_by else ():
        if e.dispreferred is None:
            what = f"pairs: example {e.id} has no rejected answer, and {', '.join(needed_by)} needs one"
            fix = "add `rejected` to the training file, set pairs: {from: corrupted}, or leave these objectives out"
            raise LeewayError(what, fix=fix)
        if e.dispreferred.strip() == e.preferred.strip():
            raise LeewayError(f"pairs: example {e.id} has two equal answers", fix="correct or remove that record")


def _from_samples(
    examples: Seq[Example],
    sampled: SampledAnswers,
    settings: PairSettings,
    hashes: Mapping[str, str],
    counts: Mapping[str, int],
) -> PairedExamples:
    """Return the examples with an accepted answer; raise LeewayError if there are none."""
    if examples and not sampled.accepted:
        why = ", ".join(f"{n} {reason}" for reason, n in sampled.rejected.most_common())
        what = f"pairs: no answer of {settings.strategy} was accepted for any of {len(examples)} examples ({why})"
        fix = "give more samples, another temperature or more max_new_tokens, or another pairs: {from: …}"
        raise LeewayError(what, fix=fix)
    paired = [replace(examples[i], dispreferred=sampled.accepted[i]) for i in sorted(sampled.accepted)]
    by_round = {f"accepted in round {k}": n for k, n in enumerate(sampled.by_round, 1)}
    report = PairReport(
        settings.strategy,
        {k: v for k, v in asdict(settings).items() if k != "strategy"},
        {**hashes, "answers": _hash(paired)},
        examples=len(examples),
        attempted=len(paired) + sampled.rejected.total(),
        accepted=len(paired),
        rejected=dict(sorted(sampled.rejected.items())),
        left_out=tuple(e.id for i, e in enumerate(examples) if i not in sampled.accepted),
        counts={**by_round, **dict(sorted(counts.items()))},
    )
    return PairedExamples(paired, report)


def _hash(examples: Seq[Example]) -> str:
    return digest("pairs", [[e.id, e.dispreferred] for e in examples])
