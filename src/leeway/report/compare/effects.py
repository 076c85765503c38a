"""Effects study by study, their differences paired by item, and each objective's effect over studies.

Runs of one study under other training seeds, taken together as one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from leeway.errors import LeewayError
from leeway.report.compare.check import Study, not_poolable
from leeway.report.results import Results
from leeway.stats.cluster_tests import MIN_MOVED, wild_cluster
from leeway.stats.contrasts import correct, standard_error
from leeway.stats.intervals import RESAMPLES, Floats, Ints, stratum_shares
from leeway.stats.meta import combine
from leeway.stats.metrics import BASE, VALUES, Measure, measures, observations
from leeway.stats.pairing import ITEM, KEY, PAIR, Pairs

EFFECTS = ["study", *KEY, "first", "axis", "measure", "label", "difference", "low", "high", "se", "p", "p_holm"]
EFFECTS += ["n", "n_clusters", "n_discordant", "n_unscored", "note"]
DIFFERENCES = [*KEY, "axis", "measure", "label", "study_a", "study_b", "effect_a", "effect_b", "difference", "low"]
DIFFERENCES += ["high", "se", "p", "p_holm", "family", "family_size", "n_shared", "n_clusters", "n_apart", "note"]
META = [*KEY, "axis", "measure", "label", "studies", "estimate", "low", "high", "se", "p", "p_holm", "family"]
META += ["family_size", "tau2", "i2", "q", "p_q", "predict_low", "predict_high", "estimate_dl", "tau2_dl"]
META += ["correlation", "note"]
TWO = "two studies: their spread is one difference, so that I² and τ² say little; no interval for a further study"
FEW = "fewer than five studies: I² and τ² are hardly known"
ALIKE = "the studies share prompts: their errors are correlated, and the mean knows it"


@dataclass(frozen=True)
class Deltas:
    """One effect's paired answers in one study: what each item moved by, seeds averaged."""

    table: pd.DataFrame  # ITEM, prompt, cluster, stratum, moved
    unscored: int


def effects(studies: list[Study]) -> pd.DataFrame:
    """Each study's own primary contrasts with its base, Holm inside its own families."""
    found = []
    for study in studies:
        own = study.results.contrasts()
        found.append(own[own["primary"]].assign(study=study.name))
    table = pd.concat(found, ignore_index=True)
    shared = table.groupby([*KEY, "measure"])["study"].transform("nunique") > 1
    return table.loc[shared, EFFECTS].sort_values([*KEY, "measure"], kind="stable").reset_index(drop=True)


def deltas(studies: list[Study]) -> dict[tuple[str, str, int, str, str], Deltas]:
    """The paired answers behind every effect, by study and effect: (study, objective, budget, condition, measure)."""
    found = {}
    for study in studies:
        rows = study.results.judged
        table = observations(rows, study.results.conditions)
        table["prompt"] = rows["prompt"].fillna("").to_numpy(object)
        base = table[table["objective"] == BASE][[*PAIR, *VALUES, "prompt"]]
        tuned = table[table["objective"] != BASE].drop(columns="prompt")
        paired = tuned.merge(base, on=PAIR, suffixes=("", "_base"))
        for measure in (m for m in measures(table) if m.primary):
            for key, own in measure.select(paired).groupby(KEY):
                found[study.name, *_key(key), measure.name] = _deltas(own, measure)
    return found


def _deltas(own: pd.DataFrame, measure: Measure) -> Deltas:
    moved = own["value"] - own[f"{measure.value}_base"]
    table = own.assign(moved=moved, cluster=_clusters(own))
    scored = table[table["moved"].notna()]
    means = scored.groupby([*ITEM, "prompt", "cluster", "stratum"])["moved"].mean().reset_index()
    return Deltas(means, int(moved.isna().sum()))


def _clusters(own: pd.DataFrame) -> pd.Series:
    """A cluster's name in every study: the first of its prompts."""
    return own.groupby("cluster")["prompt"].transform("min")


def differences(
    table: pd.DataFrame, moved: dict[tuple[str, str, int, str, str], Deltas], seed: int = 0
) -> pd.DataFrame:
    """Every pair of studies: effect in A − effect in B, paired by item where both asked it.

    The interval and p are the wild cluster bootstrap of the contrasts, on what each prompt moved by in A minus what it
    moved by in B. Studies without a shared item have a normal interval from both standard errors, and say so.
    """
    lines: list[dict[str, object]] = []
    for key, own in table.groupby([*KEY, "axis", "measure", "label"], sort=False):
        for (_, a), (_, b) in combinations(own.iterrows(), 2):
            line = dict(zip([*KEY, "axis", "measure", "label"], key, strict=True))
            line |= {"study_a": a["study"], "study_b": b["study"], "effect_a": a["difference"]}
            line |= {"effect_b": b["difference"], "family": f"{line['axis']} @ {line['budget']}, between studies"}
            ids = [(s["study"], line["objective"], line["budget"], line["condition"], line["measure"]) for s in (a, b)]
            lines.append(line | _difference(a, b, moved[_id(ids[0])], moved[_id(ids[1])], seed))
    return correct(pd.DataFrame(lines, columns=[c for c in DIFFERENCES if c not in ("p_holm", "family_size")]))[
        DIFFERENCES
    ]


def _difference(a: pd.Series, b: pd.Series, one: Deltas, other: Deltas, seed: int) -> dict[str, object]:
    both = one.table.merge(other.table, on=[*ITEM, "prompt"], suffixes=("", "_b"))
    apart = len(one.table) + len(other.table) - 2 * len(both)
    found: dict[str, object] = dict.fromkeys(("difference", "low", "high", "se", "p"), float("nan"))
    found |= {"n_shared": len(both), "n_clusters": 0, "n_apart": apart, "note": ""}
    if math.isnan(a["difference"]) or math.isnan(b["difference"]):
        return found | {"note": "one of the two effects could not be printed"}
    if both.empty:
        return found | _apart(a, b)
    strata, clusters = _codes(both["stratum"]), _codes(both["cluster"])
    value, base = both["moved"].to_numpy(float), both["moved_b"].to_numpy(float)
    share = stratum_shares(strata)
    pulls, weights = np.bincount(clusters, weights=share * (value - base)), np.bincount(clusters, weights=share)
    halves, weigh = (pulls[:, None] / 2).astype(np.float64), weights[:, None].astype(np.float64)
    tested = wild_cluster(halves, weigh, resamples=RESAMPLES, seed=seed)
    none = np.zeros(len(value), dtype=np.intp)
    pairs = Pairs(value, base, strata, clusters, none, np.ones(len(value), dtype=bool))
    moved, notes = int(tested.moved[0]), []
    if moved < MIN_MOVED:
        notes.append(f"only {moved} prompts differ: no test can reject, the interval is a bound")
    if apart:
        notes.append(f"{apart} answers without a partner in the other study are not used")
    numbers = {k: 2 * float(getattr(tested, k)[0]) for k in ("difference", "low", "high")}  # moves lie in [−2, 2]
    found |= numbers | {"p": float(tested.p[0]), "se": standard_error(pairs)}
    return found | {"n_clusters": len(pulls), "note": "; ".join(notes)}


def _apart(a: pd.Series, b: pd.Series) -> dict[str, object]:
    """No shared item: the errors are independent, and their squares add."""
    se = math.hypot(error(a), error(b))
    difference = float(a["difference"] - b["difference"])
    p = math.erfc(abs(difference) / se / math.sqrt(2)) if se > 0 else float("nan")
    numbers = {"difference": difference, "low": difference - 1.959964 * se, "high": difference + 1.959964 * se}
    note = "no shared item: normal interval from both standard errors; what differs between the item sets is in it"
    return {**numbers, "se": se, "p": p, "note": note}


def meta(table: pd.DataFrame, moved: dict[tuple[str, str, int, str, str], Deltas]) -> pd.DataFrame:
    """Each objective's effect over the studies (`stats.meta.combine`), studies without a number left out and named."""
    lines = []
    for key, own in table.groupby([*KEY, "axis", "measure", "label"], sort=False):
        line: dict[str, Any] = dict(zip([*KEY, "axis", "measure", "label"], key, strict=True))
        line |= {"family": f"{line['axis']} @ {line['budget']}, over studies", "studies": 0, "note": ""}
        known = own[own["difference"].notna() & own.apply(error, axis=1).gt(0)]
        lost = sorted(set(own["study"]) - set(known["study"]))
        notes = [f"without {', '.join(lost)}: no number there"] if lost else []
        if len(known) < 2:
            lines.append(line | {"studies": len(known), "note": "; ".join([*notes, "nothing to combine"])})
            continue
        of = [moved[_id((s, *(line[k] for k in KEY), line["measure"]))] for s in known["study"]]
        covariance = _covariance([error(r) for _, r in known.iterrows()], list(known["n_discordant"]), of)
        found = combine(known["difference"].to_numpy(float), covariance)
        notes += [TWO] if len(known) == 2 else [FEW] if len(known) < 5 else []
        notes += [ALIKE] if found.correlation else []
        numbers = asdict(found)
        ends = ("low", "high", "predict_low", "predict_high")
        if any(abs(numbers[k]) > 1 for k in ends):  # a t of few studies knows no end; a difference of shares has one
            numbers |= {k: float(np.clip(numbers[k], -1, 1)) for k in ends}
            notes.append("the interval ends where differences do: it says nothing")
        lines.append(line | numbers | {"note": "; ".join(notes)})
    return correct(pd.DataFrame(lines, columns=[c for c in META if c not in ("p_holm", "family_size")]))[META]


def error(effect: pd.Series) -> float:
    """The standard error that a mean over studies gives an effect: never smaller than its interval allows.

    Where too few prompts moved, the clustered error is too small, or 0; the interval is then a bound, and a quarter of
    its width stands in.
    """
    se = float(effect["se"])
    bound = (float(effect["high"]) - float(effect["low"])) / (2 * 1.959964)
    return (
        max(se, bound) if effect["n_discordant"] < MIN_MOVED and not math.isnan(se) else bound if math.isnan(se) else se
    )


def _covariance(errors: list[float], moved: list[int], of: list[Deltas]) -> Floats:
    """Squared errors, and beside them what shared prompts add: Σ_c r_ic r_jc over prompts in both studies."""
    found = np.diag(np.square(errors))
    residuals = [_residuals(d.table) for d in of]
    for i, j in combinations(range(len(of)), 2):
        if min(moved[i], moved[j]) >= MIN_MOVED:
            shared = residuals[i].index.intersection(residuals[j].index)
            together = float(residuals[i][shared].to_numpy(float) @ residuals[j][shared].to_numpy(float))
            size = math.sqrt(float((residuals[i] ** 2).sum() * (residuals[j] ** 2).sum()))
            found[i, j] = found[j, i] = together / size * errors[i] * errors[j] if size > 0 else 0.0
    return found


def _residuals(table: pd.DataFrame) -> pd.Series:
    """What each prompt adds to the effect beyond its stratum's mean."""
    share = stratum_shares(_codes(table["stratum"]))
    beyond = table["moved"] - table.groupby("stratum")["moved"].transform("mean")
    pulls = pd.Series(share * beyond.to_numpy(float), index=table["cluster"].to_numpy(object))
    return pulls.groupby(level=0).sum()


def _codes(column: pd.Series) -> Ints:
    return np.unique(column.to_numpy(dtype=object), return_inverse=True)[1].astype(np.intp)


def _key(key: Any) -> tuple[str, int, str]:
    objective, budget, condition = key
    return str(objective), int(budget), str(condition)


def _id(key: tuple[Any, ...]) -> tuple[str, str, int, str, str]:
    study, objective, budget, condition, measure = key
    return str(study), str(objective), int(budget), str(condition), str(measure)


ASKED = [
    "eval",
    "attack",
    "item_id",
    "sample",
    "prompt",
    "template_hash",
    "judge",
]  # one answer of the base, in raw rows
SAME = ["response", "outcome", "score"]
SHOWN = 4  # differences that a message names before it counts the rest
CONTRAST = "leave out --pool to contrast them study by study"


def pool(studies: list[Study]) -> Results:
    """One table of rows with every study's seeds; raises LeewayError for anything else that differs.

    The base answered the same questions in each run. Its answers are taken once, and have to be the same ones.
    """
    for a, b in combinations(studies, 2):
        _same_settings(a, b)
        _other_seeds(a, b)
        _same_base(a, b)
    first = studies[0].results
    rows = [first.rows, *(s.results.rows[s.results.rows["objective"] != BASE] for s in studies[1:])]
    ledgers = [s.results.ledger for s in studies]
    name = " + ".join(s.name for s in studies)
    return replace(
        first,
        rows=pd.concat(rows, ignore_index=True),
        ledger=pd.concat(ledgers, ignore_index=True),
        study={**first.study, "name": name},
    )


def _same_settings(a: Study, b: Study) -> None:
    found = not_poolable([a, b])
    if found:
        named = "; ".join(f"{d['what']}: {d[a.name]} and {d[b.name]}" for d in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        what = f"compare --pool: {a.name} and {b.name} differ in more than their seeds ({named}{more})"
        raise LeewayError(what, fix=CONTRAST)


def _other_seeds(a: Study, b: Study) -> None:
    both = _runs(a) & _runs(b)
    if both:
        objective, seed = min(both)
        what = f"compare --pool: {a.name} and {b.name} both hold {objective} with seed {seed}"
        raise LeewayError(f"{what}: one run would count as two", fix="pool runs of different seeds")


def _runs(study: Study) -> set[tuple[str, int]]:
    rows = study.results.rows
    tuned = rows.loc[rows["objective"] != BASE, ["objective", "seed"]].drop_duplicates()
    return {(str(o), int(s)) for o, s in tuned.itertuples(index=False, name=None)}


def _same_base(a: Study, b: Study) -> None:
    one, other = (s.results.rows[s.results.rows["objective"] == BASE] for s in (a, b))
    one, other = (t[[*ASKED, *SAME]].fillna({"attack": "", "template_hash": "", "judge": ""}) for t in (one, other))
    both = one.merge(other, on=ASKED, how="outer", suffixes=("", "_b"), indicator="found")
    apart = both["found"] != "both"
    for column in SAME:
        left, right = both[column], both[f"{column}_b"]
        apart |= (left != right) & ~(left.isna() & right.isna())
    if apart.any():
        what = (
            f"compare --pool: the base answered {int(apart.sum()):,} of {len(both):,} questions otherwise in {b.name}"
        )
        raise LeewayError(f"{what} than in {a.name}: not one base under one judge", fix=CONTRAST)
