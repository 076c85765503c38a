"""Per-target-token statistics from final hidden states: log-probabilities and full-vocabulary KL, streamed in chunks.

Shape legend: T target tokens, D width, V vocabulary, C tokens of one chunk. No [T, V] tensor is ever held: a chunk's
logits live as long as the chunk. Sums are taken in float32 (float64 stays float64) whatever the model's dtype.

A token's statistics depend on its own hidden state alone, so that the gradient of a loss is

    dL/dh_t = (dL/dlogp_t) dlogp_t/dh_t + (dL/dKL_t) dKL_t/dh_t

whatever the loss is. Both derivatives, [T, D], are taken while a chunk's logits are there, and the backward pass only
scales them: no logit is computed twice. Where the weight trains, its own gradient needs the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]

HALF = (torch.bfloat16, torch.float16)
BLOCKED = -1e9  # finite, so that a difference of two blocked entries is zero and not NaN
CHUNK_ELEMENTS = 1 << 24  # logits held at once on a GPU: 64 MiB in float32
CHUNK_ELEMENTS_CPU = 1 << 22  # on a CPU: 16 MiB, which its caches hold and its allocator keeps
WIDENED = 1 << 20  # elements of a half-precision weight that are in float32 at once on a CPU


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
        if hidden_CD.dtype not in HALF:
            return hidden_CD @ weight_VD.to(hidden_CD.dtype).T
        if hidden_CD.is_cuda:  # its sums are in float32, and may be had as they are
            return torch.mm(hidden_CD, weight_VD.to(hidden_CD.dtype).T, out_dtype=torch.float32)
        return _widened_product(hidden_CD.float(), weight_VD)

    def chunks(self, total: int) -> list[slice]:
        """Runs of tokens whose logits are held at once."""
        elements = CHUNK_ELEMENTS_CPU if self.weight_VD.device.type == "cpu" else CHUNK_ELEMENTS
        size = max(1, elements // self.weight_VD.shape[0])
        return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _widened_product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T in float32, of numbers that are in half precision: [C, V].

    The weight is widened block by block: no second copy of it is held.
    """
    rows = max(1, WIDENED // weight_VD.shape[1])
    logits_CV = hidden_CD.new_empty(len(hidden_CD), len(weight_VD))
    with exact_products():
        for start in range(0, len(weight_VD), rows):
            block_ND = weight_VD[start : start + rows].float()
            logits_CV[:, start : start + rows] = hidden_CD @ block_ND.T
    return logits_CV


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products through oneDNN, about twice as fast as the default on some CPUs.

    It may round its inputs to bfloat16, which changes nothing in numbers that were in bfloat16; sums are in float32.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def token_logps(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    """Log-probability of each target token, [T] in nats."""
    logp_T: Tensor = _Streamed.apply(hidden_TD, _weight(head), targets_T, head, None, None)[0]
    return logp_T


def token_logps_and_kl(
    hidden_TD: Tensor, targets_T: Tensor, head: Head, reference_hidden_TD: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the KL divergence of its whole next-token distribution, both [T], nats.

    `reverse` is D(policy || reference), `forward` is D(reference || policy). The reference's distribution is rebuilt
    from its own final hidden states through its own head (`head.reference`; `head` itself where there is none), and no
    gradient goes there.
    """
    logp_T, kl_T = _Streamed.apply(hidden_TD, _weight(head), targets_T, head, reference_hidden_TD.detach(), direction)
    return logp_T, kl_T


def _weight(head: Head) -> Tensor:
    """The output layer as autograd sees it: a forward pass alone prepares for no gradient."""
    return head.weight_VD if torch.is_grad_enabled() else head.weight_VD.detach()


@dataclass(frozen=True)
class _Chunk:
    """A chunk's log-probabilities under the policy, and the gap to the reference's where there is one, both [C, V]."""

    logp_CV: Tensor
    slope_CV: Tensor | None  # d capped logit / d logit, where logits are capped
    ref_CV: Tensor | None
    direction: Direction | None

    @classmethod
    def of(cls, hidden_CD: Tensor, head: Head, reference_CD: Tensor | None, direction: Direction | None) -> _Chunk:
        capped_CV = head.logits(hidden_CD)
        slope_CV = None if head.softcap is None else 1 - (capped_CV / head.softcap) ** 2
        reference = head.reference or head
        ref_CV = None if reference_CD is None else reference.logits(reference_CD).log_softmax(-1)
        return cls(capped_CV.log_softmax(-1), slope_CV, ref_CV, direction)

    def statistics(self, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(log-probabilities [C], KL [C], d logp / d logits [C, V], d KL / d logits [C, V] or None).

        d logp = onehot - p; reverse KL: p (log p - log q - KL); forward: p - q. Consumes what is held.
        """
        at = targets_C[:, None]
        logp_C = self.logp_CV.gather(-1, at)[:, 0]
        kl_C, slope_kl_CV = torch.zeros_like(logp_C), None
        if self.ref_CV is not None and self.direction == "forward":
            q_CV = self.ref_CV.exp()
            kl_C = torch.linalg.vecdot(q_CV, self.ref_CV.sub_(self.logp_CV))
            p_CV = self.logp_CV.exp_()
            slope_kl_CV = torch.sub(p_CV, q_CV, out=q_CV)
        elif self.ref_CV is not None:
            gap_CV = torch.sub(self.logp_CV, self.ref_CV, out=self.ref_CV)
            p_CV = self.logp_CV.exp_()
            kl_C = torch.linalg.vecdot(p_CV, gap_CV)
            slope_kl_CV = gap_CV.sub_(kl_C[:, None]).mul_(p_CV)
        else:
            p_CV = self.logp_CV.exp_()
        slope_CV = p_CV.neg_().scatter_add_(-1, at, torch.ones_like(p_CV[:, :1]))
        if self.slope_CV is not None:
            slope_CV *= self.slope_CV
            slope_kl_CV = None if slope_kl_CV is None else slope_kl_CV.mul_(self.slope_CV)
        return logp_C, kl_C, slope_CV, slope_kl_CV


class _Streamed(torch.autograd.Function):
    """By chunks of target tokens; gradients for hidden_TD, and for the weight where it trains."""

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
        wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        logp_T = torch.empty(len(targets_T), dtype=wide, device=hidden_TD.device)
        kl_T = torch.zeros_like(logp_T)
        need, both = any(ctx.needs_input_grad[:2]), reference_TD is not None
        slopes = [torch.empty_like(hidden_TD) for _ in range(1 + both)] if need else []
        narrow = weight_VD.to(hidden_TD.dtype)
        for s in head.chunks(len(targets_T)):
            part_CD = None if reference_TD is None else reference_TD[s]
            chunk = _Chunk.of(hidden_TD[s], head, part_CD, direction)
            logp_T[s], kl_T[s], *slopes_CV = chunk.statistics(targets_T[s])
            for slope_TD, slope_CV in zip(slopes, slopes_CV, strict=False):
                if slope_CV is not None:
                    slope_TD[s] = slope_CV.to(hidden_TD.dtype) @ narrow
        ctx.head, ctx.direction = head, direction
        again = [hidden_TD, targets_T, *([reference_TD] if both else [])] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(weight_VD, *slopes, *again)
        ctx.both = both
        return logp_T, kl_T

    @staticmethod
    def backward(ctx: Any, g_logp_T: Tensor, g_kl_T: Tensor) -> tuple[Tensor | None, ...]:
        weight_VD, *rest = ctx.saved_tensors
        slopes, again = rest[: 1 + ctx.both], rest[1 + ctx.both :]
        g_hidden_TD = slopes[0] * g_logp_T[:, None].to(slopes[0].dtype)
        if ctx.both:
            g_hidden_TD.addcmul_(slopes[1], g_kl_T[:, None].to(slopes[1].dtype))
        g_weight_VD = _weight_gradient(ctx, weight_VD, again, g_logp_T, g_kl_T) if again else None
        return g_hidden_TD, g_weight_VD, None, None, None, None


def _weight_gradient(ctx: Any, weight_VD: Tensor, again: list[Tensor], g_logp_T: Tensor, g_kl_T: Tensor) -> Tensor:
    """Of the output layer where it trains, from logits that are computed again."""
    hidden_TD, targets_T, *reference = again
    found_VD = torch.zeros_like(weight_VD, dtype=g_logp_T.dtype)
    for s in ctx.head.chunks(len(targets_T)):
        chunk = _Chunk.of(hidden_TD[s], ctx.head, reference[0][s] if reference else None, ctx.direction)
        _, _, slope_CV, slope_kl_CV = chunk.statistics(targets_T[s])
        slope_CV.mul_(g_logp_T[s, None])
        if slope_kl_CV is not None:
            slope_CV.add_(slope_kl_CV.mul_(g_kl_T[s, None]))
        found_VD += (slope_CV.to(hidden_TD.dtype).T @ hidden_TD[s]).to(found_VD.dtype)
    return found_VD.to(weight_VD.dtype)
