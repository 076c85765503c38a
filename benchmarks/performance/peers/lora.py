"""The same adapter on both sides."""

from __future__ import annotations

from typing import Any

from benchmarks.performance.task import LORA


def config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules="all-linear",
    )


def move(lm: Any) -> None:
    """Give every low-rank matrix a fixed random value, so that an adapter is not the base."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(lm.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.02)
