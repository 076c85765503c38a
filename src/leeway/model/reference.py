"""The reference: the model that a trajectory started from, as it answers while the policy trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from leeway.model.load import Model


@contextmanager
def as_reference(model: Model) -> Iterator[None]:
    """The model the trajectory started from: adapter off, dropout off, no gradients, no random number drawn."""
    was_training = model.lm.training
    model.lm.eval()
    try:
        with torch.no_grad(), model.lm.disable_adapter():
            yield
    finally:
        model.lm.train(was_training)
