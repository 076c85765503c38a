"""Per-token statistics from final hidden states: log-probabilities and full-vocabulary KL, streamed in blocks.

Shape legend: T target tokens, D width, V vocabulary, C tokens of one chunk, N words of one block. No [T, V] tensor is
ever held: logits are computed block by block, and a block fits a CPU's cache. Sums are in float32 (float64 for float64)
for any dtype of the model.

A token's statistics depend on its own hidden state only, so the gradient of any loss is

    dL/dh_t = (dL/dlogp_t) dlogp_t/dh_t + (dL/dKL_t) dKL_t/dh_t

Both derivatives, [T, D], are computed in the forward pass and only scaled in the backward pass: no logit is computed
twice. If the output weight is trained, its own gradient recomputes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]

HALF = (torch.bfloat16, torch.float16)
BLOCKED = -1e9  # finite, so that a difference of two blocked entries is zero and not NaN
CHUNK_ELEMENTS = 1 << 24  # logits held at once on a GPU: 64 MiB in float32
HELD_ELEMENTS = 1 << 22  # logits held at once on a CPU, if a whole chunk is held: 16 MiB
ROWS = 512  # tokens of a chunk on a CPU
BLOCK_ELEMENTS = 1 << 19  # logits of a block on a CPU: 2 MiB, which two cores' caches hold
ROUND = 64  # CPU products are padded to a multiple of this many rows, so that few shapes are compiled


@dataclass(frozen=True)
class Logits:
    """Soft-capped logits of words `start` to `stop`, [C, N], and d capped / d raw if soft-capped."""

    start: int
    stop: int
    capped_CN: Tensor
    slope_CN: Tensor | None
    weight_ND: Tensor

    def times_weight(self, parts: Seq[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the sum over words of each part [C, N] times d logit / d hidden, [parts C, D], in `dtype`."""
        scaled = parts if self.slope_CN is None else [p * self.slope_CN for p in parts]
        return torch.cat([p.to(dtype) for p in scaled]) @ self.weight_ND.to(dtype)

    def rows(self, some: slice) -> Logits:
        """Return the logits of a slice of the tokens."""
        slope_CN = None if self.slope_CN is None else self.slope_CN[some]
        return replace(self, capped_CN=self.capped_CN[some], slope_CN=slope_CN)


@dataclass(frozen=True)
class Head:
    """The output layer: logits_TV = softcap(hidden_TD @ weight_VD.T).

    `softcap`: Gemma 2's final logit soft-capping, c * tanh(logits / c), or None. `blocked`: ids that are read but never
    predicted (control tokens), excluded from the distribution. `reference`: output layer for the reference's hidden
    states, if it differs (the policy's output weight, or an embedding tied to it, is trained).
    """

    weight_VD: Tensor
    softcap: float | None = None
    blocked: tuple[int, ...] = ()
    reference: Head | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return [C, V] logits in float32 (or float64), never rounded to half precision."""
        return torch.cat([block.capped_CN for block in self.blocks(hidden_CD)], -1)

    def greedy(self, hidden_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the most probable token, its logit) for each state, [B]; NaN if a logit is. The first of equals wins.

        Only the block of the largest logit is searched: finding a position takes several times as long as a maximum.
        """
        blocks = list(self.blocks(hidden_BD))
        largest_BK = torch.stack([block.capped_CN.amax(-1) for block in blocks], -1)  # amax propagates NaN
        winner_B = largest_BK.argmax(-1)
        token_B = torch.empty_like(winner_B)
        for k, block in enumerate(blocks):
            (rows,) = (winner_B == k).nonzero(as_tuple=True)
            token_B[rows] = block.start + block.capped_CN[rows].argmax(-1)
        return token_B, largest_BK.amax(-1)

    def blocks(self, hidden_CD: Tensor) -> Iterator[Logits]:
        """Yield the logits block by block; on a CPU a half-precision weight is widened one block at a time."""
        words = len(self.weight_VD)
        widen = hidden_CD.dtype in HALF and not hidden_CD.is_cuda
        states_CD = hidden_CD.float() if widen else hidden_CD
        size = max(1, BLOCK_ELEMENTS // max(1, len(hidden_CD))) if hidden_CD.device.type == "cpu" else words
        for start in range(0, words, size):
            weight_ND = self.weight_VD[start : start + size]
            with torch.autocast(hidden_CD.device.type, enabled=False):
                raw_CN = _widened_product(states_CD, weight_ND) if widen else _product(states_CD, weight_ND)
            capped_CN = raw_CN if self.softcap is None else self.softcap * torch.tanh(raw_CN / self.softcap)
            slope_CN = None if self.softcap is None else self.slope(capped_CN)
            if here := [i - start for i in self.blocked if start <= i < start + size]:
                capped_CN[:, here] = BLOCKED
            yield Logits(start, min(start + size, words), capped_CN, slope_CN, weight_ND)

    def slope(self, capped: Tensor) -> Tensor:
        """Return d capped logit / d logit."""
        assert self.softcap is not None
        return 1 - (capped / self.softcap) ** 2

    def chunks(self, total: int, *, held: bool = False) -> list[slice]:
        """Return slices of tokens whose logits are computed together, about equally long on a CPU.

        `held`: all logits of a slice are in memory at once.
        """
        words = len(self.weight_VD)
        if self.weight_VD.device.type != "cpu":
            size = max(1, CHUNK_ELEMENTS // words)
        else:
            most = max(1, min(ROWS, HELD_ELEMENTS // words)) if held else ROWS
            size = max(1, min(most, filled(-(-total // max(1, -(-total // most))))))
        return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def filled(rows: int, multiple: int = ROUND) -> int:
    """Round up to the next multiple."""
    return -(-rows // multiple) * multiple


def _product(hidden_CD: Tensor, weight_ND: Tensor) -> Tensor:
    weight_ND = weight_ND.to(hidden_CD.dtype)
    if hidden_CD.dtype in HALF:  # on a GPU: return the float32 accumulator without rounding it
        return torch.mm(hidden_CD, weight_ND.T, out_dtype=torch.float32)
    return hidden_CD @ weight_ND.T


def _widened_product(hidden_CD: Tensor, weight_ND: Tensor) -> Tensor:
    with _COARSE_INPUTS if weight_ND.dtype == torch.bfloat16 else nullcontext():
        return hidden_CD @ weight_ND.float().T


class _CoarseInputs:
    """float32 products through oneDNN, about twice as fast as the default on some CPUs.

    It may round its inputs to bfloat16, which is exact for bfloat16 inputs; sums are in float32. The setting is global
    to the process: of several threads the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock, self._within, self._before = Lock(), 0, ""
        self._settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._before, self._settings.fp32_precision = self._settings.fp32_precision, "bf16"
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._settings.fp32_precision = self._before


_COARSE_INPUTS = _CoarseInputs()


MOVED = 0.1  # nats


def token_logps(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    """Return the log-probability of each target token, [T], nats."""
    logp_T: Tensor = _Streamed.apply(hidden_TD, _weight(head), targets_T, head, None, None)[0]
    return logp_T


def token_logps_and_kl(
    hidden_TD: Tensor, targets_T: Tensor, head: Head, reference_hidden_TD: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Return each target token's log-probability and the KL of its next-token distribution, both [T], nats.

    `reverse` is D(policy || reference), `forward` is D(reference || policy). The reference's distribution is computed
    from its own final hidden states through its own head (`head.reference`, else `head`), without gradient.
    """
    logp_T, kl_T = _Streamed.apply(hidden_TD, _weight(head), targets_T, head, reference_hidden_TD.detach(), direction)
    return logp_T, kl_T


def _weight(head: Head) -> Tensor:
    """Return the output weight; detached when no gradient is needed."""
    return head.weight_VD if torch.is_grad_enabled() else head.weight_VD.detach()


@dataclass
class _Normaliser:
    """Streaming log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3)."""

    largest_C1: Tensor
    sum_C1: Tensor

    @classmethod
    def of(cls, hidden_CD: Tensor, dtype: torch.dtype) -> _Normaliser:
        nothing = torch.zeros(len(hidden_CD), 1, dtype=dtype, device=hidden_CD.device)
        return cls(torch.full_like(nothing, -torch.inf), nothing)

    def add(self, logits_CN: Tensor) -> tuple[Tensor, Tensor]:
        """Return (exp of the logits minus the running maximum, rescaling factor of the earlier sums)."""
        largest_C1 = torch.maximum(self.largest_C1, logits_CN.amax(-1, keepdim=True))
        exp_CN = (logits_CN - largest_C1).exp_()
        scale_C1 = (self.largest_C1 - largest_C1).exp_()
        self.sum_C1 = self.sum_C1 * scale_C1 + exp_CN.sum(-1, keepdim=True)
        self.largest_C1 = largest_C1
        return exp_CN, scale_C1

    @property
    def log_C1(self) -> Tensor:
        return self.largest_C1 + self.sum_C1.log()

    def less(self, other: _Normaliser) -> Tensor:
        """Return the difference of two log-sum-exps without cancellation of their rounded values."""
        return (self.largest_C1 - other.largest_C1) + (self.sum_C1 / other.sum_C1).log()


def _picked(found_C: Tensor, block: Logits, targets_C: Tensor) -> Tensor:
    """Add the targets' logits found in this block."""
    here_C = (targets_C >= block.start) & (targets_C < block.stop)
    at_C = (targets_C - block.start).clamp(0, block.stop - block.start - 1)
    return torch.where(here_C, block.capped_CN.gather(-1, at_C[:, None])[:, 0], found_C)


def _onehot_part(head: Head, hidden_CD: Tensor, targets_C: Tensor, logit_C: Tensor) -> Tensor:
    """Return d target logit / d hidden, [C, D]."""
    rows_CD = head.weight_VD.index_select(0, targets_C).to(hidden_CD.dtype)
    return rows_CD if head.softcap is None else rows_CD * head.slope(logit_C)[:, None].to(rows_CD.dtype)


def _logps(hidden_CD: Tensor, targets_C: Tensor, head: Head, wide: torch.dtype, *, slopes: bool) -> list[Tensor]:
    """Return [logp, and with `slopes` d logp / d hidden = W_y - sum_v p_v W_v] in one pass over the blocks."""
    norm, logit_C = _Normaliser.of(hidden_CD, wide), torch.zeros(len(hidden_CD), dtype=wide, device=hidden_CD.device)
    mean_CD = torch.zeros(hidden_CD.shape, dtype=wide, device=hidden_CD.device) if slopes else None
    for block in head.blocks(hidden_CD):
        logit_C = _picked(logit_C, block, targets_C)
        exp_CN, scale_C1 = norm.add(block.capped_CN)
        if mean_CD is not None:
            mean_CD.mul_(scale_C1).add_(block.times_weight((exp_CN,), hidden_CD.dtype))
    logp_C = logit_C - norm.log_C1[:, 0]
    if mean_CD is None:
        return [logp_C]
    return [logp_C, _onehot_part(head, hidden_CD, targets_C, logit_C) - mean_CD.div_(norm.sum_C1)]


def _logps_and_kl(
    hidden_CD: Tensor,
    reference_CD: Tensor,
    targets_C: Tensor,
    head: Head,
    direction: Direction,
    wide: torch.dtype,
    *,
    slopes: bool,
) -> list[Tensor]:
    """Return [logp, KL, and with `slopes` their derivatives by the hidden state] in one pass over the blocks.

    With z and z' the logits of policy and reference, log Z and log Z' their normalisers and g = z - z' - c for any c:

        D(p || q) = E_p g + c - log Z/Z',   derivative by z: p (g - E_p g)
        D(q || p) = log Z/Z' - c - E_q g,   derivative by z: p - q

    c stays within MOVED of the running log Z/Z', and earlier sums are shifted with it, so that g is as small as
    log p - log q where the probability mass is.
    """
    ours, theirs = (_Normaliser.of(hidden_CD, wide) for _ in range(2))
    reverse = direction == "reverse"
    weighing = ours if reverse else theirs
    logit_C = torch.zeros(len(hidden_CD), dtype=wide, device=hidden_CD.device)
    c_C1, gap_C1 = (torch.zeros_like(logit_C)[:, None] for _ in range(2))
    sums = torch.zeros(2, *hidden_CD.shape, dtype=wide, device=hidden_CD.device) if slopes else None
    for block, reference in _side_by_side(head, hidden_CD, reference_CD):
        logit_C, before_C1 = _picked(logit_C, block, targets_C), weighing.sum_C1
        (p_CN, grown_C1), (q_CN, theirs_grown_C1) = ours.add(block.capped_CN), theirs.add(reference.capped_CN)
        other_grown_C1 = grown_C1 if reverse else theirs_grown_C1
        move_C1 = ours.less(theirs) - c_C1
        move_C1 = torch.where(move_C1.abs() > MOVED, move_C1, 0.0)
        if move_C1.any():
            c_C1, gap_C1 = c_C1 + move_C1, gap_C1 - move_C1 * before_C1
            if sums is not None and reverse:
                sums[1].addcmul_(sums[0], move_C1, value=-1)
        weighed_CN = torch.sub(block.capped_CN, reference.capped_CN, out=reference.capped_CN).sub_(c_C1)
        weighed_CN.mul_(p_CN if reverse else q_CN)
        gap_C1 = gap_C1 * other_grown_C1 + weighed_CN.sum(-1, keepdim=True)
        if sums is not None:
            sums[0].mul_(grown_C1)
            sums[1].mul_(other_grown_C1)
            other_CN = weighed_CN if reverse else q_CN
            sums += block.times_weight((p_CN, other_CN), hidden_CD.dtype).unflatten(0, (2, -1))
    gap_C1, away_C1 = gap_C1 / weighing.sum_C1, ours.less(theirs) - c_C1
    found = [logit_C - ours.log_C1[:, 0], (gap_C1 - away_C1 if reverse else away_C1 - gap_C1)[:, 0]]
    if sums is not None:
        mean_CD, slope_kl_CD = _means(sums, ours, weighing, gap_C1, reverse=reverse)
        found += [_onehot_part(head, hidden_CD, targets_C, logit_C) - mean_CD, slope_kl_CD]
    return found


def _means(
    sums: Tensor, ours: _Normaliser, weighing: _Normaliser, gap_C1: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return E_p W, and the derivative of the KL by the hidden state, from their unnormalised sums (overwritten)."""
    mean_CD, other_CD = sums[0].div_(ours.sum_C1), sums[1].div_(weighing.sum_C1)
    return mean_CD, other_CD.addcmul_(gap_C1, mean_CD, value=-1) if reverse else mean_CD - other_CD


def _side_by_side(head: Head, hidden_CD: Tensor, reference_CD: Tensor) -> Iterator[tuple[Logits, Logits]]:
    """Yield blocks of the policy's and the reference's logits; one product if they share a head."""
    if head.reference is not None:
        yield from zip(head.blocks(hidden_CD), head.reference.blocks(reference_CD), strict=True)
        return
    for both in head.blocks(torch.cat([hidden_CD, reference_CD])):
        yield both.rows(slice(0, len(hidden_CD))), both.rows(slice(len(hidden_CD), None))


def _filled(chunk: Tensor) -> Tensor:
    """Pad with zero rows on a CPU, so that products have few shapes."""
    missing = filled(len(chunk)) - len(chunk) if chunk.device.type == "cpu" else 0
    return torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk


class _Streamed(torch.autograd.Function):
    """Autograd function over chunks of target tokens; gradients for hidden_TD and, if trained, the weight."""

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
        slopes, found = any(ctx.needs_input_grad[:2]), []
        for s in head.chunks(len(targets_T)) or [slice(0, 0)]:
            hidden_CD, targets_C = _filled(hidden_TD[s]), _filled(targets_T[s])
            if reference_TD is None or direction is None:
                part = _logps(hidden_CD, targets_C, head, wide, slopes=slopes)
            else:
                states = hidden_CD, _filled(reference_TD[s])
                part = _logps_and_kl(*states, targets_C, head, direction, wide, slopes=slopes)
            found.append([t[: s.stop - s.start] for t in part])
        logp_T, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        kl_T = rest.pop(0) if reference_TD is not None and rest else torch.zeros_like(logp_T)
        ctx.head, ctx.direction, ctx.kept = head, direction, len(rest)
        again = [hidden_TD, targets_T, *([] if reference_TD is None else [reference_TD])]
        kept = [slope_TD.to(hidden_TD.dtype) for slope_TD in rest]
        ctx.save_for_backward(weight_VD, *kept, *(again if ctx.needs_input_grad[1] else []))
        return logp_T, kl_T

    @staticmethod
    def backward(ctx: Any, g_logp_T: Tensor, g_kl_T: Tensor) -> tuple[Tensor | None, ...]:
        weight_VD, *rest = ctx.saved_tensors
        slopes, again = rest[: ctx.kept], rest[ctx.kept :]
        g_hidden_TD = slopes[0] * g_logp_T[:, None].to(slopes[0].dtype)
        if len(slopes) > 1:
            g_hidden_TD.addcmul_(slopes[1], g_kl_T[:, None].to(slopes[1].dtype))
        g_weight_VD = _weight_gradient(ctx, weight_VD, again, g_logp_T, g_kl_T) if again else None
        return g_hidden_TD, g_weight_VD, None, None, None, None


def _weight_gradient(ctx: Any, weight_VD: Tensor, again: list[Tensor], g_logp_T: Tensor, g_kl_T: Tensor) -> Tensor:
    """Return the gradient of a trained output weight, from recomputed logits."""
    hidden_TD, targets_T, *reference = again
    found_VD = torch.zeros_like(weight_VD, dtype=g_logp_T.dtype)
    for s in ctx.head.chunks(len(targets_T), held=True):
        blocks = list(ctx.head.blocks(hidden_TD[s]))
        log_C1 = _log_sum(hidden_TD[s], blocks)
        slopes = _logp_slopes(blocks, log_C1, targets_T[s], g_logp_T[s, None])
        if reference:
            theirs = list((ctx.head.reference or ctx.head).blocks(reference[0][s]))
            gaps = (log_C1, _log_sum(hidden_TD[s], theirs))
            kls = _kl_slopes(blocks, theirs, gaps, ctx.direction, g_kl_T[s, None])
            slopes = (a.add_(b) for a, b in zip(slopes, kls, strict=True))
        for block, slope_CN in zip(blocks, slopes, strict=True):
            raw_CN = slope_CN if block.slope_CN is None else slope_CN * block.slope_CN
            found_VD[block.start : block.stop] += (raw_CN.to(hidden_TD.dtype).T @ hidden_TD[s]).to(found_VD.dtype)
    return found_VD.to(weight_VD.dtype)


def _log_sum(hidden_CD: Tensor, blocks: list[Logits]) -> Tensor:
    norm = _Normaliser.of(hidden_CD, blocks[0].capped_CN.dtype)
    for block in blocks:
        norm.add(block.capped_CN)
    return norm.log_C1


def _logp_slopes(blocks: list[Logits], log_C1: Tensor, targets_C: Tensor, g_C1: Tensor) -> Iterator[Tensor]:
    """Yield g (onehot - p), block by block."""
    for block in blocks:
        slope_CN = (block.capped_CN - log_C1).exp_().neg_()
        words_N = torch.arange(block.start, block.stop, device=targets_C.device)
        yield slope_CN.add_(targets_C[:, None] == words_N).mul_(g_C1)


def _kl_slopes(
    ours: list[Logits], theirs: list[Logits], logs: tuple[Tensor, Tensor], direction: Direction, g_C1: Tensor
) -> Iterator[Tensor]:
    """Yield g p (gap - KL), or g (p - q), block by block."""
    pairs = [(a.capped_CN - logs[0], b.capped_CN - logs[1]) for a, b in zip(ours, theirs, strict=True)]
    kl_C1 = torch.stack([(a.exp() * (a - b)).sum(-1, keepdim=True) for a, b in pairs]).sum(0)
    for a, b in pairs:
        yield g_C1 * (a.exp() * (a - b - kl_C1) if direction == "reverse" else a.exp() - b.exp())
