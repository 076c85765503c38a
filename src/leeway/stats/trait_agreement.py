"""Agreement of a questionnaire with behaviour: do checkpoints whose trait shifted more also behave worse?

    r = (S_xy − E_xy) / √((S_xx − E_xx) (S_yy − E_yy))

over checkpoints, with x the shift of a persona trait from the base (log-odds), y that of a behaviour towards the worse,
S sums of products of deviations from their means, and E the expected part of S that is error of measurement (Spearman
1904, Am. J. Psychol. 15:72). Questionnaire and behaviour have different items, so with one training seed their errors
are independent and E_xy is 0. Several seeds are drawn for both together: a run that moved both is an error of both.

`low` to `high` covers other prompts, for these checkpoints. `objective_ci_low` to `objective_ci_high` covers other
objectives too: the checkpoints of an objective are left out together, and

    tanh(z ± t_{0.975, J−1} √((J − 1)/J · Σ_j (z_(j) − z̄)²)),   z = artanh r, z_(j) without objective j of J

(the delete-one-group jackknife on Fisher's scale; Efron & Stein 1981, Ann. Stat. 9:586).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from leeway.stats import metrics
from leeway.stats.bootstrap import Draws, ObjectiveChoice, Trajectory, draws, interval, join_notes
from leeway.stats.budget_curves import MIN_RELIABILITY, error_products, paired_trajectories, products
from leeway.stats.intervals import LEVEL, NAN, RESAMPLES, Floats, Ints
from leeway.stats.metrics import BASE, POOLED_CHECKPOINT, Measure
from leeway.stats.rates import ALL_TRAITS

BEHAVIOURS = ("alignment", "misaligned", "sycophancy", "asr", "self-description")
BY_TRAIT = "self-description"  # rated for each trait: compared with that trait
MIN_CHECKPOINTS = 4  # three points lie near a line too often
COLUMNS = ["trait", "behaviour", "label", "correlation", "low", "high", "uncorrected", "reliability_trait"]
COLUMNS += ["reliability_behaviour", "objective_ci_low", "objective_ci_high", "n_points", "n_objectives"]
COLUMNS += ["n_clusters", "note"]
MIN_OBJECTIVES = 4  # with three, the interval is almost all of [-1, 1]
MAX_R = 0.999  # larger ones count as this on Fisher's scale


def trait_agreement(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    objectives: ObjectiveChoice | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one line per trait (and over all of them) and behaviour, with 95% intervals over prompts and objectives.

    `low` to `high` covers prompts only, `objective_ci_low` to `objective_ci_high` objectives too (NaN with fewer than
    four). A behaviour for which higher is better counts downwards, so 1 is full agreement. `uncorrected` is Pearson's
    correlation, `reliability_*` the share of each S that is not error; below 0.7 the correlation is withheld with a
    `note`. Empty with fewer than four checkpoints, without both keyed halves of a trait, or without a behaviour. Raises
    StatsError for a sequential design.
    """
    table = metrics.analysis_table(rows, conditions)
    by_name = {m.name: m for m in metrics.measures(table)}
    checkpoints = table.loc[table["objective"] != BASE, POOLED_CHECKPOINT].drop_duplicates()
    traits, behaviours = _traits(table) if "trait" in by_name else [], [b for b in BEHAVIOURS if b in by_name]
    if len(checkpoints) < MIN_CHECKPOINTS or not traits or not behaviours:
        return pd.DataFrame(columns=COLUMNS)
    wanted: list[str | Measure] = [*traits, *behaviours, *(b for b in by_name if b.startswith(f"{BY_TRAIT}:"))]
    drawn = draws(rows, conditions, wanted, resamples=resamples, seed=seed)
    lines = []
    for trait in traits:
        for behaviour in behaviours:
            name = f"{behaviour}:{trait.part}" if trait.part and behaviour == BY_TRAIT else behaviour
            if name in drawn.measures:
                key = {"trait": trait.part or ALL_TRAITS, "behaviour": name, "label": by_name[name].label}
                lines.append(key | _line(drawn, trait.name, by_name[name], objectives))
    return pd.DataFrame(lines, columns=COLUMNS)


def _traits(table: pd.DataFrame) -> list[Measure]:
    """Return the trait over all statements, and each trait if there are several."""
    whole = Measure("trait", "persona", "", "match_odds", False, ("Yes", "No"))
    parts = sorted(table.loc[table["endorses"] != "", "part"].unique())
    own = [Measure(f"trait:{p}", "persona", "", "match_odds", False, ("Yes", "No"), part=p) for p in parts]
    return [whole, *own] if len(own) > 1 else own


def _line(drawn: Draws, trait: str, behaviour: Measure, objectives: ObjectiveChoice | None) -> dict[str, object]:
    pairs = paired_trajectories(drawn, behaviour.name, trait, objectives)
    used = [(y, x) for y, x in pairs if not (y.missing_base or x.missing_base or y.withheld or x.withheld)]
    kept = [y.label for y, _ in used]
    left_out = ", ".join(y.label for y, _ in pairs if y.label not in kept)
    reason = f"without {left_out}: a rate or the base under their prompt is missing" if left_out else ""
    points = sum(len(y.columns_B) for y, _ in used)
    clusters = min((min(y.n_clusters, x.n_clusters) for y, x in used), default=0)
    line: dict[str, object] = {"n_points": points, "n_objectives": len(used), "n_clusters": clusters}
    if points < MIN_CHECKPOINTS:
        return line | {"note": join_notes(f"{points} checkpoints: too few", reason)}
    x_K, x_RK = _shifts(drawn, [x for _, x in used])
    y_K, y_RK = _shifts(drawn, [y for y, _ in used])
    sign = -1 if behaviour.better == "higher" else 1
    columns = [int(k) for pair in used for t in pair for k in t.columns_B]
    several = bool((drawn.cells["seeds"].iloc[columns] > 1).any())
    owner_K = np.repeat(np.arange(len(used)), [len(y.columns_B) for y, _ in used])
    found = correlate(x_K, sign * y_K, x_RK, sign * y_RK, clusters, owner_K, shared_error=several)
    return line | vars(found) | {"note": join_notes(found.note, reason, *(y.note for y, _ in used))}


def _shifts(drawn: Draws, trajectories: Seq[Trajectory]) -> tuple[Floats, Floats]:
    """Return the differences from the base, (K,), and their draws, (R, K)."""
    columns = [int(k) for t in trajectories for k in t.columns_B]
    bases = [t.base for t in trajectories for _ in t.columns_B]
    return drawn.point_K[columns] - drawn.point_K[bases], drawn.drawn_RK[:, columns] - drawn.drawn_RK[:, bases]


@dataclass(frozen=True)
class Correlation:
    """A correlation corrected for error of measurement; NaN with a `note` if withheld."""

    correlation: float
    low: float
    high: float
    uncorrected: float
    reliability_trait: float
    reliability_behaviour: float
    objective_ci_low: float = NAN
    objective_ci_high: float = NAN
    note: str = ""


def correlate(
    x_K: Floats, y_K: Floats, x_RK: Floats, y_RK: Floats, clusters: int, owner_K: Ints, *, shared_error: bool = False
) -> Correlation:
    """Correlate K estimates with the errors that their R draws show; `clusters` is the smaller number of prompts.

    `owner_K` numbers each estimate's objective. `shared_error`: the errors of x and y are drawn together and may
    correlate, so E_xy is not 0.

    A draw has the error twice, its own and the estimate's, so E is subtracted twice from its sums.
    """
    s_xx, s_yy, s_xy = (float(products(a, b)) for a, b in ((x_K, x_K), (y_K, y_K), (x_K, y_K)))
    if min(s_xx, s_yy) <= 1e-12:
        what = "the trait" if s_xx <= 1e-12 else "the behaviour"
        return Correlation(NAN, NAN, NAN, NAN, NAN, NAN, note=f"{what} shifted equally at every checkpoint")
    e_xx, e_yy = error_products(x_RK, x_RK), error_products(y_RK, y_RK)
    e_xy = error_products(x_RK, y_RK) if shared_error else 0.0
    of_x, of_y = (round(1 - e / s, 10) for e, s in ((e_xx, s_xx), (e_yy, s_yy)))
    plain = round(s_xy / np.sqrt(s_xx * s_yy), 10)
    low = [
        f"{name} within its noise (reliability {of:.2f} < {MIN_RELIABILITY})"
        for name, of in (("shifts of the trait", of_x), ("shifts of the behaviour", of_y))
        if not of >= MIN_RELIABILITY
    ]
    if low:
        return Correlation(NAN, NAN, NAN, plain, of_x, of_y, note="; ".join(low))
    value = (s_xy - e_xy) / np.sqrt((s_xx - e_xx) * (s_yy - e_yy))
    xx_R, yy_R = products(x_RK, x_RK) - 2 * e_xx, products(y_RK, y_RK) - 2 * e_yy
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn_R = np.where((xx_R > 0) & (yy_R > 0), (products(x_RK, y_RK) - 2 * e_xy) / np.sqrt(xx_R * yy_R), np.nan)
    found = interval(np.clip(drawn_R, -1, 1), clusters)
    r = round(float(np.clip(value, -1, 1)), 10)
    low_objectives, high_objectives = over_objectives(x_K, y_K, (e_xx, e_yy, e_xy), owner_K)
    ends = min(low_objectives, r), max(high_objectives, r)  # r may be above MAX_R; NaN stays
    return Correlation(r, found.low, found.high, plain, of_x, of_y, *ends, found.note)


def over_objectives(x_K: Floats, y_K: Floats, errors: tuple[float, float, float], owner_K: Ints) -> tuple[float, float]:
    """Return the jackknife interval of r over objectives; NaN with fewer than MIN_OBJECTIVES.

    `errors` are E_xx, E_yy and E_xy over all K estimates; those of a part are its share of K.
    """
    objectives = np.unique(owner_K)
    if len(objectives) < MIN_OBJECTIVES:
        return NAN, NAN

    def z(kept_K: NDArray[np.bool_]) -> float:
        e_xx, e_yy, e_xy = (e * kept_K.mean() for e in errors)
        s_xx, s_yy, s_xy = (float(products(a[kept_K], b[kept_K])) for a, b in ((x_K, x_K), (y_K, y_K), (x_K, y_K)))
        if s_xx <= e_xx or s_yy <= e_yy:
            return NAN
        return float(np.arctanh(np.clip((s_xy - e_xy) / np.sqrt((s_xx - e_xx) * (s_yy - e_yy)), -MAX_R, MAX_R)))

    z_J, J = np.array([z(owner_K != j) for j in objectives]), len(objectives)
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, J - 1) * np.sqrt((J - 1) / J * ((z_J - z_J.mean()) ** 2).sum()))
    whole = z(np.ones(len(x_K), dtype=bool))
    return round(float(np.tanh(whole - half)), 10), round(float(np.tanh(whole + half)), 10)
