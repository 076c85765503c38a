"""A checkpoint and its base as two sides of a comparison: one model whose adapter is switched, or two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leeway.model.adapters import is_low_rank
from leeway.model.load import Model
from leeway.probe.hooks import Blocks, Site

LAYER_SITES: tuple[Site, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class Side:
    """One model of a comparison. `active` puts its weights in place; forward passes run within it."""

    model: Model
    blocks: Blocks
    active: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class ModelPair:
    """The base and a checkpoint on it.

    With a low-rank adapter both are one model, and the base is that model with the adapter switched off. Otherwise they
    are two models of one structure: whole weights, or two adapters of one kind and rank.
    """

    base: Side
    checkpoint: Side

    @classmethod
    def of(cls, checkpoint: Model, base: Model | None = None) -> ModelPair:
        """Pair a model with an adapter with itself, or a model with a `base` of the same structure.

        Both are put into evaluation mode: dropout would make every pass another one.
        """
        checkpoint.lm.eval()
        blocks = Blocks.of(checkpoint)
        tuned = Side(checkpoint, blocks, lambda: direct(checkpoint.lm))
        if base is None and is_low_rank(checkpoint):
            return cls(Side(checkpoint, blocks, lambda: _base_of(checkpoint.lm)), tuned)
        other = base or checkpoint
        other.lm.eval()
        return cls(Side(other, Blocks.of(other), lambda: direct(other.lm)), tuned)

    @property
    def is_switched(self) -> bool:
        """Whether both sides are one model, whose adapter is switched on and off."""
        return self.base.blocks is self.checkpoint.blocks

    @contextmanager
    def part(self, layer: int, site: Site, *, tuned: bool) -> Iterator[None]:
        """Within the context, one block's attention or MLP has the checkpoint's weights (`tuned`) or the base's.

        For a switched adapter on the model in its current state; for two models, the base's weights move into the
        checkpoint's block, or the checkpoint's into the base's (`tuned`).
        """
        if self.is_switched:
            with switched(modules(self.checkpoint.blocks, layer, site), on=tuned):
                yield
            return
        into, out = (self.base, self.checkpoint) if tuned else (self.checkpoint, self.base)
        targets = [p for m in modules(into.blocks, layer, site) for p in m.parameters()]
        sources = [p for m in modules(out.blocks, layer, site) for p in m.parameters()]
        kept = [p.data for p in targets]
        for target, source in zip(targets, sources, strict=True):
            target.data = source.data
        try:
            yield
        finally:
            for target, data in zip(targets, kept, strict=True):
                target.data = data


def modules(blocks: Blocks, layer: int, site: Site) -> list[nn.Module]:
    """Return the modules of a block's attention or MLP, with the norm before it (and, in Gemma 2, after it)."""
    block = blocks.layers[layer]
    sandwich = hasattr(block, "pre_feedforward_layernorm")
    if site == "attn":
        names = ["input_layernorm", "self_attn", *(["post_attention_layernorm"] if sandwich else [])]
    elif sandwich:
        names = ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"]
    else:
        names = ["post_attention_layernorm", "mlp"]
    return [getattr(block, n) for n in names]


@contextmanager
def switched(inside: Any, *, on: bool) -> Iterator[None]:
    """Switch the adapter layers inside a module (or several) on or off, within the context.

    Works for LoRA, rsLoRA, DoRA and trained token rows, since each layer has the switch; nothing is merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    roots = inside if isinstance(inside, list) else [inside]
    layers = {id(m): m for root in roots for m in root.modules() if isinstance(m, BaseTunerLayer)}
    states = [(m, m._disable_adapters) for m in layers.values()]
    for layer, _ in states:
        layer._disable_adapters = not on
    try:
        yield
    finally:
        for layer, state in states:
            layer._disable_adapters = state


@contextmanager
def _base_of(lm: Any) -> Iterator[None]:
    with direct(lm), switched(lm, on=False):
        yield


@contextmanager
def direct(lm: Any) -> Iterator[None]:
    """Let plain LoRA layers add their update to the output in one product, in the dtype of the weights.

    peft adds it in float32, by five passes over inputs and outputs, which takes as long as the layer's own product.
    Both round the sum to that dtype. Other kinds of adapters run as they are.
    """
    plain = [m for m in lm.modules() if _is_plain_lora(m)] if hasattr(lm, "peft_config") else []
    for layer in plain:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in plain:
            del layer.forward


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or module.merged or module.active_adapters != ["default"]:
        return False
    return type(module.base_layer) is nn.Linear and not module.lora_variant and not module.lora_bias["default"]


def _forward(layer: Any, x_BQD: Tensor) -> Tensor:
    y_BQO = nn.functional.linear(x_BQD, layer.base_layer.weight, layer.base_layer.bias)
    if not layer.disable_adapters:
        a_RD, b_OR = (w["default"].weight.to(x_BQD.dtype) for w in (layer.lora_A, layer.lora_B))
        low_CR = nn.functional.linear(x_BQD, a_RD).flatten(0, -2)
        y_BQO.flatten(0, -2).addmm_(low_CR, b_OR.T, alpha=layer.scaling["default"])
    return y_BQO


def delta(pair: ModelPair, layer: int, site: Site) -> list[tuple[str, Tensor]]:
    """Return the change of each weight matrix of a block's attention or MLP, by name, in float32 [out, in]."""
    found = []
    tuned = modules(pair.checkpoint.blocks, layer, site)
    based = modules(pair.base.blocks, layer, site)
    for own, other in zip(tuned, based, strict=True):
        for (name, layer_own), (_, layer_other) in zip(own.named_modules(), other.named_modules(), strict=True):
            inner = ".base_layer" in name or "lora_" in name  # counted with the layer that holds it
            change = None if inner else _change(layer_own, layer_other)
            if change is not None:
                found.append((name, change))
    return found


def _change(tuned: nn.Module, base: nn.Module) -> Tensor | None:
    """Return the difference of two matrices, or of two adapters' updates of one; None for any other module."""
    update, other = _update(tuned), None if tuned is base else _update(base)
    if update is not None:
        return update if other is None else update - other
    weight = getattr(tuned, "weight", None)
    if tuned is base or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.detach().float() - base.weight.detach().float()  # type: ignore[operator]


@torch.no_grad()
def _update(tuned: nn.Module) -> Tensor | None:
    """Return the change of a matrix by its low-rank adapter; None if it has none."""
    if "default" in getattr(tuned, "lora_A", {}):
        weight = tuned.get_base_layer().weight.float()  # type: ignore[operator]
        a, b = (getattr(tuned, n)["default"].weight.float() for n in ("lora_A", "lora_B"))
        change: Tensor = tuned.scaling["default"] * (b @ a)  # type: ignore[index]
        if magnitudes := getattr(tuned, "lora_magnitude_vector", {}):
            turned = weight + change
            change = (magnitudes["default"].weight.float() / turned.norm(dim=1))[:, None] * turned - weight
        return change
    return None
