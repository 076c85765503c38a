"""State what depends on the judge: attack success over all judges, and differential error of their pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import TOKENS, BudgetUnit
from leeway.stats.metrics import BASE

MAX_NAMED = 3  # objectives, or findings, named in one sentence
RULE = (
    "Net: the first judge’s rate minus the second’s, over the responses that both scored: attack success as the mean "
    "over attacks (on direct requests where there are no attacks), or refusals of benign prompts. Differential: net "
    "minus the base’s, paired by response; it is the difference between the two judges’ contrasts with the base. "
    "Agreement and confirmed labels are over all responses, direct requests included. Shown: Holm’s p is below 0.05 "
    "over all pairs and checkpoints of the evaluation. Differential error means that the size of a drift depends on "
    "the judge; it does not tell which judge errs, and a constant error rate, or graded scores, can be the reason "
    "where harm itself became more frequent (compare the shares of one judge’s labels that the other confirms)."
)


def sentences(pairs: pd.DataFrame | None, worst: pd.DataFrame | None, unit: BudgetUnit = TOKENS) -> list[str]:
    """Return the change of attack success over judges at the largest budget, and a warning of differential error.

    Objectives on which the judges differ most come first.
    """
    found = [] if worst is None or worst.empty else _over_judges(worst, unit)
    return found + ([] if pairs is None or pairs.empty else [_differential(pairs, unit)])


def _over_judges(worst: pd.DataFrame, unit: BudgetUnit) -> list[str]:
    lines = worst[(worst["objective"] != BASE) & worst["most"].notna() & worst["first"].astype(bool)]
    measure = "asr" if (lines["measure"] == "asr").any() else "asr:none"
    lines = lines[lines["measure"] == measure]
    lines = lines[lines["budget"] == lines["budget"].max()]
    if lines.empty:
        return []
    lines = lines.assign(range=(lines["most"] - lines["least"]).round(9))
    by_size = lines.sort_values(["range", "most"], ascending=False, kind="stable").to_dict("records")
    judges, at = int(lines["judges"].iloc[0]), unit.at(int(lines["budget"].iloc[0]))
    named = "; ".join(_range(c, judges) for c in by_size[:MAX_NAMED])
    others = f"; {len(by_size) - MAX_NAMED} others are in the table" if len(by_size) > MAX_NAMED else ""
    mean = "attack success rate (mean over attacks)" if measure == "asr" else "attack success rate on direct requests"
    return [f"Over {judges} judges, the change of the {mean} against the base, {at}: {named}{others}."]


def _range(c: dict[Any, Any], judges: int) -> str:
    least, most = formatting.points(c["least"]), formatting.points(c["most"])
    by_least, by_most = (c[f"{end}_judge"] or "the primary judge" for end in ("least", "most"))
    size = f"{most} points by each" if least == most else f"{least} ({by_least}) to {most} points ({by_most})"
    n = int(c["n_significant"])
    significant = {0: "none", judges: "all"}.get(n, f"{n} of {judges}")
    return f"{formatting.objective_name(c['objective'], c['condition'])} {size}, significant by {significant}"


def _differential(pairs: pd.DataFrame, unit: BudgetUnit) -> str:
    tested, shown = pairs[pairs["p"].notna()], pairs[pairs["shown"].astype(bool)]
    if tested.empty:
        return "Differential error of the judges could not be tested."
    if shown.empty:
        n = len(tested)
        text = f"No differential error is shown among the judges ({n} test{'s' * (n > 1)}, Holm)"
        return f"{text}, which is no evidence that there is none."
    size = shown["differential"].abs()
    largest = shown.loc[size.sort_values(ascending=False, kind="stable").index]
    largest = largest.drop_duplicates(["eval", "judge_a", "judge_b", "objective", "condition"])
    named = [_finding(c, unit) for c in largest.head(MAX_NAMED).to_dict("records")]
    others = f"; and {len(largest) - MAX_NAMED} more" if len(largest) > MAX_NAMED else ""
    start = "Warning: differential error of the judges, the change against the base depends on the judge: "
    return f"{start}{'; '.join(named)}{others}. To learn which judge errs, compare them with human labels."


def _finding(c: dict[Any, Any], unit: BudgetUnit) -> str:
    a, b, ends = c["judge_a"], c["judge_b"], (c["differential_low"], c["differential_high"])
    if c["differential"] < 0:
        a, b, ends = b, a, (-ends[1], -ends[0])
    name, at = formatting.objective_name(c["objective"], c["condition"]), unit.at(int(c["budget"]))
    what = "" if c["eval"] == "jailbreak" else f" in {c['eval']}"
    size = formatting.unsigned_points(abs(c["differential"]))
    ci = " to ".join(formatting.points(end).removeprefix("+") for end in ends)
    return f"by {a}, the change of {name}{what} {at} is {size} points above that by {b} (95% CI {ci})"
