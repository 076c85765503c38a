"""Contrast checkpoints by their logs, and test equivalence at a margin.

Every checkpoint is compared with the first one by the paired, clustered tests of `leeway.stats`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leeway.errors import LeewayError
from leeway.report import formatting
from leeway.report.compare.logs.match import LogOptions, Matched, by_name, match
from leeway.report.compare.logs.samples import Checkpoint
from leeway.report.results import LEDGER_COLUMNS, Results
from leeway.report.verdict import LEVEL
from leeway.stats.contrasts import holm_by_family
from leeway.stats.intervals import TIE
from leeway.stats.metrics import BASE

FAMILY, SUBTASKS = "all comparisons", "subtasks"
CONTRASTS = [
    "checkpoint",
    "measure",
    "primary",
    "base",
    "score",
    "difference",
    "low",
    "high",
    "se",
    "mde",
    "p",
    "p_holm",
]
CONTRASTS += ["p_mcnemar", "family_size", "higher", "lower", "equal", "n", "n_clusters", "n_unpaired", "n_unscored"]
CONTRASTS += ["difference_if_highest", "difference_if_lowest", "note"]
EQUIVALENCE = ["checkpoint", "measure", "difference", "low90", "high90", "margin", "p_lower", "p_upper", "p", "p_holm"]
EQUIVALENCE += ["equivalent", "n", "n_clusters", "note"]
ITEMS = ["checkpoint", "measure", "items_base", "items", "paired", "only_base", "only_checkpoint", "answers_base"]
ITEMS += ["answers", "unscored_base", "unscored"]
CHANGED = ["checkpoint", "measure", "item", "base", "score", "difference"]


@dataclass(frozen=True)
class LogComparison:
    """The result of a comparison of logs."""

    checkpoints: Seq[Checkpoint]
    matched: Matched
    options: LogOptions

    @property
    def base(self) -> str:
        return self.matched.names[0]

    @cached_property
    def results(self) -> Results:
        """The rows as those of a run directory: the base is `base`, each other checkpoint an objective."""
        rows = self.matched.rows
        external = {"kind": "logs", "count": "none", "names": {BASE: self.base}}
        external |= {"tool": self.checkpoints[0].tool, "measures": list(self.matched.measures)}
        manifest = {"leeway": version("leeway"), "external": external, "model": {"name": self.base}}
        ledger = pd.DataFrame(columns=LEDGER_COLUMNS)
        return Results(Path(), rows, ledger, manifest, {"name": " against ".join([*self.matched.names[1:], self.base])})

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """One line per checkpoint and measure: checkpoint − base with its interval, p, and Holm's p over all lines.

        A group of tasks has further lines for its subtasks (`primary` false), a Holm family of their own. `higher`,
        `lower` and `equal` count items with a higher, lower and equal score.
        """
        table = self.results.contrasts()
        table["family"] = np.where(table["primary"], FAMILY, SUBTASKS)
        table = holm_by_family(table.drop(columns=["p_holm", "family_size"]))
        table = table.rename(columns={"objective": "checkpoint", "rate": "score"})
        table = table.rename(columns={"if_best": "difference_if_highest", "if_worst": "difference_if_lowest"})
        parts = self._pairs.assign(
            measure=self._pairs["measure"] + ":" + self._pairs["item"].str.rsplit("/", n=1).str[0]
        )
        pairs = pd.concat([self._pairs, parts], ignore_index=True).groupby(["checkpoint", "measure"])
        counts = pairs["change"].value_counts().unstack(fill_value=0)
        counts = counts.reindex(columns=["higher", "lower", "equal"], fill_value=0).reset_index()
        table = table.merge(counts, on=["checkpoint", "measure"], how="left")
        table[["higher", "lower", "equal"]] = table[["higher", "lower", "equal"]].fillna(0).astype(int)
        table["note"] = [self._note(str(n)) for n in table["note"]]
        return self._ordered(table)[CONTRASTS]

    @cached_property
    def equivalence(self) -> pd.DataFrame:
        """Tests of equivalence at the margins of the options, Holm over all lines; empty without margins."""
        margins = {}
        for measure, (task, metric) in self.matched.measures.items():
            if margin := by_name(self.options.margins, task, metric):
                margins[measure] = margin
        if not margins:
            return pd.DataFrame(columns=EQUIVALENCE)
        table = self.results.equivalence(margins)
        table = holm_by_family(table.drop(columns=["p_holm", "family_size"]).assign(family=FAMILY))
        table["equivalent"] = table["p_holm"] <= LEVEL
        table["note"] = [self._note(str(n)) for n in table["note"]]
        return self._ordered(table.rename(columns={"objective": "checkpoint"}))[EQUIVALENCE]

    @cached_property
    def items(self) -> pd.DataFrame:
        """How many items each log has, how many pair, and how many answers are unscored."""
        lines = []
        rows, unscored = self.matched.rows, self.matched.unscored
        lost = unscored.groupby(["measure", "checkpoint"])["answers"].sum().to_dict()
        for name in self.matched.names[1:]:
            for measure in self.matched.measures:
                own = rows[rows["eval"] == measure]
                base, other = (set(own.loc[own["objective"] == o, "item_id"]) for o in (BASE, name))
                line: dict[str, Any] = {"checkpoint": name, "measure": measure, "items_base": len(base)}
                line |= {"items": len(other), "paired": len(base & other), "only_base": len(base - other)}
                line |= {"only_checkpoint": len(other - base)}
                for suffix, who in (("_base", self.base), ("", name)):
                    line |= {f"answers{suffix}": self.matched.answers[measure, who]}
                    line |= {f"unscored{suffix}": int(lost.get((measure, who), 0))}
                lines.append(line)
        return pd.DataFrame(lines, columns=ITEMS)

    @property
    def changed(self) -> pd.DataFrame:
        """The items whose score differs from the base's."""
        return self._pairs.loc[self._pairs["change"] != "equal", CHANGED].reset_index(drop=True)

    @cached_property
    def _pairs(self) -> pd.DataFrame:
        """The scored pairs of every checkpoint and measure."""
        rows = self.matched.rows[["objective", "eval", "item_id", "score"]]
        rows = rows.rename(columns={"eval": "measure", "item_id": "item"}).dropna(subset=["score"])
        base = rows[rows["objective"] == BASE].drop(columns="objective").rename(columns={"score": "base"})
        found = rows[rows["objective"] != BASE].rename(columns={"objective": "checkpoint"})
        found = found.merge(base, on=["measure", "item"])
        found["difference"] = (found["score"] - found["base"]).round(10)
        sign = np.where(found["difference"].abs() <= TIE, 0, np.sign(found["difference"]))
        return found.assign(change=pd.Series(sign, index=found.index).map({1.0: "higher", -1.0: "lower", 0.0: "equal"}))

    def _note(self, note: str) -> str:
        """Return a note of `stats` without that on training seeds, and with this comparison's name for a cluster."""
        return formatting.without_seed_note(note).replace("prompt", "cluster" if self.options.cluster_by else "item")

    def _ordered(self, table: pd.DataFrame) -> pd.DataFrame:
        """Sort lines by measure and checkpoint as they were given."""
        measures, names = list(self.matched.measures), self.matched.names
        order = table.assign(m=table["axis"].map(measures.index), c=table["checkpoint"].map(names.index))
        order = order.assign(part=table["measure"].where(table["measure"] != table["axis"], ""))
        return order.sort_values(["m", "part", "c"]).reset_index(drop=True)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        found = {"contrasts": self.contrasts, "equivalence": self.equivalence, "items": self.items}
        settings = pd.DataFrame(self.matched.differences, columns=["what", "effect", *self.matched.names])
        found |= {"unscored": self.matched.unscored, "settings": settings, "changed": self.changed}
        return {k: t for k, t in found.items() if k != "equivalence" or len(t)}


def compare(checkpoints: Seq[Checkpoint], options: LogOptions | None = None) -> LogComparison:
    """Compare each checkpoint with the first one; raises LeewayError if their logs cannot be compared."""
    options = options or LogOptions()
    for name, margin in options.margins.items():
        if not 0 < margin < 1:
            where = "" if name == "*" else f" of {name}"
            raise LeewayError(
                f"compare: the margin{where} is {margin:g}", fix="give a fraction, such as 0.05: 5 points"
            )
    return LogComparison(checkpoints, match(checkpoints, options), options)
