"""The study's controls as tables and sentences: what is reported without drift, and from which drift on it is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from leeway import stats
from leeway.report.formatting import capitalize_first, eval_name, mapping, percent, points
from leeway.stats.false_alarms import ALL
from leeway.stats.metrics import BASE

if TYPE_CHECKING:
    from leeway.report.results import Results

LEVEL = 0.05
AGAIN, DOSE = "@base-again", "@dose-"
COLUMNS = ["control", "axis", "statistic", "value", "low", "high", "nominal", "n", "result", "note"]
METHOD = (
    "Rate 0: training with a learning rate of 0, so that weights must equal the base’s bit for bit. Sampling: the base "
    "against itself, its answers sampled with another seed. False alarms: studies without drift, re-drawn by taking "
    "each prompt’s scores, of base and checkpoints, from random prompts of the base, and tested as the verdict is."
)

NO_CONTROLS = (
    "Controls were not run: A/A, dose and the learning check need arms that Leeway trains, and this checkpoint was "
    "trained elsewhere. So neither the limit of detection nor what is reported without drift was measured."
)


def aa_table(results: Results) -> pd.DataFrame:
    """Return the A/A checks, one per line; empty if the study has none."""
    facts = results.control_facts
    if not facts.get("rate-0") and not mapping(results.study.get("controls")).get("aa"):
        return pd.DataFrame(columns=COLUMNS)
    return pd.DataFrame([*_rate_zero(facts), *_again(results), *_false_alarms(results)], columns=COLUMNS)


def _rate_zero(facts: dict[str, Any]) -> list[dict[str, object]]:
    line: dict[str, object] = {"control": "rate 0", "statistic": "changed weight tensors", "nominal": 0.0}
    if not (found := mapping(facts.get("rate-0"))):
        return [line | {"result": "not run", "note": str(mapping(facts.get("not_run")).get("rate-0", ""))}]
    changed = int(found["changed"]) + bool(found["adapter_changed"])
    note = "" if changed else "the weights are the base’s, so its answers are not measured again"
    line |= {"value": float(changed), "n": int(found["weights"]), "note": note}
    return [line | {"result": "alarm" if changed else "ok"}]


def _again(results: Results) -> list[dict[str, object]]:
    """Compare the base with itself under another sampling seed, on the primary measures of each sampled axis."""
    line: dict[str, object] = {"control": "sampling", "statistic": "difference of the base to itself", "nominal": 0.0}
    rows = _first_judge(results, results.control_rows)
    rows = rows[rows["objective"] == AGAIN]
    if rows.empty:
        note = str(mapping(results.control_facts.get("not_run")).get("sampling", ""))
        return [line | {"result": "not run", "note": note}]
    base = _first_judge(results, results.rows)
    base = base[(base["objective"] == BASE) & base["eval"].isin(rows["eval"].unique())]
    table = stats.contrasts(pd.concat([base, rows], ignore_index=True), results.conditions)
    table = table[table["primary"].astype(bool)]
    return [
        line
        | {"axis": r["measure"], "value": r["difference"], "low": r["low"], "high": r["high"], "n": r["n_clusters"]}
        | {"result": "alarm" if r["p_holm"] < LEVEL else "ok", "note": r["note"]}
        for r in table.to_dict("records")
    ]


def _false_alarms(results: Results) -> list[dict[str, object]]:
    table = stats.false_alarms(results.judged, results.conditions, first=results.first_conditions)
    return [
        {"control": "false alarms", "axis": r["axis"], "statistic": f"share of {r['redraws']} studies without drift"}
        | {"value": r["rate"], "low": r["low"], "high": r["high"], "nominal": r["nominal"], "n": r["tests"]}
        | {"result": "alarm" if r["low"] > r["nominal"] else "ok", "note": r["note"]}
        for r in table.to_dict("records")
    ]


def dose_tables(results: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the dose-response curve and the limits of detection; both empty without dose arms."""
    facts, rows = results.control_facts, _first_judge(results, results.control_rows)
    arms = {str(a["objective"]): float(a["share"]) for a in facts.get("arms") or []}
    own = rows[rows["objective"].isin(arms)]
    if own.empty:
        return pd.DataFrame(), pd.DataFrame()
    zero = str(facts["zero"])
    if zero not in arms:
        study = _first_judge(results, results.rows[results.rows["eval"] == "jailbreak"])
        study = study[(study["objective"] == zero) & (study["budget"] == own["budget"].max())]
        own, arms[zero] = pd.concat([study, own], ignore_index=True), 0.0
    curve, limits = stats.dose_response(own, results.conditions, arms)
    counts: dict[str, int] = {}
    for a in facts["arms"]:
        counts[a["objective"]] = counts.get(a["objective"], 0) + int(a["compliant"])
    curve["compliant"] = curve["objective"].map(counts).fillna(0).astype(int)
    return curve, limits


def _first_judge(results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["judge"] == rows["eval"].map(results.judges).fillna(rows["judge"])]


def control_sentences(results: Results) -> list[str]:
    """Return the verdict's lines on the controls; a control that was requested and not run says why.

    A run that measures a model trained elsewhere has one line, since no control can be run.
    """
    if mapping(results.manifest.get("external")):
        return [NO_CONTROLS]
    table, (curve, limits), facts = results.controls(), results.dose, results.control_facts
    lines = []
    if len(table):
        lines.append(f"A/A: {_aa_text(table)}.")
    if len(limits):
        lines.append(f"Dose: {_dose_text(curve, limits)}.")
    elif why := mapping(facts.get("not_run")).get("dose"):
        lines.append(f"Dose was not run: {why}.")
    return lines


def _aa_text(table: pd.DataFrame) -> str:
    by_control = {name: own.to_dict("records") for name, own in table.groupby("control", sort=False)}
    parts = []
    (zero,) = by_control["rate 0"]
    if zero["result"] == "not run":
        parts.append(f"no arm at learning rate 0 ({zero['note']})")
    elif zero["result"] == "ok":
        parts.append("the arm at learning rate 0 equals the base bit for bit")
    else:
        parts.append(f"THE ARM AT LEARNING RATE 0 DIFFERS FROM THE BASE ({zero['value']:.0f} tensors): nothing holds")
    again = by_control["sampling"]
    if again[0]["result"] == "not run":
        parts.append(f"the base was not measured again ({again[0]['note']})")
    else:
        differs = [f"{r['axis']} {points(r['value'])}" for r in again if r["result"] == "alarm"]
        found = f"differs from itself ({', '.join(differs)} points)" if differs else "does not differ from itself"
        parts.append(f"sampled with another seed the base {found}")
    alarms = {r["axis"]: r for r in by_control.get("false alarms", [])}
    if ALL in alarms:
        axes = ", ".join(f"{eval_name(axis)} {percent(r['value'])}" for axis, r in alarms.items() if axis != ALL)
        every = alarms[ALL]
        text = (
            f"of studies re-drawn without drift, {percent(every['value'])} report some ({axes}; at most 5% per family"
        )
        parts.append(f"{text} of tests is nominal, {percent(every['nominal'], 0)} in all)")
    return "; ".join(parts)


def _dose_text(curve: pd.DataFrame, limits: pd.DataFrame) -> str:
    parts = []
    for limit in limits.head(1).to_dict("records"):
        own = curve[curve["measure"] == limit["measure"]]
        rates = " → ".join(percent(rate, 0) for rate in own["rate"])
        doses = ", ".join(_share(share) for share in own["share"])
        shape = "rises" if limit["rising"] else "does not rise steadily"
        parts.append(f"{limit['label']} {shape} with compliant answers in SFT’s data: {rates} at {doses}")
        if limit["note"]:
            parts.append(f"no limit of detection ({limit['note']})")
            continue
        found, smallest = _beyond(limit["limit"], limit["largest"]), own.loc[own["share"] > 0, "share"].min()
        if limit["limit"] < smallest:
            found = f"below the smallest dose, {_share(smallest)}, interpolated: {found}"
        ends = f"95% CI {_beyond(limit['low'], limit['largest'])} to {_beyond(limit['high'], limit['largest'])}"
        parts.append(f"limit of detection {found} ({ends} over prompts, not over training runs; 80% power)")
    return capitalize_first("; ".join(parts))


def _share(share: float) -> str:
    return f"{100 * share:.2g}%"


def _beyond(limit: float, largest: float) -> str:
    return f"above {_share(largest)}" if limit > largest else _share(limit)


def page_values(results: Results) -> dict[str, Any]:
    """Return what the page shows of the controls: sentences, and tables as rows of text."""
    curve, limits = results.dose
    heads, doses = _dose_table(curve, limits) if len(curve) else ([], [])
    return {
        "lines": control_sentences(results),
        "method": METHOD,
        "origin": results.control_facts.get("origin", ""),
        "checks": [_check_cells(r) for r in results.controls().to_dict("records")],
        "dose_heads": heads,
        "doses": doses,
    }


def _dose_table(curve: pd.DataFrame, limits: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return a line per measure: its rate at each dose, and the smallest dose that would be seen."""
    counts = curve.drop_duplicates("share").sort_values("share")
    doses = zip(counts["share"], counts["compliant"], strict=True)
    heads = ["Measure", "Limit of detection", "95% CI", *(f"{_share(share)} ({n:,})" for share, n in doses)]
    limit_of = {r["measure"]: r for r in limits.to_dict("records")}
    lines = []
    for measure, own in curve.sort_values("share").groupby("measure", sort=False):
        rates = own[["rate", "low", "high"]].itertuples(index=False, name=None)
        cells = [f"{percent(rate, 0)} [{100 * low:.0f}, {100 * high:.0f}]" for rate, low, high in rates]
        found = _limit_cells(limit_of[measure]) if measure in limit_of else ["–", "–"]
        lines.append([str(own["label"].iloc[0]), *found, *cells])
    return heads, lines


def _check_cells(r: dict[Any, Any]) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {"rate 0": "{:.0f}".format, "sampling": points}
    show = formats.get(str(r["control"]), percent)
    value, nominal = ("–" if pd.isna(r[k]) else show(r[k]) for k in ("value", "nominal"))
    interval = "–" if pd.isna(r["low"]) else f"{show(r['low'])} to {show(r['high'])}"
    axis, note = ("" if pd.isna(r[k]) else str(r[k]) for k in ("axis", "note"))
    return [r["control"], axis, r["statistic"], value, interval, nominal, r["result"], note]


def _limit_cells(r: dict[Any, Any]) -> list[str]:
    if r["note"]:
        return [str(r["note"]), "–"]
    limit, low, high = (_beyond(r[k], r["largest"]) for k in ("limit", "low", "high"))
    return [limit if r["rising"] else f"{limit} (not rising steadily)", f"{low} to {high}"]
