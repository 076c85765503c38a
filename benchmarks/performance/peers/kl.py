"""What TRL lacks: fine-tuning with a full-vocabulary reverse KL to the model without its adapter, per target token."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

WEIGHT = 0.001


class KlTrainer(SFTTrainer):  # type: ignore[misc]
    """NLL + weight · KL(policy || reference); statistics at the target tokens only, in float32."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        import torch

        labels = inputs["labels"][:, 1:]
        at = labels != -100
        asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        logp_TV = model(**asked).logits[:, :-1][at].float().log_softmax(-1)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            ref_TV = model(**asked).logits[:, :-1][at].float().log_softmax(-1)
        nll_T = -logp_TV.gather(-1, labels[at][:, None])[:, 0]
        kl_T = (logp_TV.exp() * (logp_TV - ref_TV)).sum(-1)
        loss = (nll_T + WEIGHT * kl_T).sum() / (num_items_in_batch if num_items_in_batch is not None else at.sum())
        return (loss, None) if return_outputs else loss


class PlainTrainer(SFTTrainer):  # type: ignore[misc]
    """SFT with the model's own cross-entropy over all positions, without TRL's metrics."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        return (out.loss, out) if return_outputs else out.loss
