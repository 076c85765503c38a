"""What makes studies comparable: what is equal, what differs, and what is left out because of it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report import narrative
from leeway.report.formatting import Scale
from leeway.report.results import Results
from leeway.stats.metrics import AT, BASE

ASKED = ("adapter", "budget", "budgets", "evals", "model", "objectives", "optim", "pairs", "reference", "seeds", "task")
TOLD = ("attacks", "data", "evals", "judges", "leeway", "matching", "model", "objectives", "texts")
UNSAID = ("origin", "note", "device", "context", "started", "ids")  # words about a thing, or where it ran
LISTED, LEFT_OUT = "listed", "left out"


@dataclass(frozen=True)
class Study:
    """One run directory under a name of its own."""

    name: str
    results: Results

    @property
    def settings(self) -> dict[str, str]:
        """Everything asked and measured with, flattened: `evals.jailbreak.max_new_tokens`, `judges.jailbreak.hash`."""
        asked = {k: v for k, v in self.results.study.items() if k in ASKED}
        told = {k: v for k, v in self.results.manifest.items() if k in TOLD}
        return _flat(asked, "study") | _flat(told, "run")


@dataclass
class Comparable:
    """Studies cut down to what may be compared, and the list of what differs."""

    studies: list[Study]
    differences: list[dict[str, str]] = field(default_factory=list)  # what, effect, and each study's value

    def leave_out(self, what: str, why: str, values: dict[str, str]) -> None:
        self.differences.append({"what": what, "effect": f"{LEFT_OUT}: {why}", **values})

    @property
    def left_out(self) -> list[dict[str, str]]:
        return [d for d in self.differences if d["effect"].startswith(LEFT_OUT)]


def load(folders: Seq[Path]) -> list[Study]:
    """Each directory once; raises LeewayError for fewer than two, one given twice, or a copy."""
    if len(folders) < 2:
        raise LeewayError("compare: one run is nothing to compare", fix="give two or more run directories")
    seen: dict[str, Path] = {}
    loaded = []
    for folder in folders:
        results = Results.load(folder)
        for mark in (str(folder.resolve()), file_digest(folder / "rows.parquet")):
            if mark in seen:
                what = f"{folder} is given twice" if seen[mark] == folder else f"{folder} and {seen[mark]} hold one run"
                raise LeewayError(f"compare: {what}: it would count double", fix="give each run once")
        seen |= {str(folder.resolve()): folder, file_digest(folder / "rows.parquet"): folder}
        loaded.append(results)
    return [Study(name, results) for name, results in zip(_names(loaded), loaded, strict=True)]


def comparable(studies: list[Study]) -> Comparable:
    """Cut studies down to objectives, attacks and axes that mean the same in all of them; list all that differs.

    Raises LeewayError where budgets do not count the same thing, so that nothing could be set beside anything.
    """
    counts = {s.name: _counted(s.results) for s in studies}
    if len(set(counts.values())) > 1:
        told = "; ".join(f"{n}: {c}" for n, c in counts.items())
        raise LeewayError(f"compare: budgets count different things ({told})", fix="compare studies that count alike")
    if stopped := next((s.name for s in studies if s.results.sequential), None):
        what = f"compare: {stopped} asked its items until decided, and studies that stop are not set beside others"
        raise LeewayError(what, fix="measure with evals.stop: never")
    found = Comparable(studies)
    _objectives(found)
    _attacks(found)
    _judges(found)
    listed = {d["what"] for d in found.differences}
    found.differences += [d for d in differing(studies) if d["what"] not in listed]
    if not _shared([s.results.rows for s in found.studies]):
        told = "; ".join(f"{d['what']} {d['effect']}" for d in found.left_out)
        what = "compare: no objective was measured at the same budget in two of these studies"
        raise LeewayError(f"{what} ({told})" if told else what, fix="compare runs of one objective at one budget")
    return found


def differing(studies: list[Study]) -> list[dict[str, str]]:
    """Every setting and hash that is not the same in all studies."""
    settings = {s.name: s.settings for s in studies}
    keys = sorted({k for own in settings.values() for k in own})
    lines = []
    for key in keys:
        values = {name: own.get(key, "–") for name, own in settings.items()}
        if len(set(values.values())) > 1:
            lines.append({"what": key, "effect": LISTED, **values})
    return lines


def not_poolable(studies: list[Study]) -> list[dict[str, str]]:
    """What forbids to take these rows for one study's: anything that differs but the training seed."""
    free = ("study.seeds", "run.leeway", "run.data.origins")
    return [d for d in differing(studies) if not d["what"].startswith(free)]


def items(studies: list[Study]) -> pd.DataFrame:
    """Per axis and pair of studies: how many items each asked, and how many have the same id and text in both."""
    asked = {s.name: _items(s.results.first_judged) for s in studies}
    lines = []
    for n, a in enumerate(studies):
        for b in studies[n + 1 :]:
            for axis in sorted(asked[a.name].keys() & asked[b.name].keys()):
                one, other = asked[a.name][axis], asked[b.name][axis]
                line = {"axis": axis, "study_a": a.name, "study_b": b.name, "items_a": len(one)}
                lines.append(line | {"items_b": len(other), "shared": len(one & other)})
    return pd.DataFrame(lines, columns=["axis", "study_a", "study_b", "items_a", "items_b", "shared"])


def _items(rows: pd.DataFrame) -> dict[str, set[tuple[str, str, str]]]:
    base = rows[rows["objective"] == BASE].assign(attack=lambda t: t["attack"].fillna(""))
    keys = base[["eval", "attack", "item_id", "prompt"]].drop_duplicates()
    return {str(axis): set(own.itertuples(index=False, name=None)) for axis, own in keys.groupby("eval")}


def _objectives(found: Comparable) -> None:
    """An objective that is another thing in another study under the same name is left out."""
    names = [s.name for s in found.studies]
    told = [_dict(s.results.manifest.get("objectives")) for s in found.studies]
    for alias in sorted({a for own in told for a in own}):
        values = {n: str(own[alias]) for n, own in zip(names, told, strict=True) if alias in own}
        if len(set(values.values())) > 1:
            found.leave_out(f"objective {alias}", "one name for different settings", _filled(values, names))
            _drop(found, lambda rows, a=alias: rows["objective"] == a)


def _attacks(found: Comparable) -> None:
    """Only attacks that every study asked, in one version, are in an average over attacks."""
    names = [s.name for s in found.studies]
    told = [_dict(s.results.manifest.get("attacks")) for s in found.studies]
    asked = [set(_jailbreak(s.results.rows)["attack"].fillna("").unique()) for s in found.studies]
    asking = [n for n, own in enumerate(asked) if own]
    for attack in sorted(set().union(*asked)):
        hashes = {
            names[n]: str(_dict(told[n].get(attack)).get("hash", "not told")) for n in asking if attack in asked[n]
        }
        if len(set(hashes.values())) > 1:
            why = "one name for different texts"
        elif len(hashes) < len(asking):
            why = "not asked in every study"
        else:
            continue
        found.leave_out(f"attack {attack}", why, _filled(hashes, names))
        _drop(found, lambda rows, a=attack: (rows["eval"] == "jailbreak") & (rows["attack"].fillna("") == a))


def _judges(found: Comparable) -> None:
    """An axis that different judges scored is measured with different sticks."""
    names = [s.name for s in found.studies]
    for axis in sorted({str(e) for s in found.studies for e in s.results.rows["eval"].unique()}):
        values = {}
        for study in found.studies:
            judges = _dict(study.results.manifest.get("judges"))
            own = {
                k: _dict(j) for k, j in judges.items() if k.partition(AT)[0].partition("-")[0] == axis.partition("-")[0]
            }
            first = {k: f"{j.get('name')} {j.get('hash')}" for k, j in own.items() if AT not in k}
            if (study.results.rows["eval"] == axis).any() and first:
                values[study.name] = "; ".join(v if k == axis else f"{k}: {v}" for k, v in sorted(first.items()))
        if len(set(values.values())) > 1:
            found.leave_out(f"axis {axis}", "scored by different judges", _filled(values, names))
            _drop(found, lambda rows, a=axis: rows["eval"] == a)


def _drop(found: Comparable, which: Any) -> None:
    found.studies = [
        replace(s, results=replace(s.results, rows=s.results.rows[~which(s.results.rows)])) for s in found.studies
    ]


def _shared(tables: list[pd.DataFrame]) -> set[tuple[str, int]]:
    """Objectives at budgets that two studies or more have rows of."""
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


def _counted(results: Results) -> str:
    count = Scale.of(results.manifest).count
    return f"{narrative.matching(results.manifest).count} tokens" if count == "tokens" else count


def _names(loaded: list[Results]) -> list[str]:
    """The studies' names; where two are alike, with their folders', and with a number where those are alike too."""
    given = [str(r.study.get("name") or r.folder.resolve().name) for r in loaded]
    told = [
        n if given.count(n) == 1 else f"{n} ({r.folder.resolve().name})" for n, r in zip(given, loaded, strict=True)
    ]
    return [n if told.count(n) == 1 else f"{n} {told[: k + 1].count(n)}" for k, n in enumerate(told)]


def _flat(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        return {at: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        if key not in UNSAID:
            found |= _flat(inner, f"{at}.{key}")
    return found


def _filled(values: dict[str, str], names: list[str]) -> dict[str, str]:
    return {n: values.get(n, "–") for n in names}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
