"""Preference pairs: where the rejected answers of a study come from."""

from __future__ import annotations

from leeway.pairs.build import PairedExamples, PairReport, pair
from leeway.pairs.sample import BaseModelSampler, Grader, NotSampled, PairSettings, no_sampling

__all__ = [
    "BaseModelSampler",
    "Grader",
    "NotSampled",
    "PairReport",
    "PairSettings",
    "PairedExamples",
    "no_sampling",
    "pair",
]
