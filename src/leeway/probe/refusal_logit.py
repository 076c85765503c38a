"""Forward passes over prompts whose possible refusals follow as a tree, and the refusal logit read from it.

    L = log P − log(1 − P),   P = Σ over refusal openings of Π P(token | prompt, tokens before)

(Arditi et al. 2024, arXiv 2406.11717, §2.3, there over first tokens only). The openings' tokens form a tree; its inner
nodes stand after every prompt, each sees the prompt and its own ancestors, and one forward pass gives all of them.

Shapes: B prompts, N prompt positions (padded on the left, so position N − 1 is every prompt's last), T tree nodes,
K opening tokens scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.model.load import Model
from leeway.probe.hooks import Blocks, Edit, Point, edited, recorded
from leeway.yaml_config import package_data

Ids = tuple[int, ...]
LONGEST = 4  # tokens of an opening
SLIDING = "sliding_attention"


@cache
def openings() -> tuple[int, tuple[str, ...]]:
    """Return the version and the texts of the refusal openings."""
    content = package_data("leeway.probe", "openings.yaml")
    return int(content["version"]), tuple(content["openings"])


@dataclass(frozen=True)
class OpeningTree:
    """Refusal openings as a tree of tokens: `nodes` are its inner nodes in order of depth, the root (empty) first.

    `steps` lists the scored tokens as (index of the node that predicts it, token id); `paths` the openings, each as
    indices into `steps`. No opening continues another, so their probabilities add up.
    """

    nodes: tuple[Ids, ...]
    steps: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, chat: Chat, texts: Seq[str] | None = None) -> OpeningTree:
        texts = openings()[1] if texts is None else texts
        variants = {ids for t in texts if 0 < len(ids := chat.ids(t)) <= LONGEST}
        if not variants:
            what = f"probe: no refusal opening takes at most {LONGEST} of the model's tokens"
            raise LeewayError(what, fix="probe a model whose tokenizer knows English words")
        kept = sorted(v for v in variants if not any(v[:k] in variants for k in range(1, len(v))))
        nodes = sorted({v[:k] for v in kept for k in range(len(v))}, key=lambda n: (len(n), n))
        steps = sorted({(nodes.index(v[:k]), v[k]) for v in kept for k in range(len(v))})
        where = {step: i for i, step in enumerate(steps)}
        paths = tuple(tuple(where[nodes.index(v[:k]), v[k]] for k in range(len(v))) for v in kept)
        return cls(tuple(nodes), tuple(steps), paths)

    @property
    def tokens(self) -> Ids:
        """The last token of each inner node but the root, [T]."""
        return tuple(node[-1] for node in self.nodes[1:])

    @cached_property
    def hash(self) -> str:
        return digest("refusal openings", openings()[0], self.nodes, self.steps)

    def sees(self) -> Tensor:
        """Return which nodes each node reads: itself and its ancestors, [T, T]."""
        inner = self.nodes[1:]
        return torch.tensor([[own[: len(other)] == other for other in inner] for own in inner], dtype=torch.bool).view(
            len(inner), len(inner)
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, with the tree's nodes behind them.

    ids_BL: L = N + T tokens. sees_BLL: which position reads which. position_BL: position in the prompt.
    """

    ids_BL: Tensor
    sees_BLL: Tensor
    position_BL: Tensor
    width: int  # N

    @classmethod
    def of(cls, prompts: Seq[Ids], tree: OpeningTree | None, device: torch.device) -> PromptBatch:
        tokens = tree.tokens if tree else ()
        n, t = max(map(len, prompts)), len(tokens)
        ids = [[0] * (n - len(p)) + list(p) + list(tokens) for p in prompts]
        depth = [len(node) for node in tree.nodes[1:]] if tree else []
        position = [[0] * (n - len(p)) + list(range(len(p))) + [len(p) - 1 + d for d in depth] for p in prompts]
        real_BN = torch.tensor([[k >= n - len(p) for k in range(n)] for p in prompts])
        sees_BLL = torch.zeros(len(prompts), n + t, n + t, dtype=torch.bool)
        sees_BLL[:, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril() & real_BN[:, None, :]
        sees_BLL[:, n:, :n] = real_BN[:, None, :]
        if tree and t:
            sees_BLL[:, n:, n:] = tree.sees()
        sees_BLL |= torch.eye(n + t, dtype=torch.bool)  # padding reads itself, or its softmax would be NaN
        return cls(torch.tensor(ids, device=device), sees_BLL.to(device), torch.tensor(position, device=device), n)


def attention_mask(
    decoder: Any, dtype: torch.dtype, sees_BQL: Tensor, query_BQ: Tensor, key_BL: Tensor
) -> Tensor | dict[str, Tensor]:
    """Return the additive mask of queries at positions `query_BQ` over keys at `key_BL`, [B, 1, Q, L].

    With sliding windows in some layers (Gemma 2) it is one mask for each kind of layer, as transformers takes them.
    """

    def additive(allowed_BQL: Tensor) -> Tensor:
        empty_BQL = torch.zeros(allowed_BQL.shape, dtype=dtype, device=allowed_BQL.device)
        return empty_BQL.masked_fill(~allowed_BQL, torch.finfo(dtype).min)[:, None]

    if SLIDING not in (getattr(decoder.config, "layer_types", None) or ()):
        return additive(sees_BQL)
    near_BQL = query_BQ[:, :, None] - key_BL[:, None] < decoder.config.sliding_window
    return {"full_attention": additive(sees_BQL), SLIDING: additive(sees_BQL & near_BQL)}


class PrefixCache:
    """Keys and values of the positions before a window; reading does not change it.

    Hugging Face attention calls `update` with the window's keys and values and attends to what it returns.
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.keep_to: int | None = None  # while set, `update` records the keys and values before this position

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keep_to is not None:
            self.kept[layer_idx] = (key[:, :, : self.keep_to].clone(), value[:, :, : self.keep_to].clone())
            return key, value
        before_key, before_value = self.kept[layer_idx]
        return torch.cat([before_key, key], 2), torch.cat([before_value, value], 2)

    def get_seq_length(self, *_: Any) -> int:
        return next(iter(self.kept.values()))[0].shape[2] if self.kept and self.keep_to is None else 0


@dataclass
class Pass:
    """One model's forward passes over one batch: whole, or from a position or a block on.

    A whole pass with `window` keeps keys and values of the positions before it and the blocks' inputs from it on, so
    that `again` runs the window alone, from the first edited block: exact for any edit, since attention is causal.
    """

    model: Model
    blocks: Blocks
    batch: PromptBatch
    window: int = 0  # first position of later runs
    _cache: PrefixCache | None = None
    _inputs: dict[Point, Tensor] = field(default_factory=dict)

    def whole(
        self, edits: Mapping[Point, Edit] | None = None, record: Mapping[Point, slice | list[int]] | None = None
    ) -> tuple[Tensor, dict[Point, Tensor]]:
        """Run all positions; return (final hidden states [B, L, D], recorded activations)."""
        if not self.window or edits:
            return self._run(self.batch.ids_BL, None, 0, edits, record, None)
        cache = PrefixCache()
        cache.keep_to = self.window
        inputs: dict[Point, slice | list[int]] = {
            (k, "input"): slice(self.window, None) for k in range(len(self.blocks))
        }
        with recorded(self.blocks, inputs, self._inputs):
            out = self._run(self.batch.ids_BL, None, 0, None, record, cache)
        cache.keep_to, self._cache = None, cache
        return out

    def again(self, edits: Mapping[Point, Edit]) -> Tensor:
        """Return the final hidden states from `window` on, [B, L − window, D]; positions of edits count from there."""
        assert self._cache is not None
        first = min((layer for layer, _ in edits), default=0)
        with _only_from(self.blocks, first):
            return self._run(None, self._inputs[first, "input"], self.window, edits, None, self._cache)[0]

    def from_layer(
        self,
        layer: int,
        state_BLD: Tensor,
        edits: Mapping[Point, Edit] | None = None,
        record: Mapping[Point, slice | list[int]] | None = None,
    ) -> tuple[Tensor, dict[Point, Tensor]]:
        """Run the blocks from `layer` on, with `state_BLD` as its input; return as `whole` does."""
        with _only_from(self.blocks, layer):
            return self._run(None, state_BLD, 0, edits, record, None)

    @torch.no_grad()
    def _run(
        self,
        ids_BQ: Tensor | None,
        state_BQD: Tensor | None,
        start: int,
        edits: Mapping[Point, Edit] | None,
        record: Mapping[Point, slice | list[int]] | None,
        cache: PrefixCache | None,
    ) -> tuple[Tensor, dict[Point, Tensor]]:
        found: dict[Point, Tensor] = {}
        batch, decoder, dtype = self.batch, self.blocks.decoder, self.model.head.weight_VD.dtype
        given = {"input_ids": ids_BQ} if state_BQD is None else {"inputs_embeds": state_BQD}
        query_BQ = batch.position_BL[:, start:]
        with edited(self.blocks, edits or {}), recorded(self.blocks, record or {}, found):
            out = decoder(
                **given,
                attention_mask=attention_mask(decoder, dtype, batch.sees_BLL[:, start:], query_BQ, batch.position_BL),
                position_ids=query_BQ,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden_BQD: Tensor = out.last_hidden_state
        return hidden_BQD, found


class _Passing(nn.Module):
    """A block that changes nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


@contextmanager
def _only_from(blocks: Blocks, layer: int) -> Iterator[None]:
    """Let the decoder run its blocks from `layer` on only, within the context; blocks keep their numbers."""
    every = blocks.decoder.layers
    blocks.decoder.layers = nn.ModuleList([*(_Passing() for _ in range(layer)), *every[layer:]])
    try:
        yield
    finally:
        blocks.decoder.layers = every


@torch.no_grad()
def refusal_logits(model: Model, tree: OpeningTree, hidden_BQD: Tensor) -> Tensor:
    """Return L of each prompt, [B] float64, from final hidden states whose last T + 1 positions are root and nodes.

    log P has the error of float32 log-probabilities, about 1e-6, so |L| is exact up to about 12.
    """
    count, size = len(tree.nodes), len(hidden_BQD)
    logits_NV = model.head.logits(hidden_BQD[:, hidden_BQD.shape[1] - count :].reshape(size * count, -1))
    node_K = torch.tensor([node for node, _ in tree.steps], device=logits_NV.device)
    token_K = torch.tensor([token for _, token in tree.steps], device=logits_NV.device)
    total_BN = logits_NV.logsumexp(-1).view(size, count)
    logp_BK = (logits_NV.view(size, count, -1)[:, node_K, token_K] - total_BN[:, node_K]).double().cpu()
    path_BP = torch.stack([logp_BK[:, list(p)].sum(1) for p in tree.paths], 1)
    logp_B = path_BP.logsumexp(1).clamp(max=-1e-15)
    return logp_B - torch.log(-torch.expm1(logp_B))
