"""A transformers decoder, with or without a peft adapter, run through the fused kernels.

Supported: decoders of Llama's architecture (Llama, Qwen 2 and 3: RMS norms before attention and MLP, rotary positions,
grouped heads, SwiGLU; optional biases of q, k, v and norms of q and k), frozen, with LoRA or rsLoRA on any of their
linear layers. Anything else uses the plain path; `why_not` returns the reason.

Dropout masks are drawn as dropped indices: at a rate of 5% this needs a twentieth of the random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leeway.model.adapters import unwrapped
from leeway.model.fused.kernels import AddNorm, Attention, GatedLinear, Linears, LowRank, NormLinears, SwiGlu
from leeway.model.load import decoder
from leeway.model.packing import Blocks
from leeway.model.token_stats import filled

BATCH = 1 << 26  # indices per batch: keeps float32 gaps exact and memory bounded


def dropped(count: int, rate: float, rng: np.random.Generator) -> Tensor:
    """Return sorted indices in [0, count), each included independently with probability `rate`, int64.

    Gaps between successes of a Bernoulli process are geometric: floor(E / -log(1 - rate)) failures, E exponential with
    mean 1 (Devroye 1986, Non-Uniform Random Variate Generation, section X.2).
    """
    found = [_dropped(min(BATCH, count - start), rate, rng) + start for start in range(0, count, BATCH)]
    return torch.from_numpy(np.concatenate(found) if len(found) != 1 else found[0])


def _dropped(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    expected = count * rate
    draws = int(expected + 6 * math.sqrt(expected) + 16)
    scale = -1.0 / math.log1p(-rate)
    places = np.empty(0, dtype=np.int64)
    while True:  # a second round happens about once in 1e9
        gaps = (rng.standard_exponential(draws, dtype=np.float32) * np.float32(scale)).astype(np.int64) + 1
        more = gaps.cumsum() + (places[-1] if len(places) else -1)
        places = np.concatenate([places, more]) if len(places) else more
        if places[-1] >= count:
            return places[: np.searchsorted(places, count)]


KNOWN = ("llama", "qwen2", "qwen3")


def why_not(lm: Any) -> str:
    """Return why this architecture needs the plain path; empty if the fused one supports it."""
    config = lm.config
    kind = getattr(config, "model_type", "?")
    if kind not in KNOWN:
        return f"the architecture {kind} is none of {', '.join(KNOWN)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"the activation {config.hidden_act} is not silu"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    return ""


def hidden(lm: Any, ids_T: Tensor, position_T: Tensor, blocks: Blocks, wanted_T: Tensor) -> Tensor:
    """Return the final hidden states, after the last norm, of the tokens at `wanted_T`: [len(wanted_T), D].

    In training mode each call draws one number from torch's global generator to seed the adapter's dropout.
    """
    x_TD, cos_TE, sin_TE = embedded(lm, ids_T, position_T)
    biases = blocks.biases(x_TD.dtype)
    rng = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, (1,))))) if lm.training else None

    def mix(_: int, attention: Any, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor) -> Tensor:
        found: Tensor = Attention.apply(q_TD, k_TD, v_TD, cos_TE, sin_TE, blocks, biases, attention.scaling)
        return found

    linears = partial(_apply, rng=rng)
    return through(lm, x_TD, mix, Layers(linears, rng) if torch.is_grad_enabled() else Plain(linears), wanted_T)


# (layer index, attention module, q, k, v) -> attention output
Mix = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]
Apply = Callable[[Tensor, Seq[Any]], tuple[Tensor, ...]]  # (input, linear layers) -> one output per layer


@dataclass(frozen=True)
class Plain:
    """The linear layers of a decoder by one function, without anything saved for a backward pass."""

    linears: Apply

    def after_norm(
        self, x_TD: Tensor, delta_TD: Tensor | None, norm: Any, modules: Seq[Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (x + delta, the layers' outputs for its norm)."""
        x_TD, y_TD = AddNorm.apply(x_TD, delta_TD, norm.weight, norm.variance_epsilon)
        return x_TD, self.linears(y_TD, modules)

    def gated(self, gate_TF: Tensor, up_TF: Tensor, module: Any) -> Tensor:
        """Return the layer's output for silu(gate) * up."""
        return self.linears(SwiGlu.apply(gate_TF, up_TF), [module])[0]


@dataclass(frozen=True)
class Layers(Plain):
    """The same for training: a layer's input is computed again in the backward pass where that is cheap."""

    rng: np.random.Generator | None  # of dropout

    def after_norm(
        self, x_TD: Tensor, delta_TD: Tensor | None, norm: Any, modules: Seq[Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not all(map(adapted, modules)):
            return super().after_norm(x_TD, delta_TD, norm, modules)
        layers, low = _low_rank(modules, x_TD.numel(), x_TD.device, self.rng)
        x_TD, *found = NormLinears.apply(x_TD, delta_TD, norm.weight, norm.variance_epsilon, layers, *low)
        return x_TD, tuple(found)

    def gated(self, gate_TF: Tensor, up_TF: Tensor, module: Any) -> Tensor:
        if not adapted(module):
            return super().gated(gate_TF, up_TF, module)
        layers, low = _low_rank([module], gate_TF.numel(), gate_TF.device, self.rng)
        found: Tensor = GatedLinear.apply(gate_TF, up_TF, layers, *low)
        return found


def embedded(lm: Any, ids_T: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (embeddings [T, D], cosines and sines of the positions [T, E])."""
    base = unwrapped(lm)
    body = decoder(base)
    x_TD = base.get_input_embeddings()(ids_T[None])[0].to(body.norm.weight.dtype)
    cos, sin = body.rotary_emb(x_TD[None], position_ids=position_T[None])
    return x_TD, cos[0], sin[0]


def through(lm: Any, x_TD: Tensor, mix: Mix, layers: Plain, wanted_T: Tensor) -> Tensor:
    """Run all layers and the last norm; `mix` and `layers` implement attention and linear layers.

    After the last attention only the wanted tokens are computed.
    """
    body = decoder(unwrapped(lm))
    delta_TD: Tensor | None = None
    fill = torch.zeros(filled(len(wanted_T)) - len(wanted_T), dtype=torch.long, device=wanted_T.device)
    rows_N, last = torch.cat([wanted_T, fill]), len(body.layers) - 1
    for n, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        x_TD, (q, k, v) = layers.after_norm(x_TD, delta_TD, layer.input_layernorm, inputs)
        q, k = _normed(q, attention, "q_norm"), _normed(k, attention, "k_norm")
        mixed_TD = mix(n, attention, q, k, v)
        if n == last and len(rows_N) < len(x_TD):
            x_TD, mixed_TD = x_TD.index_select(0, rows_N), mixed_TD.index_select(0, rows_N)
            wanted_T = torch.arange(len(wanted_T), device=wanted_T.device)
        (out_TD,) = layers.linears(mixed_TD, [attention.o_proj])
        halves = [mlp.gate_proj, mlp.up_proj]
        x_TD, (gate_TF, up_TF) = layers.after_norm(x_TD, out_TD, layer.post_attention_layernorm, halves)
        delta_TD = layers.gated(gate_TF, up_TF, mlp.down_proj)
    assert delta_TD is not None
    x_TD, delta_TD, norm = x_TD.index_select(0, wanted_T), delta_TD.index_select(0, wanted_T), body.norm
    found_TD: Tensor = AddNorm.apply(x_TD, delta_TD, norm.weight, norm.variance_epsilon)[1]
    return found_TD


def _normed(x_TD: Tensor, attention: Any, name: str) -> Tensor:
    norm = getattr(attention, name, None)
    if norm is None:
        return x_TD
    heads = x_TD.reshape(-1, attention.head_dim)
    found: Tensor = AddNorm.apply(heads, None, norm.weight, norm.variance_epsilon)[1]
    return found.view_as(x_TD)


def _apply(x_TD: Tensor, modules: Seq[Any], rng: np.random.Generator | None = None) -> tuple[Tensor, ...]:
    """Apply linear layers that share one input, with their low-rank updates if any."""
    low = [adapted(m) for m in modules]
    if not any(low):
        return tuple(torch.nn.functional.linear(x_TD, *frozen(m)) for m in modules)
    if not all(low):  # only some have an adapter
        return tuple(y for m in modules for y in _apply(x_TD, [m], rng))
    layers, pairs = _low_rank(modules, x_TD.numel(), x_TD.device, rng)
    found: tuple[Tensor, ...] = Linears.apply(x_TD, layers, *pairs)
    return found


def _low_rank(
    modules: Seq[Any], inputs: int, device: torch.device, rng: np.random.Generator | None
) -> tuple[LowRank, list[Tensor]]:
    """Return the adapted layers of one input of so many elements, dropout drawn, and their A, B in turn."""
    rate = float(getattr(modules[0].lora_dropout["default"], "p", 0.0))
    places = dropped(inputs, rate, rng).to(device) if rng is not None and rate else None
    scalings = [m.scaling["default"] for m in modules]
    layers = LowRank([frozen(m) for m in modules], scalings, 1.0 - rate if places is not None else 1.0, places)
    return layers, [t for m in modules for t in (m.lora_A["default"].weight, m.lora_B["default"].weight)]


def frozen(module: Any) -> tuple[Tensor, Tensor | None]:
    plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return plain.weight, plain.bias


def adapted(module: Any) -> bool:
    """Return whether a low-rank update is active on the module: neither disabled nor merged."""
    return hasattr(module, "lora_A") and not module.disable_adapters and not module.merged
