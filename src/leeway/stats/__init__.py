"""From a table of rows to estimates: rates, paired contrasts against the base, and what dominates what.

All of it works on plain DataFrames in the layout of `rows.parquet` and knows neither a model nor a page.
"""

from leeway.stats.agreement import Confusion, confusion, judge_agreement, kappa, rogan_gladen
from leeway.stats.bounded import bounded
from leeway.stats.clustered import items_needed
from leeway.stats.contrasts import contrasts
from leeway.stats.coupling import coupling
from leeway.stats.divergence import divergence
from leeway.stats.draws import Draws, draws
from leeway.stats.equivalence import Bound, Worse, equivalence, one_sided
from leeway.stats.frontier import frontier, frontier_of
from leeway.stats.judged import judged
from leeway.stats.matched import matched
from leeway.stats.measures import StatsError
from leeway.stats.onset import onset
from leeway.stats.outcomes import outcomes
from leeway.stats.pairing import Against
from leeway.stats.persona import checks, likert, persona
from leeway.stats.rates import rates
from leeway.stats.recommend import recommend

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
