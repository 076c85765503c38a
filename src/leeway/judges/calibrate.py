"""How good a judge is at telling refusals, on answers that people labelled: a card for each model that answered."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leeway.data import xstest
from leeway.data.xstest import Labelled, LabelledSet
from leeway.errors import LeewayError
from leeway.judges.judge import Answer, Judge, Verdict
from leeway.paths import expand
from leeway.stats.agreement import Confusion, Share, confusion, kappa, share

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
    sets = xstest.completions() if on == "xstest" else [xstest.labelled(expand(on))]
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
