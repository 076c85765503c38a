"""Check which parts of several studies are comparable, list what differs, and leave out what is not comparable."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report import narrative
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.results import Results
from leeway.stats.metrics import AT, BASE

STUDY_KEYS = (
    "adapter",
    "budget",
    "budgets",
    "evals",
    "model",
    "objectives",
    "optim",
    "pairs",
    "reference",
    "seeds",
    "task",
)
MANIFEST_KEYS = ("attacks", "data", "evals", "judges", "leeway", "matching", "model", "objectives", "texts")
IGNORED_KEYS = ("origin", "note", "device", "context", "started", "ids")  # comments, or where it ran
LISTED, LEFT_OUT = "listed", "left out"


@dataclass(frozen=True)
class Study:
    """One run directory with a unique name."""

    name: str
    results: Results

    @property
    def settings(self) -> dict[str, str]:
        """Settings and hashes, flattened: `study.evals.jailbreak.max_new_tokens`, `run.judges.jailbreak.hash`."""
        study = {k: v for k, v in self.results.study.items() if k in STUDY_KEYS}
        manifest = {k: v for k, v in self.results.manifest.items() if k in MANIFEST_KEYS}
        return _flatten(study, "study") | _flatten(manifest, "run")


@dataclass
class Comparable:
    """Studies reduced to their comparable rows, and the list of differences."""

    studies: list[Study]
    differences: list[dict[str, str]] = field(default_factory=list)  # keys: what, effect, and each study's name

    def leave_out(self, what: str, reason: str, values: dict[str, str]) -> None:
        self.differences.append({"what": what, "effect": f"{LEFT_OUT}: {reason}", **values})

    @property
    def left_out(self) -> list[dict[str, str]]:
        return [d for d in self.differences if d["effect"].startswith(LEFT_OUT)]


def load(folders: Seq[Path]) -> list[Study]:
    """Load each directory; raises LeewayError for fewer than two, a repeated one, or a copy."""
    if len(folders) < 2:
        raise LeewayError("compare: needs two or more runs", fix="give two or more run directories")
    seen: dict[str, Path] = {}
    loaded = []
    for folder in folders:
        results = Results.load(folder)
        for key in (str(folder.resolve()), file_digest(folder / "rows.parquet")):
            if key in seen:
                what = (
                    f"{folder} is given twice" if seen[key] == folder else f"{folder} and {seen[key]} hold the same run"
                )
                raise LeewayError(f"compare: {what}: it would count double", fix="give each run once")
        seen |= {str(folder.resolve()): folder, file_digest(folder / "rows.parquet"): folder}
        loaded.append(results)
    return [Study(name, results) for name, results in zip(_names(loaded), loaded, strict=True)]


def comparable(studies: list[Study]) -> Comparable:
    """Reduce studies to objectives, attacks and axes that are the same in all; list all differences.

    Raises LeewayError if budgets have different units, a study stops sequentially, or no objective is shared.
    """
    units = {s.name: _budget_unit(s.results) for s in studies}
    if len(set(units.values())) > 1:
        listed = "; ".join(f"{n}: {unit}" for n, unit in units.items())
        what = f"compare: budgets count different things ({listed})"
        raise LeewayError(what, fix="compare studies with the same budget unit")
    if stopped := next((s.name for s in studies if s.results.sequential), None):
        what = f"compare: {stopped} uses sequential stopping, and cannot be compared with other studies"
        raise LeewayError(what, fix="measure with evals.stop: never")
    reduced = Comparable(studies)
    _objectives(reduced)
    _attacks(reduced)
    _judges(reduced)
    known = {d["what"] for d in reduced.differences}
    reduced.differences += [d for d in differing(studies) if d["what"] not in known]
    if not _shared([s.results.rows for s in reduced.studies]):
        left_out = "; ".join(f"{d['what']} {d['effect']}" for d in reduced.left_out)
        what = "compare: no objective was measured at the same budget in two of these studies"
        raise LeewayError(
            f"{what} ({left_out})" if left_out else what, fix="compare runs of one objective at one budget"
        )
    return reduced


def differing(studies: list[Study]) -> list[dict[str, str]]:
    """Return every setting and hash that is not the same in all studies."""
    settings = {s.name: s.settings for s in studies}
    keys = sorted({k for own in settings.values() for k in own})
    lines = []
    for key in keys:
        values = {name: own.get(key, "–") for name, own in settings.items()}
        if len(set(values.values())) > 1:
            lines.append({"what": key, "effect": LISTED, **values})
    return lines


def not_poolable(studies: list[Study]) -> list[dict[str, str]]:
    """Return the differences that forbid pooling: all except training seeds."""
    allowed = ("study.seeds", "run.leeway", "run.data.origins")
    return [d for d in differing(studies) if not d["what"].startswith(allowed)]


def items(studies: list[Study]) -> pd.DataFrame:
    """Count, per axis and pair of studies, the items of each and those with the same id and text in both."""
    by_axis = {s.name: _items(s.results.first_judged) for s in studies}
    lines = []
    for n, a in enumerate(studies):
        for b in studies[n + 1 :]:
            for axis in sorted(by_axis[a.name].keys() & by_axis[b.name].keys()):
                one, other = by_axis[a.name][axis], by_axis[b.name][axis]
                line = {"axis": axis, "study_a": a.name, "study_b": b.name, "items_a": len(one)}
                lines.append(line | {"items_b": len(other), "shared": len(one & other)})
    return pd.DataFrame(lines, columns=["axis", "study_a", "study_b", "items_a", "items_b", "shared"])


def _items(rows: pd.DataFrame) -> dict[str, set[tuple[str, str, str]]]:
    base = rows[rows["objective"] == BASE].assign(attack=lambda t: t["attack"].fillna(""))
    keys = base[["eval", "attack", "item_id", "prompt"]].drop_duplicates()
    return {str(axis): set(own.itertuples(index=False, name=None)) for axis, own in keys.groupby("eval")}


def _objectives(reduced: Comparable) -> None:
    """Leave out objectives with the same name and different settings."""
    names = [s.name for s in reduced.studies]
    objectives = [mapping(s.results.manifest.get("objectives")) for s in reduced.studies]
    for alias in sorted({a for own in objectives for a in own}):
        values = {n: str(own[alias]) for n, own in zip(names, objectives, strict=True) if alias in own}
        if len(set(values.values())) > 1:
            reduced.leave_out(f"objective {alias}", "same name, different settings", _filled(values, names))
            _drop(reduced, lambda rows, a=alias: rows["objective"] == a)


def _attacks(reduced: Comparable) -> None:
    """Leave out attacks that are not in every study with the same text, so that averages are over the same attacks."""
    names = [s.name for s in reduced.studies]
    attacks = [mapping(s.results.manifest.get("attacks")) for s in reduced.studies]
    used = [set(_jailbreak(s.results.rows)["attack"].fillna("").unique()) for s in reduced.studies]
    with_attacks = [n for n, own in enumerate(used) if own]
    for attack in sorted(set().union(*used)):
        hashes = {
            names[n]: str(mapping(attacks[n].get(attack)).get("hash", "not recorded"))
            for n in with_attacks
            if attack in used[n]
        }
        if len(set(hashes.values())) > 1:
            reason = "same name, different texts"
        elif len(hashes) < len(with_attacks):
            reason = "not used in every study"
        else:
            continue
        reduced.leave_out(f"attack {attack}", reason, _filled(hashes, names))
        _drop(reduced, lambda rows, a=attack: (rows["eval"] == "jailbreak") & (rows["attack"].fillna("") == a))


def _judges(reduced: Comparable) -> None:
    """Leave out axes that were scored by different judges."""
    names = [s.name for s in reduced.studies]
    for axis in sorted({str(e) for s in reduced.studies for e in s.results.rows["eval"].unique()}):
        values = {}
        for study in reduced.studies:
            judges = mapping(study.results.manifest.get("judges"))
            own = {
                k: mapping(j)
                for k, j in judges.items()
                if k.partition(AT)[0].partition("-")[0] == axis.partition("-")[0]
            }
            first = {k: f"{j.get('name')} {j.get('hash')}" for k, j in own.items() if AT not in k}
            if (study.results.rows["eval"] == axis).any() and first:
                values[study.name] = "; ".join(v if k == axis else f"{k}: {v}" for k, v in sorted(first.items()))
        if len(set(values.values())) > 1:
            reduced.leave_out(f"axis {axis}", "scored by different judges", _filled(values, names))
            _drop(reduced, lambda rows, a=axis: rows["eval"] == a)


def _drop(reduced: Comparable, which: Any) -> None:
    reduced.studies = [
        replace(s, results=replace(s.results, rows=s.results.rows[~which(s.results.rows)])) for s in reduced.studies
    ]


def _shared(tables: list[pd.DataFrame]) -> set[tuple[str, int]]:
    """Return the (objective, budget) pairs with rows in two or more studies."""
    seen: set[tuple[str, int]] = set()
    twice: set[tuple[str, int]] = set()
    for rows in tables:
        tuned = rows[rows["objective"] != BASE]
        own = set(tuned[["objective", "budget"]].drop_duplicates().itertuples(index=False, name=None))
        twice |= own & seen
        seen |= own
    return twice


def _jailbreak(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["eval"] == "jailbreak"]


def _budget_unit(results: Results) -> str:
    count = BudgetUnit.of(results.manifest).count
    return f"{narrative.matching_rule(results.manifest).count} tokens" if count == "tokens" else count


def _names(loaded: list[Results]) -> list[str]:
    """Return unique names: equal ones get their folder's name, and a number if that is equal too."""
    given = [str(r.study.get("name") or r.folder.resolve().name) for r in loaded]
    names = [
        n if given.count(n) == 1 else f"{n} ({r.folder.resolve().name})" for n, r in zip(given, loaded, strict=True)
    ]
    return [n if names.count(n) == 1 else f"{n} {names[: k + 1].count(n)}" for k, n in enumerate(names)]


def _flatten(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        return {at: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        if key not in IGNORED_KEYS:
            flat |= _flatten(inner, f"{at}.{key}")
    return flat


def _filled(values: dict[str, str], names: list[str]) -> dict[str, str]:
    return {n: values.get(n, "–") for n in names}
