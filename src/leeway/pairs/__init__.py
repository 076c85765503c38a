"""How the rejected answers of a study come about: one entry, four strategies, and a report of what was left out."""

from __future__ import annotations

from leeway.pairs.build import Paired, pair
from leeway.pairs.sample import BaseModelSampler, Grade, NotDrawn, not_to_be_drawn
from leeway.pairs.types import PairReport, PairSettings

__all__ = ["BaseModelSampler", "Grade", "NotDrawn", "PairReport", "PairSettings", "Paired", "not_to_be_drawn", "pair"]
