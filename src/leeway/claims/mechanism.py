"""Claims about a probe's causal measures: shares of a change that an intervention undoes, or carries."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import pandas as pd
import scipy

from leeway.claims.comparison import Comparison
from leeway.claims.schema import Mechanism

SHARE = "share of the change"
DETAIL = {"patching": "base to checkpoint", "mediation": "none"}


def comparisons(
    claim: Mechanism, table: pd.DataFrame, budgets: Seq[int], name: str, objective: str
) -> Iterator[Comparison]:
    """Yield one comparison per seed and budget: the largest share among the claimed layers, against margin and control.

    The p-value is normal, with the standard error of the share's interval, and corrected for the number of layers that
    the claim leaves open (Bonferroni). A share without an interval gives no p, and its reason.
    """
    detail = claim.detail or DETAIL.get(claim.measure, "")
    own = table[(table["objective"] == objective) & (table["measure"] == claim.measure) & (table["detail"] == detail)]
    own = own[~own["site"].str.startswith("layers")]
    if claim.site:
        own = own[own["site"] == claim.site]
    if claim.layers:
        own = own[own["layer"].isin([k - 1 for k in claim.layers])]
    for budget in budgets:
        at = own[own["budget"] == budget]
        if at.empty:
            yield Comparison(f"{name} at {budget:,}", unit=SHARE, note=f"{claim.measure} was not probed there")
        for _, seed in at.groupby("seed"):
            yield _strongest(claim, seed, f"{claim.measure} of {name} at {budget:,}")


def _strongest(claim: Mechanism, at: pd.DataFrame, name: str) -> Comparison:
    known = at[at["value"].notna() & at["low"].notna()]
    if known.empty:
        return Comparison(name, unit=SHARE, note=str(at["reason"].iloc[0]))
    line = known.iloc[int(known["value"].to_numpy().argmax())]
    control = float(line["control_high"]) if line["control_high"] == line["control_high"] else 0.0
    limit = max(claim.margin, control)
    error = (float(line["high"]) - float(line["low"])) / (2 * scipy.stats.norm.ppf(0.975))
    distance = float(line["value"]) - limit
    p = float(scipy.stats.norm.sf(distance / error))
    note = f"the control reaches {control:.2f}" if control > claim.margin else ""
    where = name if line["layer"] < 0 else f"{name}, layer {line['layer'] + 1} {line['site']}"
    return Comparison(
        where,
        float(line["value"]),
        float(line["low"]),
        float(line["high"]),
        0.95,
        SHARE,
        min(1.0, p * len(at)),
        1 - p,
        n_clusters=int(line["n"]),
        note=note,
        slack=distance,
    )
