"""The claims of a run and their verdicts: those written before it, held to their hash, and those written after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from leeway import stats
from leeway.claims import Claims, hash_of, load, restored
from leeway.claims.judge import COLUMNS, judge
from leeway.claims.parts import Bench
from leeway.errors import LeewayError
from leeway.report import wording
from leeway.report.scale import Scale

if TYPE_CHECKING:
    from leeway.report.results import Results

AFTER = "judge further ones with `leeway report DIR --claims FILE`, where they stand as written after the run"


def table(results: Results, later: str | Path | None = None) -> pd.DataFrame:
    """One line per claim; `later` is a file of claims, or a set's name, written after the run: a family of its own."""
    found = []
    declared = declared_in(results)
    if declared is not None:
        found.append(_judged(declared, results, later=False))
    if later is not None:
        claims = load(str(later))
        bench = _bench(results)
        if faults := [*claims.absent(bench.objectives, list(bench.axes), bench.budgets)]:
            raise LeewayError(
                f"{later}: " + "; ".join(faults), fix="mend them, or give a claim if_absent: inconclusive"
            )
        if declared is not None and claims.hash == declared.hash:
            raise LeewayError(f"{later}: these are the claims that the study began with", fix="leave --claims out")
        found.append(_judged(claims, results, later=True))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)


def declared_in(results: Results) -> Claims | None:
    """The claims that were hashed before training; raises where they were edited since."""
    kept, study = results.manifest.get("claims"), results.study.get("claims")
    path = results.folder / "study.yaml"
    if not isinstance(kept, dict):
        if study is not None:
            raise LeewayError(f"{path}: its claims were added after the run began", fix=f"take them out, and {AFTER}")
        return None
    now = hash_of(study) if isinstance(study, dict) else "none"
    if now != kept.get("hash"):
        what = f"{path}: its claims were edited after the run began (hash {kept.get('hash')} then, {now} now)"
        raise LeewayError(what, fix=f"restore them, and {AFTER}")
    try:
        return restored(kept)
    except ValueError as error:
        where = results.folder / "manifest.json"
        raise LeewayError(
            f"{where}: its claims cannot be used: {error}", fix="restore it, or run the study again"
        ) from error


def about(results: Results) -> dict[str, Any]:
    """Which set was declared: its name, version and hash; empty where none was."""
    kept = results.manifest.get("claims")
    return {k: kept.get(k) for k in ("name", "version", "hash")} if isinstance(kept, dict) else {}


def _judged(claims: Claims, results: Results, *, later: bool) -> pd.DataFrame:
    try:
        return judge(claims, _bench(results), "after" if later else "before")
    except stats.StatsError as error:
        what = f"{results.folder / 'rows.parquet'}: {error}"
        raise LeewayError(what, fix="report on the rows of one run") from error


def _bench(results: Results) -> Bench:
    at = Scale.of(results.manifest).at
    return Bench(results.judged, results.conditions, results.first_conditions, name=wording.name, at=at)
