"""From a study's examples to its preference pairs, by any strategy, with a report of what was left out.

Corrupted copies of the preferred answers, as rejected ones.

The final number is replaced by a wrong one and, half of the time if there are at least two lines of reasoning, one of
those lines is dropped; both depend on (seed, example id) alone. The final number is the one a grader would read:
behind the first `####`, else in the last `\\boxed{}`, else behind the last "answer is", else the last number. Behind a
mark it may be wrapped in \\text{…} or a command like it, and units may follow: `\\boxed{\\text{42}}` and
`\\boxed{42\\text{ km}}` end on 42. The wrong number differs by value, and keeps sign, decimals and commas. Nothing else
changes, so the reasoning may still contain the right number.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np

from leeway.cache import RecordStore
from leeway.data.gsm8k import COMMAND, IN_BOX
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.generation.backend import Tick
from leeway.hashing import derive_seed, digest
from leeway.pairs import sample
from leeway.pairs.sample import BaseModelSampler, CachedSampler, PairSettings, SampledAnswers

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
    """Return a wrong copy of the preferred answer; raise LeewayError if it holds no number."""
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
    examples: Sequence[Example],
    settings: PairSettings,
    *,
    needed_by: Sequence[str],
    base: BaseModelSampler | None = None,
    grade: sample.Grader | None = None,
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
        sampled = sample.unsafe(examples, CachedSampler(base, settings, sample.instruction_hash(), cache, tick))
        hashes = {"instruction": sample.instruction_hash(), "filter": sample.unsafe_filter_hash(settings.filter)}
        counts = Counter(f"{sample.manner(examples[i], settings.seed)} accepted" for i in sampled.accepted)
        accepted = [(examples[i], answer) for i, answer in sampled.accepted.items()]
        right = sum(sample.gradable(e, grade) and grade(e, answer) for e, answer in accepted) if grade else 0
        counts += Counter({"accepted, and right by the grader": right})
        return _from_samples(examples, sampled, settings, identity | hashes, counts)
    assert grade is not None
    sampled = sample.sampled_errors(examples, CachedSampler(base, settings, "plain", cache, tick), grade)
    hashes = identity | {"filter": digest("sampled-errors", sample.rules_hash())}
    return _from_samples(examples, sampled, settings, hashes, {})


def _from_dataset(examples: Sequence[Example], needed_by: Sequence[str]) -> PairedExamples:
    _check_pairs(examples, needed_by)
    n = len(examples)
    given = sum(e.dispreferred is not None for e in examples)
    report = PairReport("dataset", {}, {"answers": _hash(examples)}, n, n, n, counts={"with a rejected answer": given})
    return PairedExamples(list(examples), report)


def _corrupted(examples: Sequence[Example], needed_by: Sequence[str], seed: int) -> PairedExamples:
    made = [corrupt(e, seed) for e in examples]
    paired = [replace(e, dispreferred=c.text) for e, c in zip(examples, made, strict=True)]
    _check_pairs(paired, needed_by)
    n, counts = len(paired), {"step dropped": sum(c.step_dropped for c in made)}
    report = PairReport("corrupted", {"seed": seed}, {"answers": _hash(paired)}, n, n, n, counts=counts)
    return PairedExamples(paired, report)


def _check_pairs(examples: Sequence[Example], needed_by: Sequence[str]) -> None:
    """Raise LeewayError where an objective in `needed_by` would lack a rejected answer, or have two equal ones."""
    for e in examples if needed_by else ():
        if e.dispreferred is None:
            what = f"pairs: example {e.id} has no rejected answer, and {', '.join(needed_by)} needs one"
            fix = "add `rejected` to the training file, set pairs: {from: corrupted}, or leave these objectives out"
            raise LeewayError(what, fix=fix)
        if e.dispreferred.strip() == e.preferred.strip():
            raise LeewayError(f"pairs: example {e.id} has two equal answers", fix="correct or remove that record")


def _from_samples(
    examples: Sequence[Example],
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


def _hash(examples: Sequence[Example]) -> str:
    return digest("pairs", [[e.id, e.dispreferred] for e in examples])
