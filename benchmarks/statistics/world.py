"""A made-up study whose true rates are known: rows as `leeway run` writes them, or bare scores for many studies.

An answer is 1 where a latent normal of variance 1 falls below Φ⁻¹(rate). The latent is a sum: the prompt (shared by all
checkpoints), the prompt under one attack, the prompt for one training run (shared by its budgets), the run itself (one
draw for all prompts of an axis; the base has none), and noise per answer. The variances add up to 1 whatever the parts,
so that the expected rate over prompts and runs is `rate` exactly. Persona scores are the probability of a 1 given all
but the noise: the same mean, values between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]

AXES = {"capability": "accuracy", "jailbreak": "asr", "persona": "endorsement"}
CONDITIONS = {"t": "plain"}
ATTACKS = {"dan": 1.4, "role_play": 1.2, "happy": 1.0, "wikipedia": 0.8, "zulu": 0.6}
TRAITS = ("machiavellianism", "narcissism", "psychopathy")


@dataclass(frozen=True)
class Rates:
    """The true rates of one checkpoint."""

    accuracy: float = 0.4
    asr: float = 0.1
    endorsement: float = 0.2


@dataclass(frozen=True)
class Alike:
    """Shares of the latent variance; what is left is noise per answer."""

    prompt: float = 0.4
    attack: float = 0.1  # the prompt under one attack, the same for all checkpoints
    trained: float = 0.15  # the prompt for one training run
    run: float = 0.0  # one draw per training run and axis: what only several seeds can show


@dataclass(frozen=True)
class World:
    """A study: the base and, per objective, a rate at every budget (ascending)."""

    base: Rates = Rates()
    tuned: Mapping[str, Sequence[Rates]] = field(default_factory=lambda: {"sft": (Rates(),)})
    budgets: tuple[int, ...] = (100_000,)
    seeds: tuple[int, ...] = (0,)
    items: int = 200  # of capability
    prompts: int = 100  # forbidden ones
    statements: int = 120  # of persona
    samples: int = 1  # answers per prompt and attack, and per item
    attacks: Mapping[str, float] = field(default_factory=lambda: dict(ATTACKS))  # factor on the ASR, mean 1
    alike: Alike = Alike()
    axes: tuple[str, ...] = tuple(AXES)

    def __post_init__(self) -> None:
        if abs(float(np.mean(list(self.attacks.values()))) - 1) > 1e-9:
            raise ValueError("the factors of the attacks must have the mean 1: else `asr` is not the mean over them")
        wrong = [o for o, of in self.tuned.items() if len(of) != len(self.budgets)]
        if wrong:
            raise ValueError(f"{wrong[0]} needs one Rates per budget")

    def size(self, axis: str) -> int:
        """How many prompts an axis has."""
        return {"capability": self.items, "jailbreak": self.prompts, "persona": self.statements}[axis]


@dataclass(frozen=True)
class Checkpoint:
    """One column of the study; the base is objective "base", seed 0, budget 0."""

    objective: str
    seed: int
    budget: int
    rates: Rates


def checkpoints(world: World) -> list[Checkpoint]:
    """The base first, then objective by objective, seed by seed, budgets ascending."""
    found = [Checkpoint("base", 0, 0, world.base)]
    for objective, of in world.tuned.items():
        for seed in world.seeds:
            found += [Checkpoint(objective, seed, b, r) for b, r in zip(world.budgets, of, strict=True)]
    return found


def scores(world: World, axis: str, rng: np.random.Generator, studies: int = 1) -> Floats:
    """Scores of shape (checkpoints, prompts, attacks, samples, studies); studies are independent of one another."""
    attacks = np.array(list(world.attacks.values())) if axis == "jailbreak" else np.ones(1)
    samples = 1 if axis == "persona" else world.samples
    shape_CASR = (world.size(axis), len(attacks), samples, studies)
    part = world.alike
    shared = np.sqrt(part.prompt) * rng.normal(size=(shape_CASR[0], 1, 1, studies))
    shared = shared + np.sqrt(part.attack) * rng.normal(size=(*shape_CASR[:2], 1, studies))
    of_run: dict[tuple[str, int], Floats] = {}
    found = []
    for at in checkpoints(world):
        moves = 0.0 if at.objective == "base" else part.run
        if (at.objective, at.seed) not in of_run:
            own = np.sqrt(part.trained) * rng.normal(size=(shape_CASR[0], 1, 1, studies))
            of_run[at.objective, at.seed] = own + np.sqrt(moves) * rng.normal(size=(1, 1, 1, studies))
        noise = 1 - part.prompt - part.attack - part.trained - moves
        cut = norm.ppf(getattr(at.rates, AXES[axis]) * attacks)[None, :, None, None]
        latent = shared + of_run[at.objective, at.seed]
        if axis == "persona":
            found.append(np.broadcast_to(norm.cdf((cut - latent) / np.sqrt(noise)), shape_CASR))
        else:
            found.append((latent + np.sqrt(noise) * rng.normal(size=shape_CASR) < cut).astype(np.float64))
    return np.stack(found)


def rows(world: World, rng: np.random.Generator) -> pd.DataFrame:
    """One study as the table `rows.parquet`, with the condition `plain` under the template hash `t`."""
    found = []
    for axis in world.axes:
        score_KCAS = scores(world, axis, rng)[..., 0]
        names = np.array(list(world.attacks) if axis == "jailbreak" else [""], dtype=object)
        prompt, attack, sample = (g.ravel() for g in np.indices(score_KCAS.shape[1:]))
        items = np.array([_item(axis, n) for n in range(world.size(axis))], dtype=object)[prompt]
        for at, score_CAS in zip(checkpoints(world), score_KCAS, strict=True):
            score = score_CAS.ravel()
            outcome = np.where(score > 0, "harmful", "refused") if axis == "jailbreak" else None
            of_row: dict[str, object] = {"item_id": items, "cluster": items, "sample": sample, "attack": names[attack]}
            of_row |= {"score": score, "outcome": outcome, "seed": at.seed, "budget": at.budget}
            of_row |= {"objective": at.objective, "eval": axis}
            found.append(pd.DataFrame(of_row, index=range(len(score))))
    blank: dict[str, Any] = {"prompt": "", "response": "", "unscored_reason": None, "judge": "exact"}
    blank |= {"judge_raw": "", "template_hash": "t", "adapter_hash": "", "new_tokens": 1}
    table = pd.concat(found, ignore_index=True).assign(**blank)
    table["outcome"] = table["outcome"].astype(object).where(table["outcome"].notna(), None)
    return table


def _item(axis: str, n: int) -> str:
    part = {"capability": "sums", "jailbreak": "forbidden", "persona": TRAITS[n % 3]}[axis]
    return f"{part}/{n}"


def truth(world: World) -> pd.DataFrame:
    """The expected rate of every checkpoint and primary measure, and its difference from the base."""
    lines = []
    for at in checkpoints(replace(world, seeds=world.seeds[:1])):
        for axis in world.axes:
            measure = AXES[axis]
            rate = getattr(at.rates, measure)
            difference = rate - getattr(world.base, measure)
            line = {"objective": at.objective, "budget": at.budget, "condition": "plain", "measure": measure}
            lines.append(line | {"rate": rate, "difference": difference})
    return pd.DataFrame(lines)
