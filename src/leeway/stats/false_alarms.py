"""How often a study's tests report drift where there is none, by re-drawing prompts within the base.

A re-drawn study has no drift by construction: for every prompt the base's score and each checkpoint's are two
independent draws of a prompt's mean score *from the base's own rows*. The verdict's tests (`contrasts`: wild cluster
bootstrap, Holm inside each family) are then recomputed, and a study with a significant difference is a false alarm.
Items, judge, attacks, number of prompts and size of the families are the study's own. Two prompts differ more than two
answers to one prompt, so the noise is an upper bound of what sampling the answers again would give. Where the verdict
tests the persona trait in log-odds, statements are re-drawn within each keyed half and tested by Welch's t, as there.

Shapes: C clusters, M contrasts of a family, R re-drawn studies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leeway.stats.cluster_tests import wild_cluster_p
from leeway.stats.contrasts import ContrastMatrix, Shift, holm
from leeway.stats.intervals import TIE, Floats, Ints, stratum_shares, wilson
from leeway.stats.pairing import Contrast, Pairs, paired_contrasts

LEVEL = 0.05
REDRAWS = 400
RESAMPLES = 999
BLOCK = 40  # re-drawn studies that share their sign flips
COLUMNS = ["axis", "tests", "redraws", "alarms", "rate", "low", "high", "nominal", "discordant", "n_clusters", "note"]
ALL, TRAIT = "all", "trait"


def false_alarms(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    *,
    first: Mapping[str, str] | None = None,
    redraws: int = REDRAWS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the share of re-drawn studies with a significant contrast of the verdict at the largest budget, by axis.

    The last line, `all`, counts studies with one on any axis. `nominal` is 5% per family of tests; `low` to `high` is
    the Wilson interval of `rate`, the Monte Carlo error alone. `discordant`: mean share of prompts that differ. Axes of
    a sequential design are left out. Raises StatsError as `contrasts` does.
    """
    found, table = paired_contrasts(rows, conditions, first=first)
    largest = max((int(str(c.line["budget"])) for c in found), default=0)
    last = [c for c in found if c.line["budget"] == largest and c.scored is not None and not c.sequential]
    keyed = {c.measure.axis for c in last if c.measure.name == TRAIT}  # there the trait is tested, not endorsement
    tested = [c for c in last if c.measure.name == TRAIT or (c.measure.primary and c.measure.axis not in keyed)]
    anywhere, families, lines = np.zeros(redraws, dtype=bool), 0, list[dict[str, object]]()
    rng = np.random.default_rng(seed)
    for axis in dict.fromkeys(c.measure.axis for c in tested):
        own = [c for c in tested if c.measure.axis == axis]
        clusters = np.unique(table.loc[table["eval"] == axis, "cluster"].to_numpy(np.intp))
        by_family: dict[str, list[Contrast]] = {}
        for contrast in own:
            by_family.setdefault(str(contrast.line["family"]), []).append(contrast)
        other_RC = rng.random((redraws, len(clusters)))  # the base's draws, shared by all families
        alarm_R, shares = np.zeros(redraws, dtype=bool), list[float]()
        for family in by_family.values():
            if axis in keyed:
                p_RM, discordant = _shift_p(family, clusters, other_RC, rng)
                alarm_R |= np.array([(holm(p_M) < LEVEL).any() for p_M in p_RM])
                shares.append(discordant)
            else:
                sums_CRM = _redrawn(family, clusters, other_RC, rng)
                shares.append(float((np.abs(sums_CRM) > TIE).mean()))
                alarm_R |= _alarms(sums_CRM, resamples, seed)
        anywhere |= alarm_R
        families += len(by_family)
        line: dict[str, object] = {"axis": axis, "tests": len(own)}
        lines.append(line | _rate(alarm_R, len(by_family)) | {"discordant": round(float(np.mean(shares)), 4)})
        lines[-1]["n_clusters"] = len(clusters)
    if lines:
        tests = sum(int(str(line["tests"])) for line in lines)
        lines.append({"axis": ALL, "tests": tests} | _rate(anywhere, families))
    for line in lines:
        line["note"] = "all prompts of the base have one score: no alarm is possible" * (line.get("discordant") == 0)
    return pd.DataFrame(lines, columns=COLUMNS)


def _shift_p(
    contrasts: list[Contrast], clusters: Ints, other_RC: Floats, rng: np.random.Generator
) -> tuple[Floats, float]:
    """Return the p-values of two draws of statements from each keyed half of the base, (R, M), and the share moved."""
    p_RM, moved = np.empty((len(other_RC), len(contrasts))), list[float]()
    for m, contrast in enumerate(contrasts):
        scored = contrast.scored
        assert scored is not None
        present, first, count = np.unique(scored.clusters, return_index=True, return_counts=True)
        half_P = scored.strata[first]
        mean_P = np.bincount(np.searchsorted(present, scored.clusters), scored.base) / count
        value_RP, base_RP = np.empty((2, len(other_RC), len(present)))
        for half in np.unique(half_P):
            at = np.flatnonzero(half_P == half)
            share_RP = other_RC[:, np.searchsorted(clusters, present[at])]
            value_RP[:, at] = mean_P[at[rng.integers(0, len(at), share_RP.shape)]]
            base_RP[:, at] = mean_P[at[(share_RP * len(at)).astype(np.intp)]]
        codes, no = np.arange(len(present)), np.zeros(len(present), dtype=np.intp)
        for r in range(len(other_RC)):
            shift = Shift.of(Pairs(value_RP[r], base_RP[r], half_P, codes, no, no == 0))
            p_RM[r, m] = min(1.0, 2 * min(shift.p_below(0.0), shift.p_above(0.0)))
        moved.append(float((np.abs(value_RP - base_RP) > TIE).mean()))
    return p_RM, float(np.mean(moved))


def _redrawn(contrasts: list[Contrast], clusters: Ints, other_RC: Floats, rng: np.random.Generator) -> Floats:
    """Return weighted differences of two draws of prompts from the base, (C, R, M)."""
    weights_CM = ContrastMatrix(clusters, contrasts).weights_CM
    sums_CRM = np.empty((len(clusters), len(other_RC), len(contrasts)))
    for m, contrast in enumerate(contrasts):
        scored = contrast.scored
        assert scored is not None
        where = np.searchsorted(clusters, scored.clusters)
        base_C = np.bincount(where, stratum_shares(scored.strata) * scored.base, len(clusters))
        present = np.flatnonzero(weights_CM[:, m] > 0)
        mean_P = base_C[present] / weights_CM[present, m]
        own_RC, n = rng.integers(0, len(present), other_RC.shape), len(present)
        difference_RC = mean_P[own_RC] - mean_P[(other_RC * n).astype(np.intp)]
        sums_CRM[:, :, m] = (difference_RC * weights_CM[:, m]).T
    return sums_CRM


def _alarms(sums_CRM: Floats, resamples: int, seed: int) -> NDArray[np.bool_]:
    """Return whether a family of each re-drawn study has a significant test after Holm, (R,)."""
    clusters, redraws, tests = sums_CRM.shape
    found = np.zeros(redraws, dtype=bool)
    for start in range(0, redraws, BLOCK):
        block = sums_CRM[:, start : start + BLOCK]
        p = wild_cluster_p(block.reshape(clusters, -1), resamples=resamples, seed=seed + start)
        adjusted = np.array([holm(own) for own in p.reshape(-1, tests)])
        found[start : start + BLOCK] = (adjusted < LEVEL).any(axis=1)
    return found


def _rate(alarm_R: NDArray[np.bool_], families: int) -> dict[str, object]:
    count, redraws = int(alarm_R.sum()), len(alarm_R)
    low, high = wilson(count, redraws)
    nominal = round(min(1.0, LEVEL * families), 10)
    return {"redraws": redraws, "alarms": count, "rate": count / redraws, "low": low, "high": high, "nominal": nominal}
