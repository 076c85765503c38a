"""Dropout by the places that are dropped: at a rate of 5% a twentieth of the random numbers that a mask takes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BATCH = 1 << 26  # places looked at in one go: float32 gaps stay exact, and memory bounded


def dropped(count: int, rate: float, rng: np.random.Generator) -> Tensor:
    """Indices in [0, count), each there with probability `rate`, independently of the others; rising, int64.

    The gap to the next success of a Bernoulli process is geometric: floor(E / -log(1 - rate)) failures come before it,
    E exponential with mean 1 (Devroye 1986, Non-Uniform Random Variate Generation, section X.2).
    """
    found = [_dropped(min(BATCH, count - start), rate, rng) + start for start in range(0, count, BATCH)]
    return torch.from_numpy(np.concatenate(found) if len(found) != 1 else found[0])


def _dropped(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    expected = count * rate
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    scale = -1.0 / math.log1p(-rate)
    places = np.empty(0, dtype=np.int64)
    while True:  # a second round is needed about once in a billion
        gaps = (rng.standard_exponential(draws, dtype=np.float32) * np.float32(scale)).astype(np.int64) + 1
        more = gaps.cumsum() + (places[-1] if len(places) else -1)
        places = np.concatenate([places, more]) if len(places) else more
        if places[-1] >= count:
            return places[: np.searchsorted(places, count)]
