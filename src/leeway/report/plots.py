"""The page's charts from Python: `results.plot.tradeoff()` and the others return a `Chart`, which a notebook shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from leeway.errors import LeewayError
from leeway.report import charts
from leeway.report.charts import Chart
from leeway.report.formatting import BudgetUnit
from leeway.report.mechanism import Probe
from leeway.report.plotting import Series, order_objectives, series_of


class Measured(Protocol):
    """What charts need of `Results`."""

    rows: pd.DataFrame
    manifest: dict[str, Any]
    study: dict[str, Any]

    @property
    def probe_table(self) -> pd.DataFrame | None: ...
    @property
    def probe_contrasts(self) -> pd.DataFrame | None: ...
    def rates(self) -> pd.DataFrame: ...
    def pooled_rates(self) -> pd.DataFrame: ...
    def contrasts(self) -> pd.DataFrame: ...
    def learning(self, *, pool_seeds: bool = False) -> pd.DataFrame: ...
    def training_steps(self) -> pd.DataFrame: ...


@dataclass(frozen=True)
class Plots:
    """The charts of a run. Each raises LeewayError if the run has not measured what it shows."""

    results: Measured

    def tradeoff(self) -> Chart:
        """Capability against attack success at the largest budget."""
        return _require(charts.tradeoff(self.results.pooled_rates(), self._lines, self._unit), "accuracy and ASR")

    def budgets(self, measure: str = "jailbreak") -> Chart:
        """An axis's primary measure over the budgets: capability, jailbreak, overrefusal or persona."""
        found = {c.name: c for c in charts.by_budget(self.results.pooled_rates(), self._lines, self._unit)}
        known = ", ".join(name.removeprefix("by-budget-") for name in found)
        return _require(found.get(f"by-budget-{measure}"), f"an axis {measure!r} (this run has: {known or 'none'})")

    def attacks(self, *, change: bool = False) -> Chart:
        """Attack success by objective and attack, or its change from the base."""
        found = charts.attacks(self.results.pooled_rates(), self.results.contrasts(), self._lines, self._unit)
        name = "by-attack-change" if change else "by-attack"
        return _require(next((c for c in found if c.name == name), None), "ASR by attack")

    def forest(self) -> Chart:
        """Differences from the base with intervals, at the largest budget."""
        return _require(charts.forest(self.results.contrasts(), self._lines, self._unit), "a contrast with the base")

    def training(self) -> Chart:
        """Training loss and gradient norm against the tokens processed."""
        return _require(charts.training(self.results.training_steps(), self._lines), "a log of training steps")

    def learning(self) -> Chart:
        """The learning check of every checkpoint."""
        measured = self.results.learning(pool_seeds=True)
        return _require(charts.learning(measured, self._lines, self._unit), "a learning check")

    def mechanism(self, name: str = "patching") -> Chart:
        """A chart of `leeway probe`: patching, layers, asr, capability or depth."""
        probe = Probe.of(self.results) if self.results.probe_table is not None else None  # type: ignore[arg-type]
        found = {c.name: c for c in charts.mechanism(probe, self.results.contrasts(), self._lines)}
        known = ", ".join(c.removeprefix("mechanism-") for c in found) or "none: run `leeway probe` on it"
        return _require(found.get(f"mechanism-{name}"), f"a probe's chart {name!r} (this run has: {known})")

    @property
    def _unit(self) -> BudgetUnit:
        return BudgetUnit.of(self.results.manifest)

    @property
    def _lines(self) -> list[Series]:
        objectives = [str(o) for o in self.results.rows["objective"].unique()]
        return series_of(self.results.rates(), order_objectives(objectives, self.results.study))


def _require(chart: Chart | None, what: str) -> Chart:
    if chart is None:
        raise LeewayError(f"this run has not measured {what}", fix="choose another chart, or add the eval to the study")
    return chart
