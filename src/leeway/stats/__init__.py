"""From a table of rows to estimates: rates, paired contrasts against the base, and what dominates what.

All of it works on plain DataFrames in the layout of `rows.parquet` and knows neither a model nor a page.
"""

from leeway.stats.agreement import Confusion, confusion, judge_agreement, kappa, rogan_gladen
from leeway.stats.bootstrap import Draws, draws
from leeway.stats.budget_curves import coupling, matched, onset
from leeway.stats.contrasts import contrasts, items_needed
from leeway.stats.equivalence import Bound, Worse, bounded, equivalence, one_sided
from leeway.stats.interaction import divergence
from leeway.stats.metrics import StatsError, judged
from leeway.stats.pairing import Against
from leeway.stats.pareto import frontier, frontier_of, recommend
from leeway.stats.rates import checks, likert, outcomes, persona, rates

__all__ = [
    "Against",
    "Bound",
    "Confusion",
    "Draws",
    "StatsError",
    "Worse",
    "bounded",
    "checks",
    "confusion",
    "contrasts",
    "coupling",
    "divergence",
    "draws",
    "equivalence",
    "frontier",
    "frontier_of",
    "items_needed",
    "judge_agreement",
    "judged",
    "kappa",
    "likert",
    "matched",
    "one_sided",
    "onset",
    "outcomes",
    "persona",
    "rates",
    "recommend",
    "rogan_gladen",
]
