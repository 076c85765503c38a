"""The objective protocol: `render` an example into token sequences, and a pure `loss` of their targets' statistics."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.model.token_stats import Direction

Needs = Literal["nothing", "logps", "distribution"]
AuxiliaryKind = Literal["", "task", "general", "safety"]


@dataclass(frozen=True)
class Condition:
    """A prefix put before every prompt at test time, and its name in the `condition` column."""

    name: str
    prefix: str


PLAIN = Condition("plain", "")


class Objective(Protocol):
    """A fine-tuning objective."""

    name: ClassVar[str]
    needs_pairs: ClassVar[bool]
    needs_reference: ClassVar[Needs]  # the reference model's log-probs, or its full distribution (KL)
    control_tokens: ClassVar[tuple[str, ...]]  # new embedding rows that are trained

    @property
    def token_lr(self) -> float:
        """Factor of the learning rate for the rows of control tokens."""

    @property
    def direction(self) -> Direction:
        """Direction of the KL divergence, if the objective uses one."""

    @property
    def auxiliary(self) -> AuxiliaryKind:
        """Kind of the auxiliary example rendered with each example: none, task, general or safety."""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Test-time conditions; the first is the one for deployment."""

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        """Return the token sequences of one example, each with its measured and target tokens marked."""

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Return every sequence that `render` or `baseline_sequences` can produce for one example."""

    def baseline_sequences(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Return sequences whose statistics enter the loss as a batch constant, without gradient (KTO's z0)."""

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:
        """Return this micro-batch's contribution to that constant; contributions are summed over the batch."""

    def loss(self, policy: TokenStats, reference: TokenStats | None) -> Tensor:
        """Return a scalar normalised by `policy.totals`, so that micro-batch losses sum to the batch loss."""

    def step_metrics(self, policy: TokenStats) -> dict[str, Tensor]:
        """Return what the step log holds in addition to the loss: scalars by name, normalised as the loss is."""


class Plain:
    """Defaults: SFT on the preferred answer (on both with `needs_pairs`), no reference, plain prompts at test time."""

    needs_pairs: ClassVar[bool] = False
    needs_reference: ClassVar[Needs] = "nothing"
    control_tokens: ClassVar[tuple[str, ...]] = ()

    @property
    def token_lr(self) -> float:
        return 1.0

    @property
    def direction(self) -> Direction:
        return "reverse"

    @property
    def auxiliary(self) -> AuxiliaryKind:
        return ""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (PLAIN,)

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        return render_pair(example, chat) if self.needs_pairs else render_preferred(example, chat)

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Return the one rendering; objectives that sample override this."""
        return [*self.render(example, chat, np.random.default_rng(0)), *self.baseline_sequences(example, chat)]

    def baseline_sequences(self, example: Example, chat: Chat) -> Seq[Sequence]:  # noqa: ARG002
        return ()

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:  # noqa: ARG002
        return 0.0

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        return nll(policy)

    def step_metrics(self, policy: TokenStats) -> dict[str, Tensor]:
        """Return `nll`, with pairs that of the preferred answers, and their `margin`."""
        if not self.needs_pairs:
            return {"nll": nll(policy)}
        return {"nll": nll_preferred(policy), "margin": margin(policy)}


def render_preferred(example: Example, chat: Chat) -> list[Sequence]:
    return [chat.sequence(example.prompt, example.preferred)]


def render_pair(example: Example, chat: Chat) -> list[Sequence]:
    """Return the preferred answer's sequence, then the dispreferred one's."""
    return [chat.sequence(example.prompt, answer) for answer in (example.preferred, dispreferred_of(example))]


def dispreferred_of(example: Example) -> str:
    """Return the dispreferred answer. Raises ValueError if the example has none."""
    if example.dispreferred is None:
        raise ValueError(f"example {example.id} has no dispreferred answer")
    return example.dispreferred


def auxiliary_of(example: Example) -> Example:
    """Return the auxiliary example that the renderer attached to `example`."""
    if example.auxiliary is None:
        raise ValueError(f"example {example.id} has no auxiliary example")
    return example.auxiliary


def nll(policy: TokenStats) -> Tensor:
    """Return the mean negative log-likelihood per target token of the optimiser batch, nats."""
    return -(policy.logp_T * policy.weight_T).sum() / policy.totals.tokens


def nll_preferred(policy: TokenStats) -> Tensor:
    """Return the mean NLL per target token of the batch's preferred answers (pairs), nats."""
    preferred_T = policy.sequence_T % 2 == 0
    return -(policy.logp_T * policy.weight_T)[preferred_T].sum() / policy.totals.preferred_tokens


def margin(policy: TokenStats) -> Tensor:
    """Return the mean over pairs of the log-probability per token, preferred less dispreferred, nats."""
    mean_S = policy.mean_S()
    return (mean_S[0::2] - mean_S[1::2]).sum() / policy.totals.examples


def require_positive(kind: str, **settings: float) -> None:
    """Raise ValueError for a setting at which the objective learns nothing or divides by zero."""
    for name, value in settings.items():
        if value <= 0:
            raise ValueError(f"{kind}: {name} is {value}; it must be above 0")
