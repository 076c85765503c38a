"""Estimates from a table of rows: rates, paired contrasts with the base, tests at margins, and trajectories.

Everything works on plain DataFrames in the layout of `rows.parquet`, without models or reports.
"""

from leeway.stats.agreement import Confusion, confusion, judge_agreement, kappa, rogan_gladen
from leeway.stats.asr_at_k import asr_at_k, max_draws, named_tries, success_at_k, with_tries
from leeway.stats.behaviour import alignment, sycophancy
from leeway.stats.bootstrap import Draws, draws
from leeway.stats.budget_curves import coupling, matched, onset
from leeway.stats.contrasts import contrasts, items_needed
from leeway.stats.detection import dose_response
from leeway.stats.distance import equal_distance
from leeway.stats.equivalence import DifferenceBound, WorseDirection, equivalence, one_sided, rate_bounds
from leeway.stats.false_alarms import false_alarms
from leeway.stats.identity import identity
from leeway.stats.interaction import divergence
from leeway.stats.judge_pairs import judge_pairs, worst_case
from leeway.stats.learning import learned, learning
from leeway.stats.metrics import StatsError, split_judges
from leeway.stats.pairing import ContrastReference
from leeway.stats.pareto import frontier, frontier_of, recommend
from leeway.stats.rates import checks, likert, outcomes, persona, rates
from leeway.stats.thinking import thinking
from leeway.stats.trait_agreement import trait_agreement
from leeway.stats.triggers import trigger_verdicts, triggers

__all__ = ["Confusion", "ContrastReference", "DifferenceBound", "Draws", "StatsError", "WorseDirection"]
__all__ += ["alignment", "asr_at_k"]
__all__ += ["checks", "confusion", "contrasts", "coupling", "divergence", "dose_response", "draws"]
__all__ += ["equal_distance", "equivalence"]
__all__ += ["false_alarms", "frontier", "frontier_of", "identity", "items_needed", "judge_agreement", "judge_pairs"]
__all__ += ["kappa", "learned", "learning"]
__all__ += ["likert", "matched", "max_draws", "named_tries", "one_sided", "onset"]
__all__ += ["outcomes", "persona", "rate_bounds", "rates", "recommend", "rogan_gladen", "split_judges"]
__all__ += ["success_at_k", "sycophancy", "thinking"]
__all__ += ["trait_agreement", "trigger_verdicts", "triggers", "with_tries", "worst_case"]
