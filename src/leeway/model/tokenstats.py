"""Per-target-token statistics from final hidden states: log-probabilities and full-vocabulary KL, streamed in chunks.

Shape legend: T target tokens, D width, V vocabulary, C tokens of one chunk. No [T, V] tensor is ever held: a chunk's
logits live as long as the chunk, and the backward pass makes them again. Sums are taken in float32 (float64 stays
float64) whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]

HALF = (torch.bfloat16, torch.float16)
BLOCKED = -1e9  # finite, so that a difference of two blocked entries is zero and not NaN
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class Head:
    """The output layer: logits_TV = softcap(hidden_TD @ weight_VD.T).

    `softcap` is Gemma 2's final logit soft-capping, c * tanh(logits / c), or None. `blocked` are ids that are read but
    never predicted (control tokens): they have no share in the distribution. `reference` is the output layer that the
    reference's hidden states are read through, where it is another one than this: a weight that trains, or that is
    tied to an embedding that trains, is not the one that the reference had.
    """

    weight_VD: Tensor
    softcap: float | None = None
    blocked: tuple[int, ...] = ()
    reference: Head | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] logits in float32 (or float64): of half-precision states and weights too, never rounded to them."""
        with torch.autocast(hidden_CD.device.type, enabled=False):
            raw_CV = self._product(hidden_CD)
        capped_CV = raw_CV if self.softcap is None else self.softcap * torch.tanh(raw_CV / self.softcap)
        if self.blocked:
            capped_CV[:, list(self.blocked)] = BLOCKED
        return capped_CV

    def _product(self, hidden_CD: Tensor) -> Tensor:
        weight_VD = self.weight_VD
        if hidden_CD.dtype in HALF and hidden_CD.is_cuda:  # its sums are in float32, and may be had as they are
            return torch.mm(hidden_CD, weight_VD.to(hidden_CD.dtype).T, out_dtype=torch.float32)
        if hidden_CD.dtype in HALF:
            return hidden_CD.float() @ weight_VD.float().T
        return hidden_CD @ weight_VD.to(hidden_CD.dtype).T

    def widened(self) -> Head:
        """On a CPU with the weight in float32 where it is in half precision: a copy for as long as it is needed."""
        on_cpu = self.weight_VD.device.type == "cpu"
        return replace(self, weight_VD=self.weight_VD.float()) if on_cpu and self.weight_VD.dtype in HALF else self

    @property
    def chunk(self) -> int:
        return max(1, CHUNK_ELEMENTS // self.weight_VD.shape[0])


def token_logps(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    """Log-probability of each target token, [T] in nats."""
    logp_T: Tensor = _StreamedHead.apply(hidden_TD, head.weight_VD, targets_T, head, None, None)[0]  # type: ignore[no-untyped-call]
    return logp_T


def token_logps_and_kl(
    hidden_TD: Tensor, targets_T: Tensor, head: Head, reference_hidden_TD: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the KL divergence of its whole next-token distribution, both [T], nats.

    `reverse` is D(policy || reference), `forward` is D(reference || policy). The reference's distribution is rebuilt
    from its own final hidden states through its own head (`head.reference`; `head` itself where there is none), and no
    gradient goes there.
    """
    logp_T, kl_T = _StreamedHead.apply(  # type: ignore[no-untyped-call]
        hidden_TD, head.weight_VD, targets_T, head, reference_hidden_TD.detach(), direction
    )
    return logp_T, kl_T


class _StreamedHead(torch.autograd.Function):
    """Forward and backward by chunks of target tokens; gradients for hidden_TD, and for the weight where it trains."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        head: Head,
        reference_TD: Tensor | None,
        direction: Direction | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, *([] if reference_TD is None else [reference_TD]))
        ctx.head, ctx.direction = head, direction
        head, reference = head.widened(), (head.reference or head).widened()
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logp_T = torch.empty(len(targets_T), dtype=wide, device=hidden_TD.device)
        kl_T = torch.zeros_like(logp_T)
        for s in _chunks(len(targets_T), head.chunk):
            logp_CV = head.logits(hidden_TD[s]).log_softmax(-1)
            logp_T[s] = logp_CV.gather(-1, targets_T[s, None])[:, 0]
            if reference_TD is not None:
                ref_CV = reference.logits(reference_TD[s]).log_softmax(-1)
                a, b = (logp_CV, ref_CV) if direction == "reverse" else (ref_CV, logp_CV)
                kl_T[s] = (a.exp() * (a - b)).sum(-1)
        return logp_T, kl_T

    @staticmethod
    def backward(ctx: Any, g_logp_T: Tensor, g_kl_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_T, *rest = ctx.saved_tensors
        head, reference = ctx.head.widened(), (ctx.head.reference or ctx.head).widened()
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=g_logp_T.dtype) if ctx.needs_input_grad[1] else None
        for s in _chunks(len(targets_T), head.chunk):
            capped_CV = head.logits(hidden_TD[s])
            logp_CV = capped_CV.log_softmax(-1)
            grad_CV = -logp_CV.exp() * g_logp_T[s, None]
            grad_CV.scatter_add_(-1, targets_T[s, None], g_logp_T[s, None])
            if rest:
                ref_CV = reference.logits(rest[0][s]).log_softmax(-1)
                grad_CV += g_kl_T[s, None] * _kl_gradient(logp_CV, ref_CV, ctx.direction)
            if head.softcap is not None:
                grad_CV *= 1 - (capped_CV / head.softcap) ** 2
            grad_CV_ = grad_CV.to(hidden_TD.dtype)
            grad_hidden_TD[s] = grad_CV_ @ weight_VD.to(hidden_TD.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += (grad_CV_.T @ hidden_TD[s]).to(grad_weight_VD.dtype)
        return (
            grad_hidden_TD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None,
            None,
            None,
            None,
        )


def _kl_gradient(logp_CV: Tensor, ref_CV: Tensor, direction: Direction) -> Tensor:
    """d KL / d logits. Reverse: p (log p - log q - KL); forward: p - q."""
    p_CV = logp_CV.exp()
    if direction == "forward":
        return p_CV - ref_CV.exp()
    gap_CV = logp_CV - ref_CV
    return p_CV * (gap_CV - (p_CV * gap_CV).sum(-1, keepdim=True))


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]
