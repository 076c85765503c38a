"""KL-regularised SFT: maximum likelihood plus a KL penalty to the reference model.

    L = NLL + weight * (1/M) sum_m D( pi(.|x, y_<m) || pi_ref(.|x, y_<m) )

The divergence is over the full vocabulary at each of M tokens: single-sample estimators on data tokens are not a KL
(with k1 the gradient is a rescaled SFT). `direction`: `reverse`, D(policy || reference), is the default; `forward` is
D(reference || policy). `scope` selects the tokens: the targets (`answer`), prompt and targets (`all`), or the tokens
of one general prompt per example (`general`: its answer if it has one, else the prompt), which is not trained on.
`reduction`: the mean over the batch's M tokens (`token`), or the sum over each sequence's tokens, then the mean over
examples (`sequence`, which `F.kl_div(..., reduction="batchmean")` computes on [batch, time, vocabulary]). One weight
is stronger under `sequence` by the mean number of tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.model.token_stats import Direction
from leeway.objectives.objective import AuxiliaryKind, Needs, Plain, auxiliary_of, nll, render_preferred


def loss(logp_T: Tensor, kl_T: Tensor, weight: float = 0.001) -> Tensor:
    """Per-token loss, [T], nats: -log pi + weight * KL."""
    return weight * kl_T - logp_T


@dataclass(frozen=True)
class Kl(Plain):
    """SFT with a KL penalty towards the reference model."""

    name: ClassVar[str] = "kl"
    needs_reference: ClassVar[Needs] = "distribution"
    weight: float = 0.001
    direction: Direction = "reverse"
    scope: Literal["answer", "all", "general"] = "answer"
    reduction: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        """At weight 0 no reference is needed, and the loss is bit-identical to SFT."""
        if self.weight == 0:
            object.__setattr__(self, "needs_reference", "nothing")

    @property
    def auxiliary(self) -> AuxiliaryKind:
        return "general" if self.scope == "general" else ""

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:  # noqa: ARG002
        own = render_preferred(example, chat)
        if self.scope == "general":
            return [*own, _only_measured(auxiliary_of(example), chat)]
        return [s.with_prompt() for s in own] if self.scope == "all" else own

    def worst_case(self, example: Example, chat: Chat) -> list[Sequence]:
        """Include the general prompt once it is attached."""
        own = render_preferred(example, chat)
        return [*own, _only_measured(example.auxiliary, chat)] if self.auxiliary and example.auxiliary else own

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        return nll(policy) + self.weight * self._penalty(policy, self.reduction) if self.weight else nll(policy)

    def step_metrics(self, policy: TokenStats) -> dict[str, Tensor]:
        """Return `nll`, and with a weight `kl`: the divergence per token of the scope, under either reduction."""
        return {"nll": nll(policy)} | ({"kl": self._penalty(policy, "token")} if self.weight else {})

    def _penalty(self, policy: TokenStats, reduction: Literal["token", "sequence"]) -> Tensor:
        assert policy.kl_T is not None
        totals, kl_T, tokens = policy.totals, policy.kl_T, policy.totals.tokens
        if self.scope == "general":
            kl_T, tokens = kl_T * (1 - policy.weight_T), totals.measured_tokens - totals.tokens
        elif self.scope == "all":
            tokens = totals.measured_tokens
        return kl_T.sum() / (totals.examples if reduction == "sequence" else tokens)


def _only_measured(general: Example, chat: Chat) -> Sequence:
    """Return a sequence without targets: its answer is measured, or the prompt if it has no answer."""
    sequence = chat.sequence(general.prompt, general.preferred)
    if general.preferred:
        return sequence.without_targets()
    return Sequence(sequence.ids[: sequence.target_start], sequence.target_start, measured_from=1)
