"""Many studies at once, as the tests see them: what each prompt pulls, or the pairs of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.statistics.world import ATTACKS, Alike, Rates, World, scores
from leeway.stats.pairing import Pairs

Floats = NDArray[np.float64]
BLOCK = 500  # studies held at once


@dataclass(frozen=True)
class Setting:
    """A base and a checkpoint of known rates on one axis."""

    prompts: int
    base: float
    tuned: float
    axis: str = "jailbreak"
    attacks: int = 5
    samples: int = 1
    seeds: int = 1
    objectives: int = 1
    alike: Alike = field(default_factory=Alike)

    @property
    def difference(self) -> float:
        return self.tuned - self.base

    @property
    def world(self) -> World:
        asked = ATTACKS if self.attacks == 5 else {f"a{n}": 1.0 for n in range(self.attacks)}
        base, tuned = (Rates(r, r, r) for r in (self.base, self.tuned))
        objectives = {f"o{n}": (tuned,) for n in range(self.objectives)}
        size = self.prompts
        found = World(base, objectives, seeds=tuple(range(self.seeds)), items=size, prompts=size, statements=size)
        return replace(found, attacks=asked, samples=self.samples, alike=self.alike)

    def __str__(self) -> str:
        kind = {"jailbreak": "prompts", "capability": "items", "persona": "statements"}[self.axis]
        more = f" × {self.attacks} attacks" if self.axis == "jailbreak" and self.attacks > 1 else ""
        more += f" × {self.samples} samples" if self.samples > 1 else ""
        more += f" × {self.seeds} seeds" if self.seeds > 1 else ""
        rates = f"{100 * self.base:g}%" if self.base == self.tuned else f"{100 * self.base:g}% → {100 * self.tuned:g}%"
        return f"{self.prompts} {kind}{more}, {rates}"


def differences(setting: Setting, studies: int, seed: int) -> Iterator[Floats]:
    """Checkpoint − base, (checkpoints, prompts, attacks, samples, studies), in blocks."""
    rng = np.random.default_rng(seed)
    for start in range(0, studies, BLOCK):
        drawn = scores(setting.world, setting.axis, rng, min(BLOCK, studies - start))
        yield drawn[1:] - drawn[:1]


def pulls(setting: Setting, studies: int, seed: int) -> Iterator[Floats]:
    """What each prompt pulls, (prompts, studies × objectives): the rows' path gives the same where nothing is missing.

    The test `test_pulls_are_those_of_the_rows` holds it to that. Every prompt weighs 1/prompts.
    """
    for difference_KCASR in differences(setting, studies, seed):
        pulls_KCR = difference_KCASR.mean(axis=(2, 3)) / setting.prompts
        yield pulls_KCR.transpose(1, 2, 0).reshape(setting.prompts, -1)


def pairs(setting: Setting, studies: int, seed: int) -> Iterator[Pairs]:
    """The pairs of one study after the other, of one objective with all its seeds."""
    rng = np.random.default_rng(seed)
    for start in range(0, studies, BLOCK):
        drawn = scores(setting.world, setting.axis, rng, min(BLOCK, studies - start))
        base, tuned = np.broadcast_to(drawn[:1], drawn[1:].shape), drawn[1:]
        seeds, clusters, strata, _ = (g.ravel().astype(np.intp) for g in np.indices(tuned.shape[:-1]))
        matched = np.ones(len(seeds), dtype=np.bool_)
        for r in range(drawn.shape[-1]):
            yield Pairs(tuned[..., r].ravel(), base[..., r].ravel(), strata, clusters, seeds, matched)
