"""From a study's examples to its pairs: one entry for every strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.generation.backend import Tick
from leeway.hashing import digest
from leeway.pairs import sample
from leeway.pairs.corrupt import check_pairs, corruption
from leeway.pairs.sample import Asker, BaseModelSampler, Drawn
from leeway.pairs.types import PairReport, PairSettings


@dataclass(frozen=True)
class Paired:
    """The examples that every objective trains on, in the order they came, and what became of the others."""

    examples: list[Example]
    report: PairReport


def pair(
    examples: Seq[Example],
    settings: PairSettings,
    *,
    needed_by: Seq[str],
    base: BaseModelSampler | None = None,
    grade: sample.Grade | None = None,
    cache: Path | None = None,
    tick: Tick = lambda _: None,
) -> Paired:
    """The examples with rejected answers made as `settings` say.

    `base` and `cache` (a folder) are for sampled-errors and unsafe; `grade` is for sampled-errors, and where unsafe
    has it the report says how many accepted answers are right. What those two draw does not depend on `needed_by`, so
    that a study of SFT alone has the same examples as one of SFT beside DPO. Raises LeewayError where an objective in
    `needed_by` would lack a rejected answer, where an example cannot be checked or corrupted, and where nothing at all
    is accepted; NotDrawn where `base.load` is `not_to_be_drawn` and an answer is not in the cache.
    """
    if settings.filter == "model" and settings.strategy != "unsafe":
        raise LeewayError(f"pairs: filter: model is for from: unsafe, not {settings.strategy}", fix="leave filter out")
    if settings.strategy == "dataset":
        return _from_dataset(examples, needed_by)
    if settings.strategy == "corrupted":
        return _corrupted(examples, needed_by, settings.seed)
    if base is None or cache is None:
        raise ValueError(f"{settings.strategy} needs a base model and a folder for its answers")
    if settings.strategy == "unsafe":
        asked = Asker.of(base, settings, sample.instruction_hash(), cache, tick)
        drawn = sample.unsafe(examples, asked)
        hashes = {"instruction": sample.instruction_hash(), "filter": sample.unsafe_filter_hash(settings.filter)}
        counts = Counter(f"{sample.manner(examples[i], settings.seed)} accepted" for i in drawn.accepted)
        counts += Counter({"accepted, and right by the grader": _right(examples, drawn, grade)})
        return _paired(examples, drawn, settings, _identity(base) | hashes, counts)
    if grade is None:
        raise ValueError("sampled-errors needs a grader")
    drawn = sample.sampled_errors(examples, Asker.of(base, settings, "plain", cache, tick), grade)
    return _paired(examples, drawn, settings, _identity(base) | {"filter": sample.sampled_errors_filter_hash()}, {})


def _from_dataset(examples: Seq[Example], needed_by: Seq[str]) -> Paired:
    check_pairs(examples, needed_by)
    n = len(examples)
    given = sum(e.dispreferred is not None for e in examples)
    report = PairReport("dataset", {}, {"answers": _hash(examples)}, n, n, n, counts={"with a rejected answer": given})
    return Paired(list(examples), report)


def _corrupted(examples: Seq[Example], needed_by: Seq[str], seed: int) -> Paired:
    made = [corruption(e, seed) for e in examples]
    paired = [replace(e, dispreferred=c.text) for e, c in zip(examples, made, strict=True)]
    check_pairs(paired, needed_by)
    n, counts = len(paired), {"step dropped": sum(c.step_dropped for c in made)}
    return Paired(paired, PairReport("corrupted", {"seed": seed}, {"answers": _hash(paired)}, n, n, n, counts=counts))


def _paired(
    examples: Seq[Example],
    drawn: Drawn,
    settings: PairSettings,
    hashes: Mapping[str, str],
    counts: Mapping[str, int],
) -> Paired:
    """The examples with an accepted answer; raises LeewayError where there is none."""
    if examples and not drawn.accepted:
        why = ", ".join(f"{n} {reason}" for reason, n in drawn.rejected.most_common())
        raise LeewayError(
            f"pairs: no answer of {settings.strategy} was accepted for any of {len(examples)} examples ({why})",
            fix="give more samples, another temperature or more max_new_tokens, or another pairs: {from: …}",
        )
    paired = [replace(examples[i], dispreferred=drawn.accepted[i]) for i in sorted(drawn.accepted)]
    by_round = {f"accepted in round {k}": n for k, n in enumerate(drawn.by_round, 1)}
    report = PairReport(
        settings.strategy,
        {k: v for k, v in asdict(settings).items() if k != "strategy"},
        {**hashes, "answers": _hash(paired)},
        examples=len(examples),
        attempted=len(paired) + drawn.rejected.total(),
        accepted=len(paired),
        rejected=dict(sorted(drawn.rejected.items())),
        left_out=tuple(e.id for i, e in enumerate(examples) if i not in drawn.accepted),
        counts={**by_round, **dict(sorted(counts.items()))},
    )
    return Paired(paired, report)


def _right(examples: Seq[Example], drawn: Drawn, grade: sample.Grade | None) -> int:
    """How many accepted answers the grader finds right, of examples that it can check."""
    if grade is None:
        return 0
    return sum(sample.gradable(examples[i], grade) and grade(examples[i], a) for i, a in drawn.accepted.items())


def _identity(base: BaseModelSampler) -> dict[str, str]:
    return {"base": base.hash, "template": base.template_hash}


def _hash(examples: Seq[Example]) -> str:
    """Identity of the rejected answers themselves."""
    return digest("pairs", [[e.id, e.dispreferred] for e in examples])
