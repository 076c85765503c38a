"""Charts of a probe: where patching restores refusal, which layers carry the change, and what moves with behaviour.

Data of curves and heat maps hold one datum per line with its values in lists, which Vega-Lite flattens: a page of many
layers and budgets stays small. Tooltips are computed from the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from leeway.report import formatting
from leeway.report.charts.comparison import MOVES
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
    flat,
    line_colour,
    line_keys,
    point_looks,
    shown_by,
    spec_of,
)
from leeway.report.mechanism import (
    COMPONENTS,
    INTO_CHECKPOINT,
    SITES,
    Probe,
    answer_token,
    largest_component,
)
from leeway.report.plotting import Series, key_of
from leeway.stats.metrics import DIRECT

LISTS = ["value", "low", "high", "control", "named"]
GREY = "#9aa0a6"
POINT = ["budget", "tick", "probe", "probe_low", "probe_high", "change", "low", "high"]
CURVES = {  # panel: measure, detail, site
    "Patching, residual stream": ("patching", INTO_CHECKPOINT, "resid"),
    "Patching, attention": ("patching", INTO_CHECKPOINT, "attn"),
    "Patching, MLP": ("patching", INTO_CHECKPOINT, "mlp"),
    "Update left out, attention": ("leave-one-out", "", "attn"),
    "Update left out, MLP": ("leave-one-out", "", "mlp"),
    "Update alone, attention": ("one-alone", "", "attn"),
    "Update alone, MLP": ("one-alone", "", "mlp"),
}
SHARE = (
    "!isValid(datum.value) ? (datum.reason || 'no value') : format(datum.value, '.1%') + (isValid(datum.low) ? ' (95% "
    "CI ' + format(datum.low, '.1%') + ' to ' + format(datum.high, '.1%') + ')' : '') + (isValid(datum.control) ? ', "
    "random direction ' + format(datum.control, '.1%') : '') + (datum.named ? ', named' : ', not named')"
)
NATS = (
    "format(datum.value, '.3f') + ' nats' + (isValid(datum.low) ? ' (95% CI ' + format(datum.low, '.3f') + ' to ' + "
    "format(datum.high, '.3f') + ')' : '')"
)


def _reading(what: str) -> str:
    """Return the expression that reads a checkpoint: the probe's value, and the change of `what` in points."""
    ends = (
        "(isValid(datum.{0}) ? ' (95% CI ' + format(datum.{0}, '.2f') + ' to ' + format(datum.{1}, '.2f') + ')' : '')"
    )
    own = f"format(datum.probe, '.2f') + {ends.format('probe_low', 'probe_high')}"
    moved = f"format(datum.change, '+.1f') + ' points' + {ends.format('low', 'high')}"
    return f"{own} + '; {what} ' + {moved}"


def mechanism(probe: Probe | None, contrasts: pd.DataFrame, lines: list[Series]) -> list[Chart]:
    """Return every chart that the probe's measures allow."""
    if probe is None:
        return []
    own = series_of_probe(probe, lines)
    found = [
        _patching(probe, own),
        _layers(probe, own),
        _behaviour(probe, contrasts, own),
        _capability(probe, contrasts, own),
        _depth(probe, own),
    ]
    return [chart for chart in found if chart is not None]


def series_of_probe(probe: Probe, lines: list[Series]) -> list[Series]:
    """Return the line of each probed objective, the first of its test-time conditions."""
    firsts: dict[str, Series] = {}
    for s in lines:
        firsts.setdefault(s.objective, s)
    return [firsts[o] for o in probe.objectives if o in firsts]


def _identity(s: Series, probe: Probe, budget: int) -> Datum:
    datum: Datum = {"line": key_of(s.objective, s.condition), "label": s.label, "budget": budget}
    return datum | {"tick": probe.unit.tick(budget)}


def _lists(own: pd.DataFrame, along: str = "layer") -> Datum:
    """Return a line's values as lists; those of columns without any are left out."""
    found: Datum = {along: [int(v) for v in own[along]]}
    for name in ("value", "low", "high", "control"):
        if own[name].notna().any() or name == "value":
            found[name] = [_number(v) for v in own[name]]
    if (own["unit"] == "share").any():
        found["named"] = [int(v) for v in own["named"]]
    if reasons := [str(r) for r in dict.fromkeys(own["reason"]) if r]:
        found["reason"] = "; ".join(reasons)
    return found


def _flat(data: Sequence[Datum], along: str, what: str, reading: str) -> list[Spec]:
    """Return the transforms that make one datum per value, labelled by `what` and `along`; all get every list."""
    names = [along, *(n for n in LISTS if any(n in d for d in data))]
    for d in data:
        for name in names:
            d.setdefault(name, [None] * len(d[along]))
    point = f"datum.label + ' ' + datum.tick + ', ' + {what} + ', {along} ' + datum.{along}"
    return flat(names, point, reading)


def _largest(data: Sequence[Datum], along: str, show: str, suffix: str = "") -> list[Datum]:
    """Return each line's largest value, for the text alternative; `show` formats it."""
    found: dict[tuple[str, str], Datum] = {}
    for d in data:
        panel, what = d.get("panel", ""), SITES.get(d.get("site", ""), d.get("panel", ""))
        for at, value in zip(d[along], d["value"], strict=True):
            last = found.get((panel, d["label"]))
            if value is not None and (last is None or value > last["value"]):
                point = f"{d['label']} {d['tick']}, {what}, {along} {at}"
                reading = format(value, show) + suffix
                found[panel, d["label"]] = {**d, "value": value, "point": point, "reading": reading}
    return list(found.values())


def _from_one(own: pd.DataFrame) -> pd.DataFrame:
    return own.assign(layer=own["layer"] + 1).sort_values("layer")


def _patching(probe: Probe, lines: list[Series]) -> Chart | None:
    """Draw the share restored by patching each layer at each budget: one panel per objective, a picker for the site."""
    table = probe.at("patching", INTO_CHECKPOINT, budget=0)
    data: list[Datum] = []
    for s in lines:
        mine = table[(table["objective"] == s.objective) & table["site"].isin(list(SITES))]
        for _, own in mine.groupby(["budget", "site"]):
            datum = _identity(s, probe, int(own["budget"].iloc[0])) | {
                "site": str(own["site"].iloc[0]),
                "panel": s.label,
            }
            data.append(datum | _lists(_from_one(own)))
    if not data:
        return None
    data.sort(key=lambda d: d["budget"])
    sites = [site for site in SITES if any(d["site"] == site for d in data)]
    names = " : ".join(f"datum.site == '{k}' ? '{v}'" for k, v in SITES.items()) + " : ''"
    panels = [s.label for s in lines if any(d["label"] == s.label for d in data)]
    body: Spec = {
        "transform": [
            *_flat(data, "layer", f"({names})", SHARE),
            *shown_by("lines", "budgets"),
            {"filter": "datum.site == site"},
        ],
        "facet": _facet(data) | {"sort": panels},
        "spec": _heat([d["tick"] for d in data], probe.layers),
        "usermeta": {"panel": 156, "panels": len(panels), "computed": True},
    }
    chart = spec_of(
        "mechanism-patching",
        "Patching: share of the refusal logit’s change restored, by layer and budget",
        "The base’s activations are put into the checkpoint at one layer (rows; 1 is the first). Numbers: share of the "
        "difference between the two models’ refusal logit that comes back, in percent. Outlined: named. Dash: withheld "
        "(the difference is not shown, or no prompt is scored); the tooltip has the reason.",
        f"Heat maps of layers by budgets for {formatting.join_and(panels)}, one panel each.",
        data,
        body,
        extremes_of=_largest(data, "layer", ".1%"),
        lines=line_keys(lines),
        budgets=sorted({d["budget"] for d in data}),
    )
    labels = [formatting.capitalize_first(SITES[site]) for site in sites]
    bind: Spec = {"input": "radio", "name": "Patched: ", "options": sites, "labels": labels}
    chart.spec["params"].append({"name": "site", "value": sites[0], "bind": bind})
    return chart


def _heat(ticks: list[str], layers: int) -> Spec:
    """Return one panel: a cell per layer and budget, its number, an outline if it is named."""
    axis: Spec = {"domain": False, "ticks": False}
    x: Spec = {"field": "tick", "type": "ordinal", "title": None, "sort": list(dict.fromkeys(ticks))}
    x["axis"] = axis | {"labelAngle": 0, "labelFontSize": 10}
    y: Spec = {"field": "layer", "type": "ordinal", "title": None, "axis": axis}
    colour: Spec = {"field": "value", "type": QUANTITY, "scale": {**MOVES, "clamp": True}, "legend": None}
    outline: Spec = {"condition": {"test": "datum.named", "value": INK}, "value": None}
    label = "!isValid(datum.value) ? '–' : abs(datum.value) < 0.005 ? '0' : format(100 * datum.value, '.0f')"
    dark = "isValid(datum.value) && (datum.value < -0.887 || datum.value > 0.818)"
    ink: Spec = {"condition": [{"test": "!isValid(datum.value)", "value": INK}, {"test": dark, "value": "white"}]}
    return {
        "height": {"step": 24 if layers <= 12 else 15},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.value)"}],
                "mark": {"type": "rect", "strokeWidth": 1.5},
                "encoding": {"color": colour, "stroke": outline, **TIP},
            },
            {  # withheld: its tooltip has the reason
                "transform": [{"filter": "!isValid(datum.value)"}],
                "mark": {"type": "rect", "color": GREY, "fillOpacity": 0.15},
                "encoding": TIP,
            },
            {
                "transform": [{"calculate": label, "as": "shown"}],
                "mark": {"type": "text", "fontSize": 11 if layers <= 12 else 10, "aria": False},
                "encoding": {"text": {"field": "shown"}, "color": ink | {"value": "black"}},
            },
        ],
    }


def _layers(probe: Probe, lines: list[Series]) -> Chart | None:
    """Plot shares over layers at the largest budget: one panel per measure and site, objectives over each other."""
    data: list[Datum] = []
    for panel, (measure, detail, site) in CURVES.items():
        table = probe.at(measure, detail)
        for s in lines:
            own = table[(table["objective"] == s.objective) & (table["site"] == site)]
            if own["value"].notna().any():
                datum = _identity(s, probe, probe.largest) | {"panel": panel, "colour": s.colour}
                data.append(datum | _lists(_from_one(own)))
    if not data:
        return None
    axis: Spec = {"format": "~%", "tickCount": 4}
    x = _steps("layer", probe.layers, "Layer")
    return spec_of(
        "mechanism-layers",
        f"Share of the refusal logit’s change by layer, {probe.unit.at(probe.largest)}",
        "Patching: the base’s activations put into the checkpoint. Update left out: the checkpoint without its update "
        "of one attention or MLP. Update alone: the base with only this part. Bands: 95% CIs over prompts. Grey, "
        "dashed: a random direction of equal norm. Objectives whose share is withheld have no curve.",
        "Line charts of the share by layer, one panel per measure and site, one line per objective.",
        data,
        _curves(data, lines, "layer", SHARE, x, axis),
        extremes_of=_largest(data, "layer", ".1%"),
        lines=line_keys(lines),
    )


def _depth(probe: Probe, lines: list[Series]) -> Chart | None:
    """Plot KL to the base by answer token at the largest budget: harmful and harmless answers."""
    table = probe.at("token-kl").dropna(subset="value")
    data: list[Datum] = []
    for panel in ("harmful answers", "harmless answers"):
        for s in lines:
            own = table[(table["objective"] == s.objective) & (table["detail"] == panel)]
            if len(own):
                own = own.assign(token=answer_token(own)).sort_values("token")
                datum = _identity(s, probe, probe.largest) | {"panel": formatting.capitalize_first(panel)}
                data.append(datum | {"colour": s.colour} | _lists(own, "token"))
    if not data:
        return None
    x = _steps("token", max(max(d["token"]) for d in data), "Answer token")
    return spec_of(
        "mechanism-depth",
        f"KL to the base by answer token, {probe.unit.at(probe.largest)}",
        "KL(checkpoint ‖ base) of the next token, in nats, along fixed answers. Harmful answers: to the test prompts, "
        "as a model of the study gave them. Harmless answers: the control. Bands: 95% CIs over answers.",
        "Line charts of KL by answer token, along harmful and harmless answers, one line per objective.",
        data,
        _curves(data, lines, "token", NATS, x, {"format": "~g", "tickCount": 4}),
        extremes_of=_largest(data, "token", ".3f", " nats"),
        lines=line_keys(lines),
    )


def _steps(field: str, last: int, title: str) -> Spec:
    axis = {"tickMinStep": 1, "format": "d", "grid": False, "tickCount": min(last, 8)}
    scale = {"domain": [1, max(last, 2)], "nice": False}
    return {"field": field, "type": QUANTITY, "title": title, "axis": axis, "scale": scale}


def _curves(data: list[Datum], lines: list[Series], along: str, reading: str, x: Spec, axis: Spec) -> Spec:
    """Return curves with bands, their control in grey, one panel per value of `panel`."""
    y: Spec = {"field": "value", "type": QUANTITY, "title": None, "axis": axis}
    shown = [s for s in lines if any(d["label"] == s.label for d in data)]
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "fill": RAW}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "color": INK, "strokeWidth": 0.8, "aria": False}, "encoding": {"y": {"datum": 0}}},
        {
            "mark": {"type": "area", "aria": False},
            "encoding": {**band, "opacity": {"condition": {"param": "on", "value": 0.14}, "value": 0.01}},
        },
        {
            "params": [TOGGLE],
            "mark": {"type": "line", "strokeWidth": 1.8, "aria": False},
            "encoding": {"x": x, "y": y, "color": line_colour(shown), **FADE},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
            "encoding": {"x": x, "y": y, **point_looks(shown), **TIP, **FADE},
        },
    ]
    if any("control" in d for d in data):
        grey = {"type": "line", "strokeWidth": 1.2, "strokeDash": [4, 3], "color": GREY, "aria": False}
        control = {"x": x, "y": {**y, "field": "control"}, "detail": {"field": "label"}, **FADE}
        layers.insert(1, {"transform": [{"filter": "isValid(datum.control)"}], "mark": grey, "encoding": control})
    return {
        "transform": [*_flat(data, along, "datum.panel", reading), *shown_by("lines")],
        "facet": _facet(data),
        "spec": {"height": 150, "layer": layers},
        "resolve": {"scale": {"y": "independent"}},
        "usermeta": {"panel": PANEL, "panels": len({d["panel"] for d in data}), "computed": True},
    }


def _facet(data: list[Datum]) -> Spec:
    """Return one panel per value of `panel`, in the order of the data."""
    return {"field": "panel", "type": NOMINAL, "sort": list(dict.fromkeys(d["panel"] for d in data)), "title": None}


def _behaviour(probe: Probe, contrasts: pd.DataFrame, lines: list[Series]) -> Chart | None:
    """Plot the change of attack success against causal effects: one point per checkpoint."""
    return _scatter(
        "mechanism-asr",
        "Causal effect against the change of attack success",
        "One point per checkpoint. Mediation: attack success undone by putting the base’s component along the refusal "
        "direction back, against the change under the same attack. Largest patch: of one attention or MLP output, in "
        "nats of the refusal logit (the largest of many, so overestimated). Vertical: change of attack success from "
        "the base, points. Crosses: 95% CIs.",
        "Scatter plots of the change of attack success against causal effects, one point per checkpoint.",
        [d for panel in effects(probe) for d in _points(probe, lines, contrasts, panel)],
        lines,
    )


Panel = tuple[str, pd.DataFrame, float, str]  # title, one line per checkpoint, scale of its values, measure


def effects(probe: Probe) -> Iterator[Panel]:
    """Yield the panels of causal effects, each with the measure whose change it is drawn against."""
    mediation = probe.at("mediation-effect", budget=0).dropna(subset="value")
    for attack in dict.fromkeys(mediation["detail"]):
        title = f"Mediation, {formatting.attack_name(str(attack))}, points"
        yield title, mediation[mediation["detail"] == attack], 100, f"asr:{attack}"
    patches = probe.at("patching-effect", INTO_CHECKPOINT, budget=0)
    patches = patches[patches["site"].isin(COMPONENTS)]
    largest = [largest_component(own) for _, own in patches.groupby(["objective", "budget"], sort=False)]
    found = pd.DataFrame([c for c in largest if c is not None], columns=patches.columns)
    if len(found):
        yield "Largest patch, nats", found, 1, "asr"


def movements(probe: Probe) -> Iterator[Panel]:
    """Yield the panels of movement inside the model: the refusal logit, and persona shifts at the direction's layer."""
    for kind in ("harmful", "harmless"):
        own = probe.at("refusal-logit", f"change, {kind}", budget=0).dropna(subset="value")
        if len(own):
            yield f"Refusal logit, {kind}, nats", own, 1, "accuracy"
    shift = probe.at("persona-shift", budget=0).dropna(subset="value")
    shift = shift[shift["layer"] == probe.layer]
    for trait in dict.fromkeys(shift["detail"]):
        name = formatting.capitalize_first(str(trait).replace("-", " "))
        yield f"{name}, layer {probe.layer + 1}", shift[shift["detail"] == trait], 1, "accuracy"


def changes(contrasts: pd.DataFrame, measure: str, series: Series) -> dict[int, Datum]:
    """Return a line's contrasts with the base by budget; direct requests stand in where no attack was measured."""
    if contrasts.empty:
        return {}
    own = series.of(contrasts).dropna(subset="difference")
    if measure == "asr" and not (own["measure"] == "asr").any():
        measure = f"asr:{DIRECT}"
    return {c["budget"]: c for c in formatting.to_records(own[own["measure"] == measure])}


def checkpoints(panel: Panel, contrasts: pd.DataFrame, lines: list[Series]) -> Iterator[tuple[Series, Datum, Datum]]:
    """Yield every checkpoint that has both: its line, the probe's estimate, and the change of the panel's measure."""
    _, table, _, measure = panel
    for s in lines:
        change = changes(contrasts, measure, s)
        for c in formatting.to_records(table[table["objective"] == s.objective].sort_values("budget")):
            if c["budget"] in change:
                yield s, c, change[c["budget"]]


def _points(probe: Probe, lines: list[Series], contrasts: pd.DataFrame, panel: Panel) -> list[Datum]:
    """Return one datum per line: the probe's values and the changes of a measure over its checkpoints, as lists."""
    title, _, scale, _ = panel
    data: dict[str, Datum] = {}
    for s, c, other in checkpoints(panel, contrasts, lines):
        key = key_of(s.objective, s.condition)
        d = data.setdefault(key, {"line": key, "label": s.label, "panel": title, **{n: [] for n in POINT}})
        own = [None if c[k] is None else _number(scale * c[k]) for k in ("value", "low", "high")]
        moved = [None if other[k] is None else _number(100 * other[k]) for k in ("difference", "low", "high")]
        values = [c["budget"], probe.unit.tick(c["budget"]), *own, *moved]
        for name, value in zip(POINT, values, strict=True):
            d[name].append(value)
    return list(data.values())


def _number(value: float | None) -> float | None:
    """Return a value with the digits that a tooltip shows, and one more."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def _capability(probe: Probe, contrasts: pd.DataFrame, lines: list[Series]) -> Chart | None:
    """Plot movement inside the model against the capability gained: one point per checkpoint."""
    return _scatter(
        "mechanism-capability",
        "Movement inside the model against capability gained",
        "One point per checkpoint; thin lines follow an objective’s budgets. Horizontal: change of accuracy from the "
        "base, points. Vertical: change of the mean refusal logit, and of the mean state along persona vectors on "
        f"harmless prompts at layer {probe.layer + 1} (no causal measure). Crosses: 95% CIs.",
        "Scatter plots of movement inside the model against the change of accuracy, one point per checkpoint.",
        [d for panel in movements(probe) for d in _points(probe, lines, contrasts, panel)],
        lines,
        swap=True,
    )


def _scatter(
    name: str,
    title: str,
    caption: str,
    alt: str,
    data: list[Datum],
    lines: list[Series],
    *,
    swap: bool = False,
) -> Chart | None:
    """Return panels of points with crosses; `swap`: the probe's value is vertical, the measure's change horizontal."""
    if not data:
        return None
    keys: dict[str, tuple[str, str, str]] = {
        "probe": ("probe", "probe_low", "probe_high"),
        "change": ("change", "low", "high"),
    }
    (x_key, x_low, x_high), (y_key, y_low, y_high) = (keys["change"], keys["probe"])[:: 1 if swap else -1]
    common: Spec = {"type": QUANTITY, "title": None, "scale": {"zero": False}, "axis": {"tickCount": 4}}
    x: Spec = common | {"field": x_key}
    y: Spec = common | {"field": y_key}
    shown = [s for s in lines if any(d["label"] == s.label for d in data)]
    colour, rule, what = (
        line_colour(shown),
        {"type": "rule", "opacity": 0.45, "aria": False},
        "accuracy" if swap else "ASR",
    )
    layers: list[Spec] = [
        {
            "params": [TOGGLE],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35, "aria": False},
            "encoding": {"x": x, "y": y, "color": colour, "order": {"field": "budget"}},
        },
        {
            "mark": rule,
            "encoding": {"x": x | {"field": x_low}, "x2": {"field": x_high}, "y": y, "color": colour, **FADE},
        },
        {
            "mark": rule,
            "encoding": {"y": y | {"field": y_low}, "y2": {"field": y_high}, "x": x, "color": colour, **FADE},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
            "encoding": {"x": x, "y": y, **point_looks(shown), **TIP, **FADE},
        },
    ]
    body: Spec = {
        "transform": [
            *flat(POINT, "datum.label + ' ' + datum.tick + ', ' + datum.panel", _reading(what)),
            *shown_by("lines", "budgets"),
        ],
        "facet": _facet(data),
        "spec": {"height": 190, "layer": layers},
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
        "usermeta": {"panel": PANEL, "panels": len({d["panel"] for d in data}), "computed": True},
    }
    budgets = sorted({b for d in data for b in d["budget"]})
    last = [_last(d, what) for d in data]
    return spec_of(name, title, caption, alt, data, body, extremes_of=last, lines=line_keys(lines), budgets=budgets)


def _last(d: Datum, what: str) -> Datum:
    """Return an objective's point at its largest budget."""
    probe, change = d["probe"][-1], d["change"][-1]
    if probe is None or change is None:
        return {}
    point = f"{d['label']} {d['tick'][-1]}, {d['panel']}"
    return {**d, "value": probe, "point": point, "reading": f"{probe:.2f}; {what} {change:+.1f} points"}
