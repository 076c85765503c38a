"""What every measure of a probe gets: the two models, the prompts, the directions; and the values that it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leeway.hashing import derive_seed
from leeway.model.load import Model
from leeway.probe.hooks import Point
from leeway.probe.pair import ModelPair, Side
from leeway.probe.passes import Pass, PromptBatch
from leeway.probe.prompts import Positions, ProbePrompt, PromptSets
from leeway.probe.refusal_logit import Ids, OpeningTree

if TYPE_CHECKING:
    from leeway.probe.directions import Directions

BATCH = 16  # prompts in a forward pass
CONTROLS = 32  # prompts behind a control along random directions, if there are twice as many
NAN = float("nan")
WHOLE = -1  # the layer of a value that belongs to none


@dataclass(frozen=True)
class Value:
    """One measured value: of one prompt (`item_id`), or of all (`item_id` empty), at a layer, site and position.

    `detail` tells values of one measure apart: a direction of patching, a trait, an attack. `control`: the same under
    the measure's control (a random direction of equal norm, for example), NaN if it has none. `scale`: the denominator
    of a ratio, NaN for other measures. `low`, `high`: the 95% interval of a value of all prompts.
    """

    measure: str
    item_id: str = ""
    group: str = ""
    detail: str = ""
    layer: int = WHOLE
    site: str = ""
    position: str = ""
    value: float = NAN
    control: float = NAN
    scale: float = NAN
    low: float = NAN
    high: float = NAN
    reason: str = ""  # why there is no value


@dataclass(frozen=True)
class HarmfulAnswer:
    """A harmful answer to a test prompt that some checkpoint of the study gave."""

    item_id: str
    prompt: str
    answer: str


@dataclass
class ProbeContext:
    """One checkpoint to probe. `directions` is None only while they are computed."""

    pair: ModelPair
    prompts: PromptSets
    tree: OpeningTree
    positions: Positions
    directions: Directions | None = None
    prefix: str = ""  # of the condition under which the checkpoint is used
    answers: Seq[HarmfulAnswer] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return self.pair.checkpoint.model

    def ids(self, prompts: Seq[ProbePrompt]) -> list[Ids]:
        chat = self.model.chat.with_prefix(self.prefix)
        return [chat.prompt_ids([{"role": "user", "content": p.text}]) for p in prompts]

    def batches(self, prompts: Seq[ProbePrompt]) -> Iterator[tuple[Seq[ProbePrompt], PromptBatch]]:
        """Yield prompts in batches of similar length, with the tree of refusal openings behind them.

        The common start leaves the window's positions to each prompt.
        """
        ids, keep = self.ids(prompts), self.positions.window
        order = sorted(range(len(prompts)), key=lambda i: (len(ids[i]), i))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = PromptBatch.of([ids[i] for i in chosen], self.tree, self.model.device, keep)
            yield [prompts[i] for i in chosen], batch

    def run(self, side: Side, batch: PromptBatch, *, window: bool = False, blockwise: bool = False) -> Pass:
        first = batch.width - self.positions.window if window else None
        return Pass(side.model, side.blocks, batch, first, blockwise)


def states(context: ProbeContext, side: Side, prompts: Seq[ProbePrompt]) -> Tensor:
    """Return the residual stream after each block at the window's positions, [layers, P, positions, D] float32.

    Only the window is kept: 7 positions for a ChatML template, whatever the prompts' lengths.
    """
    layers, window = range(len(side.blocks)), context.positions.window
    where = {p.id: i for i, p in enumerate(prompts)}
    found: Tensor | None = None
    for chosen, batch in context.batches(prompts):
        at = slice(batch.width - window, batch.width)
        points: dict[Point, slice | list[int]] = {(layer, "resid"): at for layer in layers}
        with side.active():
            _, kept = context.run(side, batch).whole(record=points)
        if found is None:
            found = torch.empty(len(layers), len(prompts), *kept[0, "resid"].shape[1:], dtype=torch.float32)
        rows = [where[p.id] for p in chosen]
        for layer in layers:
            found[layer, rows] = kept[layer, "resid"].float().cpu()
    assert found is not None
    return found


def controlled(prompts: Seq[ProbePrompt]) -> set[str]:
    """Return the ids of the prompts on which a control along random directions is measured: at least `CONTROLS`."""
    return {p.id for p in prompts[:: max(1, len(prompts) // CONTROLS)]}


def random_unit(size: int, *key: object) -> Tensor:
    """Return a random unit vector, [size] float32, determined by `key`."""
    rng = np.random.default_rng(derive_seed("probe direction", *key))
    drawn: NDArray[np.float64] = rng.standard_normal(size)
    return torch.from_numpy((drawn / np.linalg.norm(drawn)).astype(np.float32))


def random_units(size: int, *key: object, prompts: Seq[str]) -> Tensor:
    """Return one random unit vector per prompt, [P, size]."""
    return torch.stack([random_unit(size, *key, prompt) for prompt in prompts])
