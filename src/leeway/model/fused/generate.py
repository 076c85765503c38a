"""Autoregressive decoding through the fused decoder, with a key-value cache.

The common prefix of a batch's prompts (system prompt, attack wrapper) is computed once. Prompts are right-aligned in
the cache, so each step writes one slice; positions before a shorter prompt are masked.

Shape legend: B rows, P common prefix, S longest remainder, L positions of the cache, H query heads, K key heads,
G = H / K, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from leeway.data.chat import Sequence
from leeway.model.fused.decoder import Plain, adapted, embedded, frozen, through
from leeway.model.fused.kernels import heads, positions, rotate, scores, to_row
from leeway.model.packing import HIDDEN, Blocks, PrefixTree, common_prefix
from leeway.model.token_stats import filled

SHARED = 16  # minimum length of a shared prefix, tokens
GROWTH = 32  # cache growth in positions: keeps it contiguous and product shapes few

KeysValues = list[tuple[Tensor, Tensor]]  # per layer: keys and values, [B K, L, E]


class Decoding:
    """The decoding state of one batch of prompts. Inference only."""

    def __init__(self, lm: Any, prompts: Seq[tuple[int, ...]], device: torch.device) -> None:
        self._lm, self._device, self._prompts = lm, device, list(prompts)
        self._cache: KeysValues = []
        self._hidden_BL = torch.empty(0)
        self._low: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> Tensor:
        """Run the prompts; return the final hidden states of their last tokens, [B, D]."""
        shared = _shared(self._prompts)
        past: KeysValues = []
        if shared:
            past = [(self._heads(k), self._heads(v)) for k, v in self._read([self._prompts[0][:shared]], 0, [])[1]]
        rests = [p[shared:] for p in self._prompts]
        hidden_BD, rows = self._read(rests, shared, past)
        self._used = shared + max(map(len, rests))
        self._position_B = torch.tensor([len(p) for p in self._prompts], device=self._device)
        self._fill(rests, shared, past, rows)
        return hidden_BD

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token per row; return the final hidden states, [B, D]."""
        if self._used == self._cache[0][0].shape[1]:
            self._hidden_BL = pad(self._hidden_BL, (0, GROWTH), value=HIDDEN)
            self._cache = [(pad(k, (0, 0, 0, GROWTH)), pad(v, (0, 0, 0, GROWTH))) for k, v in self._cache]
        x_BD, cos_BE, sin_BE = embedded(self._lm, ids_B, self._position_B)
        at, rows = self._used, len(ids_B)
        self._hidden_BL[:, at] = 0
        bias = self._hidden_BL[:, None, None].to(x_BD.dtype)

        def mix(n: int, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._cache[n]
            width, groups = keys.shape[-1], q.shape[1] // k.shape[1]
            for cache, new in ((keys, rotate(k, cos_BE, sin_BE)), (values, v)):
                cache.view(rows, -1, *cache.shape[1:])[:, :, at] = new.view(rows, -1, width)
            q = rotate(q, cos_BE, sin_BE).view(-1, groups, width)
            s = torch.bmm(q, keys.mT).mul_(attention.scaling)
            s.view(rows, -1, groups, s.shape[-1]).add_(bias)
            return torch.bmm(s.softmax(-1), values).view(rows, -1)

        self._used += 1
        self._position_B += 1
        return through(self._lm, x_BD, mix, Plain(self._linears), torch.arange(rows, device=self._device))

    def keep(self, rows: Seq[int]) -> None:
        """Drop all other rows from the batch."""
        at = torch.tensor(rows, device=self._device)
        self._position_B, self._hidden_BL = self._position_B[at], self._hidden_BL[at]
        before = len(self._prompts)
        for n, pair in enumerate(self._cache):
            keys, values = (t.view(before, -1, *t.shape[1:])[at].flatten(0, 1) for t in pair)
            self._cache[n] = keys, values
        self._prompts = [self._prompts[r] for r in rows]

    def _read(self, texts: Seq[tuple[int, ...]], offset: int, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """Return (hidden states of each text's last token [B, D], keys and values [T, K E]), attending to `past`."""
        trees = [PrefixTree.of((Sequence(ids, len(ids)),)) for ids in texts]
        blocks = Blocks.of(trees, self._device)
        fill = [0] * (filled(blocks.tokens) - blocks.tokens)
        ids_T = torch.tensor([i for t in trees for i in t.ids] + fill, device=self._device)
        position_T = torch.tensor([offset + i for t in trees for i in t.positions] + fill, device=self._device)
        x_TD, cos_TE, sin_TE = embedded(self._lm, ids_T, position_T)
        biases = [pad(bias, (offset, 0)) for bias in blocks.biases(x_TD.dtype)]  # the past is visible to all
        cache: KeysValues = []

        def mix(n: int, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            width, groups = cos_TE.shape[-1], q.shape[1] // k.shape[1]
            q, k = rotate(q, cos_TE, sin_TE), rotate(k, cos_TE, sin_TE)
            cache.append((k, v))
            found = []
            for block, bias in zip(blocks.blocks, biases, strict=True):
                keys, values = (heads(t, block, width) for t in (k, v))
                if past:
                    repeated = (t.repeat(len(keys) // len(t), 1, 1) for t in past[n])  # [B K, P, E]
                    keys, values = (torch.cat(pair, 1) for pair in zip(repeated, (keys, values), strict=True))
                p = scores(heads(q, block, width, groups), keys, bias, attention.scaling, groups).softmax(-1)
                found.append(positions(torch.bmm(p, values), block, groups))
            return to_row(found, blocks)

        last_B = torch.tensor([len(t) for t in texts], device=self._device).cumsum(0) - 1
        hidden_BD = through(self._lm, x_TD, mix, Plain(self._linears), last_B)
        self._width = cos_TE.shape[-1]
        return hidden_BD, [(k[: blocks.tokens], v[: blocks.tokens]) for k, v in cache]

    def _heads(self, row_TD: Tensor) -> Tensor:
        """Reshape a row to [K, T, E]."""
        return row_TD.view(len(row_TD), -1, self._width).transpose(0, 1)

    def _fill(self, rests: Seq[tuple[int, ...]], shared: int, past: KeysValues, rows: KeysValues) -> None:
        """Build the cache from keys and values, prompts right-aligned."""
        longest, count = max(map(len, rests)), len(rests)
        at_BS = torch.zeros(count, longest, dtype=torch.long)
        capacity = filled(self._used + 1, GROWTH)
        self._hidden_BL = torch.full((count, capacity), HIDDEN, device=self._device)
        self._hidden_BL[:, : self._used] = 0
        start = 0
        for b, ids in enumerate(rests):
            at_BS[b, longest - len(ids) :] = torch.arange(start, start + len(ids))
            self._hidden_BL[b, shared : shared + longest - len(ids)] = HIDDEN
            start += len(ids)
        at = at_BS.flatten().to(self._device)
        for n, pair in enumerate(rows):
            whole = []
            for k, t in enumerate(pair):
                new = t.index_select(0, at).view(count, longest, -1, self._width).transpose(1, 2)
                cache = t.new_zeros(count, new.shape[1], capacity, self._width)
                if past:
                    cache[:, :, :shared] = past[n][k]
                cache[:, :, shared : self._used] = new
                whole.append(cache.flatten(0, 1))
            self._cache.append((whole[0], whole[1]))

    def _linears(self, x_TD: Tensor, modules: Seq[Any]) -> tuple[Tensor, ...]:
        """Apply linear layers with their low-rank updates, cast to the states' dtype once per batch."""
        found = []
        for module in modules:
            y_TO = linear(x_TD, *frozen(module))
            if adapted(module):
                if id(module) not in self._low:
                    A_RD, B_OR = (m["default"].weight.detach() for m in (module.lora_A, module.lora_B))
                    self._low[id(module)] = A_RD.to(x_TD.dtype), (B_OR * module.scaling["default"]).to(x_TD.dtype)
                A_RD, B_OR = self._low[id(module)]
                y_TO.addmm_(x_TD @ A_RD.T, B_OR.T)
            found.append(y_TO)
        return tuple(found)


def _shared(prompts: Seq[tuple[int, ...]]) -> int:
    """Return the length of the prompts' common prefix if it is at least SHARED; each keeps one token of its own."""
    if len(prompts) < 2:
        return 0
    shared = min(min(common_prefix(prompts[0], p), len(p) - 1) for p in prompts)
    return shared if shared >= SHARED else 0
