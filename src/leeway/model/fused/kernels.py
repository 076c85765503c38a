"""Forward and backward kernels of a decoder layer.

Shape legend: T tokens, D width, F inner width, H query heads, K key heads, G = H / K, E width of a head, R rank.
Statistics (norms, softmax) use float32 or wider for any dtype; products use the dtype of the states.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from leeway.model.packing import Block, Blocks


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class AddNorm(torch.autograd.Function):
    """(x + delta, its root-mean-square norm times weight); Zhang and Sennrich 2019, arXiv 1910.07467, equation 4."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
        scale_T1 = torch.linalg.vector_norm(sum_TD, dim=-1, keepdim=True, dtype=wide(sum_TD.dtype))
        scale_T1 = scale_T1.square_().div_(sum_TD.shape[-1]).add_(eps).rsqrt_()
        y_TD = (sum_TD * scale_T1).mul_(weight_D).to(sum_TD.dtype)
        ctx.save_for_backward(sum_TD, scale_T1, weight_D)
        ctx.single = delta_TD is None
        ctx.set_materialize_grads(False)
        return (sum_TD.view_as(sum_TD) if delta_TD is None else sum_TD), y_TD

    @staticmethod
    def backward(ctx: Any, g_sum_TD: Tensor | None, g_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TD, scale_T1, weight_D = ctx.saved_tensors
        found = g_sum_TD if g_TD is None else _norm_backward(sum_TD, scale_T1, weight_D, g_TD, g_sum_TD)
        return found, (None if ctx.single else found), None, None


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


class Linears(torch.autograd.Function):
    """Linear layers of one input, each with its low-rank update: x W' + b + s (m x / (1 - rate)) A' B'.

    W and b are frozen: the input and A, B get gradients. `places` of the flattened input are dropped before A, the same
    for all layers of the input (Hu et al. 2021, arXiv 2106.09685, equation 3, with dropout as in peft).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        places: Tensor | None,
        keep: float,
        frozen: Seq[tuple[Tensor, Tensor | None]],
        scalings: Seq[float],
        *low: Tensor,
    ) -> tuple[Tensor, ...]:
        A_RD, sizes = torch.cat([A.to(x_TD.dtype) for A in low[::2]]), [len(A) for A in low[::2]]
        Bs = [(B * (s / keep)).to(x_TD.dtype) for B, s in zip(low[1::2], scalings, strict=True)]
        found = [torch.nn.functional.linear(x_TD, W, b) for W, b in frozen]
        kept_TD = x_TD if places is None else x_TD.clone(memory_format=torch.contiguous_format)
        if places is not None:
            kept_TD.view(-1).index_fill_(0, places, 0)
        z_TR = kept_TD @ A_RD.T
        for y_TO, z, B_OR in zip(found, z_TR.split(sizes, 1), Bs, strict=True):
            y_TO.addmm_(z, B_OR.T)
        ctx.save_for_backward(kept_TD, places, z_TR, *low)
        ctx.frozen, ctx.scalings, ctx.keep, ctx.packed = frozen, scalings, keep, (A_RD, Bs, sizes)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        kept_TD, places, z_TR, *low = ctx.saved_tensors
        A_RD, Bs, sizes = ctx.packed
        g_z_TR = torch.cat([g_TO @ B_OR for g_TO, B_OR in zip(g, Bs, strict=True)], 1)
        g_A_RD = g_z_TR.T @ kept_TD
        g_low: list[Tensor | None] = []
        scaled = zip(g, z_TR.split(sizes, 1), g_A_RD.split(sizes, 0), ctx.scalings, low[::2], strict=True)
        for g_TO, z, g_A, s, A in scaled:
            g_low += [g_A.to(A.dtype), (g_TO.T @ z).to(A.dtype).mul_(s / ctx.keep)]
        g_x_TD = None
        if ctx.needs_input_grad[0]:
            g_x_TD = g_z_TR @ A_RD
            if places is not None:
                g_x_TD.view(-1).index_fill_(0, places, 0)
            for g_TO, (W, _) in zip(g, ctx.frozen, strict=True):
                g_x_TD.addmm_(g_TO, W)
        return g_x_TD, None, None, None, None, *g_low


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
            p = scores(q, k, bias, scale, groups).softmax(-1)
            found.append(positions(torch.bmm(p, v), block, groups))
            saved += [q, k, v, p]
        ctx.save_for_backward(cos_TE, sin_TE, *saved)
        ctx.blocks, ctx.scale, ctx.groups = blocks, scale, groups
        return to_row(found, blocks)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        cos_TE, sin_TE, *saved = ctx.saved_tensors
        width, scale, groups = cos_TE.shape[-1], ctx.scale, ctx.groups
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for n, block in enumerate(ctx.blocks.blocks):
            q, k, v, p = saved[4 * n : 4 * n + 4]
            g = heads(g_TD, block, width, groups, padding=0.0)
            g_s = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
            g_q = _scaled(g_s, k, scale)
            g_k, g_v = _scaled(g_s.mT, q, scale), torch.bmm(p.mT, g)
            parts.append((positions(g_q, block, groups), positions(g_k, block, 1), positions(g_v, block, 1)))
        g_q_TD, g_k_TD, g_v_TD = (to_row(list(p), ctx.blocks) for p in zip(*parts, strict=True))
        g_q_TD, g_k_TD = (_rotate_backward(g, cos_TE, sin_TE) for g in (g_q_TD, g_k_TD))
        return g_q_TD, g_k_TD, g_v_TD, *[None] * 5


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
    """Return [B K, G L, E]: each key head with its query heads; `padding` fills empty positions."""
    trees, length = block.tokens_BL.shape
    x = x_TD.index_select(0, block.tokens_BL.flatten()).view(trees, length, -1, groups, width)
    if padding is not None and block.padded_N is not None:
        x.view(trees * length, -1).index_fill_(0, block.padded_N, padding)
    found: Tensor = x.permute(0, 2, 3, 1, 4).reshape(-1, groups * length, width)
    return found


def positions(x: Tensor, block: Block, groups: int) -> Tensor:
    """Inverse of `heads`: [B L, D]."""
    trees, length = block.tokens_BL.shape
    return x.view(trees, -1, groups, length, x.shape[-1]).permute(0, 3, 1, 2, 4).reshape(trees * length, -1)


def scores(q: Tensor, k: Tensor, bias: Tensor, scale: float, groups: int) -> Tensor:
    if bias.dim() == 2:
        return torch.baddbmm(bias.repeat(groups, 1), q, k.mT, alpha=scale)
    scores = torch.bmm(q, k.mT).mul_(scale)
    trees, length, _ = bias.shape
    scores.view(trees, -1, groups, length, length).add_(bias[:, None, None])
    return scores


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def to_row(parts: list[Tensor], blocks: Blocks) -> Tensor:
    """Return the blocks' positions as tokens of the row, [T, D]; filler positions are dropped."""
    found_TD = (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, blocks.place_T)
    found_TD[blocks.tokens :] = 0
    return found_TD
