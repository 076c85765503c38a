"""Read and change a decoder's activations: plain PyTorch hooks on the blocks of a Hugging Face decoder.

A *site* is a tensor of a block: `input` (the residual stream before it), `attn` and `mlp` (what its attention and its
MLP add to the stream), `resid` (the stream after it). Hooks see an adapter's layers, since these replace submodules.

Shapes: B prompts, Q positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leeway.errors import LeewayError
from leeway.model.adapters import unwrapped
from leeway.model.load import Model

Site = Literal["input", "attn", "mlp", "resid"]
Point = tuple[int, Site]  # layer from 0, site
Edit = Callable[[Tensor], Tensor]  # [B, Q, D] -> [B, Q, D]

ATTENTION, MLP = "self_attn", "mlp"
AFTER_ATTENTION, AFTER_MLP = "post_attention_layernorm", "post_feedforward_layernorm"  # Gemma 2: norms of the outputs
ROUNDING = 0.02  # share of the stream by which a block's parts may miss it: bfloat16 loses up to 0.4% a sum


@dataclass(frozen=True)
class Blocks:
    """The blocks of a decoder, and the modules whose outputs attention and MLP add to the residual stream."""

    decoder: Any
    layers: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]

    @classmethod
    def of(cls, model: Model) -> Blocks:
        """Find the blocks. Raises LeewayError, naming what was looked for, on another architecture."""
        body = getattr(unwrapped(model.lm), unwrapped(model.lm).base_model_prefix, None)
        layers = getattr(body, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise _unknown(model, "a list `layers` in its decoder")
        sandwich = hasattr(layers[0], AFTER_MLP)
        names = (AFTER_ATTENTION, AFTER_MLP) if sandwich else (ATTENTION, MLP)
        for name in (ATTENTION, MLP, *names):
            if not all(hasattr(b, name) for b in layers):
                raise _unknown(model, f"a module `{name}` in each block")
        attention, mlp = (tuple(getattr(b, name) for b in layers) for name in names)
        found = cls(body, tuple(layers), attention, mlp)
        if (missed := found._missed(model)) > ROUNDING:
            what = "attention and MLP outputs that add up to the residual stream"
            raise _unknown(model, f"{what} (they miss it by {missed:.0%})")
        return found

    @torch.no_grad()
    def _missed(self, model: Model) -> float:
        """Return the largest share of the stream by which input + attention + MLP miss a block's output."""
        ids = torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "hello"}])], device=model.device)
        kept: dict[Point, Tensor] = {}
        points: dict[Point, slice | list[int]] = {
            (k, site): slice(None) for k in range(len(self)) for site in get_args(Site)
        }
        with recorded(self, points, kept):
            self.decoder(input_ids=ids, use_cache=False)
        missed = 0.0
        for k in range(len(self)):
            start, attn, mlp, end = (kept[k, site].float() for site in get_args(Site))
            missed = max(missed, float((start + attn + mlp - end).norm() / end.norm()))
        return missed

    def __len__(self) -> int:
        return len(self.layers)

    def module(self, point: Point) -> nn.Module:
        layer, site = point
        return {"attn": self.attention, "mlp": self.mlp}.get(site, self.layers)[layer]


def _unknown(model: Model, missing: str) -> LeewayError:
    what = f"model {model.name} ({type(unwrapped(model.lm)).__name__}): no blocks found, it lacks {missing}"
    return LeewayError(what, fix="the probe reads Llama, Qwen 2 and 3, and Gemma 2 decoders")


@contextmanager
def edited(blocks: Blocks, edits: Mapping[Point, Edit]) -> Iterator[None]:
    """Replace the activation at each point by what its edit returns, within the context."""
    with ExitStack() as stack:
        for point, edit in edits.items():
            handle = _attach(blocks, point, edit)
            stack.callback(handle.remove)
        yield


def _attach(blocks: Blocks, point: Point, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    module = blocks.module(point)
    if point[1] == "input":

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(after)


@contextmanager
def recorded(blocks: Blocks, points: Mapping[Point, slice | list[int]], into: dict[Point, Tensor]) -> Iterator[None]:
    """Copy the activations at each point, at its positions, into `into`: [B, len(positions), D]."""

    def keep(point: Point, positions: slice | list[int]) -> Edit:
        def edit(x_BQD: Tensor) -> Tensor:
            into[point] = x_BQD[:, positions].detach().clone()
            return x_BQD

        return edit

    with edited(blocks, {p: keep(p, at) for p, at in points.items()}):
        yield


def ablation(direction_D: Tensor) -> Edit:
    """Return h ← h − r̂ r̂ᵀh for a unit direction (Arditi et al. 2024, arXiv 2406.11717, eq. 4)."""

    def edit(x_BQD: Tensor) -> Tensor:
        unit_D = direction_D.to(x_BQD)
        return x_BQD - (x_BQD @ unit_D)[..., None] * unit_D

    return edit


def ablate_everywhere(blocks: Blocks, direction_D: Tensor) -> dict[Point, Edit]:
    """Return the edits that keep a direction out of the stream: at block inputs, attention and MLP outputs."""
    edit = ablation(direction_D)
    sites: tuple[Site, ...] = ("input", "attn", "mlp")
    return {(layer, site): edit for layer in range(len(blocks)) for site in sites}


def addition(vector_D: Tensor) -> Edit:
    """Return h ← h + v at all positions."""
    return lambda x_BQD: x_BQD + vector_D.to(x_BQD)


def moved_as_far(as_BQD: Tensor, unit_BD: Tensor) -> Edit:
    """Return the edit that moves an activation as far as `as_BQD` is from it, along one direction per prompt."""

    def edit(x_BQD: Tensor) -> Tensor:
        length_BQ1: Tensor = (as_BQD.to(x_BQD) - x_BQD).norm(dim=-1, keepdim=True)
        return x_BQD + length_BQ1 * unit_BD.to(x_BQD)[:, None]

    return edit


def replacement(positions: slice, value_BPD: Tensor) -> Edit:
    """Return the edit that puts given activations at some positions."""

    def edit(x_BQD: Tensor) -> Tensor:
        changed_BQD = x_BQD.clone()
        changed_BQD[:, positions] = value_BPD.to(x_BQD)
        return changed_BQD

    return edit
