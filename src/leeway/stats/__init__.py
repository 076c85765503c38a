"""From a table of rows to estimates: rates, paired contrasts against the base, and what dominates what.

All of it works on plain DataFrames in the layout of `rows.parquet` and knows neither a model nor a page.
"""

from leeway.stats.agreement import Confusion, confusion, judge_agreement, kappa, rogan_gladen
from leeway.stats.contrasts import contrasts
from leeway.stats.frontier import frontier, frontier_of
from leeway.stats.judged import judged
from leeway.stats.measures import StatsError
from leeway.stats.outcomes import outcomes
from leeway.stats.persona import checks, likert, persona
from leeway.stats.rates import rates

__all__ = [
    "Confusion",
    "StatsError",
    "checks",
    "confusion",
    "contrasts",
    "frontier",
    "frontier_of",
    "judge_agreement",
    "judged",
    "kappa",
    "likert",
    "outcomes",
    "persona",
    "rates",
    "rogan_gladen",
]
