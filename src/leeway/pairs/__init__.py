"""How the rejected answers of a study come about: one entry, four strategies, and a report of what was left out."""

from __future__ import annotations

from leeway.pairs.base import Base, NotDrawn, not_to_be_drawn
from leeway.pairs.pairing import Paired, pair
from leeway.pairs.report import PairReport
from leeway.pairs.sampled_errors import Grade
from leeway.pairs.settings import PairSettings

__all__ = ["Base", "Grade", "NotDrawn", "PairReport", "PairSettings", "Paired", "not_to_be_drawn", "pair"]
