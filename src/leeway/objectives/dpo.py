"""DPO: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    margin = beta [ (log pi(y+|x) - log pi_ref(y+|x)) - (log pi(y-|x) - log pi_ref(y-|x)) ]
    L      = -mean log sigmoid(margin) + nll * NLL(y+)      log-probabilities summed over answer tokens

`nll` adds maximum likelihood of the preferred answers, mean per token of the batch (Pang et al. 2024, arXiv 2404.19733,
equation 1, who normalise by answer length instead); 0, the default, is DPO as published. The reference is the model the
trajectory starts from; the ledger records its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from leeway.model.forward import TokenStats
from leeway.objectives.objective import Needs, Plain, nll_preferred, require_positive


def margins(chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, beta: float) -> Tensor:
    """Return the scaled implicit-reward margins of N pairs from summed log-probabilities, nats."""
    return beta * ((chosen_N - ref_chosen_N) - (rejected_N - ref_rejected_N))


def loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, beta: float = 0.1
) -> Tensor:
    """Return the per-pair DPO loss, [N], nats; ln 2 where policy and reference agree."""
    return -F.logsigmoid(margins(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, beta))


@dataclass(frozen=True)
class Dpo(Plain):
    """Preference pairs against a frozen reference, plus `nll` times the NLL of the preferred answers."""

    name: ClassVar[str] = "dpo"
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[Needs] = "logps"
    beta: float = 0.1
    nll: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self.name, beta=self.beta)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:
        assert reference is not None
        pi_S, ref_S = policy.sum_S(), reference.sum_S()
        preference = loss(pi_S[0::2], pi_S[1::2], ref_S[0::2], ref_S[1::2], self.beta).sum() / policy.totals.examples
        return preference + self.nll * nll_preferred(policy) if self.nll else preference
