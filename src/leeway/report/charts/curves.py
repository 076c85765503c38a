"""Charts over training: measures by budget, persona traits, the learning check, loss and gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import pandas as pd

from leeway.report import formatting
from leeway.report.charts.spec import (
    FADE,
    INK,
    NOMINAL,
    PANEL,
    QUANTITY,
    RAW,
    TIP,
    TOGGLE,
    Chart,
    Datum,
    Spec,
    clean,
    flat,
    line_colour,
    line_keys,
    point_looks,
    shown_by,
    spec_of,
)
from leeway.report.formatting import TOKENS, BudgetUnit
from leeway.report.plotting import Series, key_of
from leeway.stats.learning import LABELS
from leeway.stats.metrics import BASE, LOG_ODDS, PLAIN
from leeway.stats.rates import ATTACKED

LOGGED = {
    "loss": "Loss, nats",
    "grad_norm": "Gradient norm",
    "nll": "NLL, nats",
    "margin": "Margin, nats",
    "kl": "KL, nats",
}
ACCENT = "#D55E00"  # SFT's colour
Show = Callable[[float, float, float], str]  # value, low, high -> text


def by_budget(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> list[Chart]:
    """Plot each primary measure, and the trait in its place of endorsement, over the budgets; one chart a measure."""
    trait = bool((rates["measure"] == "trait").any())
    replaced = (rates["measure"] == "endorsement") & trait
    primary = rates[(rates["primary"].astype(bool) & ~replaced) | (rates["measure"] == "trait")]
    budgets = sorted(int(b) for b in primary.loc[primary["objective"] != BASE, "budget"].unique())
    if not lines or not budgets:
        return []
    charts = []
    for measure in dict.fromkeys(primary["measure"]):
        own = primary[primary["measure"] == measure]
        label, log_odds = str(own["label"].iloc[0]), measure in LOG_ODDS
        show = _log_odds_ci if log_odds else formatting.percent_ci
        axis = {"format": "+.2f" if log_odds else "~%", "tickCount": 5}
        x = _budget_axis(budgets, unit)
        body: Spec = {
            "height": 260,
            "transform": shown_by("lines", "budgets"),
            "layer": _over_budgets(axis, x, lines, zero=not log_odds),
        }
        if len(budgets) == 1:
            body |= {"height": {"step": 24}, "layer": _dots(axis, lines, zero=not log_odds)}
        charts.append(
            spec_of(
                f"by-budget-{own['axis'].iloc[0]}",
                label if len(budgets) == 1 else f"{label}, by budget",
                "Bars: 95% CIs over prompts."
                if len(budgets) == 1
                else "Bands: 95% CIs over prompts. Dashed: the base.",
                f"Dot plot of {label} of the base and each objective."
                if len(budgets) == 1
                else f"Line chart of {label} by budget, one line per objective.",
                _curve_data(own, lines, unit, show),
                body,
                lines=line_keys(lines),
                budgets=budgets,
            )
        )
    return charts


def traits(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Plot the endorsement of each persona trait over the budgets: one panel per trait."""
    table = rates[rates["measure"].str.startswith("endorsement:")]
    data: list[Datum] = []
    for measure in dict.fromkeys(table["measure"]):
        panel = measure.split(":", 1)[1].replace("-", " ").capitalize()
        own = _curve_data(table[table["measure"] == measure], lines, unit, formatting.percent_ci)
        data += [d | {"panel": panel} for d in own]
    return _panels(
        "persona",
        "Endorsement by trait",
        "P(matching answer) / (P(Yes) + P(No)), averaged over statements; a model that always answers Yes scores 50%. "
        "Bands: 95% CIs. Dashed: the base.",
        "Line charts of endorsement by budget, one panel per trait, one line per objective.",
        data,
        lines,
        unit,
        {"format": "~%", "tickCount": 4},
    )


def learning(measured: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Plot each measure of the learning check over the budgets: one panel per measure."""
    table = measured.rename(columns={"value": "rate"})
    data: list[Datum] = []
    for measure in (m for m in LABELS if m != "train-loss"):
        is_share = measure in ("preference", "weight-change")
        show = formatting.percent_ci if is_share else formatting.nats_ci
        own = _curve_data(table[table["measure"] == measure], lines, unit, show)
        data += [d | {"panel": LABELS[measure]} for d in own]
    return _panels(
        "learning",
        "What each checkpoint learned",
        "On held-out examples of the task: NLL of preferred answers; preferred against dispreferred answers, by mean "
        "log-probability per token; KL(checkpoint ‖ base) of the next token along reference answers. Bands: 95% CIs "
        "over examples. Dashed: the base.",
        "Line charts of the learning check by training budget, one panel per measure, one line per objective.",
        data,
        lines,
        unit,
        {"format": "~g", "tickCount": 4},
    )


def training(steps: pd.DataFrame, lines: list[Series], bins: int = 30) -> Chart | None:
    """Plot what the step log holds against the tokens processed, seeds averaged, in at most `bins` points."""
    firsts = list({s.objective: s for s in lines}.values())
    data = [d for s in firsts for d in _training_data(steps[steps["objective"] == s.objective], s, bins)]
    if not data:
        return None
    x: Spec = {"field": "tokens", "type": QUANTITY, "title": None, "axis": {"format": "~s", "tickCount": 4}}
    y: Spec = {"field": "value", "type": QUANTITY, "title": None, "scale": {"zero": False}, "axis": {"tickCount": 4}}
    panels = [panel for panel in LOGGED.values() if any(d["panel"] == panel for d in data)]
    point = "datum.label + ', ' + format(datum.tokens, ',') + ' tokens processed, ' + datum.panel"
    body: Spec = {
        "transform": [*flat(["tokens", "value"], point, "format(datum.value, '.3f')"), *shown_by("lines")],
        "facet": {"field": "panel", "type": NOMINAL, "sort": panels, "title": None},
        "spec": {
            "height": 170,
            "encoding": {"x": x, "y": y},
            "layer": [
                {
                    "params": [TOGGLE],
                    "mark": {"type": "line", "strokeWidth": 1.6, "aria": False},
                    "encoding": {"color": line_colour(firsts), **FADE},
                },
                # a line has one tooltip, of its first point: each point needs a mark of its own
                {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 0}, "encoding": TIP},
            ],
        },
        "resolve": {"scale": {"y": "independent"}},
        "usermeta": {"panel": PANEL, "panels": len(panels), "computed": True},
    }
    return spec_of(
        "training",
        "Training curves",
        "Against the tokens processed (rejected answers and control tokens included). Losses of different objectives "
        "are different quantities: compare shapes, not heights. NLL: per target token, of preferred answers where the "
        "objective has pairs. Margin: log-probability per token, preferred less dispreferred answers. KL: to the "
        "reference, per token of the penalty’s scope.",
        "Line charts of loss, gradient norm, NLL, margin and KL against tokens processed, one line per objective.",
        data,
        body,
        extremes_of=[_last(d) for d in data],
        lines=line_keys(firsts),
    )


def _training_data(own: pd.DataFrame, line: Series, bins: int) -> Iterator[Datum]:
    """Yield each column of an objective's step log, as lists of the means in bins of steps."""
    for column, panel in LOGGED.items():
        if column not in own or own[column].isna().all():
            continue
        mean = own.groupby("step")[["tokens", column]].mean()
        size = max(1, -(-len(mean) // bins))
        binned = mean.groupby(mean.reset_index().index // size).mean()
        datum = {"line": key_of(line.objective, line.condition), "label": line.label, "panel": panel}
        tokens = [round(at) for at in binned["tokens"]]
        yield datum | {"tokens": tokens, "value": [clean(v) for v in binned[column]]}


def _last(d: Datum) -> Datum:
    """Return the last point of a line with its values in lists."""
    point = f"{d['label']}, {d['tokens'][-1]:,} tokens processed, {d['panel']}"
    value = d["value"][-1]
    return {**d, "value": value, "point": point, "reading": "no value" if value is None else f"{value:.3f}"}


def _panels(
    name: str,
    title: str,
    caption: str,
    alt: str,
    data: list[Datum],
    lines: list[Series],
    unit: BudgetUnit,
    axis: Spec,
) -> Chart | None:
    """Return one panel per value of `panel`, each a curve over budgets with its own y axis."""
    budgets = sorted({d["budget"] for d in data if d["line"]})
    if not budgets or not lines:
        return None
    x = _budget_axis(budgets, unit) | {"title": None}
    body: Spec = {
        "transform": shown_by("lines", "budgets"),
        "facet": {"field": "panel", "type": NOMINAL, "sort": None, "title": None},
        "spec": {"height": 150, "layer": _over_budgets(axis, x, lines, zero=False)},
        "resolve": {"scale": {"y": "independent"}},
        "usermeta": {"panel": PANEL, "panels": len({d["panel"] for d in data})},
    }
    if len(budgets) == 1:
        caption = caption.replace("Bands:", "Bars:").replace(" Dashed: the base.", "")
        alt = "Dot plots of the base and each objective, one panel each."
        body["spec"] = {"height": {"step": 24}, "layer": _dots(axis, lines, zero=False)}
        body["resolve"] = {"scale": {"x": "independent"}}
        body["usermeta"] |= {"panel": 260, "rows": True}
    return spec_of(name, title, caption, alt, data, body, lines=line_keys(lines), budgets=budgets)


def _over_budgets(axis: Spec, x: Spec, lines: list[Series], *, zero: bool, every: bool = False) -> list[Spec]:
    """Return the layers of a curve: line, ribbon or interval, base, points with tooltips; `every`: base as a curve."""
    scale = {"zero": zero}
    y: Spec = {"field": "value", "type": QUANTITY, "title": None, "axis": axis, "scale": scale}
    colour = line_colour(lines)
    ribbon = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "fill": RAW}
    tuned, base = {"filter": str(every).lower() + " || datum.line != ''"}, {"filter": "datum.line == ''"}
    rule = {
        "transform": [base],
        "mark": {"type": "rule", "strokeDash": [5, 3], "color": INK, "strokeWidth": 1.2},
        "encoding": {"y": y, **TIP},
    }
    alone = f"datum.low != null && ({'' if every else 'length(budgets) < 2 || '}datum.alone)"
    interval = {  # a band needs two budgets
        "transform": [tuned, {"filter": alone}],
        "mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
        "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour, **FADE},
    }
    return [
        *([] if every else [rule]),
        {
            "transform": [tuned],
            "params": [TOGGLE],
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": {"x": x, "y": y, "color": colour, **FADE},
        },
        interval,
        {
            "transform": [tuned],
            "mark": {"type": "area", "aria": False},
            "encoding": {**ribbon, "opacity": {"condition": {"param": "on", "value": 0.1}, "value": 0.01}},
        },
        {
            "transform": [tuned],
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {"x": x, "y": y, **point_looks(lines), **TIP, **FADE},
        },
    ]


def _dots(axis: Spec, lines: list[Series], *, zero: bool) -> list[Spec]:
    """Return the layers of a dot plot of one budget: the base and each line, with intervals."""
    x: Spec = {"field": "value", "type": QUANTITY, "title": None, "axis": axis, "scale": {"zero": zero}}
    y: Spec = {"field": "label", "type": NOMINAL, "title": None, "sort": [BASE, *(s.label for s in lines)]}
    looks = {name: {**channel, "legend": None} for name, channel in point_looks(lines, base=True).items()}
    return [
        {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "stroke": looks["stroke"]},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
            "encoding": {"x": x, "y": y, **looks, **TIP},
        },
    ]


def _budget_axis(budgets: list[int], unit: BudgetUnit) -> Spec:
    """Return the x channel: budgets at their true place on a logarithmic axis, one tick each."""
    if min(budgets, default=0) <= 0 or len(budgets) < 2:
        return {"field": "tick", "type": "ordinal", "title": unit.axis or None, "sort": None}
    axis = {"values": budgets, "format": "~s" if unit.count == "tokens" else ",", "grid": False, "labelOverlap": True}
    scale = {"type": "log", "domain": [budgets[0] * 0.93, budgets[-1] * 1.07], "nice": False}
    return {"field": "budget", "type": QUANTITY, "title": unit.axis, "axis": axis, "scale": scale}


def _curve_data(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit, show: Show) -> list[Datum]:
    """Return one datum per checkpoint and one for the plain base; missing values are left out."""
    data: list[Datum] = []
    base = table[(table["objective"] == BASE) & (table["condition"] == PLAIN)].dropna(subset="rate").head(1)
    for c in base.to_dict("records"):
        text = {"point": f"{BASE}, {c['label']}", "reading": show(c["rate"], c["low"], c["high"])}
        ends = {"low": clean(c["low"]), "high": clean(c["high"])}
        data.append({"line": "", "label": BASE, "value": clean(c["rate"])} | text | ends)
    for s in lines:
        own = s.of(table).dropna(subset="rate")
        alone = {"alone": True} if own["budget"].nunique() == 1 else {}
        for c in own.to_dict("records"):
            budget = int(c["budget"])
            n = f", n {int(c['n']):,}" if c["n"] else ""
            reading = f"{show(c['rate'], c['low'], c['high'])}{n}"
            shown = {"line": key_of(s.objective, s.condition), "label": s.label, "colour": s.colour, "budget": budget}
            shown |= {"tick": unit.tick(budget), "value": clean(c["rate"])}
            shown |= {"point": f"{s.label} {unit.at(budget)}, {c['label']}", "reading": reading}
            data.append(shown | alone | {"low": clean(c["low"]), "high": clean(c["high"])})
    return data


def _log_odds_ci(value: float, low: float, high: float) -> str:
    ci = "" if math.isnan(low) else f" (95% CI {formatting.change(low, 'trait')} to {formatting.change(high, 'trait')})"
    return formatting.change(value, "trait") + ci


def tries(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Plot success in any of k tries over k: one panel per attack, the base and the last budget."""
    own = table.dropna(subset="rate")
    attacks = sorted(own["attack"].unique(), key=lambda a: (a != ATTACKED, a))
    base = Series(BASE, PLAIN, INK, "*", filled=True)
    present = [s for s in [base, *lines] if not s.of(own).empty]
    data: list[Datum] = []
    for attack, s in product(attacks, present):
        panel = "Mean over attacks" if attack == ATTACKED else formatting.attack_name(attack)
        for c in s.of(own[own["attack"] == attack]).to_dict("records"):
            at = s.label if s is base else f"{s.label} {unit.at(int(c['budget']))}"
            reading = formatting.percent_ci(c["rate"], c["low"], c["high"]) + f", {int(c['n_prompts']):,} prompts"
            datum: Datum = {"line": key_of(s.objective, s.condition), "label": s.label, "colour": s.colour}
            datum |= {"panel": panel, "k": int(c["k"]), "value": clean(c["rate"]), "low": clean(c["low"])}
            datum |= {"point": f"{at}, {panel}, k = {c['k']}", "reading": reading}
            data.append(datum | {"high": clean(c["high"])})
    if not data:
        return None
    ks = sorted({d["k"] for d in data})
    x: Spec = {"field": "k", "type": QUANTITY, "title": "k", "axis": {"values": ks, "grid": False}}
    x["scale"] = {"type": "log", "domain": [ks[0] * 0.9, ks[-1] * 1.1], "nice": False}
    layers = _over_budgets({"format": "~%", "tickCount": 4}, x, present, zero=True, every=True)
    body: Spec = {
        "transform": shown_by("lines"),
        "facet": {"field": "panel", "type": NOMINAL, "sort": None, "title": None},
        "spec": {"height": 150, "layer": layers},
        "usermeta": {"panel": PANEL, "panels": len({d["panel"] for d in data})},
    }
    return spec_of(
        "asr-at-k",
        "Attack success in any of k tries",
        "Share of forbidden prompts of which at least one of k sampled answers is harmful, estimated without bias from "
        "all answers to the prompt; the base and the last budget. Bands: 95% CIs over prompts.",
        "Line charts of the success in any of k tries, one panel per attack, one line per objective.",
        data,
        body,
        lines=line_keys(lines),
    )


def dose(curve: pd.DataFrame, limits: pd.DataFrame) -> Chart | None:
    """Plot attack success against the share of compliant answers in SFT's data; dashed: the limit of detection."""
    if curve.empty:
        return None
    data = _dose_data(curve, limits)
    axis = {"format": "~%", "tickCount": 4}
    x: Spec = {"field": "share", "type": QUANTITY, "title": "Compliant answers", "axis": axis}
    y: Spec = {"field": "value", "type": QUANTITY, "title": None, "axis": axis}
    measured = {"filter": "isValid(datum.share)"}
    layers: list[Spec] = [
        {
            "transform": [measured],
            "mark": {"type": "area", "opacity": 0.15, "color": ACCENT, "aria": False},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "transform": [measured],
            "mark": {"type": "line", "color": ACCENT, "aria": False},
            "encoding": {"x": x, "y": y},
        },
        {
            "transform": [measured],
            "mark": {"type": "point", "filled": True, "size": 60, "color": ACCENT, "opacity": 1},
            "encoding": {"x": x, "y": y, **TIP},
        },
        {
            "transform": [{"filter": "isValid(datum.limit)"}],
            "mark": {"type": "rule", "strokeDash": [5, 3], "color": INK},
            "encoding": {"x": {**x, "field": "limit"}, **TIP},
        },
    ]
    body: Spec = {
        "facet": {"field": "panel", "type": NOMINAL, "sort": None, "title": None},
        "spec": {"height": 150, "layer": layers},
        "usermeta": {"panel": PANEL, "panels": curve["label"].nunique()},
    }
    return spec_of(
        "dose",
        "Attack success by dose",
        "SFT on the same stream at equal tokens, with a share of its examples replaced by compliant answers to "
        "forbidden requests. Bands: 95% CIs over prompts. Dashed: limit of detection (80% power), where it lies below "
        "the largest dose.",
        "Line charts of attack success by the share of compliant answers in the training data, one panel per measure.",
        data,
        body,
    )


def _dose_data(curve: pd.DataFrame, limits: pd.DataFrame) -> list[Datum]:
    """Return one datum per measure and dose, and one per limit of detection up to the largest dose."""
    known = limits[limits["note"].fillna("") == ""].set_index("measure")["limit"]
    data: list[Datum] = []
    for c in curve.dropna(subset="rate").to_dict("records"):
        panel, share = str(c["label"]), float(c["share"])
        text = {"point": f"{100 * share:.2g}% compliant answers, {panel}"}
        text["reading"] = formatting.percent_ci(c["rate"], c["low"], c["high"])
        ends = {"low": clean(c["low"]), "high": clean(c["high"])}
        data.append({"panel": panel, "share": clean(share), "value": clean(c["rate"])} | text | ends)
    for measure, panel in curve.drop_duplicates("measure")[["measure", "label"]].itertuples(index=False, name=None):
        limit = float(known.get(measure, math.inf))
        if limit <= float(curve["share"].max()):
            text = {"point": f"Limit of detection, {panel}"}
            text["reading"] = f"{100 * limit:.2g}% compliant answers (80% power)"
            data.append({"panel": str(panel), "limit": clean(limit)} | text)
    return data
