"""The report's interactive charts, as Vega-Lite specifications."""

from leeway.report.charts.comparison import attacks, forest, outcomes, tradeoff
from leeway.report.charts.curves import by_budget, dose, learning, training, traits, tries
from leeway.report.charts.mechanism import mechanism
from leeway.report.charts.spec import Chart

__all__ = ["Chart", "attacks", "by_budget", "dose", "forest", "learning", "mechanism", "outcomes", "tradeoff"]
__all__ += ["training", "traits", "tries"]
