"""The fused decoder is the plain one: on each architecture it knows, by its derivatives, and in what it cannot see."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_packing import drawn, moved, outcome
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.forward import APART, hidden_apart, hidden_at_measured, layout_of
from leeway.model.fused import kernels
from leeway.model.fused.decoder import dropped
from leeway.model.fused.kernels import AddNorm, Attention, GatedLinear, Linears, LowRank, NormLinears, SwiGlu
from leeway.model.load import Model, load_model
from leeway.model.packing import Blocks, Flat, Padded, PrefixTree, place
from leeway.model.token_stats import filled

CPU = torch.device("cpu")
KNOWN = ("llama", "qwen2", "qwen3")
BOUND = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 0.03}


@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d)[6:])
def test_fused_is_padded_on_every_known_architecture(
    dtype: torch.dtype,
    models: dict[str, Path],
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states and gradients, of pairs that share a prompt and of single sequences, attention in short spans."""
    monkeypatch.setattr(kernels, "SPAN", 8)
    apart = {}
    for kind in KNOWN:
        model = moved(models[kind], "sdpa", dtype, peft=True)
        padded = outcome(model, Padded.of([s for e in drawn(100) for s in e], CPU))
        fused = outcome(model, Flat.of(drawn(100), CPU))
        apart[kind] = max(float((a - b).norm() / b.norm()) for a, b in zip(fused, padded, strict=True))
    worst = f"{max(apart.values()):.1e} in {str(dtype)[6:]} (bound {BOUND[dtype]:.0e})"
    record_property("measured", f"fused = padded, {', '.join(KNOWN)}: {worst}")
    assert {kind: d for kind, d in apart.items() if d > BOUND[dtype]} == {}


@pytest.mark.parametrize("how", ["off", "merged", "some"])
def test_an_adapter_switched_off_merged_or_on_some_layers_only(how: str, models: dict[str, Path]) -> None:
    model = load_model(str(models["qwen2"]), device="cpu")
    targets = "q_proj,down_proj" if how == "some" else "all-linear"
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, targets), seed=0)
    for p in adapters.trainable(model):
        p.data += 0.05
    laid = Flat.of(drawn(), CPU), Padded.of([s for e in drawn() for s in e], CPU)
    with torch.no_grad():
        on, plain = (hidden_at_measured(model, batch) for batch in laid)
        if how == "off":
            with model.lm.disable_adapter():
                off, plain = (hidden_at_measured(model, batch) for batch in laid)
            assert not torch.allclose(on, off)
            on = off
        elif how == "merged":
            with adapters.merged(model):
                on = hidden_at_measured(model, laid[0])
    torch.testing.assert_close(on, plain, rtol=1e-4, atol=1e-5)


def test_trained_control_tokens_get_their_gradient(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0, control_tokens=("<A>",))
    (control,) = model.head.blocked
    sequences = [Sequence((control, 20, 21, 22), 2), Sequence((23, control, 24), 1)]
    fused, padded = (outcome(model, b) for b in (Flat.of([sequences], CPU), Padded.of(sequences, CPU)))
    torch.testing.assert_close(fused[1], padded[1], rtol=1e-4, atol=1e-6)
    row = next(p for n, p in model.lm.named_parameters() if "trainable_tokens_delta" in n)
    assert row.requires_grad
    hidden_at_measured(model, Flat.of([sequences], CPU)).sum().backward()
    assert row.grad is not None
    assert bool(row.grad.any())


@pytest.mark.parametrize("kind", KNOWN)
def test_no_example_sees_another(kind: str, models: dict[str, Path]) -> None:
    """To the bit: another example's tokens, another branch of the same tree, and what fills the row up."""
    model = moved(models[kind], "sdpa", torch.float32, peft=True)
    examples = drawn()
    others = [[Sequence(tuple(i + 1 for i in s.ids), s.target_start, s.measured_from) for s in e] for e in examples]
    branch = Sequence((*examples[0][0].ids[:-1], 99), examples[0][0].target_start)
    laid, exchanged = Flat.of(examples, CPU), Flat.of([examples[0], *others[1:]], CPU)
    branched = Flat.of([[branch, *examples[0][1:]], *examples[1:]], CPU)
    refilled = replace(laid, ids_BL=laid.ids_BL.clone())
    refilled.ids_BL[0, laid.blocks.tokens :] = 7
    assert laid.ids_BL.shape[1] == filled(laid.blocks.tokens) > laid.blocks.tokens
    with torch.no_grad():
        mine, same, own, padding = (hidden_at_measured(model, b) for b in (laid, exchanged, branched, refilled))
    first = sum(s.measured for s in examples[0])
    assert torch.equal(mine[:first], same[:first])
    assert not torch.equal(mine[first:], same[first:])
    assert torch.equal(mine[examples[0][0].measured :], own[examples[0][0].measured :])
    assert torch.equal(mine, padding)


def test_what_the_fused_decoder_does_not_know_goes_the_plain_way(models: dict[str, Path]) -> None:
    gemma, llama = (load_model(str(models[k]), device="cpu") for k in ("gemma2", "llama"))
    assert layout_of("auto", gemma, "lora") == "padded"
    assert layout_of("auto", llama, "lora") == layout_of("fused", llama, "rslora") == "fused"
    assert layout_of("auto", llama, "dora") == layout_of("auto", llama, "full") == "padded"
    assert layout_of("packed", llama, "lora") == "packed"
    for model, kind, why in ((gemma, "lora", "the architecture gemma2 is none of"), (llama, "dora", "kind is dora")):
        with pytest.raises(LeewayError, match=why):
            layout_of("fused", model, kind)


def test_steps_have_the_derivatives_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with places dropped, grouped heads, a tree of two branches and a filled row."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, delta, weight = leaf(3, 8), leaf(3, 8), torch.rand(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: AddNorm.apply(a, b, weight, 1e-6), (x, delta))
    assert torch.autograd.gradcheck(lambda a: AddNorm.apply(a, None, weight, 1e-6), (x,))
    assert torch.autograd.gradcheck(SwiGlu.apply, (x, delta))
    frozen = [(torch.randn(n, 8, dtype=torch.float64), torch.randn(n, dtype=torch.float64)) for n in (4, 6)]
    low = [leaf(2, 8), leaf(4, 2), leaf(3, 8), leaf(6, 3)]
    layers = LowRank(frozen, [2.0, 0.5], 0.9, torch.tensor([0, 5, 17]))
    assert torch.autograd.gradcheck(lambda a, *m: Linears.apply(a, layers, *m), (x, *low))
    assert torch.autograd.gradcheck(
        lambda a, b, *m: NormLinears.apply(a, b, weight, 1e-6, layers, *m), (x, delta, *low)
    )
    assert torch.autograd.gradcheck(lambda a, *m: NormLinears.apply(a, None, weight, 1e-6, layers, *m), (x, *low))
    down = LowRank(frozen[:1], [2.0], 0.9, torch.tensor([0, 5, 17]))
    assert torch.autograd.gradcheck(lambda a, b, *m: GatedLinear.apply(a, b, down, *m), (x, delta, *low[:2]))
    trees = [PrefixTree.of((Sequence((1, 2, 3), 1), Sequence((1, 4), 1))), PrefixTree.of((Sequence((5, 6), 1),))]
    blocks = Blocks.of(trees, CPU)
    rows = filled(6)
    cos, sin = torch.rand(rows, 4, dtype=torch.float64), torch.rand(rows, 4, dtype=torch.float64)
    biases = blocks.biases(torch.float64)
    qkv = (leaf(rows, 8), leaf(rows, 4), leaf(rows, 4))
    picked = torch.randn(6, 8, dtype=torch.float64)
    for span in (kernels.SPAN, 2):
        monkeypatch.setattr(kernels, "SPAN", span)
        assert torch.autograd.gradcheck(
            lambda q, k, v: (picked * Attention.apply(q, k, v, cos, sin, blocks, biases, 0.5)[:6]).sum(), qkv
        )


def test_places_are_dropped_at_their_rate_and_apart_from_each_other() -> None:
    """Binomial counts; a place's neighbour is dropped as often whether or not it was; one seed, one set of places."""
    n, rate = 2_000_000, 0.05
    found = dropped(n, rate, np.random.Generator(np.random.SFC64(1)))
    again = dropped(n, rate, np.random.Generator(np.random.SFC64(1)))
    assert torch.equal(found, again)
    assert bool((found.diff() > 0).all())
    assert 0 <= int(found[0]) <= int(found[-1]) < n
    deviation = (n * rate * (1 - rate)) ** 0.5
    assert abs(len(found) - n * rate) < 4 * deviation
    for gap in (1, 2, 7):
        both = len(np.intersect1d(found.numpy(), found.numpy() + gap))
        assert abs(both - n * rate**2) < 4 * (n * rate**2) ** 0.5
    ends = [dropped(3, 0.5, np.random.Generator(np.random.SFC64(k))).tolist() for k in range(4000)]
    for spot in range(3):
        assert abs(sum(spot in e for e in ends) - 2000) < 4 * 1000**0.5


def test_dropout_leaves_the_mean_and_is_the_states_alone(models: dict[str, Path]) -> None:
    """The same seed drops the same; over many draws the first layer's output is what it is without dropout."""
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    frozen = [(torch.zeros(3, 16), None)]
    low = [torch.randn(2, 16), torch.randn(3, 2)]
    rng = np.random.Generator(np.random.SFC64(0))
    layers = (LowRank(frozen, [1.0], 0.7, dropped(64, 0.3, rng)) for _ in range(4000))
    drawn_TO = torch.stack([Linears.apply(x, own, *low)[0] for own in layers])
    plain_TO = x @ low[0].T @ low[1].T
    error = drawn_TO.std(0) / 4000**0.5
    assert bool(((drawn_TO.mean(0) - plain_TO).abs() < 5 * error).all())
    model: Model = load_model(str(models["llama"]), device="cpu")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.2, "all-linear"), seed=0)
    for p in adapters.trainable(model):
        p.data += 0.05
    states = []
    for seed in (1, 1, 2):
        model.lm.train()
        torch.manual_seed(seed)
        states.append(hidden_at_measured(model, Flat.of(drawn(), CPU)).detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    model.lm.eval()
    before = torch.get_rng_state()
    hidden_at_measured(model, Flat.of(drawn(), CPU))
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def wide(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose products are large enough to be cut for threads and caches, with the small one's tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(models["qwen3"], folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.layer_types = 256, 700, 2, None
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_has_the_same_bits_whoever_its_neighbours_are(dtype: str, wide: Path) -> None:
    """Alone, and in rows filled in three ways; on one thread and on two; of many lengths, one longer than a row."""
    model = load_model(str(wide), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    lengths = [*rng.integers(4, 300, 40).tolist(), 1300, 1024]
    every = [Sequence(tuple(rng.integers(0, 200, n).tolist()), max(1, n // 2)) for n in lengths]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                alone = {s: hidden_apart(model, [s]) for s in every}
                for _ in range(3):
                    mixed = [every[k] for k in rng.permutation(len(every))[: rng.integers(20, len(every) + 1)]]
                    places, rows = place([len(s.ids) for s in mixed], APART)
                    for row in range(rows):
                        group = [s for s, (r, _) in zip(mixed, places, strict=True) if r == row]
                        found = torch.split(hidden_apart(model, group), [s.measured for s in group])
                        assert all(torch.equal(h, alone[s]) for s, h in zip(group, found, strict=True))
    finally:
        torch.set_num_threads(threads)
    plain = hidden_at_measured(model, Padded.of(every, CPU)).detach()
    apart = float((torch.cat([alone[s] for s in every]) - plain).norm() / plain.norm())
    assert apart < BOUND[plain.dtype]
