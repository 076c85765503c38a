"""Estimate effects per study, their pairwise differences and their meta-analysis; pool runs that differ in seeds."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from leeway.errors import LeewayError
from leeway.report.compare.check import Study, not_poolable
from leeway.report.results import Results
from leeway.stats.cluster_tests import MIN_DISCORDANT, wild_cluster
from leeway.stats.contrasts import holm_by_family, standard_error
from leeway.stats.intervals import RESAMPLES, Floats, stratum_shares
from leeway.stats.meta import combine
from leeway.stats.metrics import BASE, VALUES, analysis_table, factorize, measures
from leeway.stats.metrics import POOLED_CHECKPOINT as KEY
from leeway.stats.pairing import ITEM, PAIR, Pairs

EFFECTS = ["study", *KEY, "first", "axis", "measure", "label", "difference", "low", "high", "se", "p", "p_holm"]
EFFECTS += ["n", "n_clusters", "n_discordant", "n_unscored", "note"]
DIFFERENCES = [*KEY, "axis", "measure", "label", "study_a", "study_b", "effect_a", "effect_b", "difference", "low"]
DIFFERENCES += ["high", "se", "p", "p_holm", "family", "family_size", "n_shared", "n_clusters", "n_unpaired", "note"]
META = [*KEY, "axis", "measure", "label", "studies", "estimate", "low", "high", "se", "p", "p_holm", "family"]
META += ["family_size", "tau2", "i2", "q", "p_q", "predict_low", "predict_high", "estimate_dl", "tau2_dl"]
META += ["correlation", "note"]
TWO = "two studies: I² and τ² rest on one difference; no prediction interval"
FEW = "fewer than five studies: I² and τ² are imprecise"
CORRELATED = "the studies share prompts: the mean accounts for their correlated errors"
BASE_KEYS = ["eval", "attack", "item_id", "sample", "prompt", "template_hash", "judge"]  # of one response of the base
BASE_VALUES = ["response", "outcome", "score"]
MAX_NAMED = 4  # differences named in a message
NO_POOL = "leave out --pool to compare the studies"


Deltas = pd.DataFrame  # paired differences in one study, checkpoint − base: ITEM, prompt, cluster, stratum, delta


def effects(studies: list[Study]) -> pd.DataFrame:
    """Return each study's primary contrasts with its base, with Holm within its own families."""
    found = []
    for study in studies:
        own = study.results.contrasts()
        found.append(own[own["primary"]].assign(study=study.name))
    table = pd.concat(found, ignore_index=True)
    shared = table.groupby([*KEY, "measure"])["study"].transform("nunique") > 1
    return table.loc[shared, EFFECTS].sort_values([*KEY, "measure"], kind="stable").reset_index(drop=True)


def deltas(studies: list[Study]) -> dict[tuple[Any, ...], Deltas]:
    """Return each effect's paired differences, averaged over seeds, by (study, objective, budget, condition, measure).

    A cluster is named by the first of its prompts, which is the same in every study.
    """
    found = {}
    for study in studies:
        rows = study.results.judged
        table = analysis_table(rows, study.results.conditions)
        table["prompt"] = rows["prompt"].fillna("").to_numpy(object)
        base = table[table["objective"] == BASE][[*PAIR, *VALUES, "prompt"]]
        tuned = table[table["objective"] != BASE].drop(columns="prompt")
        paired = tuned.merge(base, on=PAIR, suffixes=("", "_base"))
        for measure in (m for m in measures(table) if m.primary):
            for key, own in measure.select(paired).groupby(KEY):
                delta = own["value"] - own[f"{measure.value}_base"]
                named = own.assign(delta=delta, cluster=own.groupby("cluster")["prompt"].transform("min"))
                scored = named[delta.notna()].groupby([*ITEM, "prompt", "cluster", "stratum"])
                found[study.name, *key, measure.name] = scored["delta"].mean().reset_index()
    return found


def differences(table: pd.DataFrame, paired: dict[tuple[Any, ...], Deltas]) -> pd.DataFrame:
    """Return effect in A − effect in B for each pair of studies, paired by shared items.

    Interval and p come from the wild cluster bootstrap on each prompt's difference of differences. Studies without a
    shared item get a normal interval from both standard errors, with a note.
    """
    lines: list[dict[str, Any]] = []
    for key, own in table.groupby([*KEY, "axis", "measure", "label"], sort=False):
        for (_, a), (_, b) in combinations(own.iterrows(), 2):
            line: dict[str, Any] = dict(zip([*KEY, "axis", "measure", "label"], key, strict=True))
            line |= {"study_a": a["study"], "study_b": b["study"], "effect_a": a["difference"]}
            line |= {"effect_b": b["difference"], "family": f"{line['axis']} @ {line['budget']}, between studies"}
            effect = [line[k] for k in (*KEY, "measure")]
            lines.append(line | _difference(a, b, paired[a["study"], *effect], paired[b["study"], *effect]))
    return _corrected(lines, DIFFERENCES)


def _corrected(lines: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    table = pd.DataFrame(lines, columns=[c for c in columns if c not in ("p_holm", "family_size")])
    return holm_by_family(table)[columns]


def _difference(a: pd.Series, b: pd.Series, one: Deltas, other: Deltas) -> dict[str, object]:
    both = one.merge(other, on=[*ITEM, "prompt"], suffixes=("", "_b"))
    unpaired = len(one) + len(other) - 2 * len(both)
    found: dict[str, object] = dict.fromkeys(("difference", "low", "high", "se", "p"), float("nan"))
    found |= {"n_shared": len(both), "n_clusters": 0, "n_unpaired": unpaired, "note": ""}
    if math.isnan(a["difference"]) or math.isnan(b["difference"]):
        return found | {"note": "one of the two effects is not available"}
    if both.empty:
        return found | _independent(a, b)
    strata, clusters = factorize(both["stratum"])[1], factorize(both["cluster"])[1]
    value, base = both["delta"].to_numpy(float), both["delta_b"].to_numpy(float)
    share = stratum_shares(strata)
    pulls, weights = np.bincount(clusters, weights=share * (value - base)), np.bincount(clusters, weights=share)
    halves, weigh = (pulls[:, None] / 2).astype(np.float64), weights[:, None].astype(np.float64)
    tested = wild_cluster(halves, weigh, resamples=RESAMPLES, seed=0)
    none = np.zeros(len(value), dtype=np.intp)
    pairs = Pairs(value, base, strata, clusters, none, np.ones(len(value), dtype=bool))
    discordant, notes = int(tested.n_discordant[0]), []
    if discordant < MIN_DISCORDANT:
        notes.append(f"only {discordant} prompts differ: no test can reject, the interval is a bound")
    if unpaired:
        notes.append(f"{unpaired} responses without a pair in the other study are not used")
    numbers = {k: 2 * float(getattr(tested, k)[0]) for k in ("difference", "low", "high")}  # values lie in [−2, 2]
    found |= numbers | {"p": float(tested.p[0]), "se": standard_error(pairs)}
    return found | {"n_clusters": len(pulls), "note": "; ".join(notes)}


def _independent(a: pd.Series, b: pd.Series) -> dict[str, object]:
    """Return the difference of two effects without shared items, whose errors are independent."""
    se = math.hypot(error(a), error(b))
    difference = float(a["difference"] - b["difference"])
    p = math.erfc(abs(difference) / se / math.sqrt(2)) if se > 0 else float("nan")
    numbers = {"difference": difference, "low": difference - 1.959964 * se, "high": difference + 1.959964 * se}
    note = "no shared item: normal interval from both standard errors; includes differences between the item sets"
    return {**numbers, "se": se, "p": p, "note": note}


def meta(table: pd.DataFrame, paired: dict[tuple[Any, ...], Deltas]) -> pd.DataFrame:
    """Combine each effect over studies (`stats.meta.combine`); `note` names studies without an estimate."""
    lines = []
    for key, own in table.groupby([*KEY, "axis", "measure", "label"], sort=False):
        line: dict[str, Any] = dict(zip([*KEY, "axis", "measure", "label"], key, strict=True))
        line |= {"family": f"{line['axis']} @ {line['budget']}, over studies", "studies": 0, "note": ""}
        known = own[own["difference"].notna() & own.apply(error, axis=1).gt(0)]
        missing = sorted(set(own["study"]) - set(known["study"]))
        notes = [f"without {', '.join(missing)}: no estimate"] if missing else []
        if len(known) < 2:
            lines.append(line | {"studies": len(known), "note": "; ".join([*notes, "fewer than two estimates"])})
            continue
        of = [paired[s, *(line[k] for k in (*KEY, "measure"))] for s in known["study"]]
        covariance = _covariance([error(r) for _, r in known.iterrows()], list(known["n_discordant"]), of)
        found = combine(known["difference"].to_numpy(float), covariance)
        notes += [TWO] if len(known) == 2 else [FEW] if len(known) < 5 else []
        notes += [CORRELATED] if found.correlation else []
        numbers = asdict(found)
        ends = ("low", "high", "predict_low", "predict_high")
        if any(abs(numbers[k]) > 1 for k in ends):  # t intervals of few studies exceed the range of a difference
            numbers |= {k: float(np.clip(numbers[k], -1, 1)) for k in ends}
            notes.append("interval clipped to [−1, 1]: uninformative")
        lines.append(line | numbers | {"note": "; ".join(notes)})
    return _corrected(lines, META)


def error(effect: pd.Series) -> float:
    """Return the standard error of an effect for the meta-analysis.

    If too few prompts differ, the clustered standard error is too small or 0. Then the interval is a bound, and its
    width / (2 · 1.96) is used if larger.
    """
    se = float(effect["se"])
    bound = (float(effect["high"]) - float(effect["low"])) / (2 * 1.959964)
    if math.isnan(se):
        return bound
    return max(se, bound) if effect["n_discordant"] < MIN_DISCORDANT else se


def _covariance(errors: list[float], discordant: list[int], of: list[Deltas]) -> Floats:
    """Return the covariance of the effects; off-diagonal terms are Σ_c r_ic r_jc over prompts c in both studies."""
    found = np.diag(np.square(errors))
    residuals = [_residuals(table) for table in of]
    for i, j in combinations(range(len(of)), 2):
        if min(discordant[i], discordant[j]) >= MIN_DISCORDANT:
            shared = residuals[i].index.intersection(residuals[j].index)
            together = float(residuals[i][shared].to_numpy(float) @ residuals[j][shared].to_numpy(float))
            size = math.sqrt(float((residuals[i] ** 2).sum() * (residuals[j] ** 2).sum()))
            found[i, j] = found[j, i] = together / size * errors[i] * errors[j] if size > 0 else 0.0
    return found


def _residuals(table: pd.DataFrame) -> pd.Series:
    """Return each prompt's contribution to the effect relative to its stratum's mean."""
    share = stratum_shares(factorize(table["stratum"])[1])
    residual = table["delta"] - table.groupby("stratum")["delta"].transform("mean")
    pulls = pd.Series(share * residual.to_numpy(float), index=table["cluster"].to_numpy(object))
    return pulls.groupby(level=0).sum()


def pool(studies: list[Study]) -> Results:
    """Pool the rows of runs that differ in training seeds only; raises LeewayError for any other difference.

    The base's responses must be the same in each run, and are taken once.
    """
    for a, b in combinations(studies, 2):
        if found := not_poolable([a, b]):
            named = "; ".join(f"{d['what']}: {d[a.name]} and {d[b.name]}" for d in found[:MAX_NAMED])
            named += f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            what = f"compare --pool: {a.name} and {b.name} differ in more than their seeds ({named})"
            raise LeewayError(what, fix=NO_POOL)
        if both := _runs(a) & _runs(b):
            objective, seed = min(both)
            what = f"compare --pool: {a.name} and {b.name} both hold {objective} with seed {seed}"
            raise LeewayError(f"{what}: it would count twice", fix="pool runs of different seeds")
        _check_base(a, b)
    first = studies[0].results
    rows = [first.rows, *(s.results.rows[s.results.rows["objective"] != BASE] for s in studies[1:])]
    ledgers = [s.results.ledger for s in studies]
    name = " + ".join(s.name for s in studies)
    table, ledger = pd.concat(rows, ignore_index=True), pd.concat(ledgers, ignore_index=True)
    return replace(first, rows=table, ledger=ledger, study={**first.study, "name": name})


def _runs(study: Study) -> set[tuple[str, int]]:
    rows = study.results.rows
    tuned = rows.loc[rows["objective"] != BASE, ["objective", "seed"]].drop_duplicates()
    return {(str(o), int(s)) for o, s in tuned.itertuples(index=False, name=None)}


def _check_base(a: Study, b: Study) -> None:
    rows = (s.results.rows for s in (a, b))
    bases = (r.loc[r["objective"] == BASE, [*BASE_KEYS, *BASE_VALUES]] for r in rows)
    one, other = (base.fillna({"attack": "", "template_hash": "", "judge": ""}) for base in bases)
    both = one.merge(other, on=BASE_KEYS, how="outer", suffixes=("", "_b"), indicator="found")
    differ = both["found"] != "both"
    for column in BASE_VALUES:
        left, right = both[column], both[f"{column}_b"]
        differ |= (left != right) & ~(left.isna() & right.isna())
    if differ.any():
        what = f"compare --pool: {int(differ.sum()):,} of {len(both):,} responses of the base differ between {a.name}"
        raise LeewayError(f"{what} and {b.name}: not the same base or judge", fix=NO_POOL)
