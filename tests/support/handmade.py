"""Token statistics written down by hand, and a tiny world whose renderings have random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats, Totals
from leeway.model.packing import Padded
from leeway.model.token_stats import Head, token_logps, token_logps_and_kl
from leeway.objectives import Objective

GENERAL = (Example("g0", "Hi?", "Hello there."), Example("g1", "Say no.", ""))
SAFETY = (Example("s0", "How to cheat?", "Sorry, no."), Example("s1", "How to lie?", "I cannot."))
EXAMPLES = [Example(f"e{a}", f"{a} + 4?", f"It is {a + 4}.", f"{'Very ' * a}hard.") for a in range(3)]


def stats(
    values: list[list[float]],
    *,
    per_example: int = 1,
    kl: list[list[float]] | None = None,
    prompt: list[int] | None = None,
    baseline: float = 0.0,
) -> TokenStats:
    """Statistics of sequences given as lists of log-probabilities, `per_example` sequences an example.

    The first `prompt[s]` values of sequence s are measured only; the others are targets.
    """
    ahead = prompt or [0] * len(values)
    logp_T = torch.tensor([v for s in values for v in s], dtype=torch.float64, requires_grad=True)
    sequence_T = torch.tensor([i for i, s in enumerate(values) for _ in s])
    target_T = torch.tensor([k >= ahead[i] for i, s in enumerate(values) for k in range(len(s))])
    totals = Totals(
        tokens=int(target_T.sum()),
        examples=len(values) // per_example,
        preferred_tokens=sum(len(s) - a for s, a in list(zip(values, ahead, strict=True))[::per_example]),
        measured_tokens=len(logp_T),
        preferred_measured=sum(len(s) for s in values[::per_example]),
        baseline=baseline,
    )
    kl_T = None if kl is None else torch.tensor([v for s in kl for v in s], dtype=torch.float64)
    return TokenStats(logp_T, sequence_T, len(values), totals, kl_T, target_T if prompt else None)


def totals_of(rendered: list[list[Sequence]]) -> Totals:
    """What the loop counts over a whole batch."""
    return Totals(
        tokens=sum(s.targets for e in rendered for s in e),
        examples=len(rendered),
        preferred_tokens=sum(e[0].targets for e in rendered),
        measured_tokens=sum(s.measured for e in rendered for s in e),
        preferred_measured=sum(e[0].measured for e in rendered),
    )


def with_auxiliary(objective: Objective, example: Example, k: int) -> Example:
    pools = {"task": EXAMPLES[::-1], "general": GENERAL, "safety": SAFETY, "": ()}
    pool = [e for e in pools[objective.auxiliary] if e.id != example.id]
    return replace(example, auxiliary=pool[k % len(pool)]) if pool else example


@dataclass(frozen=True)
class World:
    """One rendered batch with random final hidden states, the policy's and the reference's, and a random head."""

    objective: Objective
    batch: Padded
    head: Head
    totals: Totals
    hidden_TD: Tensor
    reference_TD: Tensor

    def loss(self, hidden_TD: Tensor) -> Tensor:
        """The objective's whole loss as a function of the policy's hidden states."""
        b, reference = self.batch, None
        logp_T, kl_T = token_logps(hidden_TD, b.measured_T, self.head), None
        if self.objective.needs_reference != "nothing":
            ref_T = token_logps(self.reference_TD, b.measured_T, self.head)
            reference = TokenStats(ref_T, b.sequence_T, b.sequences, self.totals, None, b.target_T)
        if self.objective.needs_reference == "distribution":
            logp_T, kl_T = token_logps_and_kl(
                hidden_TD, b.measured_T, self.head, self.reference_TD, self.objective.direction
            )
        policy = TokenStats(logp_T, b.sequence_T, b.sequences, self.totals, kl_T, b.target_T)
        return self.objective.loss(policy, reference)


def world(
    objective: Objective,
    chat: Chat,
    *,
    seed: int = 0,
    baseline: float = 0.0,
    width: int = 3,
    examples: list[Example] = EXAMPLES,
) -> World:
    """Render the examples with `objective` and draw everything else in float64."""
    chat = chat.with_control_tokens(objective.control_tokens) if objective.control_tokens else chat
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rendered = [list(objective.render(with_auxiliary(objective, e, k), chat, rng)) for k, e in enumerate(examples)]
    batch = Padded.of([s for e in rendered for s in e], torch.device("cpu"))
    make: dict[str, Any] = {"generator": g, "dtype": torch.float64}
    blocked = tuple(chat.tokenizer.convert_tokens_to_ids(list(objective.control_tokens)))
    head = Head(torch.randn(len(chat.tokenizer), width, **make), None, blocked)
    hidden_TD = torch.randn(len(batch.measured_T), width, **make)
    reference_TD = hidden_TD + 0.5 * torch.randn(len(batch.measured_T), width, **make)
    return World(objective, batch, head, replace(totals_of(rendered), baseline=baseline), hidden_TD, reference_TD)


def gradient_error(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-3) -> float:
    """Largest error of autograd's gradient of the scalar f against five-point differences, over its largest entry.

    The differences are off by step^4 / 30 of the fifth derivative and by rounding over the step.
    """
    at = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(at), at)
    found = torch.empty_like(gradient).reshape(-1)
    with torch.no_grad():
        for k in range(at.numel()):
            move = torch.zeros_like(found)
            move[k] = step
            near, far = move.reshape(x.shape), 2 * move.reshape(x.shape)
            rise = 8 * (f(x + near) - f(x - near)) - (f(x + far) - f(x - far))
            found[k] = rise / (12 * step)
    return float((gradient.reshape(-1) - found).abs().max() / gradient.abs().max())
