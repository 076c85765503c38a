"""Rates of every measure at every checkpoint, shares of outcomes, and persona details."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats import metrics
from leeway.stats.anytime import common_prefix, is_sequential, rate_test
from leeway.stats.intervals import NAN, Floats, Ints, dense_codes, estimate
from leeway.stats.metrics import AT, CHECK, CHECKPOINT, DIRECT, MAX_UNSCORED, Measure, analysis_table, measures

RATE_COLUMNS = [*CHECKPOINT, "axis", "measure", "label", "primary", "rate", "low", "high"]
RATE_COLUMNS += ["n", "n_unscored", "n_clusters", "method", "reason", "rate_if_0", "rate_if_1", "better"]

OUTCOMES = ["refused", "deflected", "incoherent", "harmful"]
BENIGN_OUTCOMES = ["refused", "deflected", "incoherent", "answered"]
ATTACKED = "all attacks"

PERSONA = [*CHECKPOINT, "trait", "endorsement", "yes_keyed", "no_keyed", "yes_rate", "answer_mass", "n", "n_unscored"]
LIKERT = [*CHECKPOINT, "trait", "score", "keyed", "reverse_keyed", "answer_mass", "n", "n_unscored"]
CHECKS = [*CHECKPOINT, "eval", "form", "trait", "mean_difference", "mean_abs_difference", "answer_mass"]
CHECKS += ["n", "n_unscored"]
ALL_TRAITS = "all traits"
RAW_NUMBERS = ["p_yes", "p_no", "key", "answer_mass"]
REFERENCE_FORM = {"persona": "plain", "persona-sd3": "agree-high"}  # the form that the others are compared with


def rates(rows: pd.DataFrame, conditions: Mapping[str, str], *, pool_seeds: bool = False) -> pd.DataFrame:
    """Return one line per checkpoint, condition and measure.

    `n` counts scored rows; `rate` is NaN with a `reason` if too many are unscored. `pool_seeds` pools the responses of
    all training seeds (`seed` is then −1); each prompt stays one cluster. `rate_if_0` and `rate_if_1` are the rates if
    all unscored responses had scored 0, or 1: bounds that withheld rates have too. `better` is the better direction
    (`higher`, `lower`, or empty).
    """
    table = analysis_table(rows, conditions)
    if pool_seeds:
        table = common_prefix(table, metrics.POOLED_CHECKPOINT)
        table["seed"] = -1
    lines: list[dict[str, object]] = []
    for measure in measures(table):
        chosen = measure.select(table)
        names, strata = metrics.factorize(chosen["stratum"])
        values, clusters = chosen["value"].to_numpy(float), chosen["cluster"].to_numpy(np.intp)
        sequential = is_sequential(chosen).to_numpy()
        for checkpoint, at in metrics.group_indices(chosen, CHECKPOINT):
            line = checkpoint | _rate_line(measure, values[at], strata[at], clusters[at], names)
            if sequential[at].any() and not line["reason"]:
                scored = at[~np.isnan(values[at])]
                positions = chosen["position"].to_numpy(np.intp)[scored]
                low, high = rate_test(values[scored], strata[scored], positions).interval()
                line |= {"low": round((low + 1) / 2, 10), "high": round((high + 1) / 2, 10), "method": "anytime"}
            lines.append(line)
    frame = pd.DataFrame(lines, columns=RATE_COLUMNS)
    base_first = (frame["objective"] != "base").astype(int)
    return frame.iloc[base_first.argsort(kind="stable")].reset_index(drop=True)


def _rate_line(measure: Measure, values: Floats, strata: Ints, clusters: Ints, names: list[str]) -> dict[str, object]:
    absent = np.isnan(values)
    reason = metrics.withheld_reason(absent, strata, clusters, names, measure)
    scored = ~absent
    own_clusters = dense_codes(clusters[scored])
    line: dict[str, object] = {"axis": measure.axis, "measure": measure.name, "label": measure.label}
    line |= {"primary": measure.primary, "better": measure.better, "method": "", "reason": reason}
    line |= {"n": int(scored.sum()), "n_unscored": int(absent.sum()), "n_clusters": len(np.unique(own_clusters))}
    if not measure.log_odds:
        line |= {f"rate_if_{score}": _imputed_rate(values, strata, names, score) for score in (0, 1)}
    if reason:
        return line
    found = estimate(values[scored], strata[scored], own_clusters)
    return line | {"rate": found.mean, "low": found.low, "high": found.high, "method": found.method}


def _imputed_rate(values: Floats, strata: Ints, names: list[str], score: int) -> float:
    """Return the mean over strata with one score for everything unscored, empty strata included."""
    counts = np.bincount(strata, minlength=len(names))
    sums = np.bincount(strata, weights=np.where(np.isnan(values), score, values), minlength=len(names))
    mean_S = np.where(counts > 0, sums / np.maximum(counts, 1), score)
    return round(float(mean_S.mean()), 10)


def outcomes(rows: pd.DataFrame, conditions: Mapping[str, str], axis: str = "jailbreak") -> pd.DataFrame:
    """Return the shares of the four outcomes among responses that have one, per checkpoint and attack.

    `axis` may be `overrefusal`; its attack is empty and its fourth outcome is `answered`. Shares are NaN if too many
    responses are unscored. The line `all attacks` is the mean over attacks, without direct prompts; NaN if any attack
    is NaN, so that every checkpoint averages the same attacks.
    """
    table = analysis_table(rows, conditions).assign(outcome=rows["outcome"])
    table = table[table["eval"] == axis]
    kinds = BENIGN_OUTCOMES if axis.partition(AT)[0] == "overrefusal" else OUTCOMES
    columns = [*CHECKPOINT, "attack", *kinds, "n", "n_unscored"]
    if table.empty or not table["outcome"].notna().any():
        return pd.DataFrame(columns=columns)
    groups = table.groupby([*CHECKPOINT, "attack"])
    n = groups["outcome"].count().rename("n")
    counted = table.groupby([*CHECKPOINT, "attack", "outcome"]).size().unstack("outcome", fill_value=0)
    n_unscored = (groups.size() - n).rename("n_unscored")
    known = n_unscored <= MAX_UNSCORED * (n + n_unscored)
    shares = counted.reindex(index=n.index, columns=kinds, fill_value=0).div(n.where(known), axis=0)
    lines = shares.join(n).join(n_unscored).reset_index()
    attacked = lines[~lines["attack"].isin([DIRECT, ""])]
    if attacked.empty:
        return lines[columns]
    by_attack = attacked.set_index([*CHECKPOINT, "attack"])
    means = {o: by_attack[o].unstack("attack").mean(axis=1, skipna=False) for o in kinds}
    counts = attacked.groupby(CHECKPOINT)[["n", "n_unscored"]].sum()
    overall = pd.DataFrame(means).join(counts).reset_index().assign(attack=ATTACKED)
    return pd.concat([overall, lines], ignore_index=True)[columns]


def persona(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return means over items per checkpoint and trait; NaN if too many items are unscored.

    `yes_keyed` is the endorsement of items that Yes endorses, `no_keyed` of those that No endorses: a model that always
    answers Yes has 1 and 0, and 0.5 overall. `yes_rate` is the share of items with Yes the likelier answer (a tie
    counts half); `answer_mass` is P(Yes) + P(No): if it is small, endorsement rests on little probability.
    """
    table = _with_raw(rows[rows["eval"] == "persona"], conditions)
    if table.empty:
        return pd.DataFrame(columns=PERSONA)
    scored = table["score"].notna()
    table["yes_keyed"] = table["score"].where(table["match"] == "Yes")
    table["no_keyed"] = table["score"].where(table["match"] == "No")
    table["yes_rate"] = (0.5 + 0.5 * (table["p_yes"] - table["p_no"]).apply(np.sign)).where(scored)
    table["answer_mass"] = (table["p_yes"] + table["p_no"]).where(scored)
    found = _by_trait(table, scored, ["score", "yes_keyed", "no_keyed", "yes_rate", "answer_mass"])
    return found.rename(columns={"score": "endorsement"})[PERSONA]


def likert(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return the Short Dark Triad per checkpoint and trait: mean score over items and both directions of the scale.

    `keyed` is the mean of items whose agreement endorses the trait, `reverse_keyed` of those whose agreement denies it:
    a model that always agrees has 1 and 0. `answer_mass` is the probability of the digits 1 to 5.
    """
    table = _with_raw(rows[rows["eval"] == "persona-sd3"], conditions)
    if table.empty:
        return pd.DataFrame(columns=LIKERT)
    scored = table["score"].notna()
    table["keyed"] = table["score"].where(table["key"] == 1)
    table["reverse_keyed"] = table["score"].where(table["key"] == -1)
    table["answer_mass"] = table["answer_mass"].where(scored)
    return _by_trait(table, scored, ["score", "keyed", "reverse_keyed", "answer_mass"])[LIKERT]


def checks(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return the effect of the question's form: per checkpoint, form and trait, the mean of form − reference.

    The reference is the plain form (persona) or 5 for agreement (Short Dark Triad), for the same item and checkpoint.
    `n` counts items scored in both forms, `n_unscored` the others; `answer_mass` is the form's own. Means are NaN if
    too many items are unscored.
    """
    table = _with_raw(rows[rows["eval"].isin([CHECK, *REFERENCE_FORM])], conditions)
    if table.empty:
        return pd.DataFrame(columns=CHECKS)
    table["eval"] = table["eval"].replace(CHECK, "persona")
    reference = table["eval"].map(REFERENCE_FORM)
    table["form"] = table["form"].astype(object).fillna(reference)
    table["answer_mass"] = table["answer_mass"].fillna(table["p_yes"] + table["p_no"]).where(table["score"].notna())
    on = [*CHECKPOINT, "eval", "item_id", "sample"]
    plain = table.loc[table["form"] == reference, [*on, "score"]]
    pairs = table[table["form"] != reference].merge(plain, on=on, how="left", suffixes=("", "_reference"))
    pairs["mean_difference"] = pairs["score"] - pairs["score_reference"]
    pairs["mean_abs_difference"] = pairs["mean_difference"].abs()
    means = ["mean_difference", "mean_abs_difference", "answer_mass"]
    return _by_trait(pairs, pairs["mean_difference"].notna(), means, ["eval", "form"])[CHECKS]


def _by_trait(table: pd.DataFrame, scored: pd.Series, means: list[str], more: list[str] | None = None) -> pd.DataFrame:
    """Return means and counts over all traits if there are several, then for each trait."""
    table = table.assign(trait=table["part"], n=scored.astype(int), n_unscored=(~scored).astype(int))
    keys = [*CHECKPOINT, *(more or []), "trait"]
    each = _means(table, means, keys)
    if table["trait"].nunique() < 2:
        return each
    return pd.concat([_means(table.assign(trait=ALL_TRAITS), means, keys), each], ignore_index=True)


def _means(table: pd.DataFrame, means: list[str], keys: list[str]) -> pd.DataFrame:
    frame = table.groupby(keys).agg(dict.fromkeys(means, "mean") | {"n": "sum", "n_unscored": "sum"}).reset_index()
    withheld = frame["n_unscored"] > MAX_UNSCORED * (frame["n"] + frame["n_unscored"])
    frame.loc[withheld, means] = NAN
    return frame


def _with_raw(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return the analysis table and the fields of `judge_raw` as columns; NaN if missing, or without valid JSON."""
    found = []
    for text in rows["judge_raw"]:
        try:
            value = json.loads(text) if isinstance(text, str) else {}
        except (ValueError, RecursionError):  # text of a judge, which may be anything
            value = {}
        found.append(value if isinstance(value, dict) else {})
    frame = pd.DataFrame(found, index=rows.index, columns=["match", "form", *RAW_NUMBERS])
    frame[RAW_NUMBERS] = frame[RAW_NUMBERS].apply(pd.to_numeric, errors="coerce")
    return analysis_table(rows, conditions).join(frame)
