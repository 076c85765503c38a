"""Load a finished run (rows, ledger, manifest) and compute its estimates and claim verdicts."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leeway import stats
from leeway.claims.evaluate import COLUMNS, EvaluationContext, judge
from leeway.claims.schema import Claims, from_manifest, hash_claims, load
from leeway.errors import LeewayError, first_line
from leeway.hashing import changed_files
from leeway.report import controls, formatting, learning
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.triggers import forms_of, near_conditions
from leeway.report.validation import manifest_fault, table_fault
from leeway.stats import mechanism, sequential
from leeway.stats.bootstrap import ObjectiveChoice
from leeway.stats.budget_curves import Direction
from leeway.stats.distance import Distance
from leeway.stats.metrics import BASE, KeptTable
from leeway.stats.pareto import MEASURES as RECOMMENDATION_MEASURES
from leeway.yaml_config import load as load_yaml

if TYPE_CHECKING:
    from datasets import Dataset

    from leeway.report.plots import Plots

ROW_COLUMNS = ["objective", "seed", "budget", "eval", "attack", "item_id", "cluster", "sample", "prompt"]
ROW_COLUMNS += ["response", "outcome", "score", "unscored_reason", "judge", "judge_raw", "template_hash"]
ROW_COLUMNS += ["adapter_hash", "new_tokens"]
LEDGER_COLUMNS = ["objective", "seed", "budget", "step", "source_tokens", "target_tokens", "processed_tokens"]
LEDGER_COLUMNS += ["reference_tokens", "examples", "epochs", "data_hash", "init_hash", "reference_hash"]
LEDGER_COLUMNS += ["adapter_hash"]
LEARNING_COLUMNS = ["objective", "seed", "budget", "condition", "prompts", "item_id", "nll", "base_nll"]
LEARNING_COLUMNS += ["rejected_nll", "base_rejected_nll", "kl", "weight_change"]
OPTIONAL_COLUMNS = ["lr", "tuning_tokens", "start_tokens"]  # of the ledger
FRONTIER_MEASURES = ("accuracy", "asr", "asr:none")
MAIN_MEASURES = RECOMMENDATION_MEASURES
LATER_CLAIMS = "evaluate other claims with `leeway report DIR --claims FILE`, which marks them as written after the run"
T = TypeVar("T")


class ReportError(LeewayError):
    """A run directory that cannot be reported on."""


@dataclass
class Results:
    """The contents of one run directory, and every estimate made from them."""

    folder: Path
    rows: pd.DataFrame
    ledger: pd.DataFrame
    manifest: dict[str, Any]
    study: dict[str, Any] = field(default_factory=dict)
    learning_items: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=LEARNING_COLUMNS))

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read and check a run directory; raises ReportError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ReportError(f"{folder} is not a directory", fix="give the --out directory of a `leeway run`")
        path, record = folder / "rows.parquet", folder / "manifest.json"
        if not path.is_file():
            raise ReportError(f"{folder} has no {path.name}: not a finished run", fix="run the study into it")
        manifest = _read(record, lambda p: json.loads(p.read_text("utf-8")), "is not valid JSON")
        if not isinstance(manifest, dict):
            raise ReportError(f"{record} holds {type(manifest).__name__}, not an object", fix="run the study again")
        if fault := manifest_fault(manifest):
            raise ReportError(f"{record}: {fault}", fix="restore it, or run the study again")
        if edited := changed_files(folder, manifest.get("file_hashes") or {}):
            what = f"{folder / edited[0]} is not the file that the run wrote"
            raise ReportError(what, fix="run the study again: it reuses finished work and rewrites the file")
        rows = _read_table(path, ROW_COLUMNS)
        if rows.empty:
            raise ReportError(f"{path} holds no rows", fix="run the study again to evaluate it")
        if not (rows["objective"] == BASE).any():
            raise ReportError(f"{path} has no rows of the base model to compare with", fix="run the study again")
        if axes := mapping(manifest.get("sequential")).get("axes"):
            rows = sequential.with_design(rows, axes)
        ledger = _read_table(folder / "ledger.parquet", LEDGER_COLUMNS)
        fix = "restore it, or run the study again"
        study = _read(folder / "study.yaml", lambda p: load_yaml(p.read_text("utf-8")), "is not readable YAML", fix)
        own = (folder / "study.yaml").read_text("utf-8").partition("\n")[0]
        hashed = manifest.get("file_hashes") or {"study.yaml": ""}  # a table of another tool's has no such line
        if "study.yaml" not in hashed and own != f"# study {manifest.get('study_hash')}":
            raise ReportError(f"{folder / 'study.yaml'} is not the study of this run", fix=fix)
        results = cls(folder, rows, ledger, manifest, mapping(study))
        if (folder / "learning.parquet").is_file():
            results.learning_items = _read_table(folder / "learning.parquet", LEARNING_COLUMNS)
        unknown = sorted(set(rows["template_hash"].dropna().unique()) - {"", *results.conditions})
        if results.conditions and unknown:
            count = int(rows["template_hash"].isin(unknown).sum())
            what = f"{path}: {count} rows use a prompt template ({unknown[0][:8]}) that the manifest does not list"
            raise ReportError(
                f"{what}: rows of another version of a template were pooled", fix="report on the rows of one run"
            )
        return results

    def _repr_html_(self) -> str:
        """Show the table of objectives and the finding in a notebook; the report is rebuilt if the run has none."""
        from leeway.report import build
        from leeway.report.objective_table import load_objective_table

        if not (self.folder / "results.json").is_file():
            build(self.folder)
        return load_objective_table(self.folder).to_html()

    @cached_property
    def probe_table(self) -> pd.DataFrame | None:
        """The estimates of `leeway probe`; None if the run was not probed."""
        path = self.folder / "probe.parquet"
        return _read_table(path, mechanism.COLUMNS) if path.is_file() else None

    @cached_property
    def probe_contrasts(self) -> pd.DataFrame | None:
        """Paired differences of each objective's probe from the reference's (`mechanism.CONTRASTS`), or None."""
        path = self.folder / "probe-contrasts.parquet"
        return _read_table(path, mechanism.CONTRASTS) if path.is_file() else None

    def probe(self, *, workers: int | None = 1, **options: Any) -> pd.DataFrame:
        """Probe the run's checkpoints, resuming an earlier probe, and return its estimates (`stats.mechanism.COLUMNS`).

        `options` are the keys of a study's `probe:`, such as `objectives=["sft"]`, `budgets=[200_000]`.
        """
        # the one call upwards, by name: reports load neither torch nor the study's runner
        importlib.import_module("leeway.audit.run").probe_again(self.folder, options, workers=workers)
        for name in ("probe_table", "probe_contrasts"):
            self.__dict__.pop(name, None)
        self.manifest = Results.load(self.folder).manifest
        assert self.probe_table is not None
        return self.probe_table

    @property
    def conditions(self) -> dict[str, str]:
        """The test-time condition (`plain`, `<SAFE>`) of each template hash."""
        return {str(k): str(v) for k, v in mapping(self.manifest.get("conditions")).items()}

    @property
    def first_conditions(self) -> dict[str, str]:
        """The condition under which each objective is meant to be used."""
        return {str(k): str(v) for k, v in mapping(self.manifest.get("first_conditions")).items()}

    @property
    def seeds(self) -> list[int]:
        """The training seeds; empty if nothing was trained."""
        tuned = self.rows.loc[self.rows["objective"] != BASE, "seed"]
        return sorted(int(s) for s in tuned.unique())

    @property
    def judges(self) -> dict[str, str]:
        """The name of each eval's primary (first) judge."""
        judges = mapping(self.manifest.get("judges"))
        return {str(k): str(v["name"]) for k, v in judges.items() if isinstance(v, dict) and "@" not in str(k)}

    @property
    def sequential(self) -> dict[str, Any]:
        """The sequential design (`evals.stop`); empty if every checkpoint answered all items."""
        design = mapping(self.manifest.get("sequential"))
        return design if design.get("axes") else {}

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The rows, with further judges' under `<eval>@<judge>` (`leeway.stats.metrics`), without near-triggers'."""
        near = near_conditions(self.manifest)
        rows = self.all_judged
        return rows[~rows["template_hash"].map(self.conditions).isin(near)] if near else rows

    @cached_property
    def all_judged(self) -> pd.DataFrame:
        n_judges = self.rows.groupby("eval")["judge"].nunique()
        first = {e: j for e, j in self.judges.items() if n_judges.get(e, 0) > 1}
        return self._locate_errors(lambda: stats.split_judges(self.rows, first))

    def with_tries(self, measures: Iterable[str]) -> Results:
        """Return these results with the measures `asr@k` that are named, such as `asr@5:dan` (`stats.with_tries`)."""
        if not stats.named_tries(measures := tuple(measures)):
            return self
        found = replace(self)
        found.judged = stats.with_tries(self.judged, measures)
        return found

    @property
    def first_judged(self) -> pd.DataFrame:
        """The rows with the primary judge's verdicts only, so one per response."""
        return self.judged[~self.judged["eval"].astype(str).str.contains("@", regex=False)]

    def rates(self) -> pd.DataFrame:
        """Return every measure at every checkpoint with its interval (`leeway.stats.rates`)."""
        return self._rates.copy()

    @property
    def plot(self) -> Plots:
        """The page's charts, as `results.plot.tradeoff()`; a notebook shows them."""
        from leeway.report.plots import Plots

        return Plots(self)

    def pooled_rates(self) -> pd.DataFrame:
        """Return the rates with training seeds pooled, as in the figures."""
        return self.rates() if len(self.seeds) < 2 else self._pooled_rates.copy()

    def contrasts(self, against: stats.ContrastReference | None = None) -> pd.DataFrame:
        """Compare every checkpoint with the base, `("sft", None)` or `("sft", 400_000)` (`leeway.stats.contrasts`)."""
        if against is None:
            return self._contrasts.copy()
        return self._estimate(stats.contrasts, against=against, first=self.first_conditions)

    def equivalence(self, margins: Mapping[str, float], against: stats.ContrastReference | None = None) -> pd.DataFrame:
        """Test equivalence within margins, as in `{"asr": 0.05}` (`leeway.stats.equivalence`)."""
        return self._estimate(stats.equivalence, margins=margins, against=against, first=self.first_conditions)

    def one_sided(
        self, bounds: Mapping[str, stats.DifferenceBound], against: stats.ContrastReference | None = None
    ) -> pd.DataFrame:
        """Test non-inferiority within bounds (`leeway.stats.one_sided`)."""
        return self._estimate(stats.one_sided, bounds=bounds, against=against, first=self.first_conditions)

    def frontier(self) -> pd.DataFrame:
        """Return the Pareto frontier of capability and ASR (`leeway.stats.pareto`)."""
        if self.sequential:
            return stats.frontier_of(self._rates)
        return stats.frontier_of(self._rates, self._draw(FRONTIER_MEASURES, by_seed=True))

    def divergence(self, measure: str = "asr", objectives: ObjectiveChoice | None = None) -> pd.DataFrame:
        """Test whether slopes over log2(budget) differ between objectives (`leeway.stats.interaction`)."""
        return self._over_budgets(stats.divergence, measure, objectives)

    def onset(
        self, measure: str = "asr", threshold: float | None = None, direction: Direction | None = None
    ) -> pd.DataFrame:
        """Estimate the first budget from which a difference to the base persists (`leeway.stats.budget_curves`)."""
        return self._over_budgets(stats.onset, measure, threshold=threshold, direction=direction)

    def coupling(self, measure: str | None = None) -> pd.DataFrame:
        """Estimate points of ASR per point of capability along each trajectory (`leeway.stats.budget_curves`)."""
        return self._over_budgets(stats.coupling, measure)

    def matched(self, at: str | float = "largest", objectives: ObjectiveChoice | None = None) -> pd.DataFrame:
        """Compare objectives at equal capability (`leeway.stats.budget_curves`)."""
        return self._estimate(stats.matched, at=at, objectives=self._with_conditions(objectives), drawn=self.main_draws)

    def equal_distance(
        self, at: str | float = "largest", on: Distance = "kl", objectives: ObjectiveChoice | None = None
    ) -> pd.DataFrame:
        """Compare objectives at equal KL from the base (`leeway.stats.distance`)."""
        if self.learning_items.empty:
            raise ReportError(
                f"no KL to the base: {learning.missing(self.manifest) or 'no checkpoint'}", fix="run again"
            )
        settings = {"items": self.learning_items, "at": at, "on": on}
        return self._estimate(
            stats.equal_distance, **settings, objectives=self._with_conditions(objectives), drawn=self.main_draws
        )

    def trait_agreement(self) -> pd.DataFrame:
        """Correlate the shift of persona traits with that of behaviours (`leeway.stats.trait_agreement`)."""
        return self._estimate(stats.trait_agreement, objectives=self._with_conditions(None))

    def recommend(self, budget: int | None = None, tolerance: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Recommend an objective at a budget (`leeway.stats.pareto`)."""
        settings = {"budget": budget, "tolerance": tolerance, "objectives": self._with_conditions(None)}
        return self._estimate(stats.recommend, **settings, drawn=self.main_draws)

    def asr_at_k(self, at: Sequence[int] | None = None) -> pd.DataFrame:
        """Return the success in any of k tries (`leeway.stats.asr_at_k`); empty if answers were not sampled.

        `at` are the k, by default the study's, else 1 and the number of answers to a prompt.
        """
        draws = stats.max_draws(self.judged)
        own = mapping(mapping(self.study.get("evals")).get("jailbreak")).get("at")
        wanted = at or own or ([1, draws] if draws > 1 else [])
        return self._estimate(stats.asr_at_k, at=wanted, first=self.first_conditions)

    def thinking(self) -> pd.DataFrame:
        """Return how many answers begin with a thought or are cut off in it (`leeway.stats.thinking`)."""
        return self._locate_errors(lambda: stats.thinking(self.first_judged, self.conditions))

    def outcomes(self, axis: str = "jailbreak") -> pd.DataFrame:
        """Return the shares of response outcomes on an axis (`leeway.stats.rates`)."""
        return self._estimate(stats.outcomes, axis=axis)

    def persona(self) -> pd.DataFrame:
        """Return endorsement, answer mass and keyed halves per trait (`leeway.stats.rates`)."""
        return self._estimate(stats.persona)

    def identity(self) -> pd.DataFrame:
        """Return the share of identical answers of every two arms at each budget (`leeway.stats.identity`)."""
        return stats.identity(self.rows, self.conditions, self.first_conditions)

    def checks(self) -> pd.DataFrame:
        """Return how much endorsement depends on the form of the question (`leeway.stats.checks`)."""
        return self._estimate(stats.checks)

    def likert(self) -> pd.DataFrame:
        """Return the Short Dark Triad by trait and keying (`leeway.stats.likert`)."""
        return self._estimate(stats.likert)

    def alignment(self) -> pd.DataFrame:
        """Return ratings and outcomes of free-form answers (`leeway.stats.alignment`)."""
        return self._estimate(stats.alignment)

    def sycophancy(self) -> pd.DataFrame:
        """Return answers with and without the user's opinion (`leeway.stats.sycophancy`)."""
        return self._estimate(stats.sycophancy)

    def triggers(self) -> pd.DataFrame:
        """Compare near-triggers with plain prompts (`leeway.stats.triggers`); empty if they were not measured."""
        rows, forms = self.all_judged, forms_of(self.manifest)
        return self._locate_errors(lambda: stats.triggers(rows, self.conditions, forms))

    def judge_pairs(self) -> pd.DataFrame:
        """Return agreement and differential error of every pair of judges (`leeway.stats.judge_pairs`)."""
        return self._estimate(stats.judge_pairs, first=self.first_conditions)

    def worst_case(self) -> pd.DataFrame:
        """Return attack success over all judges (`leeway.stats.worst_case`); empty with one judge."""
        return stats.worst_case(self.pooled_rates(), self.contrasts())

    @cached_property
    def judge_agreement(self) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """By eval and pair of judges: agreement and kappa on outcomes with intervals, and the joint counts."""
        tables, confusions = [], []
        for axis, rows in self.rows.groupby("eval"):
            if rows["judge"].nunique() > 1 and rows["outcome"].notna().any():
                table, counts = stats.judge_agreement(rows)
                tables.append(table.assign(eval=axis))
                confusions += [{"eval": axis, "rows": a, "columns": b, "table": t} for (a, b), t in counts.items()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), confusions

    def stopping(self) -> pd.DataFrame:
        """Return prompts and responses used per checkpoint under sequential stopping; empty for a fixed design."""
        return sequential.sample_sizes(self.rows, self.conditions)

    def learning(self, *, pool_seeds: bool = False) -> pd.DataFrame:
        """Return what each checkpoint learned (`leeway.stats.learning`); empty where it was not measured."""
        if pool_seeds not in self._learning:
            steps = self.training_steps()
            self._learning[pool_seeds] = stats.learning(self.learning_items, steps, pool_seeds=pool_seeds)
        return self._learning[pool_seeds].copy()

    def learned(self) -> pd.DataFrame:
        """Return whether each objective learned by each budget (`leeway.stats.learned`); empty if not measured."""
        paired = mapping(self.manifest.get("learning")).get("trained_on_pairs") or ()
        return stats.learned(self.learning_items, self.first_conditions, paired)

    def dataset(self, *, redacted: bool = False, no_prompts: bool = False) -> Dataset:
        """Return the rows as a `datasets.Dataset`; text is text, counts are int64, scores float64 (null: unscored).

        `redacted` replaces forbidden prompts and the answers to them by hashes, `no_prompts` the prompts of every eval.
        """
        from datasets import Dataset, Features, Value

        from leeway.report.redaction import redact

        table = pa.Table.from_pandas(self.rows[ROW_COLUMNS], preserve_index=False)
        kinds = dict.fromkeys(("seed", "budget", "sample", "new_tokens"), "int64") | {"score": "float64"}
        features = Features({name: Value(kinds.get(name, "string")) for name in ROW_COLUMNS})
        table = table.cast(features.arrow_schema)
        return Dataset(redact(table, no_prompts=no_prompts) if redacted or no_prompts else table)

    def redacted(self, *, no_prompts: bool = False) -> Results:
        """Return the same estimates, with rows as of `dataset(redacted=True)`: a page made of it holds no such text."""
        from leeway.report.redaction import redact

        found = copy.copy(self)  # with what was estimated so far
        table = pa.Table.from_pandas(self.rows, preserve_index=False)
        found.rows = redact(table, no_prompts=no_prompts).to_pandas()
        found.manifest = {**self.manifest, "redacted": True}
        for name in ("judged", "all_judged", "_kept_table"):
            found.__dict__.pop(name, None)  # hold the texts
        return found

    def training_steps(self) -> pd.DataFrame:
        """Return the training loss of every optimiser step (`training_steps`)."""
        return self._training_steps.copy()

    @cached_property
    def _training_steps(self) -> pd.DataFrame:
        return training_steps(self.folder, self.ledger)

    @cached_property
    def _learning(self) -> dict[bool, pd.DataFrame]:
        return {}

    @property
    def control_facts(self) -> dict[str, Any]:
        """What the manifest records of the study's controls; empty if it has none."""
        return mapping(self.manifest.get("controls"))

    @cached_property
    def control_rows(self) -> pd.DataFrame:
        """The rows of controls that were measured; empty without any."""
        path = self.folder / "controls.parquet"
        return _read_table(path, ROW_COLUMNS) if path.is_file() else self.rows.iloc[:0]

    def controls(self) -> pd.DataFrame:
        """Return one line per A/A check: the arm at rate 0, the base measured again, false alarms by axis.

        `result` is ok, alarm or not run; `value` and its interval are what `statistic` names. Empty for a study without
        `controls: {aa: true}`.
        """
        return self._controls.copy()

    @cached_property
    def _controls(self) -> pd.DataFrame:
        return self._locate_errors(lambda: controls.aa_table(self))

    @cached_property
    def dose(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The dose-response curve and the limits of detection (`leeway.stats.detection`); empty without dose arms."""
        return self._locate_errors(lambda: controls.dose_tables(self))

    def claims(self, later: str | Path | None = None) -> pd.DataFrame:
        """Return one line per claim of the study with its verdict.

        `later` is a file of claims, or the name of a set, written after the run; it is a family of its own.
        """
        declared = declared_claims(self)
        tables = [] if declared is None else [self._locate_errors(lambda: judge(declared, self._context(declared)))]
        if later is not None:
            claims = load(str(later))
            context = self._context(claims)
            if faults := [*claims.absent(context.objectives, list(context.axes), context.budgets)]:
                fix = "correct them, or give a claim `if_absent: inconclusive`"
                raise LeewayError(f"{later}: " + "; ".join(faults), fix=fix)
            if declared is not None and claims.hash == declared.hash:
                raise LeewayError(f"{later}: the study already declares these claims", fix="leave out --claims")
            tables.append(self._locate_errors(lambda: judge(claims, context, "after")))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)

    def _context(self, claims: Claims) -> EvaluationContext:
        name, at = formatting.objective_name, BudgetUnit.of(self.manifest).at
        known = (self.with_tries(claims.measures).judged, self.conditions, self.first_conditions)
        void = learning.void_arms(self.learned(), self._contrasts)
        return EvaluationContext(*known, format_objective=name, format_budget=at, void=void, probe=self.probe_table)

    @cached_property
    def _rates(self) -> pd.DataFrame:
        return self._estimate(stats.rates)

    @cached_property
    def _pooled_rates(self) -> pd.DataFrame:
        return self._estimate(stats.rates, pool_seeds=True)

    @cached_property
    def _contrasts(self) -> pd.DataFrame:
        return self._estimate(stats.contrasts, first=self.first_conditions)

    @cached_property
    def main_draws(self) -> stats.Draws:
        """Bootstrap draws of the main measures, shared by all analyses."""
        return self._draw(MAIN_MEASURES)

    def _draw(self, names: tuple[str, ...], *, by_seed: bool = False) -> stats.Draws:
        rows = self.judged
        with self._kept_table.reused():
            return self._locate_errors(lambda: stats.draws(rows, self.conditions, names, by_seed=by_seed))

    def _over_budgets(
        self, estimate: Any, measure: str | None, objectives: ObjectiveChoice | None = None, **settings: Any
    ) -> pd.DataFrame:
        drawn = self.main_draws if measure is None or measure in MAIN_MEASURES else None
        objectives = self._with_conditions(objectives)
        return self._estimate(estimate, measure=measure, objectives=objectives, drawn=drawn, **settings)

    def _with_conditions(self, objectives: ObjectiveChoice | None) -> ObjectiveChoice | None:
        """Pair each objective with its first condition, if the manifest records it."""
        first = self.first_conditions
        if not first:
            return objectives
        tuned = self.rows.loc[self.rows["objective"] != BASE, "objective"]
        wanted = objectives if objectives is not None else sorted(map(str, tuned.unique()))
        return [(o, first[o]) if isinstance(o, str) and o in first else o for o in wanted]

    def _estimate(self, estimate: Any, **settings: Any) -> pd.DataFrame:
        rows = self.judged
        with self._kept_table.reused():
            table = self._locate_errors(lambda: estimate(rows, self.conditions, **settings))
        assert isinstance(table, pd.DataFrame)
        return table

    @cached_property
    def _kept_table(self) -> KeptTable:
        return KeptTable(self.judged)

    def _locate_errors(self, compute: Callable[[], T]) -> T:
        """Run `compute`, and raise its StatsError as a ReportError that names the file."""
        try:
            return compute()
        except stats.StatsError as error:
            what = f"{self.folder / 'rows.parquet'}: {error}"
            raise ReportError(what, fix="report on the rows of one run") from error


LOGGED = ("loss", "grad_norm", "nll", "margin", "kl")  # of the step log


def training_steps(folder: Path, ledger: pd.DataFrame) -> pd.DataFrame:
    """Return every optimiser step: objective, seed, budget, step, loss (nats), grad_norm, tokens (processed so far).

    `nll`, `margin` and `kl` (nats per token; `Objective.step_metrics`) are missing where an objective has none.
    `budget` is that of the first checkpoint from this step on.
    """
    found = [pd.DataFrame(columns=["objective", "seed", "budget", "step", *LOGGED, "tokens"])]
    for (objective, seed), stops in ledger.sort_values("step").groupby(["objective", "seed"]):
        whole = f"{objective}-s{seed}"
        for name, ends in [(whole, stops), *((f"{whole}-{b}", s) for b, s in stops.groupby("budget"))]:
            path = folder / "steps" / f"{name}.jsonl"
            if not path.is_file():
                continue  # one log for all budgets, or under a decaying learning rate one for each
            steps = _read(path, lambda p: pd.read_json(p, lines=True), "is not readable JSON lines")
            steps = steps[steps["step"] <= ends["step"].iloc[-1]]
            at = ends["budget"].to_numpy()[np.searchsorted(ends["step"], steps["step"])]
            known = steps.reindex(columns=["step", *LOGGED, "processed_tokens"])
            tokens = known.pop("processed_tokens").cumsum()
            found.append(known.assign(objective=objective, seed=seed, budget=at, tokens=tokens))
    return pd.concat(found[1:] or found, ignore_index=True)


def declared_claims(results: Results) -> Claims | None:
    """Return the claims that were hashed before training; raise LeewayError if they were edited since."""
    recorded, study = results.manifest.get("claims"), results.study.get("claims")
    path = results.folder / "study.yaml"
    if not isinstance(recorded, dict):
        if study is not None:
            what = f"{path}: its claims were added after the run began"
            raise LeewayError(what, fix=f"remove them, and {LATER_CLAIMS}")
        return None
    now = hash_claims(study) if isinstance(study, dict) else "none"
    if now != recorded.get("hash"):
        what = f"{path}: its claims were edited after the run began (hash {recorded.get('hash')} then, {now} now)"
        raise LeewayError(what, fix=f"restore them, and {LATER_CLAIMS}")
    try:
        return from_manifest(recorded)
    except ValueError as error:
        what = f"{results.folder / 'manifest.json'}: its claims cannot be used: {error}"
        raise LeewayError(what, fix="restore it, or run the study again") from error


def declared_set(results: Results) -> dict[str, Any]:
    """Return name, version and hash of the declared claims; empty if there are none."""
    recorded = results.manifest.get("claims")
    return {k: recorded.get(k) for k in ("name", "version", "hash")} if isinstance(recorded, dict) else {}


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    table: pd.DataFrame = _read(path, pd.read_parquet, "cannot be read as Parquet")
    missing = [c for c in columns if c not in table.columns]
    if missing:
        what = f"{path} lacks the columns {', '.join(missing)}: not written by `leeway run`"
        raise ReportError(what, fix="give the directory of a `leeway run`")
    table = table[columns + [c for c in OPTIONAL_COLUMNS if c in table.columns]]
    own = "item_id" in columns or "step" in columns  # rows, learning, ledger
    if own and (fault := table_fault(table, pq.read_schema(path))):
        raise ReportError(f"{path}: {fault}", fix="restore it, or run the study again")
    return table


def _read(path: Path, read: Callable[[Path], Any], fault: str, fix: str = "run the study again") -> Any:
    if not path.is_file():
        raise ReportError(f"{path.parent} has no {path.name}: not a finished run", fix="run the study into it")
    try:
        return read(path)
    except Exception as error:  # pyarrow raises many types
        raise ReportError(f"{path} {fault} ({first_line(error)[:160]})", fix=fix) from error
