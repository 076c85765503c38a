"""A batch through the model: the loss over all of it and its gradient, however it is cut into micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.model.forward import TokenStats, Totals, target_stats
from leeway.model.layout import Examples, Laid, lay
from leeway.model.load import Model
from leeway.model.reference import Reference
from leeway.objectives.objective import Objective
from leeway.training.batch import Batch, Optim
from leeway.training.ranks import Ranks


@dataclass(frozen=True)
class Passes:
    """What takes a batch through `model`, and by which loss.

    Micro-batches add up because every loss is normalised by the batch's totals.
    """

    model: Model
    objective: Objective
    settings: Optim
    reference: Reference
    ranks: Ranks

    def gradient(self, batch: Batch) -> tuple[Totals, float]:
        """Add the gradient of the whole batch's loss to that of the parameters; returns (what it is over, the loss)."""
        torch.manual_seed(self.ranks.seed(batch.seed))
        totals, loss = self.totals(batch), 0.0
        self.model.lm.train()
        for micro, weight in self.ranks.share(batch.rendered, self.settings.cut):
            with self._autocast():
                part = weight * self._loss(micro, totals)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        return totals, self.ranks.sum(loss)

    def totals(self, batch: Batch) -> Totals:
        """What the batch's loss is normalised by, the objective's own pass over the batch included."""
        totals = Totals(
            tokens=sum(s.targets for example in batch.rendered for s in example),
            examples=len(batch.rendered),
            preferred_tokens=sum(example[0].targets for example in batch.rendered),
            measured_tokens=sum(s.measured for example in batch.rendered for s in example),
            preferred_measured=sum(example[0].measured for example in batch.rendered),
        )
        return replace(totals, baseline=self._baseline(batch, totals)) if batch.baseline else totals

    def _baseline(self, batch: Batch, totals: Totals) -> float:
        """The objective's own pass over the whole batch: the policy without dropout and without a gradient."""
        found = 0.0
        self.model.lm.eval()
        for micro, weight in self.ranks.share(batch.baseline, self.settings.cut):
            laid = self._laid(micro)
            with torch.no_grad(), self._autocast():
                policy = target_stats(self.model, laid, totals)
                theirs = self._reference(laid, micro, totals)
            found += weight * self.objective.baseline(policy, theirs)
        return self.ranks.sum(found)

    def _loss(self, micro: Examples, totals: Totals) -> Tensor:
        model, objective, batch = self.model, self.objective, self._laid(micro)
        if objective.needs_reference == "distribution":
            theirs_TD = self.reference.hidden(model, batch, _flat(micro))
            policy = target_stats(model, batch, totals, reference_hidden_TD=theirs_TD, direction=objective.direction)
            return objective.loss(policy, None)
        theirs = self._reference(batch, micro, totals) if objective.needs_reference == "logps" else None
        return objective.loss(target_stats(model, batch, totals), theirs)

    def _reference(self, batch: Laid, micro: Examples, totals: Totals) -> TokenStats:
        logp_T = self.reference.logps(self.model, batch, _flat(micro))
        return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, None, batch.target_T)

    def _laid(self, micro: Examples) -> Laid:
        return lay(micro, self.model.device, self.settings.layout)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        dtype = self.settings.autocast
        return nullcontext() if dtype is None else torch.autocast(self.model.device.type, dtype)


def _flat(micro: Examples) -> list[Sequence]:
    return [s for example in micro for s in example]
