"""Forward passes over prompts with the tree of refusal openings behind them: whole, or from a position or a block on.

Prompts of one template begin with the same tokens (its system prompt). These run once for a batch, and every prompt
reads their keys and values: attention is causal, so this is exact.

Shapes: B prompts, S tokens that all of them begin with, N further prompt positions (padded on the left, so position
N − 1 is every prompt's last), T tree nodes, L = N + T, K = S + L, Q positions of a pass, V variants of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leeway.model.load import Model
from leeway.probe.hooks import MLP, Blocks, Edit, Point, edited, recorded
from leeway.probe.refusal_logit import Ids, OpeningTree

SLIDING = "sliding_attention"
Edits = Mapping[Point, Edit]
At = slice | list[int]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts without their common start, padded on the left, with the tree's nodes behind them.

    start_S: the common start. ids_BL: the other tokens. sees_BLK: which position reads which, the start first.
    position_BL: position in the prompt.
    """

    ids_BL: Tensor
    sees_BLK: Tensor
    position_BL: Tensor
    width: int  # N
    start_S: Tensor

    @classmethod
    def of(
        cls, prompts: Seq[Ids], tree: OpeningTree | None, device: torch.device, keep: int | None = None
    ) -> PromptBatch:
        """Batch prompts; the common start leaves at least their last `keep` tokens, or is empty (None)."""
        s = 0 if keep is None else common_start(prompts, keep)
        tokens, rest = tree.tokens if tree else (), [p[s:] for p in prompts]
        n, t = max(map(len, rest)), len(tokens)
        ids = [[0] * (n - len(p)) + list(p) + list(tokens) for p in rest]
        depth = [len(node) for node in tree.nodes[1:]] if tree else []
        position = [[0] * (n - len(p)) + list(range(s, s + len(p))) + [s + len(p) - 1 + d for d in depth] for p in rest]
        real_BN = torch.tensor([[k >= n - len(p) for k in range(n)] for p in rest])
        sees_BLL = torch.zeros(len(prompts), n + t, n + t, dtype=torch.bool)
        sees_BLL[:, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril() & real_BN[:, None, :]
        sees_BLL[:, n:, :n] = real_BN[:, None, :]
        if tree and t:
            sees_BLL[:, n:, n:] = tree.sees()
        sees_BLL |= torch.eye(n + t, dtype=torch.bool)  # padding reads itself, or its softmax would be NaN
        sees_BLK = torch.cat([torch.ones(len(prompts), n + t, s, dtype=torch.bool), sees_BLL], 2)
        start_S = torch.tensor(prompts[0][:s], dtype=torch.long, device=device)
        ids_BL, position_BL = (torch.tensor(rows, device=device) for rows in (ids, position))
        return cls(ids_BL, sees_BLK.to(device), position_BL, n, start_S)

    @property
    def start(self) -> int:
        return len(self.start_S)

    @property
    def start_position_1S(self) -> Tensor:
        return torch.arange(self.start, device=self.ids_BL.device)[None]

    @property
    def position_BK(self) -> Tensor:
        return torch.cat([self.start_position_1S.expand(len(self.ids_BL), -1), self.position_BL], 1)

    def rows(self, rows: Seq[int]) -> PromptBatch:
        """Return some of the prompts, with the same start and padding."""
        own = list(rows)
        return PromptBatch(self.ids_BL[own], self.sees_BLK[own], self.position_BL[own], self.width, self.start_S)

    def joined(self) -> PromptBatch:
        """Return the prompts with the start as a part of each: for edits that differ between prompts."""
        count, s = len(self.ids_BL), self.start
        causal_SK = torch.ones(s, self.sees_BLK.shape[2], dtype=torch.bool, device=self.ids_BL.device).tril()
        sees_BKK = torch.cat([causal_SK.expand(count, -1, -1), self.sees_BLK], 1)
        ids_BK = torch.cat([self.start_S.expand(count, -1), self.ids_BL], 1)
        return PromptBatch(ids_BK, sees_BKK, self.position_BK, s + self.width, self.start_S[:0])


def common_start(prompts: Seq[Ids], keep: int) -> int:
    """Return how many tokens all prompts begin with, at least the last `keep` of each left out."""
    most, s = min(map(len, prompts)) - keep, 0
    while s < most and all(p[s] == prompts[0][s] for p in prompts):
        s += 1
    return s


def attention_mask(
    decoder: Any, dtype: torch.dtype, sees_BQK: Tensor, query_BQ: Tensor, key_BK: Tensor
) -> Tensor | dict[str, Tensor]:
    """Return the additive mask of queries at positions `query_BQ` over keys at `key_BK`, [B, 1, Q, K].

    With sliding windows in some layers (Gemma 2) it is one mask for each kind of layer, as transformers takes them.
    """

    def additive(allowed_BQK: Tensor) -> Tensor:
        empty_BQK = torch.zeros(allowed_BQK.shape, dtype=dtype, device=allowed_BQK.device)
        return empty_BQK.masked_fill(~allowed_BQK, torch.finfo(dtype).min)[:, None]

    if SLIDING not in (getattr(decoder.config, "layer_types", None) or ()):
        return additive(sees_BQK)
    near_BQK = query_BQ[:, :, None] - key_BK[:, None] < decoder.config.sliding_window
    return {"full_attention": additive(sees_BQK), SLIDING: additive(sees_BQK & near_BQK)}


class KeysValues:
    """Keys and values of the positions before a pass, which it reads, and of its own first ones, which it leaves.

    Hugging Face attention calls `update` with a pass's keys and values and attends to what it returns.
    """

    def __init__(self, before: KeysValues | None = None, keep: int = 0) -> None:
        self.before = before.kept if before is not None else {}
        self.keep = keep  # the number of first positions, those before the pass included, to keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.before:
            earlier = (_for_rows(b, len(key)) for b in self.before[layer_idx])
            key, value = (torch.cat([b, own], 2) for b, own in zip(earlier, (key, value), strict=True))
        if self.keep:
            self.kept[layer_idx] = (key[:, :, : self.keep].clone(), value[:, :, : self.keep].clone())
        return key, value

    def rows(self, rows: Seq[int]) -> KeysValues:
        """Return the kept keys and values of some prompts."""
        found = KeysValues()
        found.kept = {layer: (k[list(rows)], v[list(rows)]) for layer, (k, v) in self.kept.items()}
        return found

    def get_seq_length(self, *_: Any) -> int:
        return next(iter(self.before.values()))[0].shape[2] if self.before else 0


def _for_rows(before_BHSE: Tensor, rows: int) -> Tensor:
    """Repeat keys or values of B prompts (or of one start) for every variant of the pass."""
    if len(before_BHSE) == 1:
        return before_BHSE.expand(rows, -1, -1, -1)
    return before_BHSE.repeat(rows // len(before_BHSE), 1, 1, 1)


@dataclass
class Pass:
    """One model's forward passes over one batch: whole, or from a position or a block on.

    A whole pass with a `window` keeps keys and values of the positions before it and the blocks' inputs from it on, so
    that `again` runs the window alone, from the first edited block. With `blockwise` it keeps all blocks' inputs, and
    `from_block` runs the blocks from one on. Both are exact.
    """

    model: Model
    blocks: Blocks
    batch: PromptBatch
    window: int | None = None  # first position of later runs, the start not counted
    blockwise: bool = False
    _before: KeysValues | None = None
    _inputs: dict[Point, Tensor] = field(default_factory=dict)
    _start_inputs: dict[Point, Tensor] = field(default_factory=dict)

    def whole(
        self, edits: Edits | None = None, record: Mapping[Point, At] | None = None, everywhere: Edits | None = None
    ) -> tuple[Tensor, dict[Point, Tensor]]:
        """Run all positions; return (final hidden states [B, L, D], recorded activations).

        Positions count after the common start. `edits` and `record` see the positions after it; `everywhere` are edits
        of every position, the same for every prompt.
        """
        first, every = self.window or 0, dict[Point, At]()
        if (self.window is not None or self.blockwise) and not edits and not everywhere:
            every = {(k, "input"): slice(first, None) for k in range(len(self.blocks))}
        start = self._run_start(0, everywhere)
        keep = 0 if self.window is None else self.batch.start + first
        cache = KeysValues(start, keep) if start or keep else None
        with recorded(self.blocks, every, self._inputs), edited(self.blocks, everywhere or {}):
            out = self._run(edits, record, cache, ids=self.batch.ids_BL)
        self._before = cache
        return out

    def again(self, variants: Seq[Edits]) -> Tensor:
        """Run the window under each of several sets of edits; return final hidden states, [V, B, L − window, D].

        Positions of edits count from the window's first.
        """
        assert self.window is not None
        first = min(layer for edits in variants for layer, _ in edits)
        state_BQD, cache = self._inputs[first, "input"].repeat(len(variants), 1, 1), KeysValues(self._before)
        with _only_from(self.blocks, first, self._read):
            hidden_BQD, _ = self._run(stacked(variants), None, cache, state_BQD, self.window)
        return hidden_BQD.view(len(variants), -1, *hidden_BQD.shape[1:])

    def only(self, rows: Seq[int]) -> Pass:
        """Return a pass over some of the prompts, for `again`."""
        assert self._before is not None
        inputs = {p: x_BQD[list(rows)] for p, x_BQD in self._inputs.items()}
        return Pass(self.model, self.blocks, self.batch.rows(rows), self.window, False, self._before.rows(rows), inputs)

    def from_block(self, layer: int, record: Point | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the blocks from `layer` on, as the weights now are, on the inputs that a whole pass kept.

        Returns final hidden states [B, L, D], and the activation at `record` at all positions, the start's included
        [B, K, D].
        """
        assert self.blockwise
        at: dict[Point, At] = {} if record is None else {record: slice(None)}
        of_start: dict[Point, Tensor] = {}
        with _only_from(self.blocks, layer, self._read):
            with recorded(self.blocks, at, of_start):
                start = self._run_start(layer)
            cache = None if start is None else KeysValues(start)
            hidden_BLD, found = self._run(None, at, cache, self._inputs[layer, "input"])
        if record is None:
            return hidden_BLD, None
        return hidden_BLD, _joined(of_start.get(record), found[record])

    def input_of(self, layer: int) -> Tensor:
        """Return a block's input at all positions, the start's included, as a whole pass kept it, [B, K, D]."""
        return _joined(self._start_inputs.get((layer, "input")), self._inputs[layer, "input"])

    def from_state(self, layer: int, state_BLD: Tensor, variants: Seq[Edits] = ({},)) -> Tensor:
        """Run the blocks from `layer` on with a given input, under each set of edits; return [V, B, L, D].

        For a batch without a common start.
        """
        assert not self.batch.start
        with _only_from(self.blocks, layer, self._read):
            hidden_BLD, _ = self._run(stacked(variants), None, None, state_BLD.repeat(len(variants), 1, 1))
        return hidden_BLD.view(len(variants), -1, *hidden_BLD.shape[1:])

    @property
    def _read(self) -> int:
        """The number of last positions whose final states are read: the prompt's last and the tree's nodes."""
        return self.batch.ids_BL.shape[1] - self.batch.width + 1

    def _run_start(self, layer: int, everywhere: Edits | None = None) -> KeysValues | None:
        """Run the common start from a block on; return its keys and values, None without a start."""
        batch = self.batch
        if not batch.start:
            return None
        cache = KeysValues(keep=batch.start)
        every: dict[Point, At] = {(k, "input"): slice(None) for k in range(len(self.blocks))}
        keeps = self.blockwise and layer == 0 and not self._start_inputs
        causal_1SS = torch.ones(1, batch.start, batch.start, dtype=torch.bool, device=batch.ids_BL.device).tril()
        position = batch.start_position_1S
        given: dict[str, Any] = {"input_ids": batch.start_S[None]}
        if layer or (self.blockwise and not keeps):
            given = {"inputs_embeds": self._start_inputs[layer, "input"]}
        with edited(self.blocks, everywhere or {}), recorded(self.blocks, every if keeps else {}, self._start_inputs):
            self._decode(given, causal_1SS, position, position, cache)
        return cache

    def _run(
        self,
        edits: Edits | None,
        record: Mapping[Point, At] | None,
        cache: KeysValues | None,
        state: Tensor | None = None,
        first: int = 0,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[Point, Tensor]]:
        """Run the positions from `first` on, on token ids or on states of V · B rows."""
        found: dict[Point, Tensor] = {}
        batch = self.batch
        given = {"input_ids": ids} if state is None else {"inputs_embeds": state}
        times = 1 if state is None else len(state) // len(batch.ids_BL)
        sees_BQK = batch.sees_BLK[:, first:].repeat(times, 1, 1)
        query_BQ = batch.position_BL[:, first:].repeat(times, 1)
        with edited(self.blocks, edits or {}), recorded(self.blocks, record or {}, found):
            hidden_BQD = self._decode(given, sees_BQK, query_BQ, batch.position_BK.repeat(times, 1), cache)
        return hidden_BQD, found

    @torch.no_grad()
    def _decode(
        self, given: dict[str, Any], sees_BQK: Tensor, query_BQ: Tensor, key_BK: Tensor, cache: KeysValues | None
    ) -> Tensor:
        decoder, dtype = self.blocks.decoder, self.model.head.weight_VD.dtype
        hidden_BQD: Tensor = decoder(
            **given,
            attention_mask=attention_mask(decoder, dtype, sees_BQK, query_BQ, key_BK),
            position_ids=query_BQ,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden_BQD


def stacked(variants: Seq[Edits]) -> dict[Point, Edit]:
    """Return the edits of a pass whose rows are V variants of one batch, each under its own edits."""

    def at(point: Point) -> Edit:
        def edit(x_BQD: Tensor) -> Tensor:
            parts = zip(x_BQD.chunk(len(variants)), variants, strict=True)
            return torch.cat([own[point](x) if point in own else x for x, own in parts])

        return edit

    return {p: at(p) for p in dict.fromkeys(p for own in variants for p in own)}


def _joined(start_1SD: Tensor | None, rest_BLD: Tensor) -> Tensor:
    if start_1SD is None:
        return rest_BLD
    return torch.cat([start_1SD.expand(len(rest_BLD), -1, -1), rest_BLD], 1)


class _Passing(nn.Module):
    """A block that changes nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@contextmanager
def _only_from(blocks: Blocks, layer: int, read: int) -> Iterator[None]:
    """Let the decoder run its blocks from `layer` on only, within the context; blocks keep their numbers.

    Of the last block's MLP only the last `read` positions are computed; the others are read by nothing and get 0.
    """
    every = blocks.decoder.layers
    blocks.decoder.layers = nn.ModuleList([*(_Passing() for _ in range(layer)), *every[layer:]])
    with ExitStack() as stack:
        stack.callback(setattr, blocks.decoder, "layers", every)
        stack.enter_context(_last_positions(getattr(every[-1], MLP), read))
        yield


@contextmanager
def _last_positions(mlp: nn.Module, read: int) -> Iterator[None]:
    plain, own = mlp.forward, vars(mlp).get("forward")

    def forward(x_BQD: Tensor) -> Tensor:
        found_BQD = torch.zeros_like(x_BQD)
        found_BQD[:, -read:] = plain(x_BQD[:, -read:])
        return found_BQD

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
        if own is not None:
            mlp.forward = own
