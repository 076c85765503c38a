"""The refusal logit, read from final hidden states of prompts whose possible refusals follow as a tree of tokens.

    L = log P − log(1 − P),   P = Σ over refusal openings of Π P(token | prompt, tokens before)

(Arditi et al. 2024, arXiv 2406.11717, §2.3, there over first tokens only). The openings' tokens form a tree; its inner
nodes stand after every prompt, each sees the prompt and its own ancestors, and one forward pass gives all of them.

Shapes: B prompts, T tree nodes, K opening tokens scored, C hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.model.load import Model
from leeway.yaml_config import package_data

Ids = tuple[int, ...]
LONGEST = 4  # tokens of an opening


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


@torch.no_grad()
def refusal_logits(model: Model, tree: OpeningTree, hidden_BQD: Tensor) -> Tensor:
    """Return L of each prompt, [B] float64, from final hidden states whose last T + 1 positions are root and nodes.

    log P has the error of float32 log-probabilities, about 1e-6, so |L| is exact up to about 12.
    """
    count, size = len(tree.nodes), len(hidden_BQD)
    rows_CD = hidden_BQD[:, hidden_BQD.shape[1] - count :].reshape(size * count, -1)
    logp_BNK = torch.cat([_opening_logps(model, tree, rows_CD[some]) for some in model.head.chunks(len(rows_CD))])
    logp_BNK = logp_BNK.view(size, count, -1)
    steps = torch.arange(len(tree.steps))
    logp_BK = logp_BNK[:, [node for node, _ in tree.steps], steps].double()
    path_BP = torch.stack([logp_BK[:, list(p)].sum(1) for p in tree.paths], 1)
    logp_B = path_BP.logsumexp(1).clamp(max=-1e-15)
    return logp_B - torch.log(-torch.expm1(logp_B))


def _opening_logps(model: Model, tree: OpeningTree, hidden_CD: Tensor) -> Tensor:
    """Return the log-probability of every step's token after every hidden state, [C, K] on the CPU."""
    tokens = [token for _, token in tree.steps]
    total_C: Tensor | None = None
    found_CK = torch.empty(len(hidden_CD), len(tokens), dtype=torch.float64)
    for block in model.head.blocks(hidden_CD):
        sum_C = block.capped_CN.logsumexp(-1)
        total_C = sum_C if total_C is None else torch.logaddexp(total_C, sum_C)
        here = [k for k, token in enumerate(tokens) if block.start <= token < block.stop]
        if here:
            found_CK[:, here] = block.capped_CN[:, [tokens[k] - block.start for k in here]].double().cpu()
    assert total_C is not None
    return found_CK - total_C.double().cpu()[:, None]
