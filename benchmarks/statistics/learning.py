"""The rule by which "no drift" of an arm that did not learn is void: how often it calls one void.

Each example has a gain in NLL, a gain in margin and a KL (nats per token), drawn around known means: normal, skewed to
either side (a shifted exponential) or heavy-tailed (Student's t with 3 degrees of freedom, scaled); the KL is a gamma
variable of shape 1/2, as skewed as those of a tuned model, on GENERAL general prompts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from benchmarks.statistics.finding import Finding
from leeway.stats.learning import FLOOR, lower_bound, status

Draws = NDArray[np.float64]
LEVEL, POWER = 0.05, 0.8
GENERAL = 32
VOID = (0.935, 1.0)  # at least 95%, up to the simulation's error


@dataclass(frozen=True)
class Arm:
    """One objective at one budget: true means in nats per token; `spread`: standard deviation over examples."""

    examples: int = 64
    gain: float = 0.0
    margin: float | None = None  # None: not trained on pairs
    kl: float = 0.001
    spread: float = 0.1
    shape: str = "normal"

    @property
    def tests(self) -> int:
        return 3 if self.margin is None else 4

    @property
    def detectable(self) -> float:
        """The gain that the rule sees with 80% power, for normal gains."""
        df = self.examples - 1
        return FLOOR + (t.ppf(1 - LEVEL / self.tests, df) + t.ppf(POWER, df)) * self.spread / self.examples**0.5

    def __str__(self) -> str:
        pairs = "" if self.margin is None else f", margin +{self.margin:.3g}"
        return (
            f"{self.examples} examples, {self.shape}, gain +{self.gain:.3g} (SD {self.spread:g}){pairs}, KL {self.kl:g}"
        )


def _noise(arm: Arm, size: tuple[int, int], rng: np.random.Generator) -> Draws:
    """Draw errors of mean 0 and variance 1."""
    if arm.shape == "heavy tails":
        return np.asarray(rng.standard_t(3, size) / 3**0.5)
    skewed = rng.standard_exponential(size) - 1
    return {"normal": rng.standard_normal(size), "right-skewed": skewed, "left-skewed": -skewed}[arm.shape]


def void_share(arm: Arm, studies: int, seed: int) -> float:
    """Return the share of studies in which the rule calls the arm void."""
    rng, size = np.random.default_rng([8, seed]), (studies, arm.examples)
    values = {"nll_gain": arm.gain + arm.spread * _noise(arm, size, rng)}
    if arm.margin is not None:
        values["margin_gain"] = arm.margin + arm.spread * _noise(arm, size, rng)
    values["kl"] = rng.gamma(0.5, 2 * arm.kl, size)
    values["kl_general"] = rng.gamma(0.5, 2 * arm.kl, (studies, GENERAL))
    low = {f"{name}_low": lower_bound(x, LEVEL / len(values)) for name, x in values.items()}
    lines = [{"n": arm.examples} | {name: float(x[k]) for name, x in low.items()} for k in range(studies)]
    return float(np.mean([status(line) == "void" for line in lines]))


def voids(studies: int) -> Iterator[Finding]:
    """Void is right where nothing was learned, and wrong where something was."""
    plain = [Arm(shape=s) for s in ("normal", "right-skewed", "left-skewed", "heavy tails")]
    nothing = [*plain, Arm(16), Arm(spread=0.5), Arm(margin=0.0, spread=0.5), Arm(200, margin=0.0)]
    about = "Learning check: void where nothing was learned"
    for n, arm in enumerate(nothing):
        yield Finding(about, str(arm), void_share(arm, studies, n), studies, VOID)
    about = f"Learning check: void where every mean is at its floor of {FLOOR:g}, the hardest case"
    floor = [replace(a, gain=FLOOR, kl=FLOOR) for a in (*plain, Arm(16), Arm(200))]
    floor += [replace(a, margin=FLOOR) for a in floor[:4]]
    for n, arm in enumerate(floor):
        why = "gains with a long lower tail" if arm.shape == "left-skewed" else ""
        yield Finding(about, str(arm), void_share(arm, studies, 100 + n), studies, VOID if not why else (0.9, 1.0), why)
    about = "Learning check: void where something was learned"
    small = [*plain, Arm(16), Arm(200), Arm(margin=0.0)]
    learned = [replace(a, gain=a.detectable) for a in small]
    learned += [replace(a, gain=0.0, margin=a.detectable) for a in [Arm(margin=0.0)]]
    for n, arm in enumerate(learned):
        setting = f"80% power: {arm}"
        yield Finding(about, setting, void_share(arm, studies, 200 + n), studies, (0.0, 0.23))
    for n, arm in enumerate([Arm(gain=0.1), Arm(16, gain=0.2), Arm(gain=0.0, margin=0.1), Arm(gain=0.0, kl=0.1)]):
        yield Finding(about, f"clearly: {arm}", void_share(arm, studies, 300 + n), studies, (0.0, 0.05))
