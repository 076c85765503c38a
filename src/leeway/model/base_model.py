"""Share one loaded base model: every checkout has its original weights, verified bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leeway.errors import LeewayError
from leeway.model.load import Model

CHUNK = 1 << 20  # values per step: 8 MiB, 16 MiB with their weights
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bits(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return one checksum per tensor, computed on the tensor's device, that changes if its bits change.

    With the values read as integers x_0, x_1, …: sum((2 i + 1) x_i) modulo 2^64. A single changed value always changes
    it, since an odd number times a non-zero difference below 2^64 is not zero; several changes go unnoticed with
    probability about 2^-64. It guards against mistakes, not against tampering.
    """
    return tuple(_bits(t) for t in tensors)


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    odd = torch.arange(1, 2 * min(CHUNK, len(flat)), 2, dtype=torch.int64, device=flat.device)
    found = 0
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK].to(torch.int64)
        found += int((part * odd[: len(part)]).sum()) + 2 * start * int(part.sum())
    return found % 2**64


class SharedBaseModel:
    """A loaded base model that is restored to its original state at every checkout.

    An adapter changes a model in one of two ways. Low-rank layers, grown embeddings and copied tables replace modules,
    parameters and settings but leave the original tensors alone: the originals are recorded here and put back. Full
    fine-tuning (`trained`) changes the weights themselves: a copy in main memory is written back. After either, `bits`
    of every parameter and buffer is compared with the loaded ones.
    """

    def __init__(self, model: Model, *, trained: bool = False) -> None:
        self._model = model
        self._places = [(place, _record(place)) for place in _places(model.lm)]
        self._tensors = {**dict(model.lm.named_parameters()), **dict(model.lm.named_buffers())}
        self._data = {name: t.data for name, t in self._tensors.items()}
        self._wanted = {name: t.requires_grad for name, t in self._tensors.items()}
        self._copy = {name: t.to("cpu", copy=True) for name, t in self._data.items()} if trained else {}
        self._bits = self._checksums()

    def checkout(self) -> Model:
        """Return the model as it was loaded; it invalidates earlier ones. Raises LeewayError if a tensor changed."""
        self._reset()
        for (name, was), now in zip(zip(self._tensors, self._bits, strict=True), self._checksums(), strict=True):
            if was != now:
                raise LeewayError(
                    f"model {self._model.name}: {name} changed after an adapter was removed",
                    fix="run the same command again: the model is reloaded, finished work is kept",
                )
        return replace(self._model)

    def _checksums(self) -> tuple[int, ...]:
        return bits(self._tensors.values())

    @torch.no_grad()
    def _reset(self) -> None:
        for place, noted in self._places:
            _restore(place, noted)
        for name, tensor in self._tensors.items():
            tensor.data = self._data[name]
            tensor.grad = None
            tensor.requires_grad_(self._wanted[name])
            if name in self._copy:
                tensor.data.copy_(self._copy[name])


def _places(lm: Any) -> list[Any]:
    """Return every object whose attributes an adapter may replace: modules and size settings."""
    settings = (lm.config, lm.config.get_text_config())
    return [*lm.modules(), *{id(s): s for s in settings}.values()]


def _record(place: Any) -> dict[str, Any]:
    """Record an object's attributes; dictionaries (parameters, submodules, hooks) are copied."""
    return {k: type(v)(v) if isinstance(v, dict) else v for k, v in vars(place).items()}


def _restore(place: Any, noted: dict[str, Any]) -> None:
    own = vars(place)
    for name in own.keys() - noted.keys():
        del own[name]
    for name, value in noted.items():
        if isinstance(value, dict) and isinstance(own.get(name), dict):
            own[name].clear()
            own[name].update(value)
        else:
            own[name] = type(value)(value) if isinstance(value, dict) else value
