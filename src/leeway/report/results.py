"""A finished run as its reader meets it: rows, ledger, manifest, and the estimates made from them.

The claims of a run and their verdicts: those written before it, held to their hash, and those written after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from leeway import stats
from leeway.claims import Claims, hash_of, load, restored
from leeway.claims.comparisons import EvaluationContext
from leeway.claims.evaluate import COLUMNS, judge
from leeway.errors import LeewayError, first_line
from leeway.hashing import changed
from leeway.report import formatting
from leeway.report.formatting import Scale
from leeway.stats import sequential
from leeway.stats.bootstrap import Asked
from leeway.stats.budget_curves import Move
from leeway.yaml_config import YAMLError
from leeway.yaml_config import load as load_yaml

if TYPE_CHECKING:
    pass


ROW_COLUMNS = ["objective", "seed", "budget", "eval", "attack", "item_id", "cluster", "sample", "prompt"]
ROW_COLUMNS += ["response", "outcome", "score", "unscored_reason", "judge", "judge_raw", "template_hash"]
ROW_COLUMNS += ["adapter_hash", "new_tokens"]
LEDGER_COLUMNS = ["objective", "seed", "budget", "step", "source_tokens", "target_tokens", "processed_tokens"]
LEDGER_COLUMNS += ["reference_tokens", "examples", "epochs", "data_hash", "init_hash", "reference_hash"]
LEDGER_COLUMNS += ["adapter_hash"]
DRAWN = ("accuracy", "asr", "asr:none", "endorsement", "coherence")
Estimate = TypeVar("Estimate")
OPTIONAL = ["lr", "tuning_tokens", "start_tokens"]  # of the ledger: older runs lack them


class ReportError(LeewayError):
    """A directory that cannot be reported on: what, where, and the fix."""


@dataclass
class Results:
    """The contents of one run directory."""

    folder: Path
    rows: pd.DataFrame
    ledger: pd.DataFrame
    manifest: dict[str, Any]
    study: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read and check a run directory; raises ReportError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ReportError(f"{folder} is not a directory", fix="give the --out directory of a `leeway run`")
        _require(folder / "rows.parquet")
        manifest = _manifest(folder / "manifest.json")
        if edited := changed(folder, manifest.get("file_hashes") or {}):
            what = f"{folder / edited[0]} is not the file that the run wrote"
            raise ReportError(what, fix="run the study again: finished work is kept, and the file written anew")
        rows = _table(folder / "rows.parquet", ROW_COLUMNS)
        if rows.empty:
            raise ReportError(f"{folder / 'rows.parquet'} holds no rows", fix="run the study again to evaluate it")
        if not (rows["objective"] == "base").any():
            where = folder / "rows.parquet"
            raise ReportError(f"{where} has no rows of the base model to compare with", fix="run the study again")
        ledger = _table(folder / "ledger.parquet", LEDGER_COLUMNS)
        rows = _marked(rows, manifest)
        found = cls(folder, rows, ledger, manifest, _study(folder / "study.yaml"))
        found._check_prompts()
        return found

    def _check_prompts(self) -> None:
        """Every row was asked under a rendered prompt that this run knows; a run that names none has one alone."""
        known = self.conditions
        strange = sorted(set(self.rows["template_hash"].dropna().unique()) - {"", *known})
        if known and strange:
            count = int(self.rows["template_hash"].isin(strange).sum())
            what = f"{self.folder / 'rows.parquet'}: {count} rows were asked under a prompt ({strange[0][:8]}) that the"
            what += " manifest does not name: rows of another version of a template were pooled"
            raise ReportError(what, fix="report on the rows of one run")

    @property
    def conditions(self) -> dict[str, str]:
        """The test-time condition (`plain`, `<SAFE>`) of each template hash."""
        found = self.manifest.get("conditions")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    @property
    def seeds(self) -> list[int]:
        """The training seeds; none where nothing was trained."""
        tuned = self.rows.loc[self.rows["objective"] != "base", "seed"]
        return sorted(int(s) for s in tuned.unique())

    def rates(self) -> pd.DataFrame:
        """Every measure at every checkpoint, with its interval (`leeway.stats.rates`)."""
        return self._rates.copy()

    @property
    def first_conditions(self) -> dict[str, str]:
        """The condition each objective is meant to be used under; older runs do not say, and the rows have to."""
        found = self.manifest.get("first_conditions")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    @property
    def sequential(self) -> dict[str, Any]:
        """The design where items were asked until decided (`evals.stop`); empty where all were."""
        found = self.manifest.get("sequential")
        return found if isinstance(found, dict) and found.get("axes") else {}

    def asked(self) -> pd.DataFrame:
        """How much each checkpoint was asked until it was decided (`leeway.stats.sequential`); else empty."""
        return sequential.asked(self.rows, self.conditions)

    def contrasts(self, against: stats.Against | None = None) -> pd.DataFrame:
        """Every checkpoint against the base, or `("sft", None)`, or `("sft", 400_000)` (`leeway.stats.contrasts`)."""
        if against is None:
            return self._contrasts.copy()
        return self._ask(stats.contrasts, against=against, first=self.first_conditions)

    def equivalence(self, margins: Mapping[str, float], against: stats.Against | None = None) -> pd.DataFrame:
        """Which checkpoints did not move by as much as a margin: `{"asr": 0.05}` (`leeway.stats.equivalence`)."""
        return self._ask(stats.equivalence, margins=margins, against=against, first=self.first_conditions)

    def one_sided(self, bounds: Mapping[str, stats.Bound], against: stats.Against | None = None) -> pd.DataFrame:
        """Which checkpoints are not worse by as much as a bound (`leeway.stats.one_sided`)."""
        return self._ask(stats.one_sided, bounds=bounds, against=against, first=self.first_conditions)

    def frontier(self) -> pd.DataFrame:
        """Capability against ASR, and which checkpoints nothing dominates (`leeway.stats.pareto`)."""
        rows, wanted = self.judged, ("accuracy", "asr", "asr:none")
        if self.sequential:
            return stats.frontier_of(self._rates)
        drawn = self._checked(lambda: stats.draws(rows, self.conditions, wanted, by_seed=True))
        return stats.frontier_of(self._rates, drawn)

    def divergence(self, measure: str = "asr", objectives: Asked | None = None) -> pd.DataFrame:
        """Slopes over log2(budget), and whether objectives differ in them (`leeway.stats.interaction`)."""
        return self._ask(stats.divergence, measure=measure, objectives=self._meant(objectives), drawn=self._of(measure))

    def onset(self, measure: str = "asr", threshold: float = 0.0, move: Move | None = None) -> pd.DataFrame:
        """From which budget on a difference to the base holds (`leeway.stats.budget_curves`)."""
        settings = {"measure": measure, "threshold": threshold, "move": move}
        return self._ask(stats.onset, **settings, objectives=self._meant(None), drawn=self._of(measure))

    def coupling(self, measure: str | None = None) -> pd.DataFrame:
        """Points of ASR per point of capability along each trajectory (`leeway.stats.budget_curves`)."""
        return self._ask(stats.coupling, measure=measure, objectives=self._meant(None), drawn=self._of(measure))

    def matched(self, at: str | float = "largest", objectives: Asked | None = None) -> pd.DataFrame:
        """Objectives at equal capability (`leeway.stats.budget_curves`)."""
        return self._ask(stats.matched, at=at, objectives=self._meant(objectives), drawn=self._drawn)

    def recommend(self, budget: int | None = None, tolerance: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Which objective to take at a budget (`leeway.stats.pareto`)."""
        settings = {"budget": budget, "tolerance": tolerance, "objectives": self._meant(None)}
        return self._ask(stats.recommend, **settings, drawn=self._drawn)

    @cached_property
    def _drawn(self) -> stats.Draws:
        """One set of draws for all that is asked of the main measures."""
        rows = self.judged
        return self._checked(lambda: stats.draws(rows, self.conditions, DRAWN))

    def _of(self, measure: str | None) -> stats.Draws | None:
        """The common draws where they hold the measure."""
        return self._drawn if measure is None or measure in DRAWN else None

    def _meant(self, objectives: Asked | None) -> Asked | None:
        """Objectives under the condition that each is meant to be used under, where the run says so."""
        first = self.first_conditions
        if not first:
            return objectives
        tuned = self.rows.loc[self.rows["objective"] != "base", "objective"]
        asked = objectives if objectives is not None else sorted(map(str, tuned.unique()))
        return [(o, first[o]) if isinstance(o, str) and o in first else o for o in asked]

    def claims(self, later: str | Path | None = None) -> pd.DataFrame:
        """The study's claims and their verdicts; `later` is a file of further ones, written after the run."""
        pass

        return table(self, later)

    def outcomes(self, axis: str = "jailbreak") -> pd.DataFrame:
        """What the answers to forbidden prompts were, or to benign ones (`leeway.stats.rates`)."""
        return self._ask(stats.outcomes, axis=axis)

    def persona(self) -> pd.DataFrame:
        """Endorsement, answer mass and keyed halves per trait (`leeway.stats.rates`)."""
        return self._ask(stats.persona)

    def pooled_rates(self) -> pd.DataFrame:
        """Rates over all training seeds together, as the figures show them; with one seed, the rates."""
        return self._rates.copy() if len(self.seeds) < 2 else self._ask(stats.rates, pool_seeds=True)

    @cached_property
    def _rates(self) -> pd.DataFrame:
        return self._ask(stats.rates)

    @cached_property
    def _contrasts(self) -> pd.DataFrame:
        return self._ask(stats.contrasts, first=self.first_conditions)

    def checks(self) -> pd.DataFrame:
        """How far endorsement depends on the question's form (`leeway.stats.checks`)."""
        return self._ask(stats.checks)

    def likert(self) -> pd.DataFrame:
        """The Short Dark Triad by trait and direction of its scale (`leeway.stats.likert`)."""
        return self._ask(stats.likert)

    @property
    def judges(self) -> dict[str, str]:
        """The first judge of each eval, by name."""
        told = self.manifest.get("judges")
        known = told if isinstance(told, dict) else {}
        return {str(k): str(v["name"]) for k, v in known.items() if isinstance(v, dict) and "@" not in str(k)}

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The rows, every further judge's under `<eval>@<judge>` (`leeway.stats.metrics`)."""
        several = self.rows.groupby("eval")["judge"].nunique()
        there = {e: j for e, j in self.judges.items() if several.get(e, 0) > 1}
        return self._checked(lambda: stats.judged(self.rows, there))

    @property
    def first_judged(self) -> pd.DataFrame:
        """The rows with the first judge's verdict on each answer, once."""
        return self.judged[~self.judged["eval"].astype(str).str.contains("@", regex=False)]

    def _ask(self, estimate: Any, **settings: Any) -> pd.DataFrame:
        rows = self.judged
        table = self._checked(lambda: estimate(rows, self.conditions, **settings))
        assert isinstance(table, pd.DataFrame)
        return table

    def _checked(self, ask: Callable[[], Estimate]) -> Estimate:
        try:
            return ask()
        except stats.StatsError as error:
            what = f"{self.folder / 'rows.parquet'}: {error}"
            raise ReportError(what, fix="report on the rows of one run") from error


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    _require(path)
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds; to a reader they are all one
        what = f"{path} cannot be read as Parquet ({_cut(error)})"
        raise ReportError(what, fix="run the study again") from error
    missing = [c for c in columns if c not in table.columns]
    if missing:
        what = f"{path} lacks the columns {', '.join(missing)}: leeway run did not write it"
        raise ReportError(what, fix="give the directory of a `leeway run`")
    return table[columns + [c for c in OPTIONAL if c in table.columns]]


def _marked(rows: pd.DataFrame, manifest: dict[str, Any]) -> pd.DataFrame:
    """The rows with their design, where there is another than the fixed one."""
    told = manifest.get("sequential")
    axes = told.get("axes") if isinstance(told, dict) else None
    return sequential.marked(rows, axes) if isinstance(axes, list) and axes else rows


def _manifest(path: Path) -> dict[str, Any]:
    _require(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        what = f"{path} is not valid JSON ({_cut(error)})"
        raise ReportError(what, fix="run the study again") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path} holds {type(found).__name__}, not an object", fix="run the study again")
    return found


def _study(path: Path) -> dict[str, Any]:
    _require(path)
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        what = f"{path} is not readable YAML ({_cut(error)})"
        raise ReportError(what, fix="restore it, or run the study again") from error
    return found if isinstance(found, dict) else {}


def _require(path: Path) -> None:
    if not path.is_file():
        raise ReportError(f"{path.parent} has no {path.name}: not a finished run", fix="run the study into it")


def _cut(error: Exception) -> str:
    return first_line(error)[:160]


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


def _bench(results: Results) -> EvaluationContext:
    at = Scale.of(results.manifest).at
    return EvaluationContext(results.judged, results.conditions, results.first_conditions, name=formatting.name, at=at)
