"""KL-regularised SFT: maximum likelihood with a penalty for leaving the reference's distribution.

    L = NLL + weight * (1/M) sum_m D( pi(.|x, y_<m) || pi_ref(.|x, y_<m) )

The divergence is over the full vocabulary at each of M tokens: single-sample estimators on data tokens are not a KL
(with k1 the gradient is a rescaled SFT). `towards`: `reverse`, D(policy || reference), is the default; `forward` is
D(reference || policy). `over` says which tokens: the targets (`answer`), the prompt's as well (`all`), or those of a
general prompt beside each example (`general`: its answer where it has one, else the prompt), which is not learned.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.model.token_stats import Direction
from leeway.objectives.objective import Companion, Needs, Plain, companion_of, nll, render_preferred


def loss(logp_T: Tensor, kl_T: Tensor, weight: float = 0.001) -> Tensor:
    """Per-token loss, [T], nats: -log pi + weight * KL."""
    return weight * kl_T - logp_T


@dataclass(frozen=True)
class Kl(Plain):
    """SFT held near the model that the trajectory started from."""

    name: ClassVar[str] = "kl"
    needs_reference: ClassVar[Needs] = "distribution"
    weight: float = 0.001
    towards: Direction = "reverse"
    over: Literal["answer", "all", "general"] = "answer"

    def __post_init__(self) -> None:
        """Without a weight nothing is asked of a reference, and this is SFT to the bit."""
        if self.weight == 0:
            object.__setattr__(self, "needs_reference", "nothing")

    @property
    def direction(self) -> Direction:
        return self.towards

    @property
    def companion(self) -> Companion:
        return "general" if self.over == "general" else ""

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        own = render_preferred(example, chat)
        if self.over == "general":
            return [*own, _only_measured(companion_of(example), chat)]
        return [s.with_prompt() for s in own] if self.over == "all" else own

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """The general prompt counts once the example has it."""
        own = render_preferred(example, chat)
        return [*own, _only_measured(example.companion, chat)] if self.companion and example.companion else own

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        if self.weight == 0:
            return nll(policy)
        if policy.kl_T is None:
            raise ValueError("the KL objective needs the divergence to its reference")
        totals = policy.totals
        if self.over == "general":
            away = (policy.kl_T * (1 - policy.weight_T)).sum() / (totals.measured_tokens - totals.tokens)
        else:
            away = policy.kl_T.sum() / (totals.measured_tokens if self.over == "all" else totals.tokens)
        return nll(policy) + self.weight * away


def _only_measured(general: Example, chat: Chat) -> Sequence:
    """A general prompt's sequence without a target: its answer is measured, or the prompt where there is none."""
    whole = chat.sequence(general.prompt, general.preferred)
    if general.preferred:
        return whole.without_targets()
    return Sequence(whole.ids[: whole.target_start], whole.target_start, measured_from=1)


objective = Kl
