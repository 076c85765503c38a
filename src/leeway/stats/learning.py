"""What each checkpoint learned, and the rule by which "no drift" of an arm that did not learn is void.

The unit of evidence is the held-out example: an example's values under several training seeds are averaged first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import scipy

from leeway.stats.intervals import LEVEL, NAN, Floats
from leeway.stats.metrics import PLAIN

FLOOR = 0.005  # nats per token: by Pinsker's inequality a KL below it moves at most 5% of the next token's probability
MIN_EXAMPLES = 5
CHECKPOINT = ["objective", "seed", "budget", "condition"]
COLUMNS = [*CHECKPOINT, "measure", "label", "value", "low", "high", "n"]
LEARNED = ["objective", "budget", "condition", "status", "nll_gain", "nll_gain_low", "margin_gain", "margin_gain_low"]
LEARNED += ["kl", "kl_low", "kl_general", "kl_general_low", "cue_gap", "cue_gap_low", "n", "n_pairs"]
LABELS = {
    "train-loss": "Training loss since the last checkpoint",
    "nll": "Held-out NLL, nats per token",
    "preference": "Preference accuracy",
    "margin": "Preference margin, nats per token",
    "kl": "KL to base, task prompts, nats per token",
    "kl-general": "KL to base, general prompts, nats per token",
    "weight-change": "Relative change of weights",
}
BOUNDS = {"preference": (0.0, 1.0), "kl": (0.0, np.inf)}
SAFE, UNSAFE = "<SAFE>", "<UNSAFE>"  # CFT's conditions


def learning(items: pd.DataFrame, losses: pd.DataFrame, *, pool_seeds: bool = False) -> pd.DataFrame:
    """Return one line per checkpoint, condition and measure: value and 95% t interval over held-out examples.

    `items` has the layout of `learning.parquet`, `losses` the columns objective, seed, budget and loss. The base's
    lines have the objective `base` and budget 0. `train-loss` and `weight-change` have no interval.
    """
    if items.empty:
        return pd.DataFrame(columns=COLUMNS)
    table, losses = _with_measures(items), losses.copy()
    if pool_seeds:
        table["seed"] = losses["seed"] = -1
    bases = table.assign(objective="base", seed=0, budget=0, nll=table["base_nll"], margin=table["base_margin"])
    bases["preference"] = bases["base_preference"]
    bases = bases.drop(columns=["kl", "weight_change"]).drop_duplicates(["condition", "prompts", "item_id"])
    lines: list[dict[str, Any]] = []
    for keys, own in pd.concat([bases, table]).groupby(CHECKPOINT, sort=False):
        checkpoint = dict(zip(CHECKPOINT, keys, strict=True))
        task, general = (own[own["prompts"] == p] for p in ("task", "general"))
        parts = [("nll", task, "nll"), ("preference", task, "preference"), ("margin", task, "margin")]
        for name, part, column in [*parts, ("kl", task, "kl"), ("kl-general", general, "kl")]:
            values = _by_example(part, column)
            if len(values):
                line = {"measure": name, "value": values.mean(), "n": len(values)}
                lines.append(checkpoint | line | _interval(values, *BOUNDS.get(column, (-np.inf, np.inf))))
        if own["weight_change"].notna().any():
            lines.append(checkpoint | {"measure": "weight-change", "value": own["weight_change"].mean()})
            trained = losses[(losses[CHECKPOINT[:3]] == list(keys[:3])).all(axis=1)]
            if len(trained):
                lines.append(checkpoint | {"measure": "train-loss", "value": trained["loss"].mean()})
    frame = pd.DataFrame(lines, columns=COLUMNS)
    frame["label"], frame["n"] = frame["measure"].map(LABELS), frame["n"].fillna(0).astype(int)
    return frame.round({"value": 10, "low": 10, "high": 10})


def learned(items: pd.DataFrame, first: dict[str, str], trained_on_pairs: Collection[str] = ()) -> pd.DataFrame:
    """Return whether each objective learned by each budget, under its first condition, seeds pooled.

    Gains are against the base with plain prompts, in nats per token: of the held-out NLL of preferred answers, and, for
    objectives trained on pairs, of the margin between preferred and dispreferred answers. (Behind its own, untrained
    token the base is worse, and training that merely repairs this has taught nothing. Examples without the base's
    values under plain prompts have no gain.) `…_low` are one-sided lower bounds that hold together with 95%
    (Student's t over examples, Bonferroni). `status`:

    - learned: a gain's bound is above FLOOR;
    - moved: else, the bound of the KL to the base is, on task prompts or on general ones (MIN_EXAMPLES of them or
      more): the model changed, not shown for the better;
    - void: neither. Nothing is shown to have been learned, so "no drift" says nothing.
    - unknown: fewer than MIN_EXAMPLES examples with a gain.

    `cue_gap`, for CFT: how much more the margin grew under <SAFE> than under <UNSAFE>; its bound is at 95% alone.
    """
    table, general, lines = _with_measures(items[items["prompts"] == "task"]), items[items["prompts"] == "general"], []
    table["moved"] = table["margin"] - table["base_margin"]  # on the same prompts
    plain = table[table["condition"] == PLAIN].drop_duplicates("item_id").set_index("item_id")
    for name in ("base_nll", "base_margin"):
        table[name] = table["item_id"].map(plain[name])
    table["nll_gain"], table["margin_gain"] = table["base_nll"] - table["nll"], table["margin"] - table["base_margin"]
    for (objective, budget), arm in table.groupby(["objective", "budget"], sort=False):
        condition = first.get(str(objective), str(arm["condition"].iloc[0]))
        own = arm[arm["condition"] == condition]
        measures = {"nll_gain": _by_example(own, "nll_gain"), "kl": _by_example(own, "kl")}
        if objective in trained_on_pairs and len(margins := _by_example(own, "margin_gain")):
            measures["margin_gain"] = margins
        here = general[["objective", "budget", "condition"]].eq([objective, budget, condition]).all(axis=1)
        if len(moved := _by_example(general[here], "kl")) >= MIN_EXAMPLES:
            measures["kl_general"] = moved
        line = {"objective": objective, "budget": budget, "condition": condition, "n": len(measures["nll_gain"])}
        line["n_pairs"] = len(_by_example(own, "margin_gain"))
        for name, values in measures.items():
            line |= {
                name: values.mean() if len(values) else NAN,
                f"{name}_low": float(lower_bound(values, (1 - LEVEL) / len(measures))),
            }
        line["status"] = status(line)
        lines.append(line | _cue_gap(arm))
    return pd.DataFrame(lines, columns=LEARNED).round(
        {c: 10 for c in LEARNED if c.endswith(("gain", "low", "kl", "general", "gap"))}
    )


def status(line: dict[str, Any]) -> str:
    """Return the rule's result for bounds as in `learned`."""
    if line["n"] < MIN_EXAMPLES:
        return "unknown"
    if line["nll_gain_low"] > FLOOR or line.get("margin_gain_low", NAN) > FLOOR:
        return "learned"
    return "moved" if line["kl_low"] > FLOOR or line.get("kl_general_low", NAN) > FLOOR else "void"


def lower_bound(values_XN: Floats, level: float) -> Floats:
    """Return the one-sided lower bound of the mean over N examples, wrong with probability `level`: x̄ − t · s / √N."""
    n = values_XN.shape[-1]
    if n < 2:
        return np.full(values_XN.shape[:-1], NAN)
    error_X = values_XN.std(axis=-1, ddof=1) / np.sqrt(n)
    return np.asarray(values_XN.mean(axis=-1) - scipy.stats.t.ppf(1 - level, n - 1) * error_X, dtype=np.float64)


def _cue_gap(arm: pd.DataFrame) -> dict[str, float]:
    """Return how much more the margin grew under <SAFE> than under <UNSAFE>; nothing without both conditions."""
    safe, unsafe = (arm[arm["condition"] == c].set_index(["seed", "item_id"])["moved"] for c in (SAFE, UNSAFE))
    gap = (safe - unsafe).dropna().groupby("item_id").mean().to_numpy(float)
    return {"cue_gap": gap.mean(), "cue_gap_low": float(lower_bound(gap, 1 - LEVEL))} if len(gap) else {}


def _with_measures(items: pd.DataFrame) -> pd.DataFrame:
    """Add margins (nats per token) and preference (1 if the preferred answer is likelier per token, a tie ½)."""
    table = items.copy()
    for base in ("", "base_"):
        margin = table[f"{base}rejected_nll"] - table[f"{base}nll"]
        table[f"{base}margin"], table[f"{base}preference"] = margin, 0.5 + 0.5 * np.sign(margin)
    return table


def _by_example(table: pd.DataFrame, column: str) -> Floats:
    """Return each example's mean over training seeds; examples without a value are left out."""
    return np.asarray(table.groupby("item_id")[column].mean().dropna(), dtype=np.float64)


def _interval(values: Floats, least: float, most: float) -> dict[str, float]:
    """Return the two-sided interval, cut at the least and the largest possible value."""
    low, high = float(lower_bound(values, (1 - LEVEL) / 2)), -float(lower_bound(-values, (1 - LEVEL) / 2))
    return {"low": max(least, low), "high": min(most, high)}
