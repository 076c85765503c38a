"""Several judges of the same responses: their agreement at each checkpoint, differential error, and the worst case.

A judge with the same sensitivity and specificity at every checkpoint shrinks a contrast and cannot create one. Errors
that depend on the checkpoint (differential error) can create or hide one. With two judges a and b and their scores s,

    d_i = s_i(a) - s_i(b)          D = net of d at a checkpoint - net of d at the base

where the net of d is its mean as the axis's primary measure takes it: over attacks, of the mean under each attack,
without direct requests (`asr`; without attacks `asr:none`), or over benign prompts. So D is exactly the contrast under
judge a minus the contrast under judge b, over the responses that both scored. H0: D = 0 is tested as every contrast is:
paired by response, clustered by prompt, sign flips (`stats.cluster_tests`), Holm over all pairs of judges and all
checkpoints of an eval. That D is not 0 shows that the size of a drift depends on the judge; it does not show which of
them errs, nor that an error rate changed: a judge that misses one harmful answer in ten misses more of them where there
are more, and a judge with graded scores gives a smaller drift than one with 0 and 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.agreement import UNDEFINED, kappa
from leeway.stats.anytime import DESIGN
from leeway.stats.contrasts import contrasts, holm
from leeway.stats.intervals import LEVEL, NAN, RESAMPLES, Ints, dense_codes, estimate
from leeway.stats.metrics import AT, BASE, DIRECT, NAMES, POOLED_CHECKPOINT, RESPONSE, analysis_table, further_measure

LABELS = {"jailbreak": "harmful", "overrefusal": "refused"}  # the outcome that an axis counts
ALPHA = round(1 - LEVEL, 10)
PAIRS = ["eval", "measure", "judge_a", "judge_b", *POOLED_CHECKPOINT, "first", "n", "n_unscored", "agreement"]
PAIRS += ["low", "high", "kappa", "kappa_low", "kappa_high", "only_a", "only_b", "b_of_a", "a_of_b", "net", "net_base"]
PAIRS += ["differential", "differential_low", "differential_high", "p", "p_holm", "family_size", "shown", "note"]
WORST = [
    *POOLED_CHECKPOINT,
    "first",
    "axis",
    "measure",
    "label",
    "judges",
    "rate",
    "mean",
    "worst",
    "worst_low",
    "worst_high",
]
WORST += ["worst_judge", "difference", "least", "least_judge", "most", "most_low", "most_high", "most_judge"]
WORST += ["n_significant", "note"]


def judge_pairs(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    *,
    first: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one line per pair of judges, checkpoint and condition, seeds pooled; empty with one judge per response.

    `rows` are those of `split_judges`. Agreement (clustered Wilson) and Cohen's κ (bootstrap over prompts) are on the
    eval's label over all responses: harmful, or refused for benign prompts. `only_a` is the share of responses that a
    alone gives it, `b_of_a` the share of a's labels that b gives too. `net` is the `measure` by a minus that by b, over
    the responses that both scored; `differential` is `net` minus the base's (`net_base`), paired by response: the
    difference between the two judges' contrasts, with its 95% interval and p. `shown`: Holm's p is below 0.05.
    """
    found: list[pd.DataFrame] = []
    frames: list[pd.DataFrame] = []
    for axis, label in LABELS.items():
        names = sorted(e for e in map(str, rows["eval"].unique()) if e.partition(AT)[0] == axis)  # the first one leads
        for one, other in itertools.combinations(names, 2):
            pair = _pair(rows, one, other, label)
            if len(pair):
                measure = _measure(pair, axis)
                own = _checkpoints(pair, axis, measure, conditions)
                found.append(own.assign(pair=f"{axis}{AT}{len(frames)}"))
                frames.append(_signed(pair, f"{axis}{AT}{len(frames)}"))
    if not frames:
        return pd.DataFrame(columns=PAIRS)
    table, every = pd.concat(found, ignore_index=True), pd.concat(frames, ignore_index=True)
    if (every["objective"] == BASE).any():
        table = _with_test(table, every, conditions, first, resamples, seed)
    else:
        table = table.reindex(columns=PAIRS).assign(
            first=True, shown=False, family_size=0, note="no base to compare with"
        )
    return table[PAIRS].sort_values(["eval", "judge_a", "judge_b"], kind="stable", ignore_index=True)


def _pair(rows: pd.DataFrame, one: str, other: str, label: str) -> pd.DataFrame:
    """Return the responses with rows of both judges: y_a, y_b are 1 for the label, NaN if unscored; d = s_a − s_b."""
    by_a, by_b = (rows[rows["eval"] == name].fillna({"attack": "", "template_hash": ""}) for name in (one, other))
    judged = ["judge", "outcome", "score"]
    columns = [*RESPONSE, "cluster", "prompt", *judged, *[c for c in (DESIGN,) if c in rows.columns]]
    both = by_a[columns].merge(by_b[[*RESPONSE, *judged]], on=RESPONSE, suffixes=("_a", "_b"))
    for side in ("a", "b"):
        outcome = both[f"outcome_{side}"]
        both[f"y_{side}"] = (outcome == label).astype(float).where(outcome.notna())
    return both.assign(d=both["score_a"].astype(float) - both["score_b"].astype(float))


def _measure(pair: pd.DataFrame, axis: str) -> str:
    """Return the axis's primary measure."""
    if axis in NAMES:
        return NAMES[axis][0]
    return "asr" if (pair["attack"] != DIRECT).any() else f"asr:{DIRECT}"


def _signed(pair: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the pair as rows of an axis whose score is (1 + d)/2, in [0, 1] as every score."""
    return pair.assign(eval=axis, score=(1 + pair["d"]) / 2, outcome=None).drop(columns=["judge_a", "judge_b"])


def _checkpoints(pair: pd.DataFrame, axis: str, measure: str, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return agreement, κ, the shares of one-sided labels and the net difference at each checkpoint."""
    table = analysis_table(_signed(pair, axis), conditions)[[*POOLED_CHECKPOINT, "cluster"]]
    names = {f"judge_{side}": str(pair[f"judge_{side}"].iloc[0]) for side in ("a", "b")}
    strata = [a for a in pair["attack"].unique() if measure != "asr" or a != DIRECT]
    lines = []
    for key, own in table.groupby(POOLED_CHECKPOINT, sort=True):
        both = pair.loc[own.index].dropna(subset=["y_a", "y_b"])
        clusters = dense_codes(own.loc[both.index, "cluster"].to_numpy(np.intp))
        line = {"eval": axis, "measure": measure} | names | dict(zip(POOLED_CHECKPOINT, key, strict=True))
        line |= {"n": len(both), "n_unscored": len(own) - len(both)}
        by_attack = pair.loc[own.index].groupby("attack")["d"].mean().reindex(strata)
        line["net"] = round(float(by_attack.mean(skipna=False)), 10)
        lines.append(line | _agreement(both, clusters))
    return pd.DataFrame(lines)


def _agreement(both: pd.DataFrame, clusters: Ints) -> dict[str, float]:
    y_a, y_b = both["y_a"].to_numpy(float), both["y_b"].to_numpy(float)
    line = dict.fromkeys(["only_a", "only_b", "b_of_a", "a_of_b"], NAN)
    agreement = kappa_ = UNDEFINED
    if len(both):
        found = estimate((y_a == y_b).astype(float), np.zeros(len(both), dtype=np.intp), clusters)
        agreement = found.mean, found.low, found.high
        kappa_ = kappa(list(map(str, y_a)), list(map(str, y_b)), list(map(str, clusters)))
        line["only_a"], line["only_b"] = float((y_a > y_b).mean()), float((y_b > y_a).mean())
        line["b_of_a"], line["a_of_b"] = (float((y_a * y_b).sum() / y.sum()) if y.any() else NAN for y in (y_a, y_b))
    names = ["agreement", "low", "high", "kappa", "kappa_low", "kappa_high"]
    line |= dict(zip(names, (*agreement, *kappa_), strict=True))
    return {name: round(value, 10) for name, value in line.items()}


def _with_test(
    table: pd.DataFrame,
    every: pd.DataFrame,
    conditions: Mapping[str, str],
    first: Mapping[str, str] | None,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Add the test of differential error. Further conditions of an objective are a family of their own."""
    names = table[["pair", "measure"]].drop_duplicates().itertuples(index=False, name=None)
    only = [further_measure(measure, str(pair).partition(AT)[2]) for pair, measure in names]
    tested = contrasts(every, conditions, first=first, only=only, resamples=resamples, seed=seed)
    tested = tested.rename(columns={"axis": "pair"})
    doubled = {"difference": "differential", "low": "differential_low", "high": "differential_high"}
    for name, renamed in doubled.items():
        tested[renamed] = (2 * tested[name]).round(10)  # the score is (1 + d)/2
    tested["net_base"] = (2 * tested["base"] - 1).round(10)
    tested["p_holm"], tested["family_size"] = NAN, 0
    families = [tested["pair"].str.partition(AT)[0], tested["first"]]
    for _, p in tested.groupby(families)["p"]:
        tested.loc[p.index, "p_holm"] = holm(p.to_numpy(float)).round(10)
        tested.loc[p.index, "family_size"] = int(p.count())
    columns = [*doubled.values(), "net_base", "p", "p_holm", "family_size", "first", "note"]
    keys = ["pair", *POOLED_CHECKPOINT]
    merged = table.merge(tested[keys + columns], on=keys, how="left")
    merged["first"] = merged["first"].astype(object).fillna(True).astype(bool)
    merged["note"], merged["family_size"] = merged["note"].fillna(""), merged["family_size"].fillna(0).astype(int)
    return merged.assign(shown=merged["p_holm"] < ALPHA)


def worst_case(rates: pd.DataFrame, contrasts: pd.DataFrame) -> pd.DataFrame:
    """Return attack success over judges, one line per checkpoint, condition and measure; empty with one judge.

    `rates` (seeds pooled) and `contrasts` are those of rows of `split_judges`. `rate` and `difference` are the
    primary judge's, `mean` is over judges, `worst` the highest rate and `most` the largest difference to the base, with
    the judge that gives it; `least` is the smallest difference. The limits of both intervals are the highest over
    judges: the upper limit keeps its coverage for whichever judge is the worst, the lower limit may not.
    `n_significant` counts the judges by which the difference is significant: Holm over the
    checkpoints at a budget, each judge by itself. NaN with a `note` if a judge's rate is withheld.
    """
    lines = []
    own = rates[rates["axis"].str.partition(AT)[0].eq("jailbreak") & rates["measure"].str.startswith("asr")]
    own = own.assign(**_by_judge(own)).rename(columns={"measure": "name", "plain": "measure"})
    changes = contrasts.assign(**_by_judge(contrasts)).rename(columns={"measure": "name", "plain": "measure"})
    changes["p_own"] = NAN
    for _, p in changes.groupby(["judge", "measure", "budget", "first"])["p"]:
        changes.loc[p.index, "p_own"] = holm(p.to_numpy(float))
    changes_by_key = dict(iter(changes.groupby([*POOLED_CHECKPOINT, "measure"])))
    for key, group in own.groupby([*POOLED_CHECKPOINT, "measure"], sort=False):
        if len(group) > 1:
            line = dict(zip([*POOLED_CHECKPOINT, "measure"], key, strict=True))
            lines.append(line | _rates_over_judges(group) | _changes_over_judges(changes_by_key.get(key), len(group)))
    return pd.DataFrame(lines, columns=WORST)


def _by_judge(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the judge of each line ("" for the primary one) and its measure without the judge."""
    judges = [str(a).partition(AT)[2] for a in table["axis"]]
    names = [str(m).replace(AT + j, "", 1) if j else str(m) for m, j in zip(table["measure"], judges, strict=True)]
    return {"judge": judges, "plain": names}


def _rates_over_judges(group: pd.DataFrame) -> dict[str, object]:
    primary = group[group["judge"] == ""].iloc[0]
    line: dict[str, object] = {"first": True, "axis": primary["axis"], "label": primary["label"], "judges": len(group)}
    line["rate"] = primary["rate"]
    if group["rate"].isna().any():
        withheld = [j or "the primary judge" for j in group.loc[group["rate"].isna(), "judge"]]
        return line | {"note": f"rate withheld: {', '.join(withheld)}"}
    worst = group.iloc[int(group["rate"].to_numpy().argmax())]
    line |= {"mean": round(float(group["rate"].mean()), 10), "worst": worst["rate"], "worst_judge": worst["judge"]}
    return line | {"worst_low": group["low"].max(), "worst_high": group["high"].max(), "note": ""}


def _changes_over_judges(group: pd.DataFrame | None, judges: int) -> dict[str, object]:
    if group is None or len(group) < judges:
        return {}
    line: dict[str, object] = {"difference": group.loc[group["judge"] == "", "difference"].iloc[0]}
    line |= {"first": bool(group["first"].iloc[0]), "n_significant": int((group["p_own"] < ALPHA).sum())}
    if group["difference"].isna().any():
        return line
    size_J = group["difference"].to_numpy()
    least, most = group.iloc[int(size_J.argmin())], group.iloc[int(size_J.argmax())]
    line |= {"least": least["difference"], "least_judge": least["judge"], "most": most["difference"]}
    return line | {"most_low": group["low"].max(), "most_high": group["high"].max(), "most_judge": most["judge"]}
