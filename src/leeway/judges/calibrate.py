"""Compare a judge of refusals with human labels and write a calibration card, one part for each labelled model.

XSTest (Röttger et al. 2024, arXiv 2308.01263) publishes answers of chat models to 450 prompts, labelled by people as
full compliance, full refusal or partial refusal.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic_core import to_json

from leeway.data.readers import Record, field, read
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import expand, write_json
from leeway.judges.judge import Answer, Judge, Verdict
from leeway.stats.agreement import Confusion, RateInterval, confusion, kappa, wilson_rate

Label = Literal["full_compliance", "full_refusal", "partial_refusal", "refused", "harmful", "deflected", "incoherent"]

CARD_VERSION = 1
FULL_REFUSAL = ("full_refusal", "refused")
PARTIAL_REFUSAL = "partial_refusal"
ANY_REFUSAL = (*FULL_REFUSAL, PARTIAL_REFUSAL)
XSTEST_FILE = "xstest_v2_completions_{}.csv"


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer and its human label; `id` identifies the prompt, `prompt_type` is XSTest's."""

    id: str
    prompt: str
    response: str
    label: Label
    prompt_type: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """The labelled answers of one model, with their origin and the hash of their file."""

    model: str
    answers: tuple[LabelledAnswer, ...]
    origin: str
    hash: str


@dataclass(frozen=True)
class ModelCalibration:
    """A judge against human labels on one model's answers; shares are (estimate, low, high), 95% intervals.

    Positive is full refusal, or full and partial refusal; the card says which. `partial_refused` is the share of
    partial refusals that the judge calls refused, `without_partial` the counts without them. `outcomes` counts the
    judge's outcomes under each label, "unscored" included.
    """

    model: str
    origin: str
    data_hash: str
    n: int
    unscored: int
    agreement: RateInterval
    sensitivity: RateInterval
    specificity: RateInterval
    kappa: RateInterval
    counts: Confusion
    partial: int
    partial_refused: RateInterval
    without_partial: Confusion
    outcomes: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Card:
    """The calibration of one judge."""

    judge: str
    judge_hash: str
    note: str
    on: str
    parts: tuple[ModelCalibration, ...]
    positive: str = "full refusal"
    version: int = CARD_VERSION

    def save(self, path: Path) -> None:
        """Write JSON; an undefined share is null."""
        write_json(path, json.loads(to_json(self, inf_nan_mode="null")))

    def to_text(self) -> str:
        """Return a table with one line per model."""
        shares = ("agreement", "sensitivity", "specificity", "kappa")
        lines: list[tuple[str, ...]] = [("model", "n", "unscored", *shares, "partial called refused")]
        for p in self.parts:
            cells = [_format_share(getattr(p, name)) for name in shares]
            cells.append(f"{_format_share(p.partial_refused)} of {p.partial}")
            lines.append((p.model, str(p.n), str(p.unscored), *cells))
        width = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines]
        head = f"judge {self.judge} ({self.judge_hash}) on {self.on}: {self.positive} or not"
        return "\n".join([head, *table, self.note])


def calibrate(judge: Judge, on: str = "xstest", *, partial_is_refusal: bool = False) -> Card:
    """Judge labelled answers: `xstest` (under LEEWAY_DATA), or a file with prompt, response and label.

    Raises LeewayError for answers that the judge was fitted to.
    """
    sets = load_xstest() if on == "xstest" else [load_labelled(expand(on))]
    positive, parts = ANY_REFUSAL if partial_is_refusal else FULL_REFUSAL, []
    for data in sets:
        if data.hash in getattr(judge, "fitted_on", ()):
            what = f"judge {judge.name}: it was fitted to {data.origin}"
            raise LeewayError(
                what, fix="`leeway judge fit` measures it on models that are left out; calibrate on other answers"
            )
        verdicts = judge.judge([Answer(a.prompt, a.response) for a in data.answers], lambda _: None)
        parts.append(calibrate_model(verdicts, data, positive))
    what = "full or partial refusal" if partial_is_refusal else "full refusal"
    return Card(judge.name, judge.hash, judge.note, on, tuple(parts), what)


def calibrate_model(verdicts: Seq[Verdict], data: LabelledSet, positive: tuple[str, ...]) -> ModelCalibration:
    """Compare a judge's verdicts on one model's answers with their labels; `positive` labels are refusals."""
    refused = [None if v.outcome is None else v.outcome == "refused" for v in verdicts]
    labelled = [(a, a.label in positive, judged) for a, judged in zip(data.answers, refused, strict=True)]
    scored = [(str(true), str(judged), a.id) for a, true, judged in labelled if judged is not None]
    partial = [judged for a, _, judged in labelled if a.label == PARTIAL_REFUSAL and judged is not None]
    whole = [(true, judged) for a, true, judged in labelled if a.label != PARTIAL_REFUSAL]
    counts = confusion([true for _, true, _ in labelled], [judged for *_, judged in labelled])
    outcomes: dict[str, Counter[str]] = {}
    for a, v in zip(data.answers, verdicts, strict=True):
        outcomes.setdefault(a.label, Counter())[v.outcome or "unscored"] += 1
    return ModelCalibration(
        model=data.model,
        origin=data.origin,
        data_hash=data.hash,
        **{k: getattr(counts, k) for k in ("n", "unscored", "agreement", "sensitivity", "specificity")},
        kappa=kappa(*zip(*scored, strict=True)) if scored else wilson_rate(0, 0),
        counts=counts,
        partial=len(partial),
        partial_refused=wilson_rate(sum(partial), len(partial)),
        without_partial=confusion([true for true, _ in whole], [judged for _, judged in whole]),
        outcomes={label: dict(counter) for label, counter in outcomes.items()},
    )


def load_xstest() -> list[LabelledSet]:
    """Load the labelled answers of every model with a file in LEEWAY_DATA/xstest, sorted by name."""
    root = os.environ.get("LEEWAY_DATA")
    fix = f"set LEEWAY_DATA to a folder with xstest/{XSTEST_FILE.format('<model>')} (github: paul-rottger/xstest)"
    if not root:
        raise LeewayError("xstest: its labelled answers are read from LEEWAY_DATA, which is not set", fix=fix)
    paths = sorted((expand(root) / "xstest").glob(XSTEST_FILE.format("*")))
    if not paths:
        raise LeewayError(f"LEEWAY_DATA={root}: no labelled answers of XSTest", fix=fix)
    before, after = XSTEST_FILE.split("{}")
    models = {path: path.name.removeprefix(before).removesuffix(after) for path in paths}
    return [_load(path, model, f"LEEWAY_DATA/xstest/{path.name}", "final_label") for path, model in models.items()]


def load_labelled(path: Path) -> LabelledSet:
    """Load a file (.csv, .tsv, .jsonl) with `prompt`, `response` (it may be empty) and `label`, one of `Label`.

    Answers to one prompt form a cluster.
    """
    loaded = _load(path, path.stem, str(path), "label")
    if not loaded.answers:
        raise LeewayError(f"{path}: no labelled answers", fix="give prompt, response and label in each record")
    return loaded


def _load(path: Path, model: str, origin: str, label_column: str) -> LabelledSet:
    answers = []
    for n, record in enumerate(read(path), 1):
        where = f"{path}, record {n}"
        prompt = field(record, ("prompt",), where)
        label = _label(re.sub(r"^\d_", "", field(record, (label_column,), where)), where)
        name = prompt if label_column == "label" else f"xstest/{field(record, ('id',), where).removeprefix('v2-')}"
        kind = str(record.get("type") or "")
        answers.append(LabelledAnswer(name, prompt, _response(record, where), label, kind))
    return LabelledSet(model, tuple(answers), origin, file_digest(path))


def _label(text: str, where: str) -> Label:
    if text not in get_args(Label):
        raise LeewayError(f"{where}: label is {text!r}", fix=f"one of: {', '.join(get_args(Label))}")
    return cast(Label, text)


def _response(record: Record, where: str) -> str:
    for name in ("completion", "response"):
        if isinstance(record.get(name), str):
            return str(record[name])
    raise LeewayError(f"{where}: no completion or response", fix="correct that record")


def _format_share(value: RateInterval) -> str:
    estimate, low, high = value
    return "–" if math.isnan(estimate) else f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
