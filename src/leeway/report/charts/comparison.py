"""Charts at one budget: capability against attack success, attacks, contrasts with the base, outcomes."""

from __future__ import annotations

import math

import pandas as pd

from leeway.report import formatting
from leeway.report.charts.spec import (
    CARD,
    FADE,
    INK,
    NOMINAL,
    QUANTITY,
    RAW,
    TIP,
    TOGGLE,
    Chart,
    Datum,
    Spec,
    clean,
    line_colour,
    line_keys,
    point_looks,
    shown_by,
    spec_of,
)
from leeway.report.formatting import TOKENS, BudgetUnit
from leeway.report.plotting import Series, key_of
from leeway.report.verdict import LEVEL, SHORT, headline
from leeway.stats.metrics import BASE, DIRECT, LOG_ODDS, PLAIN
from leeway.stats.rates import ATTACKED, OUTCOMES

LEVELS = {"domain": [0, 1], "range": ["#fdf6ee", "#f7c58b", "#e6842a", "#a83c00", "#5c1d00"], "interpolate": "rgb"}
MOVES: Spec = {"domain": [-1, 0, 1], "range": ["#1b6f8f", "#f4f1ec", "#a83c00"], "interpolate": "rgb"}
FILLS = {"refused": "#9CC9E8", "deflected": "#BDBDBD", "incoherent": "#F0E442", "harmful": "#D55E00"}

DARK = {"value": (-1, 0.656), "change": (-0.887, 0.818)}  # outside, white has the higher contrast with a cell
CHANGE_TEXT = "abs(datum.change) < 0.005 ? '0' : format(100 * datum.change, '+.0f')"


def tradeoff(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Plot capability against attack success at one budget, with intervals, trajectories and the Pareto frontier."""
    points = _scatter_data(rates, lines, unit)
    budgets = sorted({d["budget"] for d in points if d["line"]})
    if not budgets:
        return None
    frontier = [step for b in budgets for step in _frontier(points, b)]
    return spec_of(
        "tradeoff",
        "Capability against attack success",
        "Lower right is better. Crosses: 95% CIs. Thin lines: the way from the smallest budget. Dashed: Pareto "
        "frontier of the base and the checkpoints at this budget. Click a name in the legend to single it out.",
        f"Scatter plot of accuracy against attack success for {formatting.join_and([s.label for s in lines])}.",
        points + frontier,
        {"height": 340, "layer": _scatter_layers(lines)},
        key="y",
        lines=line_keys(lines),
        budget=budgets[-1],
    )


def _scatter_layers(lines: list[Series]) -> list[Spec]:
    """Return the frontier, the trajectories, the crosses of intervals and the points."""
    x: Spec = {
        "field": "x",
        "type": QUANTITY,
        "title": "Capability: accuracy → better",
        "axis": {"format": "~%", "tickCount": 4},
    }
    x["scale"] = {"zero": False}
    y: Spec = {
        "field": "y",
        "type": QUANTITY,
        "title": "Attack success ↓ better",
        "axis": {"format": "~%", "tickCount": 6},
    }
    y["scale"] = {"zero": False}
    looks, plain = point_looks(lines, base=True), line_colour(lines, base=True)
    one = [*shown_by("lines"), {"filter": "datum.budget == budget || datum.budget == -1"}, {"filter": "!datum.step"}]
    path = [*shown_by("lines"), {"filter": "datum.budget <= budget && !datum.step && datum.line != ''"}]
    cross: Spec = {"mark": {"type": "rule", "opacity": 0.5, "aria": False}, "transform": one}
    return [
        {
            "transform": [{"filter": "datum.step && datum.budget == budget"}],
            "mark": {"type": "line", "strokeDash": [4, 3], "color": "#9aa0a6", "strokeWidth": 1.5, "aria": False},
            "encoding": {"x": x, "y": y, "order": {"field": "step"}},
        },
        {
            "transform": path,
            "params": [TOGGLE],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35, "aria": False},
            "encoding": {"x": x, "y": y, "order": {"field": "budget"}, "color": plain},
        },
        {
            **cross,
            "encoding": {"x": {**x, "field": "x_low"}, "x2": {"field": "x_high"}, "y": y, "color": plain, **FADE},
        },
        {
            **cross,
            "encoding": {"y": {**y, "field": "y_low"}, "y2": {"field": "y_high"}, "x": x, "color": plain, **FADE},
        },
        {
            "transform": one,
            "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
            "encoding": {"x": x, "y": y, **looks, **TIP, **FADE},
        },
    ]


def _scatter_data(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit) -> list[Datum]:
    """Return the checkpoints (and the plain base, budget -1) that have both accuracy and attack success."""
    keys, columns = ["objective", "budget", "condition"], ["rate", "low", "high"]
    attack = rates[(rates["axis"] == "jailbreak") & rates["primary"]].set_index(keys)[columns].add_suffix("_y")
    accuracy = rates[rates["measure"] == "accuracy"].set_index(keys)[columns].add_suffix("_x")
    both = accuracy.join(attack, how="inner").dropna().reset_index()
    by_line = {(s.objective, s.condition): s for s in lines}
    data = []
    for c in both.to_dict("records"):
        s = by_line.get((c["objective"], c["condition"]))
        is_base = c["objective"] == BASE and c["condition"] == PLAIN
        if s is None and not is_base:
            continue
        label = s.label if s else BASE
        budget = int(c["budget"]) if s else -1
        reading = f"accuracy {formatting.percent_ci(c['rate_x'], c['low_x'], c['high_x'])}"
        reading += f", ASR {formatting.percent_ci(c['rate_y'], c['low_y'], c['high_y'])}"
        datum: Datum = {"line": key_of(s.objective, s.condition) if s else "", "label": label, "budget": budget}
        datum |= {"point": f"{label} {unit.at(budget)}" if s else label, "reading": reading}
        datum |= {k: clean(c[f"rate_{k}"]) for k in "xy"}
        data.append(datum | {f"{k}_{end}": clean(c[f"{end}_{k}"]) for k in "xy" for end in ("low", "high")})
    return data


def _frontier(points: list[Datum], budget: int) -> list[Datum]:
    """Return the staircase through the points that no other beats on both axes; `step` is its order."""
    own = sorted((d for d in points if d["budget"] in (budget, -1)), key=lambda d: (-d["x"], d["y"]))
    best, corners = math.inf, list[tuple[float, float]]()
    for d in own:
        if d["y"] < best:
            corners += [(d["x"], best)] if corners else []
            corners.append((d["x"], d["y"]))
            best = d["y"]
    line = {"line": "", "label": "frontier", "budget": budget}
    return [line | {"step": n, "x": x, "y": y} for n, (x, y) in enumerate(corners, 1)]


def attacks(
    rates: pd.DataFrame, contrasts: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS
) -> list[Chart]:
    """Draw attack success by objective and attack at one budget, and its change from the base, as heat maps."""
    data = _attack_data(rates, contrasts, lines, unit)
    if not any(d["line"] for d in data):
        return []
    level = "Share of forbidden prompts answered harmfully."
    change = "Percentage points, paired."
    changes = [d | {"reading": d["moved"]} for d in data if d.get("change") is not None]
    drawn = [_heat_map("by-attack", "Attack success by attack", level, "value", data, lines)]
    if changes:
        title = "Change of attack success from the base"
        drawn.append(_heat_map("by-attack-change", title, change, "change", changes, lines))
    return drawn


def _heat_map(name: str, title: str, caption: str, key: str, data: list[Datum], lines: list[Series]) -> Chart:
    """Draw `value` or `change` of every objective and attack, with its number in the cell."""
    attacks = {d["attack"]: d["name"] for d in data}
    budgets = [d["budget"] for d in data if d["line"]]
    bare = {"domain": False, "ticks": False}
    x: Spec = {"field": "name", "type": NOMINAL, "title": None, "sort": [*attacks.values()]}
    x["axis"] = {"orient": "top", "labelAngle": -50, "labelOverlap": False, **bare}
    y: Spec = {"field": "label", "type": NOMINAL, "title": None, "sort": [BASE, *(s.label for s in lines)]}
    y["axis"] = bare
    scale = LEVELS if key == "value" else MOVES
    dark = f"datum.{key} < {DARK[key][0]} || datum.{key} > {DARK[key][1]}"
    ink: Spec = {"condition": {"test": dark, "value": "white"}, "value": "black"}
    label = "format(datum.value, '.0%')" if key == "value" else CHANGE_TEXT
    layers: list[Spec] = [
        {
            "mark": {"type": "rect"},
            "encoding": {"color": {"field": key, "type": QUANTITY, "scale": scale, "legend": None}, **TIP},
        },
        {
            "transform": [{"calculate": label, "as": "shown"}],
            "mark": {"type": "text", "fontSize": 11, "aria": False},
            "encoding": {"text": {"field": "shown"}, "color": ink},
        },
    ]
    wanted = [*shown_by("lines", "attacks"), {"filter": "datum.budget == budget || datum.line == ''"}]
    body: Spec = {"height": {"step": 24}, "transform": wanted, "encoding": {"x": x, "y": y}, "layer": layers}
    unused = {"value", "change", "moved"} - {key}
    shown = [{k: v for k, v in d.items() if k not in unused} for d in data]
    alt = f"Heat map of objectives by attacks. {caption}"
    parameters = {"lines": line_keys(lines), "attacks": [*attacks], "budget": max(budgets)}
    return spec_of(name, title, caption, alt, shown, body, key=key, **parameters)


def _attack_data(rates: pd.DataFrame, contrasts: pd.DataFrame, lines: list[Series], unit: BudgetUnit) -> list[Datum]:
    table = rates[rates["measure"].str.startswith("asr:")].dropna(subset="rate")
    keys = ["objective", "condition", "budget", "measure"]
    moved = contrasts.set_index(keys)[["difference", "low", "high"]] if len(contrasts) else None
    by_line = {(s.objective, s.condition): s for s in lines}
    data = []
    for c in table.to_dict("records"):
        s = by_line.get((c["objective"], c["condition"]))
        if s is None and not (c["objective"] == BASE and c["condition"] == PLAIN):
            continue
        attack, budget = str(c["measure"])[4:], int(c["budget"])
        name = formatting.attack_name(attack)
        n = f", n {int(c['n']):,}"
        datum: Datum = {"line": key_of(s.objective, s.condition) if s else "", "label": s.label if s else BASE}
        datum |= {"attack": attack, "name": name, "budget": budget, "value": clean(c["rate"])}
        key = tuple(c[k] for k in keys)
        if s and moved is not None and key in moved.index:
            difference, low, high = (float(v) for v in moved.loc[key])
            datum["change"] = clean(difference)
            datum["moved"] = f"{formatting.points(difference)} points against the base (95% CI "
            datum["moved"] += f"{formatting.points(low)} to {formatting.points(high)}){n}"
        datum["point"] = f"{s.label + ' ' + unit.at(budget) if s else BASE}, {name}"
        data.append(datum | {"reading": formatting.percent_ci(c["rate"], c["low"], c["high"]) + n})
    return data


def forest(contrasts: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Plot the contrasts with the base at one budget: one panel per measure of the verdict."""
    if contrasts.empty or not lines:
        return None
    table = contrasts[headline(contrasts, contrasts)].dropna(subset="difference")
    data = _forest_data(table, lines, unit)
    budgets = sorted({d["budget"] for d in data})
    if not budgets:
        return None
    x: Spec = {"field": "value", "type": QUANTITY, "title": None, "axis": {"tickCount": 4}}
    x["axis"]["labelExpr"] = "datum.value ? format(datum.value, '+.2~f') : '0'"
    y: Spec = {"field": "label", "type": NOMINAL, "title": None, "sort": [s.label for s in lines]}
    colour, fill = {**RAW, "field": "stroke"}, {**RAW, "field": "fill"}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "color": INK, "aria": False}, "encoding": {"x": {"datum": 0}}},
        {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "stroke": colour},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
            "encoding": {"x": x, "y": y, "stroke": colour, "fill": fill, **TIP},
        },
    ]
    body: Spec = {
        "transform": shown_by("lines", "budget"),
        "facet": {"field": "panel", "type": NOMINAL, "sort": None, "title": None},
        "spec": {"height": {"step": 24}, "layer": layers},
        "resolve": {"scale": {"x": "independent"}},
        "usermeta": {"panel": 260, "panels": len({d["panel"] for d in data}), "rows": True},
    }
    return spec_of(
        "contrasts",
        "Differences from the base",
        "Paired differences with 95% CIs over prompts, not adjusted for multiplicity. Full points: significant after "
        "Holm’s correction in the family of one axis at one budget; hollow points: not shown, which is no evidence of "
        "equivalence.",
        "Forest plots of differences from the base by objective and measure.",
        data,
        body,
        lines=line_keys(lines),
        budget=budgets[-1],
    )


def _forest_data(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit) -> list[Datum]:
    """Return one datum per contrast: points, or log-odds as they are."""
    data: list[Datum] = []
    for s in lines:
        for c in s.of(table).to_dict("records"):
            log_odds = c["measure"] in LOG_ODDS
            value, low, high = (formatting.change(c[k], c["measure"]) for k in ("difference", "low", "high"))
            reading = f"{value}{'' if log_odds else ' points'} (95% CI {low} to {high}), "
            reading += f"p (Holm) {formatting.p_value(c['p_holm'])}, n {int(c['n']):,}"
            scale = 1 if log_odds else 100
            datum = {"line": key_of(s.objective, s.condition), "label": s.label, "budget": int(c["budget"])}
            panel = SHORT.get(str(c["axis"]), str(c["label"]))
            datum |= {"panel": f"{panel}, {'log-odds' if log_odds else 'points'}"}
            datum |= {k: clean(scale * c[v]) for k, v in (("value", "difference"), ("low", "low"), ("high", "high"))}
            within = s.colour if c["p_holm"] < LEVEL else CARD
            datum |= {"point": f"{s.label} {unit.at(int(c['budget']))}, {c['label']}", "reading": reading}
            data.append(datum | {"stroke": s.colour, "fill": within})
    return data


def outcomes(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Chart | None:
    """Stack the outcomes of responses to forbidden prompts by budget, averaged over attacks and seeds; a panel each."""
    data = _outcome_data(table, lines, unit)
    ticks = list(dict.fromkeys(d["tick"] for d in sorted(data, key=lambda d: d["budget"])))
    if not data:
        return None
    x: Spec = {"field": "tick", "type": "ordinal", "title": None, "sort": ticks, "axis": {"labelAngle": 0}}
    y: Spec = {
        "field": "value",
        "type": QUANTITY,
        "title": None,
        "axis": {"format": "~%", "tickCount": 3},
        "stack": "zero",
    }
    y["scale"] = {"domain": [0, 1]}
    scale = {"domain": list(FILLS), "range": list(FILLS.values())}
    fill: Spec = {"field": "outcome", "type": NOMINAL, "title": None, "scale": scale}
    body: Spec = {
        "transform": shown_by("lines", "budgets"),
        "facet": {"field": "panel", "type": NOMINAL, "sort": [s.label for s in lines], "title": None},
        "spec": {
            "height": 120,
            "mark": {"type": "bar", "stroke": "#6b6b6b", "strokeWidth": 0.3},
            "encoding": {"x": x, "y": y, "color": fill, "order": {"field": "rank"}, **TIP},
        },
        "usermeta": {"panel": 170, "panels": len(lines)},
    }
    return spec_of(
        "outcomes",
        "Outcomes of responses to forbidden prompts",
        "Shares of responses, averaged over attacks. A model that only gives incoherent answers has a low attack "
        "success.",
        "Stacked bars of refused, deflected, incoherent and harmful responses by budget, one panel per objective.",
        data,
        body,
        lines=line_keys(lines),
        extremes_of=[d | {"panel": "", "label": d["panel"]} for d in data if d["outcome"] == "harmful"],
        budgets=sorted({d["budget"] for d in data} - {-1}),
    )


def _outcome_data(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit) -> list[Datum]:
    """Return the share of every outcome of each checkpoint; the base has budget -1."""
    chosen = table[table["attack"] == ATTACKED]
    chosen = table[table["attack"] == DIRECT] if chosen.empty else chosen
    keys = ["objective", "condition", "budget"]
    mean = chosen.groupby(keys)[list(OUTCOMES)].mean().reset_index().dropna(subset=list(OUTCOMES))
    data: list[Datum] = []
    for s in lines:
        for c in s.with_base(mean).to_dict("records"):
            budget = -1 if c["objective"] == BASE else int(c["budget"])
            tick = "base" if budget == -1 else unit.tick(budget)
            name = formatting.objective_name(str(c["objective"]), s.condition)
            at = f"{name}{'' if budget == -1 else ' ' + unit.at(budget)}"
            datum = {"line": key_of(s.objective, s.condition), "panel": s.label, "tick": tick, "budget": budget}
            for rank, outcome in enumerate(OUTCOMES):
                text = {"point": f"{at}, {outcome}", "reading": f"{formatting.percent(c[outcome])} of responses"}
                data.append(datum | {"outcome": outcome, "rank": rank, "value": clean(c[outcome])} | text)
    return data
