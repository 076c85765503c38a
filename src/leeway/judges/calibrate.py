"""How good a judge is at telling refusals, on answers that people labelled: a card for each model that answered.

XSTest (Röttger et al. 2024, arXiv 2308.01263): 450 prompts, safe ones that look unsafe and their unsafe contrasts.

Answers of chat models to all of them, labelled by people as full compliance, full or partial refusal, say how good a
judge of refusals is.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from leeway.data.readers import Record, Source, field, load, read
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import expand
from leeway.judges.judge import Answer, Judge, Verdict
from leeway.stats.agreement import Confusion, Share, confusion, kappa, share

Label = Literal["full_compliance", "full_refusal", "partial_refusal", "refused", "harmful", "deflected", "incoherent"]

PROMPTS = Source(("xstest/xstest_prompts.csv",), "walledai/XSTest", split="test")
ANSWERS = "xstest_v2_completions_{}.csv"


@dataclass(frozen=True)
class XSPrompt:
    """One prompt; `safe` is whether a model should answer it."""

    id: str
    text: str
    type: str
    safe: bool


@dataclass(frozen=True)
class Labelled:
    """An answer and what people say it is; `id` is its prompt's."""

    id: str
    prompt: str
    response: str
    label: Label


@dataclass(frozen=True)
class LabelledSet:
    """The labelled answers of one model, where they came from and the hash of that file."""

    model: str
    answers: tuple[Labelled, ...]
    origin: str
    hash: str


def prompts(revision: str | None = None) -> tuple[list[XSPrompt], str]:
    """All prompts in the file's order, and their origin."""
    loaded = load(PROMPTS, revision=revision)
    return [_prompt(r, n + 1) for n, r in enumerate(loaded.records)], loaded.origin


def _prompt(record: Record, n: int) -> XSPrompt:
    """Copies on the hub may lack the ids, which count from 1."""
    where = f"xstest, record {n}"
    label = field(record, ("label",), where)
    if label not in ("safe", "unsafe"):
        raise LeewayError(f"{where}: label is {label!r}", fix="it must be safe or unsafe")
    number = str(record.get("id") or n).removeprefix("v2-")
    return XSPrompt(
        f"xstest/{number}", field(record, ("prompt",), where), field(record, ("type",), where), label == "safe"
    )


def completions() -> list[LabelledSet]:
    """The labelled answers of every model whose file lies under LEEWAY_DATA/xstest, by the model's name."""
    root = os.environ.get("LEEWAY_DATA")
    fix = f"set LEEWAY_DATA to a folder that holds xstest/{ANSWERS.format('<model>')} (github: paul-rottger/xstest)"
    if not root:
        raise LeewayError("xstest: its labelled answers are read from LEEWAY_DATA, which is not set", fix=fix)
    found = sorted((expand(root) / "xstest").glob(ANSWERS.format("*")))
    if not found:
        raise LeewayError(f"LEEWAY_DATA={root}: there are no labelled answers of XSTest", fix=fix)
    return [_completions(path) for path in found]


def _completions(path: Path) -> LabelledSet:
    model = path.name.removeprefix("xstest_v2_completions_").removesuffix(".csv")
    answers = []
    for n, record in enumerate(read(path)):
        where = f"{path.name}, record {n + 1}"
        number = field(record, ("id",), where).removeprefix("v2-")
        label = label_of(re.sub(r"^\d_", "", field(record, ("final_label",), where)), where)
        answers.append(Labelled(f"xstest/{number}", field(record, ("prompt",), where), _text(record, where), label))
    return LabelledSet(model, tuple(answers), f"LEEWAY_DATA/xstest/{path.name}", file_digest(path))


def labelled(path: Path) -> LabelledSet:
    """A user's own file (.csv, .tsv, .jsonl): `prompt`, `response` (it may be empty) and `label`, one of `Label`.

    Answers to one prompt are one cluster.
    """
    answers = []
    for n, record in enumerate(read(path)):
        where = f"{path}, record {n + 1}"
        prompt = field(record, ("prompt",), where)
        answers.append(
            Labelled(prompt, prompt, _text(record, where), label_of(field(record, ("label",), where), where))
        )
    if not answers:
        raise LeewayError(f"{path}: no labelled answers in it", fix="give prompt, response and label in each record")
    return LabelledSet(path.stem, tuple(answers), str(path), file_digest(path))


def label_of(text: str, where: str) -> Label:
    if text not in get_args(Label):
        raise LeewayError(f"{where}: label is {text!r}", fix=f"one of: {', '.join(get_args(Label))}")
    return cast(Label, text)


def _text(record: Record, where: str) -> str:
    for name in ("completion", "response"):
        if isinstance(record.get(name), str):
            return str(record[name])
    raise LeewayError(f"{where}: no completion or response in it", fix="mend that record")


CARD_VERSION = 1
FULL = ("full_refusal", "refused")
PARTIAL = "partial_refusal"


@dataclass(frozen=True)
class Part:
    """A judge against people on one model's answers; shares are (estimate, low, high), 95% intervals.

    Positive is *full refusal*; everything else is negative, partial refusals too. `partial_refused` is the share of
    partial refusals that the judge calls refused, and `without_partial` the counts where they are left out.
    `outcomes` counts the judge's outcomes under each label, unscored ones by name.
    """

    model: str
    origin: str
    data_hash: str
    n: int
    unscored: int
    agreement: Share
    sensitivity: Share
    specificity: Share
    kappa: Share
    counts: Confusion
    partial: int
    partial_refused: Share
    without_partial: Confusion
    outcomes: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Card:
    """What was measured of one judge."""

    judge: str
    judge_hash: str
    note: str
    on: str
    parts: tuple[Part, ...]
    version: int = CARD_VERSION

    def save(self, path: Path) -> None:
        """Write JSON; an undefined share is null."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_nulls(asdict(self)), indent=1, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Card:
        """Read a card again. Raises LeewayError where it is not one of this version."""
        try:
            raw = json.loads(path.read_text("utf-8"))
            if raw["version"] != CARD_VERSION:
                raise LeewayError(
                    f"{path}: a card of version {raw['version']}, not {CARD_VERSION}", fix="calibrate again"
                )
            return cls(**raw | {"parts": tuple(_part(p) for p in raw["parts"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LeewayError(f"{path}: not a calibration card ({error})", fix="calibrate again") from error

    def to_text(self) -> str:
        """A table, a line for each model."""
        columns = (
            "model",
            "n",
            "unscored",
            "agreement",
            "sensitivity",
            "specificity",
            "kappa",
            "partial called refused",
        )
        lines = [columns] + [
            (
                p.model,
                str(p.n),
                str(p.unscored),
                *(_shown(s) for s in (p.agreement, p.sensitivity, p.specificity, p.kappa)),
                f"{_shown(p.partial_refused)} of {p.partial}",
            )
            for p in self.parts
        ]
        width = [max(len(line[k]) for line in lines) for k in range(len(columns))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines]
        return "\n".join(
            [f"judge {self.judge} ({self.judge_hash}) on {self.on}: full refusal or not", *table, self.note]
        )


def calibrate(judge: Judge, on: str = "xstest") -> Card:
    """Judge labelled answers: `xstest` (under LEEWAY_DATA), or the path of a file with `prompt,response,label`."""
    sets = completions() if on == "xstest" else [labelled(expand(on))]
    return Card(judge.name, judge.hash, judge.note, on, tuple(part(judge, s) for s in sets))


def part(judge: Judge, given: LabelledSet) -> Part:
    """The judge on one model's answers."""
    verdicts = judge.judge([Answer(a.prompt, a.response) for a in given.answers], lambda _: None)
    truth = [a.label in FULL for a in given.answers]
    said = [_refused(v) for v in verdicts]
    scored = [(str(t), str(s), a.id) for t, s, a in zip(truth, said, given.answers, strict=True) if s is not None]
    partial = [s for s, a in zip(said, given.answers, strict=True) if a.label == PARTIAL and s is not None]
    whole = [(t, s) for t, s, a in zip(truth, said, given.answers, strict=True) if a.label != PARTIAL]
    counts = confusion(truth, said)
    return Part(
        model=given.model,
        origin=given.origin,
        data_hash=given.hash,
        n=counts.n,
        unscored=counts.unscored,
        agreement=counts.agreement,
        sensitivity=counts.sensitivity,
        specificity=counts.specificity,
        kappa=kappa(*zip(*scored, strict=True)) if scored else share(0, 0),
        counts=counts,
        partial=len(partial),
        partial_refused=share(sum(partial), len(partial)),
        without_partial=confusion([t for t, _ in whole], [s for _, s in whole]),
        outcomes=_outcomes(given.answers, verdicts),
    )


def _refused(verdict: Verdict) -> bool | None:
    return None if verdict.outcome is None else verdict.outcome == "refused"


def _outcomes(answers: Seq[Labelled], verdicts: Seq[Verdict]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for a, v in zip(answers, verdicts, strict=True):
        under = found.setdefault(a.label, {})
        name = v.outcome or "unscored"
        under[name] = under.get(name, 0) + 1
    return found


def _shown(share_: Share) -> str:
    estimate, low, high = share_
    return "–" if math.isnan(estimate) else f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def _nulls(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _part(raw: dict[str, Any]) -> Part:
    shares = ("agreement", "sensitivity", "specificity", "kappa", "partial_refused")
    read = {k: tuple(float("nan") if x is None else float(x) for x in raw[k]) for k in shares}
    counts = {k: Confusion(**raw[k]) for k in ("counts", "without_partial")}
    return Part(**raw | read | counts)
