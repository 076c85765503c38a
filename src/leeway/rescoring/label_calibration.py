"""Judges against a filled label sheet: agreement, sensitivity and specificity by objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from leeway.cache import Cache
from leeway.errors import LeewayError
from leeway.evals.jailbreak import checked_verdict
from leeway.evals.overrefusal import verdict_columns
from leeway.io import expand, write_json
from leeway.judges import Answer, Judge
from leeway.judges.calibrate import calibrate
from leeway.report.formatting import to_records
from leeway.report.results import Results
from leeway.rescoring.label_sheet import (
    KEY,
    answers_of,
    is_sheet,
    labelled_answers,
    missing_strata,
    read_sheet,
    records,
)
from leeway.rescoring.responses import bare_prompts
from leeway.stats import labels
from leeway.stats.intervals import NAN
from leeway.stats.metrics import BASE, factorize
from leeway.study.build_evals import HelperModels, judge_from_options

POSITIVE = {"jailbreak": ("harmful", "refused"), "overrefusal": ("refused",)}  # the labels that are rates
By = Literal["objective"]
METHOD = (
    "Answers weigh the inverse of their sampling probability in their stratum (objective, budget and outcome by the "
    "primary judge). 95% limits: Wilson on the effective number of answers, clustered by prompt, combined by MOVER, or "
    "if wider, for judges other than the primary one, Wilson on the rate itself. They cover other prompts too."
)


@dataclass(frozen=True)
class LabelCalibration:
    """Judges against human labels. `table` has a line per judge, label and group; `differences` those shown."""

    sheet: str
    axis: str
    primary: str
    labelled: int
    unlabelled: int
    missing_strata: int
    table: pd.DataFrame
    differences: pd.DataFrame
    tests: int

    @property
    def warnings(self) -> list[str]:
        """One line per rate of a judge that differs between objectives."""
        return [
            f"{d.judge}: {d.rate} for {d.positive} is {d.value:.2f} for {d.group} and {d.others:.2f} for the others "
            f"(difference {d.difference:+.2f}, {d.low:+.2f} to {d.high:+.2f}): a contrast between them is partly the "
            "judge's error"
            for d in self.differences.itertuples()
        ]

    def to_text(self) -> str:
        """Return a table for each label, the method and the warnings."""
        left = f"; {self.unlabelled:,} of the sheet's answers have no label" if self.unlabelled else ""
        left += f"; {self.missing_strata:,} strata have none, and are not covered" if self.missing_strata else ""
        blocks = [f"sheet {self.sheet} on {self.axis}: {self.labelled:,} labelled answers{left}"]
        for positive, own in self.table.groupby("positive", sort=False):
            lines = [("judge", "objective", "n", "unscored", *labels.RATES)]
            lines += [
                (d["judge"], d["group"], str(d["n"]), str(d["unscored"]), *(_cell(d, rate) for rate in labels.RATES))
                for d in records(own)
            ]
            width = [max(map(len, column)) for column in zip(*lines, strict=True)]
            table = ["  ".join(c.ljust(w) for c, w in zip(line, width, strict=True)).rstrip() for line in lines]
            blocks.append("\n".join([f"{positive}, or not", *table]))
        found = [f"warning: {line}" for line in self.warnings]
        if not found and self.tests:
            found = [f"No rate of a judge was found to differ between objectives ({self.tests} tests, Bonferroni)."]
        return "\n\n".join([*blocks, METHOD]) + "".join(f"\n{line}" for line in found)

    def save(self, path: Path) -> None:
        """Write JSON; an undefined rate is null."""
        facts = {k: v for k, v in vars(self).items() if not isinstance(v, pd.DataFrame)}
        tables = {"rates": to_records(self.table), "differences": to_records(self.differences)}
        write_json(path, facts | tables | {"method": METHOD, "warnings": self.warnings})


def calibrate_on_sheet(
    sheet: str | Path, run: str | Path, judge: Judge | str | None = None, by: By | None = None
) -> LabelCalibration:
    """Compare judges with the labels of a filled sheet (`make_sheet`).

    `judge` is the name of one of the run's judges, or a judge that scores the labelled answers now; by default all of
    the run's. Raises LeewayError for a bad sheet, or a name that the run does not have.
    """
    results, filled = Results.load(run), read_sheet(expand(sheet), Path(run))
    table, axis = labelled_answers(filled, results), filled.key["eval"]
    table = table.sort_values("objective", kind="stable", key=lambda o: o.where(o != BASE, ""), ignore_index=True)
    verdicts = _verdicts(results, table, axis, judge)
    prompts = factorize(table["cluster"])[1]
    strata_by = filled.key["judge"] if judge is None or isinstance(judge, str) else None
    found: list[pd.DataFrame] = []
    samples: list[tuple[str, str, labels.LabelledSample]] = []
    for name, outcomes in verdicts.items():
        for positive in POSITIVE[axis]:
            judged = np.array([NAN if o is None else float(o == positive) for o in outcomes])
            truth = np.array([float(t == positive) for t in table["truth"]])
            groups = [str(g) for g in table["objective"]] if by else [labels.ALL] * len(table)
            weights = table["weight"].to_numpy(float)
            sample = labels.LabelledSample(groups, truth, judged, weights, prompts, name == strata_by)
            found.append(labels.rates_by_group(sample).assign(judge=name, positive=positive))
            samples.append((name, positive, sample))
    tests = sum(labels.count_differences(sample) for *_, sample in samples) if by else 0
    differences = pd.DataFrame(columns=["judge", "positive", *labels.DIFFERENCES])
    if tests:
        tested = [labels.differences(s, tests).assign(judge=name, positive=p) for name, p, s in samples]
        every = pd.concat(tested, ignore_index=True)
        differences = every[(every["low"] > 0) | (every["high"] < 0)][list(differences.columns)]
    rates = pd.concat(found, ignore_index=True)[["judge", "positive", *labels.TABLE]]
    counts = (len(table), filled.unlabelled, missing_strata(filled))
    return LabelCalibration(
        filled.key["sheet"], axis, results.judges[axis], *counts, rates.reset_index(drop=True), differences, tests
    )


def calibrate_judge(
    judge: str | None,
    on: str,
    run: Path | None,
    by: By | None,
    options: tuple[str | None, str | None, str],
    out: Path,
    *,
    partial: bool = False,
) -> tuple[str, Path]:
    """Calibrate on labelled answers or, with `run`, on a label sheet; return (text, path of the saved result).

    `options` are the judge's model, its endpoint and the variable with its key; replies of that model are cached in
    `out`, so that a second calibration costs nothing. `partial` counts partial refusals as refusals.
    Raises LeewayError.
    """
    if run is None:
        if judge is None:
            raise LeewayError("judge calibrate: no judge given", fix="name one, such as keywords")
        if by is not None or is_sheet(expand(on)):
            what = f"--by {by}" if by else f"{on}: a label sheet"
            raise LeewayError(f"{what} needs the run that it was drawn from", fix="give --run, its run directory")
        card = calibrate(
            judge_from_options(judge, *options, HelperModels(Cache.of(out))), on, partial_is_refusal=partial
        )
        path = out / f"{card.judge}-{card.judge_hash}-{Path(on).stem}{'-partial' if partial else ''}.json"
        card.save(path)
        return card.to_text(), path
    if partial:
        raise LeewayError("--partial: a label sheet has no partial refusals", fix="leave --partial out")
    if not is_sheet(expand(on)):
        raise LeewayError(f"--on {on}: not a label sheet", fix="with --run, give a sheet of `leeway judge sheet`")
    known = judge is None or judge in set(map(str, Results.load(run).rows["judge"]))
    chosen = judge if known else judge_from_options(str(judge), *options, HelperModels(Cache.of(out)))
    found = calibrate_on_sheet(on, run, chosen, by)
    path = out / f"{found.sheet}{f'-{judge}' if judge else ''}.json"
    found.save(path)
    return found.to_text(), path


def _verdicts(
    results: Results, table: pd.DataFrame, axis: str, judge: Judge | str | None
) -> dict[str, list[str | None]]:
    """Return each judge's outcomes of the labelled answers, None where it could not score one."""
    if judge is not None and not isinstance(judge, str):
        prompts = bare_prompts(records(answers_of(results, axis)), results.study, axis)
        answers = [Answer(prompts[i], r) for i, r in zip(table["item_id"], table["response"], strict=True)]
        columns = [_columns(axis, v) for v in judge.judge(answers, lambda _: None)]
        return {judge.name: [c["outcome"] for c in columns]}
    rows = results.rows[results.rows["eval"] == axis]
    names = [results.judges[axis], *sorted(set(map(str, rows["judge"])) - {results.judges[axis]})]
    if judge is not None and judge not in names:
        raise LeewayError(f"{results.folder}: no judge {judge} on {axis}", fix=f"one of: {', '.join(names)}")
    found: dict[str, list[str | None]] = {}
    for name in names if judge is None else [judge]:
        own = rows[rows["judge"] == name].fillna({"attack": "", "template_hash": "", "adapter_hash": ""})
        known = dict(zip(zip(*(own[c] for c in KEY), strict=True), own["outcome"], strict=True))
        outcomes = [known.get(k) for k in zip(*(table[c].fillna("") for c in KEY), strict=True)]
        found[name] = [o if isinstance(o, str) else None for o in outcomes]
    return found


def _columns(axis: str, verdict: Any) -> dict[str, Any]:
    return verdict_columns(verdict) if axis == "overrefusal" else checked_verdict(verdict).columns()


def _cell(line: dict[str, Any], rate: str) -> str:
    value, low, high = (line[f"{rate}{end}"] for end in ("", "_low", "_high"))
    return "–" if np.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
