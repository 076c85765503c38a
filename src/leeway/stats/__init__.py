"""From a table of rows to estimates: rates, paired contrasts against the base, and what dominates what.

All of it works on plain DataFrames in the layout of `rows.parquet` and knows neither a model nor a page.
"""

from leeway.stats.contrasts import contrasts
from leeway.stats.frontier import frontier, frontier_of
from leeway.stats.measures import StatsError
from leeway.stats.outcomes import outcomes
from leeway.stats.persona import persona
from leeway.stats.rates import rates

__all__ = ["StatsError", "contrasts", "frontier", "frontier_of", "outcomes", "persona", "rates"]
