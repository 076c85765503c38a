"""Estimates of a probe: means, ratios and areas with clustered intervals, and which layers carry an effect.

Input is one row per measured value (`VALUES`): of one prompt, or of all where `item_id` is empty. Prompts are the
clusters of every bootstrap, and one set of draws serves all layers and sites of a checkpoint, so they stay paired.

**Ratios** (patching, parts of the update, mediation) are ratios of means, Σ numerator / Σ denominator, drawn jointly.
They are withheld where the denominator's interval covers 0: the two models are then not shown to differ, and a share of
nothing means nothing (Heimersheim & Nanda 2024, arXiv 2404.15255, §4). The numerator is reported by itself as well
(`<measure>-effect`, nats or points).

**Named** layers. A layer and site is named if

- its effect differs from 0. Within a family (one measure at one checkpoint in one direction: all layers and sites)
  p-values are adjusted by the maximum of |t| over the family under random signs per prompt (Westfall & Young 1993;
  exact for symmetric effects), so that the chance to name any layer under no effect is 5%;
- its effect lies outside the middle 95% of random directions; without this control nothing is named. Every prompt has
  its own random direction, so their root mean square is at least the spread over directions of a mean effect, and one
  direction exceeds Student's quantile of it (P degrees of freedom) at most one time in twenty. Successes are compared
  prompt by prompt: as 0 or 1 they vary for other reasons;
- it has the sign of the difference between the two models, whose interval lies beyond ±1 nat (successes: 0). Two
  training seeds of one objective differ by up to 0.6 nats on the organism; that is no mechanism.

Shapes: P prompts, M places (layer, site), R draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import scipy

from leeway.hashing import derive_seed
from leeway.stats.bootstrap import interval, multinomial_weights
from leeway.stats.intervals import NAN, Floats

CHECKPOINT = ["objective", "seed", "budget"]
PLACE = ["layer", "site", "position"]
VALUES = [*CHECKPOINT, "measure", "item_id", "group", "detail", *PLACE]
VALUES += ["value", "control", "scale", "low", "high", "reason"]
COLUMNS = [*CHECKPOINT, "measure", "detail", *PLACE, "value", "low", "high", "control", "control_low", "control_high"]
COLUMNS += ["n", "p", "named", "unit", "reason"]
CONTRASTS = ["objective", "reference", *CHECKPOINT[1:], "measure", "detail", *PLACE, "difference", "low", "high"]
CONTRASTS += ["p", "n"]
SUCCESSES = "mediation"  # measured in attack successes, all other ratios in nats
RATIOS = ("patching", "leave-one-out", "one-alone", SUCCESSES)
GROUPS = ("harmful", "harmless")
CAUSAL = RATIOS  # measures that intervene: only these can support a claim of mechanism
UNITS = {**dict.fromkeys(RATIOS, "share"), "refusal-logit": "nats", "token-kl": "nats", "stable-rank": "rank"}
TESTED = (*RATIOS, "persona-shift", "persona-data")  # measures that are 0 under no effect
LEAST_GAP = 1.0  # nats between two models; below it no layer is named
RESAMPLES = 2_000
FLIPS = 5_000
ALPHA = 0.05


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per checkpoint, measure, detail and place (columns `COLUMNS`) from measured values (`VALUES`)."""
    values = pd.concat([values, _logit_changes(values)], ignore_index=True)
    lines: list[dict[str, Any]] = []
    for key, own in values.groupby([*CHECKPOINT, "measure", "detail"], sort=False):
        identity = dict(zip([*CHECKPOINT, "measure", "detail"], key, strict=True))
        whole = own[own["item_id"] == ""]
        lines += [{**identity, **_estimate(line)} for line in whole.to_dict("records")]
        prompts = own[own["item_id"] != ""]
        if not prompts.empty:
            lines += [{**identity, **line} for line in _of_prompts(str(identity["measure"]), prompts)]
    return pd.DataFrame(lines, columns=COLUMNS).fillna({"reason": "", "named": False})


def _logit_changes(values: pd.DataFrame) -> pd.DataFrame:
    """Return each prompt's change of the refusal logit, the checkpoint's minus the base's (detail `change, <kind>`)."""
    own = values[values["measure"] == "refusal-logit"]
    side, key = own["detail"].str.split(",").str[0], [*CHECKPOINT, "item_id"]
    base = own.loc[side == "base", [*key, "value"]]
    both = own[side == "checkpoint"].merge(base, on=key, suffixes=("", "_base"))
    both["value"] -= both.pop("value_base")
    return both.assign(detail="change, " + both["group"].astype(str))


def _estimate(line: dict[Any, Any]) -> dict[str, Any]:
    kept = {k: line[k] for k in (*PLACE, "value", "low", "high", "control", "reason")}
    return {**kept, "unit": UNITS.get(str(line["measure"]), ""), "named": False}


def _of_prompts(measure: str, own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    if measure == "direction-auroc":
        yield from _areas(own)
        return
    families = own["site"].str.startswith("layers")
    for _, family in own.groupby(families, sort=False):
        if measure in RATIOS:
            yield from _ratios(measure, family)
        else:
            yield from _means(measure, family)


def _matrix(own: pd.DataFrame, column: str) -> tuple[Floats, pd.MultiIndex]:
    """Return [P, M] values by prompt and place; NaN where a prompt has none."""
    table = own.pivot(index="item_id", columns=PLACE, values=column).sort_index(axis=1)
    return table.to_numpy(float), table.columns  # type: ignore[return-value]


def _means(measure: str, own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    value_PM, places = _matrix(own, "value")
    control_PM = _aligned(own, "control", value_PM)
    weights_RP = _weights(len(value_PM), measure)
    adjusted_M = adjusted_p(value_PM) if measure in TESTED else np.full(len(places), NAN)
    for m, place in enumerate(places):
        line = _interval(value_PM[:, m], weights_RP)
        yield {
            **dict(zip(PLACE, place, strict=True)),
            **line,
            **_control(measure, control_PM[:, m], weights_RP),
            "p": adjusted_M[m],
            "named": False,
            "unit": UNITS.get(measure, ""),
            "reason": _unscored(own, place, line),
        }


SAME_SHARE = "no interval: every draw of prompts has the same share"


def _unscored(own: pd.DataFrame, place: Sequence[object], line: dict[str, Any]) -> str:
    at = own[(own[PLACE] == list(place)).all(axis=1)]
    failed = at.loc[at["reason"] != "", "reason"]
    return f"{len(failed)} prompts unscored ({failed.iloc[0]})" if len(failed) else str(line.get("note", ""))


def _ratios(measure: str, own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield each place's share and, as `<measure>-effect`, its numerator."""
    value_PM, places = _matrix(own, "value")
    control_PM, scale_PM = (_aligned(own, c, value_PM) for c in ("control", "scale"))
    weights_RP = _weights(len(value_PM), measure)
    named_M, adjusted_M = named(value_PM, control_PM, scale_PM, successes=measure == SUCCESSES)
    unit = "points" if measure == SUCCESSES else "nats"
    for m, place in enumerate(places):
        where = dict(zip(PLACE, place, strict=True))
        effect = _interval(value_PM[:, m], weights_RP)
        common = {"n": effect["n"], "p": adjusted_M[m], "named": bool(named_M[m])}
        failed = _unscored(own, place, {})
        control = _control(measure, control_PM[:, m], weights_RP)
        yield {**where, **effect, **control, **common, "measure": f"{measure}-effect", "unit": unit, "reason": failed}
        gap = _interval(scale_PM[:, m], weights_RP)
        if not (float(gap["low"]) > 0 or float(gap["high"]) < 0):  # also where there is no interval
            ends = f"{gap['value']:+.2f} [{gap['low']:.2f}, {gap['high']:.2f}]"
            why = f"withheld: the models' difference is not shown ({ends})"
            yield {
                **where,
                **common,
                "value": NAN,
                "low": NAN,
                "high": NAN,
                "unit": "share",
                "reason": why,
                "named": False,
            }
            continue
        share = _interval(value_PM[:, m], weights_RP, scale_PM[:, m])
        random = _control(measure, control_PM[:, m], weights_RP, scale_PM[:, m])
        if share["low"] == share["high"]:  # every changed prompt is undone, say: the bootstrap knows no other outcome
            share |= {"low": NAN, "high": NAN}
            failed = failed or SAME_SHARE
        yield {**where, **share, **random, **common, "unit": "share", "reason": failed}


def _areas(own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the area under the ROC curve of harmful against harmless prompts, both drawn."""
    for place, at in own.groupby(PLACE, sort=True):
        harmful, harmless = (at.loc[at["group"] == g, "value"].to_numpy(float) for g in GROUPS)
        above = (harmful[:, None] > harmless) + 0.5 * (harmful[:, None] == harmless)
        rows_RP, columns_RP = (_weights(n, f"auroc {group}") / n for n, group in zip(above.shape, GROUPS, strict=True))
        drawn_R = np.einsum("rp,pq,rq->r", rows_RP, above, columns_RP)
        found = interval(drawn_R, min(above.shape))
        yield {
            **dict(zip(PLACE, place, strict=True)),
            "value": float(above.mean()),
            "low": found.low,
            "high": found.high,
            "n": above.shape[0] + above.shape[1],
            "named": False,
            "reason": found.note,
        }


def named(
    value_PM: Floats, control_PM: Floats, scale_PM: Floats, *, successes: bool = False
) -> tuple[np.ndarray, Floats]:
    """Return (which places carry an effect, adjusted p-values of an effect of 0), [M] each.

    `successes`: values are differences of 0 and 1 instead of nats.
    """
    adjusted_M = adjusted_p(value_PM)
    mean_M = np.array([_mean(v) for v in value_PM.T])
    sign_M = np.sign(mean_M)
    ok_M = adjusted_M <= ALPHA
    if successes:
        against_M = np.sign([_mean(c) for c in control_PM.T]) * sign_M  # the control as if it agreed with the effect
        excess_PM = sign_M * (value_PM - against_M * control_PM)
        ok_M &= (adjusted_p(excess_PM) <= ALPHA) & (np.array([_mean(e) for e in excess_PM.T]) > 0)
    else:
        ok_M &= np.abs(mean_M) > [chance(c) for c in control_PM.T]
    weights_RP, least = _weights(len(value_PM), "gap"), 0.0 if successes else LEAST_GAP
    for m in range(value_PM.shape[1]):
        gap = _interval(scale_PM[:, m], weights_RP)
        shown = float(gap["low"]) > least or float(gap["high"]) < -least
        ok_M[m] &= shown and sign_M[m] == np.sign(float(gap["value"]))
    return ok_M, adjusted_M


def chance(control_P: Floats) -> float:
    """Return what the mean effect of one random direction exceeds 5% of the time, or less often."""
    known_P = control_P[~np.isnan(control_P)]
    if not len(known_P):
        return NAN
    return float(scipy.stats.t.ppf(1 - ALPHA / 2, len(known_P)) * np.sqrt((known_P**2).mean()))


def _mean(value_P: Floats) -> float:
    known_P = value_P[~np.isnan(value_P)]
    return float(known_P.mean()) if len(known_P) else NAN


@cache
def _signs(prompts: int, flips: int) -> Floats:
    rng = np.random.default_rng(derive_seed("probe signs", prompts))
    return rng.choice([-1.0, 1.0], size=(flips, prompts))


def adjusted_p(value_PM: Floats, flips: int = FLIPS) -> Floats:
    """Return p-values of a mean of 0 at each place, adjusted for all places by the largest |t| under random signs."""
    filled_PM = np.nan_to_num(value_PM)
    size_M = np.sqrt((filled_PM**2).sum(axis=0))
    moves = size_M > 0
    p_M = np.full(value_PM.shape[1], 1.0)
    if not moves.any():
        return p_M
    unit_PM = filled_PM[:, moves] / size_M[moves]
    observed_M = np.abs(unit_PM.sum(axis=0))
    most_R = np.sort(np.abs(_signs(len(value_PM), flips) @ unit_PM).max(axis=1))
    exceed_M = flips - np.searchsorted(most_R, observed_M - 1e-12)
    p_M[moves] = (1 + exceed_M) / (1 + flips)
    return p_M


def _aligned(own: pd.DataFrame, column: str, like_PM: Floats) -> Floats:
    if own[column].isna().all():
        return np.full(like_PM.shape, NAN)
    return _matrix(own, column)[0]


def _weights(count: int, key: str) -> Floats:
    return multinomial_weights(count, RESAMPLES, np.random.default_rng(derive_seed("probe draws", key, count)))


def _interval(value_P: Floats, weights_RP: Floats, scale_P: Floats | None = None) -> dict[str, Any]:
    """Return mean (or ratio of means) and interval over the prompts that have a value."""
    known = ~np.isnan(value_P)
    if not known.any():
        return {"value": NAN, "low": NAN, "high": NAN, "n": 0}
    weights = weights_RP[:, known]
    over_P = np.ones(int(known.sum())) if scale_P is None else scale_P[known]
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn_R = (weights @ value_P[known]) / (weights @ over_P)
    found = interval(drawn_R, int(known.sum()))
    point = float(value_P[known].sum() / over_P.sum())
    if found.note.startswith("all draws"):  # every prompt has the same value: an exact 0, for example
        return {"value": point, "low": point, "high": point, "n": int(known.sum())}
    return {"value": point, "low": found.low, "high": found.high, "n": int(known.sum()), "note": found.note}


def _control(measure: str, control_P: Floats, weights_RP: Floats, scale_P: Floats | None = None) -> dict[str, Any]:
    """Return the control's mean and the middle 95% of random directions (of successes: the mean's interval)."""
    if np.isnan(control_P).all():
        return {"control": NAN, "control_low": NAN, "control_high": NAN}
    line = _interval(control_P, weights_RP, scale_P)
    if measure != SUCCESSES:
        far = chance(control_P) / (1.0 if scale_P is None else abs(_mean(scale_P)))  # of the share that is reported
        line |= {"low": -far, "high": far}
    return {"control": line["value"], "control_low": line["low"], "control_high": line["high"]}


def contrasts(values: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return paired differences of each objective from `reference` at the same seed and budget, prompt by prompt.

    For the numerators of causal measures, the refusal logit and the persona shift. Columns: objective, reference, seed,
    budget, measure, detail, layer, site, position, difference, low, high, p (adjusted within its family), n.
    """
    paired = values[(values["item_id"] != "") & values["measure"].isin([*CAUSAL, "refusal-logit", "persona-shift"])]
    key = [*CHECKPOINT[1:], "measure", "detail"]
    lines: list[dict[str, Any]] = []
    others = dict(iter(paired[paired["objective"] == reference].groupby(key, sort=False)))
    for full, own in paired[paired["objective"] != reference].groupby(["objective", *key], sort=False):
        objective, *rest = full
        other = others.get(tuple(rest))
        if other is None:
            continue
        both = own.merge(other, on=["item_id", *PLACE], suffixes=("", "_reference"))
        both["value"] = both["value"] - both["value_reference"]
        value_PM, places = _matrix(both, "value")
        weights_RP, adjusted_M = _weights(len(value_PM), "contrast"), adjusted_p(value_PM)
        for m, place in enumerate(places):
            line = _interval(value_PM[:, m], weights_RP)
            line["difference"] = line.pop("value")
            lines.append(
                {"objective": objective, "reference": reference}
                | dict(zip(key, rest, strict=True))
                | dict(zip(PLACE, place, strict=True))
                | line
                | {"p": adjusted_M[m]}
            )
    return pd.DataFrame(lines, columns=CONTRASTS)


MIN_TRAITS = 5  # a rank correlation over fewer says nothing


def prediction(table: pd.DataFrame, drift: pd.DataFrame) -> pd.DataFrame:
    """Return, per checkpoint and trait, what the training data predicted and what happened.

    `drift`: columns objective, seed, budget, trait, difference. Columns added: `projection` of the data along the
    trait's vector at the middle layer with its interval, `shift` of the checkpoint along it, `agrees` (same sign as the
    projection), and `rank_correlation` over the traits of the checkpoint (NaN below 5 traits).
    """
    data = table[(table["measure"] == "persona-data") & table["value"].notna()]
    columns = [*drift.columns, "projection", "low", "high", "shift", "agrees", "rank_correlation"]
    if data.empty or drift.empty:
        return pd.DataFrame(columns=columns)
    middle = int(data["layer"].median())
    kept = ["detail", "value", "low", "high"]
    at = data[data["layer"] == middle][kept].rename(columns={"detail": "trait", "value": "projection"})
    shift = table[(table["measure"] == "persona-shift") & (table["layer"] == middle)]
    moved = shift[[*CHECKPOINT, "detail", "value"]].rename(columns={"detail": "trait", "value": "shift"})
    found = drift.merge(at, on="trait").merge(moved, on=[*CHECKPOINT, "trait"], how="left")
    found["agrees"] = np.sign(found["projection"]) == np.sign(found["difference"])
    found["rank_correlation"] = NAN
    for _, own in found.groupby(CHECKPOINT):
        if len(own) >= MIN_TRAITS:
            found.loc[own.index, "rank_correlation"] = own["projection"].corr(own["difference"], method="spearman")
    return found[columns]
