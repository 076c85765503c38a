"""Tests at a margin if few prompts change a lot: five methods, false passes on the margin and power inside it.

`python -m benchmarks.statistics.few [--studies N] [--out FILE]`. A share of prompts changes a lot, under all attacks
and samples; the others follow one of `KINDS`. The margin is the true mean, so every pass ("the difference is below the
margin") is false. Power: the same prompts with nothing changed on average, margin 5 points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from leeway.stats.anytime import BET_FRACTIONS
from leeway.stats.cluster_tests import ALPHA, bound_draws

Floats = NDArray[np.float64]
PROMPTS = (50, 100, 200, 500)
MOVES = ((0.01, 1.0), (0.02, 1.0), (0.03, 1.0), (0.05, 1.0), (0.03, 0.6), (0.05, 0.2))  # share of prompts, change
RESAMPLES, MARGIN = 999, 0.05
# what the other prompts do: answers per prompt, P(−1), P(+1) of each, sd of normal noise
KINDS = {
    "no other change": (1, 0.0, 0.0, 0.0),
    "one answer, 3% up, 3% down": (1, 0.03, 0.03, 0.0),
    "5 attacks, 0.5% down, 1% up": (5, 0.005, 0.01, 0.0),
    "5 attacks, 3% down, 5% up": (5, 0.03, 0.05, 0.0),
    "5 attacks × 3 seeds, 2% up, 2% down": (15, 0.02, 0.02, 0.0),
    "probabilities, noise of 2 points": (1, 0.0, 0.0, 0.02),
    "probabilities, noise of 10 points": (1, 0.0, 0.0, 0.1),
}


def changes(kind: str, n: int, studies: int, rng: np.random.Generator, *, even: bool = False) -> Floats:
    """Differences of prompts, (n, studies); `even` makes rises as likely as falls."""
    answers, down, up, noise = KINDS[kind]
    if even:
        down = up = (down + up) / 2
    found = np.clip(rng.normal(0, noise, (n, studies)), -1, 1) if noise else np.zeros((n, studies))
    for _ in range(answers if up else 0):
        u = rng.random((n, studies))
        found += ((u > 1 - up).astype(float) - (u < down)) / answers
    return found


def pass_default(x_CS: Floats, margin: float) -> NDArray[np.bool_]:
    """What `one_sided`, gates and claims use."""
    weights = np.full_like(x_CS, 1 / len(x_CS))
    drawn = bound_draws(x_CS * weights, weights, resamples=RESAMPLES, seed=1)
    return drawn.p_below(np.full(x_CS.shape[1], margin)) <= ALPHA


def _draws(x_CS: Floats, margin: float, extra_RS: Floats, worst_S: Floats) -> NDArray[np.bool_]:
    E_RC = np.random.default_rng(1).standard_exponential((RESAMPLES, len(x_CS)))
    U_RS = (E_RC @ x_CS + extra_RS * worst_S) / (E_RC.sum(axis=1)[:, None] + extra_RS)
    p_S = ((margin <= U_RS).sum(axis=0) + 1) / (RESAMPLES + 1)
    return np.asarray(p_S <= ALPHA)


def pass_whole(x_CS: Floats, margin: float) -> NDArray[np.bool_]:
    """Gaffke's bound: always a whole prompt with the worst possible difference."""
    extra = np.random.default_rng(2).standard_exponential((RESAMPLES, 1))
    return _draws(x_CS, margin, extra, np.ones(x_CS.shape[1]))


def pass_largest(x_CS: Floats, margin: float) -> NDArray[np.bool_]:
    """The rule before: half a prompt with the largest difference seen, Gaffke's if fewer than 5 prompts differ."""
    most = [np.unique(x.round(9), return_counts=True)[1].max() for x in x_CS.T]
    few = np.minimum((np.abs(x_CS) > 1e-9).sum(axis=0), len(x_CS) - np.array(most)) < 5
    rng = np.random.default_rng(2)
    extra = np.where(few, rng.standard_exponential((RESAMPLES, 1)), rng.standard_gamma(0.5, (RESAMPLES, 1)))
    return _draws(x_CS, margin, extra, np.where(few, 1.0, np.abs(x_CS).max(axis=0)))


def pass_betting(x_CS: Floats, margin: float) -> NDArray[np.bool_]:
    """The betting martingale of `stats.anytime`, read once at the end, where the order does not matter."""
    ratio = (1 - x_CS) / (1 - margin)
    log_GS = np.stack([np.log1p(c * (ratio - 1)).sum(axis=0) for c in BET_FRACTIONS])
    most = log_GS.max(axis=0)
    return np.asarray(most + np.log(np.exp(log_GS - most).mean(axis=0)) >= -np.log(ALPHA))


def pass_discordant(x_CS: Floats, margin: float) -> NDArray[np.bool_] | None:
    """Exact on discordant pairs: Clopper & Pearson's bounds of both directions at half the level; binary pairs only."""
    if not np.isin(x_CS, (-1.0, 0.0, 1.0)).all():
        return None
    n, up, down = len(x_CS), (x_CS > 0).sum(axis=0), (x_CS < 0).sum(axis=0)
    high = beta.ppf(1 - ALPHA / 2, up + 1, n - up)
    low = np.where(down > 0, beta.ppf(ALPHA / 2, np.maximum(down, 1), n - down + 1), 0.0)
    return np.asarray(high - low < margin)


METHODS: dict[str, Callable[[Floats, float], NDArray[np.bool_] | None]] = {
    "default": pass_default,
    "whole prompt (Gaffke)": pass_whole,
    "largest seen (before)": pass_largest,
    "betting": pass_betting,
    "discordant pairs": pass_discordant,
}


def lines(studies: int) -> list[str]:
    """Return the Markdown lines of both tables."""
    head = f"| {' | '.join(METHODS)} |"
    rule = "|---" * (len(METHODS) + 3) + "|"
    found = ["### False passes on the margin", "", f"| prompts | others | changed prompts {head}", rule]
    worst = dict.fromkeys(METHODS, 0.0)
    for n in PROMPTS:
        for kind, (_, down, up, _) in KINDS.items():
            for q, v in MOVES:
                rng = np.random.default_rng([n, list(KINDS).index(kind), MOVES.index((q, v))])
                x_CS = np.where(rng.random((n, studies)) < q, v, changes(kind, n, studies, rng))
                shares = _shares(x_CS, (1 - q) * (up - down) + q * v)
                worst = {m: max(w, shares[m] or 0.0) for m, w in worst.items()}
                found.append(f"| {n} | {kind} | {100 * q:g}% by {v:g} | {_cells(shares)} |")
    found.append(f"| | | **largest** | {_cells(dict(worst))} |")
    found += ["", "### Power: passes of a margin of 5 points, equal rises and falls", ""]
    found += [f"| prompts | others {head}", rule.removeprefix("|---")]
    for n in PROMPTS:
        for kind in KINDS:
            rng = np.random.default_rng([n, list(KINDS).index(kind)])
            shares = _shares(changes(kind, n, studies, rng, even=True), MARGIN)
            found.append(f"| {n} | {kind} | {_cells(shares)} |")
    return found


def _shares(x_CS: Floats, margin: float) -> dict[str, float | None]:
    passed = {name: method(x_CS, margin) for name, method in METHODS.items()}
    return {name: None if p is None else float(p.mean()) for name, p in passed.items()}


def _cells(shares: dict[str, float | None]) -> str:
    return " | ".join("" if s is None else f"{100 * s:.1f}%" for s in shares.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics.few", description=__doc__)
    parser.add_argument("--studies", type=int, default=1_000, help="studies per line")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("few.md"), help="where the tables go")
    told = parser.parse_args()
    text = "\n".join([f"{told.studies:,} studies a line, {RESAMPLES} draws.", "", *lines(told.studies)]) + "\n"
    told.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
