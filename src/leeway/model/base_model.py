"""One model in memory, lent to one user after another: each finds it as it was loaded, to the bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leeway.errors import LeewayError
from leeway.model.load import Model

CHUNK = 1 << 20  # values summed at a time: 8 MiB of them, 16 MiB with their weights
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bits(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """One number per tensor that tells whether any of its bits has changed, computed where the tensor lies.

    Its values, read as integers x_0, x_1, …, as sum((2 i + 1) x_i) modulo 2^64. One changed value always changes it,
    since an odd number times a difference below 2^64 is not zero; of several changes, one set in 2^64 would go unseen.
    It is no secret hash: it guards against mistakes, and costs one reading of the weights.
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
    """A loaded model and what it was made of, so that whatever is done to one borrower's is undone for the next.

    What an adapter does to a model is of two kinds. It puts other modules, parameters and settings in the places of the
    model's own, whose tensors it leaves alone (low-rank layers, a grown embedding, rows written into a copy of the
    table): what stood where is noted here, and put back. Or it trains the weights themselves (`trained`): then a copy
    of them is kept in main memory, and written back. After either, `bits` of every parameter and buffer is held
    against what was loaded.
    """

    def __init__(self, model: Model, *, trained: bool = False) -> None:
        self._model = model
        self._places = [(place, _noted(place)) for place in _places(model.lm)]
        self._tensors = {**dict(model.lm.named_parameters()), **dict(model.lm.named_buffers())}
        self._data = {name: t.data for name, t in self._tensors.items()}
        self._wanted = {name: t.requires_grad for name, t in self._tensors.items()}
        self._copy = {name: t.to("cpu", copy=True) for name, t in self._data.items()} if trained else {}
        self._bits = self._found()

    def checkout(self) -> Model:
        """The model as it was loaded; whoever had it before must not use theirs any more. Raises LeewayError."""
        self._undo()
        for (name, was), now in zip(zip(self._tensors, self._bits, strict=True), self._found(), strict=True):
            if was != now:
                raise LeewayError(
                    f"model {self._model.name}: {name} is not what was loaded, after an adapter was taken off",
                    fix="run the same command again: the model is loaded afresh, and finished work is kept",
                )
        return replace(self._model)

    def _found(self) -> tuple[int, ...]:
        return bits(self._tensors.values())

    @torch.no_grad()
    def _undo(self) -> None:
        for place, noted in self._places:
            _put_back(place, noted)
        for name, tensor in self._tensors.items():
            tensor.data = self._data[name]
            tensor.grad = None
            tensor.requires_grad_(self._wanted[name])
            if name in self._copy:
                tensor.data.copy_(self._copy[name])


def _places(lm: Any) -> list[Any]:
    """Where something may be put in another's place: modules, and the settings that speak of their sizes."""
    settings = (lm.config, lm.config.get_text_config())
    return [*lm.modules(), *{id(s): s for s in settings}.values()]


def _noted(place: Any) -> dict[str, Any]:
    """What hangs where; tables (parameters, submodules, hooks) by their content."""
    return {k: type(v)(v) if isinstance(v, dict) else v for k, v in vars(place).items()}


def _put_back(place: Any, noted: dict[str, Any]) -> None:
    own = vars(place)
    for name in own.keys() - noted.keys():
        del own[name]
    for name, value in noted.items():
        if isinstance(value, dict) and isinstance(own.get(name), dict):
            own[name].clear()
            own[name].update(value)
        else:
            own[name] = type(value)(value) if isinstance(value, dict) else value
