"""Forward and backward kernels of a decoder layer.

Shape legend: T tokens, D width, F inner width, H query heads, K key heads, G = H / K, E width of a head, R rank.
Statistics (norms, softmax) use float32 or wider for any dtype; products use the dtype of the states.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leeway.model.packing import Block, Blocks

SPAN = 64  # query positions


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class AddNorm(torch.autograd.Function):
    """(x + delta, its root-mean-square norm times weight); Zhang and Sennrich 2019, arXiv 1910.07467, equation 4."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
        scale_T1 = _norm_scale(sum_TD, eps)
        y_TD = _normed(sum_TD, scale_T1, weight_D)
        ctx.save_for_backward(sum_TD, scale_T1, weight_D)
        ctx.single = delta_TD is None
        ctx.set_materialize_grads(False)
        return (sum_TD.view_as(sum_TD) if delta_TD is None else sum_TD), y_TD

    @staticmethod
    def backward(ctx: Any, g_sum_TD: Tensor | None, g_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TD, scale_T1, weight_D = ctx.saved_tensors
        found = g_sum_TD if g_TD is None else _norm_backward(sum_TD, scale_T1, weight_D, g_TD, g_sum_TD)
        return found, (None if ctx.single else found), None, None


def _norm_scale(x_TD: Tensor, eps: float) -> Tensor:
    """Return the inverse root mean square of each token, [T, 1]."""
    norm_T1: Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide(x_TD.dtype))
    return norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()


def _normed(x_TD: Tensor, scale_T1: Tensor, weight_D: Tensor) -> Tensor:
    return (x_TD * scale_T1).mul_(weight_D).to(x_TD.dtype)


def _norm_backward(
    x_TD: Tensor, scale_T1: Tensor, weight_D: Tensor, g_TD: Tensor, residual_TD: Tensor | None
) -> Tensor:
    """s (g w) - s^3 x <g w, x> / D with s the token's scale; `residual` is added before rounding."""
    kind = wide(x_TD.dtype)
    g_wide_TD, x_wide_TD = g_TD.to(kind, copy=True).mul_(weight_D), x_TD.to(kind)
    along_T1 = torch.linalg.vecdot(g_wide_TD, x_wide_TD).unsqueeze_(-1)
    along_T1.mul_(scale_T1**3).div_(-x_TD.shape[-1])
    g_wide_TD.mul_(scale_T1).addcmul_(x_wide_TD, along_T1)
    if residual_TD is not None:
        g_wide_TD.add_(residual_TD)
    return g_wide_TD.to(x_TD.dtype)


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up; Shazeer 2020, arXiv 2002.05202, equation 5."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        open_TF = torch.nn.functional.silu(gate_TF)
        ctx.save_for_backward(gate_TF, up_TF, open_TF)
        return open_TF * up_TF

    @staticmethod
    def backward(ctx: Any, g_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF, open_TF = ctx.saved_tensors
        g_gate_TF = torch.ops.aten.silu_backward(g_TF * up_TF, gate_TF)
        return g_gate_TF, g_TF * open_TF


@dataclass(frozen=True)
class LowRank:
    """Linear layers of one input, each with its low-rank update: x W' + b + s (m x / keep) A' B'.

    W and b are frozen: the input and A, B get gradients. `places` of the flattened input are dropped before A, the same
    for all layers of the input (Hu et al. 2021, arXiv 2106.09685, equation 3, with dropout as in peft).
    """

    frozen: Seq[tuple[Tensor, Tensor | None]]
    scalings: Seq[float]
    keep: float  # 1 - rate of the dropout
    places: Tensor | None

    def drop(self, x_TD: Tensor) -> Tensor:
        """Zero the dropped places of a contiguous input in place."""
        if self.places is not None:
            x_TD.view(-1).index_fill_(0, self.places, 0)
        return x_TD

    def plain(self, x_TD: Tensor) -> list[Tensor]:
        """Return the frozen layers' outputs."""
        return [torch.nn.functional.linear(x_TD, W, b) for W, b in self.frozen]

    def update(self, ctx: Any, found: list[Tensor], kept_TD: Tensor, low: Seq[Tensor]) -> Tensor:
        """Add the updates of a dropped input to `found`; return z = A x, [T, R] of all layers."""
        A_RD, sizes = torch.cat([A.to(kept_TD.dtype) for A in low[::2]]), [len(A) for A in low[::2]]
        Bs = [(B * (s / self.keep)).to(kept_TD.dtype) for B, s in zip(low[1::2], self.scalings, strict=True)]
        z_TR = kept_TD @ A_RD.T
        for y_TO, z, B_OR in zip(found, z_TR.split(sizes, 1), Bs, strict=True):
            y_TO.addmm_(z, B_OR.T)
        ctx.layers, ctx.packed = self, (A_RD, Bs, sizes)
        return z_TR

    def backward(
        self, ctx: Any, kept_TD: Tensor, z_TR: Tensor, low: Seq[Tensor], g: Seq[Tensor], *, wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of the input (None unless `wanted`) and of A, B of each layer."""
        A_RD, Bs, sizes = ctx.packed
        g_z_TR = torch.cat([g_TO @ B_OR for g_TO, B_OR in zip(g, Bs, strict=True)], 1)
        g_A_RD = g_z_TR.T @ kept_TD
        g_low: list[Tensor] = []
        scaled = zip(g, z_TR.split(sizes, 1), g_A_RD.split(sizes, 0), self.scalings, low[::2], strict=True)
        for g_TO, z, g_A, s, A in scaled:
            g_low += [g_A.to(A.dtype), (g_TO.T @ z).to(A.dtype).mul_(s / self.keep)]
        if not wanted:
            return None, g_low
        g_x_TD = self.drop(g_z_TR @ A_RD)
        for g_TO, (W, _) in zip(g, self.frozen, strict=True):
            g_x_TD.addmm_(g_TO, W)
        return g_x_TD, g_low


class Linears(torch.autograd.Function):
    """`LowRank` layers of an input."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layers: LowRank, *low: Tensor) -> tuple[Tensor, ...]:
        found = layers.plain(x_TD)
        dropped = layers.places is not None
        kept_TD = layers.drop(x_TD.clone(memory_format=torch.contiguous_format)) if dropped else x_TD
        ctx.save_for_backward(kept_TD, layers.update(ctx, found, kept_TD, low), *low)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        kept_TD, z_TR, *low = ctx.saved_tensors
        g_x_TD, g_low = ctx.layers.backward(ctx, kept_TD, z_TR, low, g, wanted=ctx.needs_input_grad[0])
        return g_x_TD, None, *g_low


class NormLinears(torch.autograd.Function):
    """(x + delta, `LowRank` layers of its norm); the norm is computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, layers: LowRank, *low: Tensor
    ) -> tuple[Tensor, ...]:
        sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
        scale_T1 = _norm_scale(sum_TD, eps)
        y_TD = _normed(sum_TD, scale_T1, weight_D)
        found = layers.plain(y_TD)
        z_TR = layers.update(ctx, found, layers.drop(y_TD), low)
        ctx.save_for_backward(sum_TD, scale_T1, weight_D, z_TR, *low)
        ctx.single = delta_TD is None
        ctx.set_materialize_grads(False)
        return (sum_TD.view_as(sum_TD) if delta_TD is None else sum_TD), *found

    @staticmethod
    def backward(ctx: Any, g_sum_TD: Tensor | None, *used: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TD, scale_T1, weight_D, z_TR, *low = ctx.saved_tensors
        kept_TD = ctx.layers.drop(_normed(sum_TD, scale_T1, weight_D))
        outputs = zip(used, ctx.layers.frozen, strict=True)  # one that nothing used has no gradient
        g = tuple(sum_TD.new_zeros(len(sum_TD), len(W)) if g_TO is None else g_TO for g_TO, (W, _) in outputs)
        wanted = any(ctx.needs_input_grad[:2])
        g_y_TD, g_low = ctx.layers.backward(ctx, kept_TD, z_TR, low, g, wanted=wanted)
        found = g_sum_TD if g_y_TD is None else _norm_backward(sum_TD, scale_T1, weight_D, g_y_TD, g_sum_TD)
        return found, (None if ctx.single else found), None, None, None, *g_low


class GatedLinear(torch.autograd.Function):
    """A `LowRank` layer of silu(gate) * up, which is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, layers: LowRank, *low: Tensor) -> Tensor:
        x_TF = torch.nn.functional.silu(gate_TF).mul_(up_TF)
        found = layers.plain(x_TF)
        ctx.save_for_backward(gate_TF, up_TF, layers.update(ctx, found, layers.drop(x_TF), low), *low)
        return found[0]

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        gate_TF, up_TF, z_TR, *low = ctx.saved_tensors
        open_TF = torch.nn.functional.silu(gate_TF)
        kept_TF = ctx.layers.drop(open_TF * up_TF)
        g_TF, g_low = ctx.layers.backward(ctx, kept_TF, z_TR, low, (g_TD,), wanted=True)
        del kept_TF
        g_gate_TF = torch.ops.aten.silu_backward(g_TF * up_TF, gate_TF)
        return g_gate_TF, g_TF.mul_(open_TF), None, *g_low


class Attention(torch.autograd.Function):
    """softmax(scale q k') v within each prefix tree, after rotary embedding of q and k.

    q_TD: H heads, k_TD and v_TD: K heads, each head contiguous. Rotary embedding: Su et al. 2021, arXiv 2104.09864,
    equation 34, pairing the halves of a head; cos_TE, sin_TE in transformers' layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_TD: Tensor,
        k_TD: Tensor,
        v_TD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        blocks: Blocks,
        biases: Seq[Tensor],
        scale: float,
    ) -> Tensor:
        width = cos_TE.shape[-1]
        groups = q_TD.shape[1] // k_TD.shape[1]
        q_TD, k_TD = rotate(q_TD, cos_TE, sin_TE), rotate(k_TD, cos_TE, sin_TE)
        saved: list[Tensor] = []
        found = []
        for block, bias in zip(blocks.blocks, biases, strict=True):
            q, k, v = heads(q_TD, block, width, groups), heads(k_TD, block, width), heads(v_TD, block, width)
            out, saved = torch.empty_like(q), [*saved, q, k, v]
            for start, stop in _spans(k.shape[1]):
                rows = slice(start * groups, stop * groups)
                p = scores(q[:, rows], k[:, :stop], bias[..., start:stop, :stop], scale, groups).softmax(-1)
                out[:, rows] = torch.bmm(p, v[:, :stop])
                saved.append(p)
            found.append(positions(out, block, groups))
        ctx.save_for_backward(cos_TE, sin_TE, *saved)
        ctx.blocks, ctx.scale, ctx.groups = blocks, scale, groups
        return to_row(found, blocks)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        cos_TE, sin_TE, *saved = ctx.saved_tensors
        width, groups, left = cos_TE.shape[-1], ctx.groups, iter(saved)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for block in ctx.blocks.blocks:
            q, k, v = next(left), next(left), next(left)
            g = heads(g_TD, block, width, groups, padding=0.0)
            spans = [(start, stop, next(left)) for start, stop in _spans(k.shape[1])]
            g_q, g_k, g_v = _attention_backward(q, k, v, g, spans, ctx.scale)
            parts.append((positions(g_q, block, groups), positions(g_k, block, 1), positions(g_v, block, 1)))
        g_q_TD, g_k_TD, g_v_TD = (to_row(list(p), ctx.blocks) for p in zip(*parts, strict=True))
        g_q_TD, g_k_TD = (_rotate_backward(g, cos_TE, sin_TE) for g in (g_q_TD, g_k_TD))
        return g_q_TD, g_k_TD, g_v_TD, *[None] * 5


def _spans(length: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the query positions that are computed together, against the keys up to their last.

    No token attends to a later one, in a tree neither: of a long block nearly half of all products is left out.
    """
    if length < 2 * SPAN:
        return [(0, length)]
    return [(start, min(start + SPAN, length)) for start in range(0, length, SPAN)]


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, spans: Seq[tuple[int, int, Tensor]], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one block's q, k and v; `spans` have (first, last + 1, softmax)."""
    groups = q.shape[1] // k.shape[1]
    g_q, g_k, g_v = torch.empty_like(q), k, v
    for start, stop, p in reversed(spans):  # the last one reaches every key
        rows = slice(start * groups, stop * groups)
        g_s = torch.ops.aten._softmax_backward_data(torch.bmm(g[:, rows], v[:, :stop].mT), p, -1, p.dtype)
        g_q[:, rows] = _scaled(g_s, k[:, :stop], scale)
        if stop == k.shape[1]:
            g_k, g_v = _scaled(g_s.mT, q[:, rows], scale), torch.bmm(p.mT, g[:, rows])
        else:
            g_k[:, :stop].baddbmm_(g_s.mT, q[:, rows], alpha=scale)
            g_v[:, :stop].baddbmm_(p.mT, g[:, rows])
    return g_q, g_k, g_v


def rotate(x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Apply the rotary embedding per head: x cos + (-x2, x1) sin."""
    x, half = x_TD.view(len(x_TD), -1, cos_TE.shape[-1]), cos_TE.shape[-1] // 2
    out, sin = x * cos_TE[:, None], sin_TE[:, None]
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.reshape(x_TD.shape)


def _rotate_backward(g_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    g, half = g_TD.view(len(g_TD), -1, cos_TE.shape[-1]), cos_TE.shape[-1] // 2
    out, sin = g * cos_TE[:, None], sin_TE[:, None]
    out[..., :half].addcmul_(g[..., half:], sin[..., half:])
    out[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
    return out.reshape(g_TD.shape)


def heads(x_TD: Tensor, block: Block, width: int, groups: int = 1, padding: float | None = None) -> Tensor:
    """Return [B K, L G, E]: each key head, its query heads by position; `padding` fills empty positions."""
    trees, length = block.tokens_BL.shape
    x = x_TD.index_select(0, block.tokens_BL.flatten()).view(trees, length, -1, groups, width)
    if padding is not None and block.padded_N is not None:
        x.view(trees * length, -1).index_fill_(0, block.padded_N, padding)
    found: Tensor = x.permute(0, 2, 1, 3, 4).reshape(-1, length * groups, width)
    return found


def positions(x: Tensor, block: Block, groups: int) -> Tensor:
    """Inverse of `heads`: [B L, D]."""
    trees, length = block.tokens_BL.shape
    return x.view(trees, -1, length, groups, x.shape[-1]).permute(0, 2, 1, 3, 4).reshape(trees * length, -1)


def scores(q: Tensor, k: Tensor, bias: Tensor, scale: float, groups: int) -> Tensor:
    """Return scale q k' + bias of M query positions, [B K, M G, N]; bias [M, N], or [B, M, N] for each tree."""
    if bias.dim() == 2:
        return torch.baddbmm(bias.repeat_interleave(groups, 0), q, k.mT, alpha=scale)
    scores = torch.bmm(q, k.mT).mul_(scale)
    trees, count, keys = bias.shape
    scores.view(trees, -1, count, groups, keys).add_(bias[:, None, :, None])
    return scores


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def to_row(parts: list[Tensor], blocks: Blocks) -> Tensor:
    """Return the blocks' positions as tokens of the row, [T, D]; filler positions are dropped."""
    found_TD = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, blocks.place_T)
    found_TD[blocks.tokens :] = 0
    return found_TD
