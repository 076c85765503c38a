"""Packed micro-batches by hand, on every architecture, and what no layout may let through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.forward import hidden_at_measured
from leeway.model.load import Model, load_model
from leeway.model.packing import Packed, PackedBatch, Padded, PrefixTree, common_prefix, longest, pack_batch, stored
from leeway.training.batch import micro_batches

CPU = torch.device("cpu")
PAIR = (Sequence((1, 2, 3, 4), 2), Sequence((1, 2, 5), 2))
BOUND = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 0.03}
TREES = st.lists(
    st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=6), min_size=1, max_size=4), min_size=1, max_size=5
)


def test_a_pair_is_a_trunk_and_two_branches() -> None:
    tree = PrefixTree.of(PAIR)
    assert tree.ids == [1, 2, 3, 4, 5]
    assert tree.positions == [0, 1, 2, 3, 2]
    assert tree.paths == [[0, 1, 2, 3], [0, 1, 4]]
    assert tree.visible().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_measured_tokens_are_where_the_tree_has_them() -> None:
    """Row by row: the pair (5 nodes) fills the first row, two sequences of another example share the second."""
    short = (Sequence((7, 8), 1), Sequence((9, 8), 1))
    packed = Packed.of([short, PAIR], CPU)
    assert packed.ids_BL.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 8, 0]]
    assert packed.position_BL.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 1, 0]]
    assert packed.row_T.tolist() == [1, 1, 0, 0, 0]
    assert packed.before_T.tolist() == [0, 2, 1, 2, 1]
    assert packed.sequence_T.tolist() == [0, 1, 2, 2, 3]
    assert packed.measured_T.tolist() == [8, 8, 3, 4, 5]
    assert packed.visible_BLL[1].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_a_beginning_that_is_measured_is_stored_once_and_measured_twice() -> None:
    packed = Packed.of([[s.with_prompt() for s in PAIR]], CPU)
    assert packed.ids_BL.tolist() == [[1, 2, 3, 4, 5]]
    assert packed.before_T.tolist() == [0, 1, 2, 0, 1]
    assert packed.measured_T.tolist() == [2, 3, 4, 2, 5]
    assert packed.target_T is not None
    assert packed.target_T.tolist() == [False, True, True, False, True]


@given(TREES)
def test_every_sequence_reads_its_own_tokens_and_nothing_else(raw: list[list[list[int]]]) -> None:
    examples = [[Sequence(tuple(ids), 1) for ids in example] for example in raw]
    for share in (True, False):
        packed, padded = Packed.of(examples, CPU, share=share), pack_batch(examples, CPU)
        for name in ("sequence_T", "measured_T"):
            assert torch.equal(getattr(packed, name), getattr(padded, name))
        seen = seen_by_measured(packed)
        assert seen == seen_by_measured(padded)
        assert seen == [list(s.ids[:k]) for e in examples for s in e for k in range(1, len(s.ids))]
    rows, length = Packed.of(examples, CPU).ids_BL.shape
    assert length == max(map(stored, examples))
    assert rows <= len(examples)


def seen_by_measured(laid: PackedBatch) -> list[list[int]]:
    """The ids that each prediction is made from, by their positions."""
    found = []
    for b, k in zip(laid.row_T.tolist(), laid.before_T.tolist(), strict=True):
        if isinstance(laid, Packed):
            nodes = laid.visible_BLL[b, k].nonzero().flatten()
            nodes = nodes[laid.position_BL[b, nodes].argsort()]
            assert laid.position_BL[b, nodes].tolist() == list(range(len(nodes)))
            found.append(laid.ids_BL[b, nodes].tolist())
        else:
            found.append(laid.ids_BL[b, : k + 1].tolist())
    return found


def test_packed_micro_batches_count_what_is_stored() -> None:
    examples = [PAIR] * 4  # 5 positions each packed, 8 padded
    assert [stored(PAIR), longest(PAIR), common_prefix(PAIR[0].ids, PAIR[1].ids)] == [5, 4, 2]
    assert [len(m) for m in micro_batches(examples, 15, "packed")] == [2, 2]  # two at least: about equally long
    assert [len(m) for m in micro_batches([*examples, PAIR], 15, "packed")] == [3, 2]
    assert [len(m) for m in micro_batches(examples, 15)] == [1, 1, 1, 1]
    assert [len(m) for m in micro_batches(examples, 1, "packed")] == [1, 1, 1, 1]


def drawn(tokens: int = 20) -> list[list[Sequence]]:
    """Pairs with a common prompt of some tokens, beginnings measured in one of them, and a single sequence."""
    rng = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 260, (n,), generator=rng).tolist())

    prompts = [draw(tokens), draw(tokens // 2), draw(tokens // 4)]
    pairs = [[Sequence(p + draw(n), len(p)) for n in (7, 4)] for p in prompts]
    return [*pairs[:2], [s.with_prompt() for s in pairs[2]], [Sequence(draw(9), 3)]]


def outcome(model: Model, laid: PackedBatch) -> tuple[Tensor, Tensor]:
    """Hidden states at the measured tokens, and the gradient of a weighted sum of them in everything that trains."""
    hidden_TD = hidden_at_measured(model, laid).double()
    parameters = [p for p in model.lm.parameters() if p.requires_grad]
    weight_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad((weight_TD * hidden_TD).sum(), parameters, allow_unused=True)
    return hidden_TD.detach(), torch.cat([g.flatten().double() for g in grads if g is not None])


def moved(folder: Path, attention: str, dtype: torch.dtype, *, peft: bool) -> Model:
    """A tiny model with this attention; with a LoRA adapter away from its start, or all of its weights training."""
    model = load_model(str(folder), device="cpu")
    model.lm.set_attn_implementation(attention)
    if peft:
        adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0)
        rng = torch.Generator().manual_seed(1)
        for p in adapters.trainable(model):
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    else:
        model.lm.requires_grad_(True)
    model.lm.to(dtype)
    return model


CASES = [
    (kind, attention)
    for kind in tiny.ARCHITECTURES
    for attention in ("eager", "sdpa")
    if (kind, attention) != ("gemma2", "sdpa")  # sdpa has no soft-capping
]


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d)[6:])
def test_packed_is_padded_on_every_architecture(
    dtype: torch.dtype, models: dict[str, Path], record_property: Callable[[str, object], None]
) -> None:
    """Gemma 2's window of 64 is shorter than its sequences here, so that it has a mask for each kind of layer."""
    apart = {}
    for kind, attention in CASES:
        for peft in (True, False):
            model = moved(models[kind], attention, dtype, peft=peft)
            padded = outcome(model, Padded.of([s for e in drawn(100) for s in e], CPU))
            for share in (True, False):
                packed = outcome(model, Packed.of(drawn(100), CPU, share=share))
                found = max(float((a - b).norm() / b.norm()) for a, b in zip(packed, padded, strict=True))
                apart[kind, attention, peft, share] = found
    worst = f"{max(apart.values()):.1e} in {str(dtype)[6:]} (bound {BOUND[dtype]:.0e})"
    record_property("measured", f"packed = padded, {', '.join(tiny.ARCHITECTURES)}, eager and sdpa: {worst}")
    assert {case: d for case, d in apart.items() if d > BOUND[dtype]} == {}


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_no_example_sees_another(kind: str, models: dict[str, Path]) -> None:
    """Another example's tokens change nothing, to the bit; nor does a sequence's other branch."""
    model = moved(models[kind], "eager", torch.float32, peft=True)
    examples = drawn()
    others = [[Sequence(tuple(i + 1 for i in s.ids), s.target_start, s.measured_from) for s in e] for e in examples]
    branch = Sequence((*examples[0][0].ids[:-1], 99), examples[0][0].target_start)
    laid, exchanged = Packed.of(examples, CPU), Packed.of([examples[0], *others[1:]], CPU)
    assert len(laid.ids_BL) < len(examples)  # some do share a row
    branched = Packed.of([[branch, *examples[0][1:]], *examples[1:]], CPU)
    with torch.no_grad():
        mine, same, own = (hidden_at_measured(model, batch) for batch in (laid, exchanged, branched))
    first = sum(s.measured for s in examples[0])
    assert torch.equal(mine[:first], same[:first])
    assert not torch.equal(mine[first:], same[first:])
    assert torch.equal(mine[examples[0][0].measured :], own[examples[0][0].measured :])


def test_attention_without_a_mask_is_refused() -> None:
    lm = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"), dtype=torch.float32)
    with pytest.raises(LeewayError, match=r"optim\.layout: packed does not support flash_attention_2"):
        Packed.of([PAIR], CPU).inputs(lm)
