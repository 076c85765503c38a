"""Check which parts of several studies are comparable, list what differs, and leave out what is not comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report import narrative
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.results import Results
from leeway.stats.metrics import AT, BASE

STUDY_KEYS = ["adapter", "budget", "budgets", "evals", "model", "objectives", "optim", "pairs"]
STUDY_KEYS += ["reference", "seeds", "task"]
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

    def leave_out(self, what: str, reason: str, values: dict[str, str], **only: str) -> None:
        """Drop the rows with these column values from every study, and list why; `values` differ, by study name."""
        listed = {s.name: values.get(s.name, "–") for s in self.studies}
        self.differences.append({"what": what, "effect": f"{LEFT_OUT}: {reason}", **listed})
        for n, study in enumerate(self.studies):
            rows = study.results.rows
            dropped = (rows[[*only]].astype(object).fillna("") == [*only.values()]).all(axis=1)
            self.studies[n] = replace(study, results=replace(study.results, rows=rows[~dropped]))

    @property
    def left_out(self) -> list[dict[str, str]]:
        return [d for d in self.differences if d["effect"].startswith(LEFT_OUT)]

    def reasons(self) -> str:
        """Return what was left out and why, in brackets after a space; empty if nothing was."""
        listed = "; ".join(f"{d['what']} {d['effect']}" for d in self.left_out)
        return f" ({listed})" if listed else ""


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
                same = "is given twice" if seen[key] == folder else f"and {seen[key]} hold the same run"
                raise LeewayError(f"compare: {folder} {same}: it would count double", fix="give each run once")
        seen |= {str(folder.resolve()): folder, file_digest(folder / "rows.parquet"): folder}
        loaded.append(results)
    return [Study(name, results) for name, results in zip(_names(loaded), loaded, strict=True)]


def comparable(studies: list[Study]) -> Comparable:
    """Reduce studies to objectives, attacks and axes that are the same in all; list all differences.

    Raises LeewayError if budgets have different units, a study stops sequentially, or no objective is shared.
    """
    units = {}
    for study in studies:
        count, manifest = BudgetUnit.of(study.results.manifest).count, study.results.manifest
        units[study.name] = f"{narrative.matching_rule(manifest).count} tokens" if count == "tokens" else count
    if len(set(units.values())) > 1:
        listed = "; ".join(f"{n}: {unit}" for n, unit in units.items())
        what = f"compare: budgets count different things ({listed})"
        raise LeewayError(what, fix="compare studies with the same budget unit")
    if stopped := next((s.name for s in studies if s.results.sequential), None):
        what = f"compare: {stopped} uses sequential stopping, and cannot be compared with other studies"
        raise LeewayError(what, fix="measure with evals.stop: never")
    reduced = Comparable([*studies])
    _objectives(reduced)
    _attacks(reduced)
    _judges(reduced)
    known = {d["what"] for d in reduced.differences}
    reduced.differences += [d for d in differing(studies) if d["what"] not in known]
    if not _shared([s.results.rows for s in reduced.studies]):
        what = "compare: no objective was measured at the same budget in two of these studies"
        raise LeewayError(what + reduced.reasons(), fix="compare runs of one objective at one budget")
    return reduced


def differing(studies: list[Study]) -> list[dict[str, str]]:
    """Return every setting and hash that is not the same in all studies."""
    settings = {s.name: s.settings for s in studies}
    lines = []
    for key in sorted({k for own in settings.values() for k in own}):
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
    for a, b in combinations(by_axis, 2):
        for axis in sorted(by_axis[a].keys() & by_axis[b].keys()):
            one, other = by_axis[a][axis], by_axis[b][axis]
            line = {"axis": axis, "study_a": a, "study_b": b, "items_a": len(one)}
            lines.append(line | {"items_b": len(other), "shared": len(one & other)})
    return pd.DataFrame(lines, columns=["axis", "study_a", "study_b", "items_a", "items_b", "shared"])


def _items(rows: pd.DataFrame) -> dict[str, set[tuple[str, str, str]]]:
    base = rows[rows["objective"] == BASE].assign(attack=lambda t: t["attack"].fillna(""))
    keys = base[["eval", "attack", "item_id", "prompt"]].drop_duplicates()
    return {str(axis): set(own.itertuples(index=False, name=None)) for axis, own in keys.groupby("eval")}


def _objectives(reduced: Comparable) -> None:
    """Leave out objectives with the same name and different settings."""
    objectives = {s.name: mapping(s.results.manifest.get("objectives")) for s in reduced.studies}
    for alias in sorted({a for own in objectives.values() for a in own}):
        values = {n: str(own[alias]) for n, own in objectives.items() if alias in own}
        if len(set(values.values())) > 1:
            reduced.leave_out(f"objective {alias}", "same name, different settings", values, objective=alias)


def _attacks(reduced: Comparable) -> None:
    """Leave out attacks that are not in every study with the same text, so that averages are over the same attacks."""
    attacks = {s.name: mapping(s.results.manifest.get("attacks")) for s in reduced.studies}
    jailbreak = {s.name: s.results.rows[s.results.rows["eval"] == "jailbreak"] for s in reduced.studies}
    used = {n: set(rows["attack"].fillna("").unique()) for n, rows in jailbreak.items() if len(rows)}
    for attack in sorted(set().union(*used.values())):
        infos = {n: mapping(attacks[n].get(attack)) for n, own in used.items() if attack in own}
        hashes = {n: str(info.get("hash", "not recorded")) for n, info in infos.items()}
        if len(set(hashes.values())) > 1:
            reason = "same name, different texts"
        elif len(hashes) < len(used):
            reason = "not used in every study"
        else:
            continue
        reduced.leave_out(f"attack {attack}", reason, hashes, eval="jailbreak", attack=attack)


def _judges(reduced: Comparable) -> None:
    """Leave out axes that were scored by different judges."""
    for axis in sorted({str(e) for s in reduced.studies for e in s.results.rows["eval"].unique()}):
        values = {}
        for study in reduced.studies:
            judges = mapping(study.results.manifest.get("judges"))
            own = {k: mapping(j) for k, j in judges.items() if AT not in k and k.split("-")[0] == axis.split("-")[0]}
            first = {k: f"{j.get('name')} {j.get('hash')}" for k, j in own.items()}
            if (study.results.rows["eval"] == axis).any() and first:
                values[study.name] = "; ".join(v if k == axis else f"{k}: {v}" for k, v in sorted(first.items()))
        if len(set(values.values())) > 1:
            reduced.leave_out(f"axis {axis}", "scored by different judges", values, eval=axis)


def _shared(tables: list[pd.DataFrame]) -> set[tuple[str, int]]:
    """Return the (objective, budget) pairs with rows in two or more studies."""
    pairs = (rows.loc[rows["objective"] != BASE, ["objective", "budget"]].drop_duplicates() for rows in tables)
    counts = Counter(pair for table in pairs for pair in table.itertuples(index=False, name=None))
    return {pair for pair, n in counts.items() if n > 1}


def _names(loaded: list[Results]) -> list[str]:
    """Return unique names: equal ones get their folder's name, and a number if that is equal too."""
    given = [str(r.study.get("name") or r.folder.resolve().name) for r in loaded]
    folders = [r.folder.resolve().name for r in loaded]
    names = [n if given.count(n) == 1 else f"{n} ({f})" for n, f in zip(given, folders, strict=True)]
    return [n if names.count(n) == 1 else f"{n} {names[: k + 1].count(n)}" for k, n in enumerate(names)]


def _flatten(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        return {at: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        if key not in IGNORED_KEYS:
            flat |= _flatten(inner, f"{at}.{key}")
    return flat
