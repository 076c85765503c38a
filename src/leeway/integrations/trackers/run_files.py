"""What a run writes that a tracker shows: step logs, parts with rows, learning checks; and their values as points."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.hashing import digest
from leeway.integrations.trackers.tracker import Point
from leeway.report.results import LEARNING_COLUMNS, LEDGER_COLUMNS, ROW_COLUMNS, Results
from leeway.stats import sequential
from leeway.stats.metrics import BASE

RATES, LEARNING = "rates", "learning"
COUNTED = ("target_tokens", "processed_tokens", "reference_tokens")
NO_CURVE = ("train-loss",)  # the step log has it step by step
Key = tuple[str, int, int, str]  # objective, seed, budget, condition


@dataclass(frozen=True)
class StepLog:
    """The step log of a trajectory, which is a tracker run."""

    run: str
    path: str


@dataclass(frozen=True)
class Target:
    """A checkpoint under one condition: the files of its rows, and the tracker run and step that show it."""

    run: str
    step: int
    objective: str
    seed: int
    budget: int
    condition: str
    own_form: bool  # whether the condition is the one under which the objective is used
    parts: tuple[str, ...]

    @property
    def key(self) -> Key:
        return self.objective, self.seed, self.budget, self.condition

    def group(self, kind: str) -> str:
        """Return the first part of the metrics' names: one for all objectives in their own form."""
        return kind if self.own_form else f"{kind}-under-{slug(self.condition.strip('<>').replace(' ', '-').lower())}"


@dataclass(frozen=True)
class RunFiles:
    """Everything of a run that a tracker follows."""

    study: str
    folder: str
    logs: tuple[StepLog, ...] = ()
    targets: tuple[Target, ...] = ()
    learning: tuple[str, ...] = ()  # paths of learning checks, each of one checkpoint under all its conditions
    sequential_axes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunFiles:
        raw = json.loads(text)
        logs = tuple(StepLog(**log) for log in raw["logs"])
        targets = tuple(Target(**{**t, "parts": tuple(t["parts"])}) for t in raw["targets"])
        listed = {name: tuple(raw[name]) for name in ("learning", "sequential_axes")}
        return cls(raw["study"], raw["folder"], logs, targets, **listed)


def slug(text: str) -> str:
    """Return `text` as part of a metric's name; other characters are replaced, and a hash keeps names distinct."""
    plain = re.sub(r"[^A-Za-z0-9_.:-]", "_", text)
    return plain if plain == text else f"{plain[:60]}-{digest(text)[:6]}"


def training_points(path: Path, after: int) -> list[Point]:
    """Return the steps of a log after the first `after`; token counts are sums since the first step.

    A log is written line by line; an unfinished last line is left for the next call.
    """
    if not path.is_file():
        return []
    totals, points = dict.fromkeys(COUNTED, 0), []
    for k, line in enumerate(path.read_text("utf-8").split("\n")[:-1]):
        step = json.loads(line)
        for name in COUNTED:
            totals[name] += step[name]
        if k < after:
            continue
        values = {
            name: step[name] for name in ("loss", "grad_norm", "lr", "nll", "margin", "kl") if name in step
        } | totals
        values["tokens_per_second"] = step["processed_tokens"] / step["seconds"] if step["seconds"] else math.nan
        points.append(Point(step["step"], _finite({f"train/{name}": v for name, v in values.items()})))
    return points


def results_of(files: RunFiles, targets: Sequence[Target], learning: Sequence[Path] = ()) -> Results:
    """Return results of a part of a running study, so that its numbers are those of the finished run's page."""
    folder = Path(files.folder)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    parts = [(target, pd.read_parquet(path)) for target in targets for path in target.parts]
    empty = pd.DataFrame(columns=ROW_COLUMNS)
    rows = pd.concat([part for _, part in parts], ignore_index=True)[ROW_COLUMNS] if parts else empty
    if files.sequential_axes:
        rows = sequential.with_design(rows, files.sequential_axes)
    manifest["conditions"] = {h: t.condition for t, part in parts for h in part["template_hash"].unique()}
    results = Results(folder, rows, pd.DataFrame(columns=LEDGER_COLUMNS), manifest)
    if learning:
        results.learning_items = pd.concat([pd.read_parquet(path) for path in learning])[LEARNING_COLUMNS]
    return results


def rate_points(results: Results, targets: Sequence[Target]) -> Iterator[tuple[Key, str, Point]]:
    """Yield (checkpoint, tracker run, its rates with intervals); a withheld rate has only its counts."""
    lines = _by_key(results.rates()) if not results.rows.empty else {}
    for target in targets:
        values: dict[str, float] = {}
        for line in lines.get(target.key, []):
            group, name = target.group(RATES), slug(str(line["measure"]))
            values |= {f"{group}/{name}": line["rate"], f"{group}/{name}_low": line["low"]}
            values |= {f"{group}/{name}_high": line["high"], f"{group}-n/{name}": line["n"]}
            values[f"{group}-unscored/{name}"] = line["n_unscored"]
        if values:
            yield target.key, target.run, Point(target.step, _finite(values), target.budget)


def learning_points(results: Results, targets: Sequence[Target]) -> Iterator[tuple[Key, str, Point]]:
    """Yield (checkpoint, tracker run, what it learned) of every checkpoint that was checked."""
    lines = _by_key(results.learning())
    for target in (t for t in targets if t.objective != BASE):
        values: dict[str, float] = {}
        for line in lines.get(target.key, []):
            if line["measure"] not in NO_CURVE:
                name = f"{target.group(LEARNING)}/{slug(str(line['measure']))}"
                values |= {name: line["value"], f"{name}_low": line["low"], f"{name}_high": line["high"]}
        if values:
            yield target.key, target.run, Point(target.step, _finite(values), target.budget)


def _by_key(table: pd.DataFrame) -> dict[Key, list[dict[str, Any]]]:
    found: dict[Key, list[dict[str, Any]]] = {}
    for line in table.to_dict("records"):
        key = (str(line["objective"]), int(line["seed"]), int(line["budget"]), str(line["condition"]))
        found.setdefault(key, []).append({str(k): v for k, v in line.items()})
    return found


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Leave out what has no number: a withheld rate, a diverged loss."""
    return {name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)}
