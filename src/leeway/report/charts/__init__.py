"""The report's interactive charts, as Vega-Lite specifications."""

from leeway.report.charts.comparison import attacks, forest, outcomes, tradeoff
from leeway.report.charts.curves import by_budget, learning, training, traits, tries
from leeway.report.charts.spec import Chart

__all__ = ["Chart", "attacks", "by_budget", "forest", "learning", "outcomes", "tradeoff", "training", "traits", "tries"]
