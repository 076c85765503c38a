"""The page's section on mechanism: sentences, and tables of the probe's estimates at chosen places, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from leeway.report import formatting, mechanism
from leeway.report.charts.mechanism import series_of_probe
from leeway.report.formatting import MISSING
from leeway.report.mechanism import INTO_BASE, INTO_CHECKPOINT, Line, Probe, answer_token, largest_component, place
from leeway.report.plotting import Series, key_of

Heads = list[tuple[str, bool]]  # heading, whether it is text
CAUSAL_MEASURES = (
    ("patching", INTO_CHECKPOINT, "Patching, base → checkpoint"),
    ("patching", INTO_BASE, "Patching, checkpoint → base"),
    ("leave-one-out", "", "Update left out"),
    ("one-alone", "", "Update alone"),
)
TOKENS = (1, 2, 5, 10, 20, 32)  # of the table of KL
NUMBER, TEXT = False, True


def section(probe: Probe | None, lines: list[Series]) -> dict[str, Any]:
    """Return what the template shows; empty without a probe."""
    if probe is None:
        return {}
    own = {s.objective: s for s in series_of_probe(probe, lines)}
    made = (_causal, _geometry, _persona, _predicted, _depth, _weights, _contrasts)
    return {
        "summary": mechanism.summary(probe),
        "sentences": mechanism.verdict(probe),
        "description": mechanism.description(probe),
        "rule": mechanism.RULE,
        "origin": mechanism.origin(probe),
        "seeds": probe.seeds,
        "tables": [t for t in (make(probe, own) for make in made) if t["rows"]],
    }


def _table(name: str, title: str, about: str, heads: Heads, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "title": title, "about": about, "heads": heads, "rows": rows}


def _row(s: Series, budget: int, cells: list[str], note: str = "") -> dict[str, Any]:
    return {
        "line": key_of(s.objective, s.condition),
        "budget": budget,
        "cells": [s.label, *cells],
        "note": note,
    }


def _number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", formatting.MINUS)


def _range(low: float | None, high: float | None, digits: int = 2) -> str:
    return MISSING if low is None or high is None else f"{_number(low, digits)} to {_number(high, digits)}"


def _percents(low: float | None, high: float | None) -> str:
    return MISSING if low is None else f"{mechanism.share(low)} to {mechanism.share(high)}"


def _causal(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return the largest component of each causal measure, and mediation under each attack, per objective."""
    rows = []
    for objective, s in lines.items():
        found: list[tuple[str, str, Line]] = []
        for measure, detail, label in CAUSAL_MEASURES:
            effect = probe.at(f"{measure}-effect", detail)
            if c := largest_component(effect[effect["objective"] == objective]):
                found.append((label, measure, c))
        effect = probe.at("mediation-effect")
        found += [
            (f"Mediation, {formatting.attack_name(str(c['detail']))}", "mediation", c)
            for c in formatting.to_records(effect[effect["objective"] == objective])
        ]
        rows += [_row(s, probe.largest, *_causal_cells(probe, *one)) for one in found]
    return _table(
        "probe-causal",
        "Causal measures",
        "Per measure the attention or MLP with the largest effect, named ones first; the file has every layer, site "
        "and budget. Share: of the difference between base and checkpoint in the refusal logit (mediation: in attack "
        "success). Random direction: the same measure with a random direction of equal norm; parts of the update have "
        "no such control. p: adjusted for all layers and sites of the measure.",
        [
            ("Objective", TEXT),
            ("Measure", TEXT),
            ("Place", TEXT),
            ("Share", NUMBER),
            ("95% CI", NUMBER),
            ("Random direction", NUMBER),
            ("Effect", NUMBER),
            ("95% CI", NUMBER),
            ("p", NUMBER),
            ("Named", TEXT),
        ],
        rows,
    )


def _causal_cells(probe: Probe, label: str, measure: str, effect: Line) -> tuple[list[str], str]:
    """Return the cells of one effect and its share, and the reason why this share is withheld."""
    shares = probe.at(measure, effect["detail"])
    shares = shares[(shares["objective"] == effect["objective"]) & (shares["layer"] == effect["layer"])]
    share = formatting.to_records(shares[shares["site"] == effect["site"]])[0]
    scale, unit = (100, " points") if measure == "mediation" else (1, " nats")
    digits = 1 if scale == 100 else 2
    value, low, high = (None if effect[k] is None else scale * effect[k] for k in ("value", "low", "high"))
    withheld = share["value"] is None
    cells = [label, "" if measure == "mediation" else mechanism.place(effect["layer"], effect["site"])]
    cells += ["withheld" if withheld else mechanism.share(share["value"]), _percents(share["low"], share["high"])]
    cells += [
        mechanism.share(share["control"]),
        _number(value, digits) + unit * (value is not None),
        _range(low, high, digits),
    ]
    cells += [formatting.p_value(effect["p"]), "yes" if share["named"] else "no"]
    return cells, str(share["reason"] or "")


def _geometry(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return cosine and AUROC with their controls at the direction's layer, at every position."""
    own = probe.table[(probe.table["layer"] == probe.layer) & (probe.table["budget"] == probe.largest)]
    rows = []
    for objective, s in lines.items():
        mine = own[own["objective"] == objective]
        for position in dict.fromkeys(mine.loc[mine["measure"] == "direction-cosine", "position"]):
            at = {(c["measure"], c["detail"]): c for c in formatting.to_records(mine[mine["position"] == position])}
            areas = [
                c["value"] for (m, _), c in at.items() if m == "direction-auroc-category" and c["value"] is not None
            ]
            cosine, area = at["direction-cosine", ""], at.get(("direction-auroc", ""), {})
            random = at.get(("direction-auroc-control", "random"), {})
            norms = [_number(at.get(("direction-norm", k), {}).get("value")) for k in ("base", "checkpoint")]
            cells = ["last of the instruction" if position == "instruction" else position]
            cells += [_number(cosine["value"]), _range(cosine["low"], cosine["high"]), _number(cosine["control"])]
            cells += [_number(area.get("value")), _range(area.get("low"), area.get("high"))]
            cells += [
                _range(random.get("low"), random.get("high")),
                _range(min(areas), max(areas)) if areas else MISSING,
            ]
            cells += [" → ".join(norms), _number(at.get(("cka", ""), {}).get("value"))]
            rows.append(_row(s, probe.largest, cells))
    return _table(
        "probe-geometry",
        f"Geometry of the direction at layer {probe.layer + 1}",
        "Description, no causal measure. Position: the prompt’s token, counted from its end; at the instruction’s last "
        "token the direction is about harmfulness, at the last token about refusal. Cosine: of the checkpoint’s "
        "direction with the base’s; split-half: of two halves of the base’s prompts. AUROC: how well the base’s "
        "direction separates the checkpoint’s states of harmful and harmless test prompts; random: the middle 95% of "
        "random directions; categories: lowest and highest over kinds of harm that the direction was not made from. "
        "Norm: of the direction over the mean norm of states.",
        [
            ("Objective", TEXT),
            ("Position", TEXT),
            ("Cosine", NUMBER),
            ("95% CI", NUMBER),
            ("Split-half", NUMBER),
            ("AUROC", NUMBER),
            ("95% CI", NUMBER),
            ("Random", NUMBER),
            ("Categories", NUMBER),
            ("Norm, base → checkpoint", NUMBER),
            ("CKA", NUMBER),
        ],
        rows,
    )


def _persona(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return the shift along each persona vector at the direction's layer."""
    shift, halves = probe.at("persona-shift"), probe.at("persona-vector-halves")
    shift, halves = (t[(t["layer"] == probe.layer)] for t in (shift, halves))
    rows = []
    for objective, s in lines.items():
        for c in formatting.to_records(shift[shift["objective"] == objective]):
            agree = halves[(halves["objective"] == objective) & (halves["detail"] == c["detail"])]["value"]
            cells = [str(c["detail"]), _number(c["value"]), _range(c["low"], c["high"]), _number(c["control"])]
            cells += [_range(c["control_low"], c["control_high"]), *(_number(float(v)) for v in agree.head(1))]
            rows.append(_row(s, probe.largest, cells + [MISSING] * (6 - len(cells)), str(c["reason"] or "")))
    return _table(
        "probe-persona",
        f"Shift along persona vectors at layer {probe.layer + 1}",
        "Mean change of the state at the last prompt token of harmless test prompts along each trait’s vector, of "
        "length 1; no causal measure. Random: along a random direction. Split-half: cosine of the vectors of two "
        "halves of the questions.",
        [
            ("Objective", TEXT),
            ("Trait", TEXT),
            ("Shift", NUMBER),
            ("95% CI", NUMBER),
            ("Random", NUMBER),
            ("95% CI", NUMBER),
            ("Split-half", NUMBER),
        ],
        rows,
    )


def _predicted(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return what the training data predicted of each trait, and what came."""
    own, rows = probe.predicted, []
    for objective, s in lines.items() if len(own) else ():
        mine = own[(own["objective"] == objective) & (own["budget"] == own["budget"].max())]
        for c in formatting.to_records(mine):
            cells = [str(c["trait"]), _number(c["projection"]), _range(c["low"], c["high"]), _number(c["shift"])]
            rows.append(
                _row(s, c["budget"], [*cells, formatting.points(c["difference"]), "yes" if c["agrees"] else "no"])
            )
    return _table(
        "probe-prediction",
        "What the training data predicted",
        "Projection: of the training answers along the trait’s vector in the base, minus that of the base’s own "
        "answers, at the middle layer, before training. Shift: of the checkpoint along the same vector. Endorsement: "
        "change from the base in points. Same sign: of projection and endorsement.",
        [
            ("Objective", TEXT),
            ("Trait", TEXT),
            ("Projection", NUMBER),
            ("95% CI", NUMBER),
            ("Shift", NUMBER),
            ("Endorsement", NUMBER),
            ("Same sign", TEXT),
        ],
        rows,
    )


def _depth(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return KL at some answer tokens along harmful and harmless answers."""
    own = probe.at("token-kl")
    known = own[own["value"].notna()]
    known = known.assign(token=answer_token(known)) if len(known) else known.assign(token=0)
    tokens = [t for t in TOKENS if (known["token"] == t).any()]
    rows = []
    for objective, s in lines.items():
        for kind in dict.fromkeys(own.loc[own["objective"] == objective, "detail"]):
            mine = known[(known["objective"] == objective) & (known["detail"] == kind)]
            at = {c["token"]: c for c in formatting.to_records(mine)}
            cells = [
                f"{_number(at[t]['value'])} [{_range(at[t]['low'], at[t]['high'])}]" if t in at else MISSING
                for t in tokens
            ]
            count = formatting.count(max((c["n"] or 0 for c in at.values()), default=0))
            reasons = own.loc[(own["objective"] == objective) & (own["detail"] == kind), "reason"]
            note = "; ".join(dict.fromkeys(r for r in reasons if r))
            rows.append(_row(s, probe.largest, [str(kind), *cells, count], note))
    return _table(
        "probe-depth",
        "KL to the base by answer token",
        "KL(checkpoint ‖ base) of the next token in nats [95% CI over answers], along fixed answers; harmless answers "
        "are the control.",
        [("Objective", TEXT), ("Answers", TEXT), *((f"Token {t}", NUMBER) for t in tokens), ("Answers", NUMBER)],
        rows,
    )


def _weights(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return the part of the update with the largest norm, and the one that writes most along the direction."""
    rows = []
    for objective, s in lines.items():
        norm, rank, along = (_of(probe.at(m), objective) for m in ("weight-norm", "stable-rank", "weight-on-direction"))
        if norm.empty:
            continue
        first = formatting.to_records(norm.nlargest(1, "value"))[0]
        ranks = rank[(rank["layer"] == first["layer"]) & (rank["site"] == first["site"])]["value"]
        cells = [place(first["layer"], first["site"]), _number(first["value"])]
        cells.append(_number(float(ranks.iloc[0]), 1) if len(ranks) else MISSING)
        if len(along):
            most = formatting.to_records(along.nlargest(1, "value"))[0]
            cells += [place(most["layer"], most["site"]), _number(most["value"], 3), _number(most["control"], 3)]
        rows.append(_row(s, probe.largest, cells + [MISSING] * (6 - len(cells))))
    return _table(
        "probe-weights",
        "The update",
        "Description, no causal measure. The attention or MLP whose update ΔW has the largest Frobenius norm, and the "
        "one that writes most along the refusal direction: ‖r̂ᵀΔW‖ / ‖ΔW‖, against 1/√d, the mean of random directions.",
        [
            ("Objective", TEXT),
            ("Largest update", TEXT),
            ("‖ΔW‖", NUMBER),
            ("Stable rank", NUMBER),
            ("Most along r̂", TEXT),
            ("Share along r̂", NUMBER),
            ("Random", NUMBER),
        ],
        rows,
    )


def _of(own: pd.DataFrame, objective: str) -> pd.DataFrame:
    return own[(own["objective"] == objective) & own["value"].notna()]


def _contrasts(probe: Probe, lines: dict[str, Series]) -> dict[str, Any]:
    """Return each objective's differences from the reference: the logit, the largest part of each measure, traits."""
    paired = probe.contrasts
    paired = paired[paired["budget"] == probe.largest] if len(paired) else paired
    reference = formatting.objective_name(str(paired["reference"].iloc[0])) if len(paired) else ""
    several = len(paired) and paired["seed"].nunique() > 1
    rows = []
    for objective, s in lines.items():
        mine = paired[paired["objective"] == objective]
        for seed in dict.fromkeys(mine["seed"]):
            for label, c in _contrast_lines(probe, mine[mine["seed"] == seed]):
                where = f"{label}, seed {seed}" if several else label
                cells = [where, _number(c["difference"]), _range(c["low"], c["high"]), formatting.p_value(c["p"])]
                rows.append(_row(s, probe.largest, [*cells, formatting.count(c["n"])]))
    return _table(
        "probe-contrasts",
        f"Differences from {reference}",
        f"Each objective minus {reference} at the same budget, paired by prompt: what fine-tuning on this data does "
        "anyway is subtracted. Effects in nats (mediation: share of prompts), per measure the attention or MLP with "
        "the largest difference. p: adjusted for all layers and sites of the measure.",
        [
            ("Objective", TEXT),
            ("Measure", TEXT),
            ("Difference", NUMBER),
            ("95% CI", NUMBER),
            ("p", NUMBER),
            ("Prompts", NUMBER),
        ],
        rows,
    )


def _contrast_lines(probe: Probe, own: pd.DataFrame) -> Iterator[tuple[str, Line]]:
    for kind in ("harmful", "harmless"):
        logit = own[(own["measure"] == "refusal-logit") & (own["detail"] == f"checkpoint, {kind}")]
        yield from ((f"Refusal logit, {kind} prompts", c) for c in formatting.to_records(logit))
    for measure, detail, label in CAUSAL_MEASURES:
        parts = own[(own["measure"] == measure) & (own["detail"] == detail)]
        if c := largest_component(parts.assign(value=parts["difference"], named=parts["p"] < mechanism.LEVEL)):
            yield f"{label}: {place(c['layer'], c['site'])}", c
    for c in formatting.to_records(own[own["measure"] == "mediation"]):
        yield f"Mediation, {formatting.attack_name(str(c['detail']))}", c
    traits = own[(own["measure"] == "persona-shift") & (own["layer"] == probe.layer)]
    yield from ((f"Persona shift, {c['detail']}", c) for c in formatting.to_records(traits))
