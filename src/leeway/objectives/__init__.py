"""Fine-tuning objectives: one file each, its formula and source on top, its pure loss exposed as `<name>.loss`."""

from __future__ import annotations

from leeway.objectives import cft, dpo, ip, ipo, kl, kto, orpo, sft, sft_both, sft_refusal, sft_safety, simpo
from leeway.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": sft.objective,
    "dpo": dpo.objective,
    "cft": cft.objective,
    "ip": ip.objective,
    "orpo": orpo.objective,
    "kl": kl.objective,
    "ipo": ipo.objective,
    "simpo": simpo.objective,
    "kto": kto.objective,
    "sft_safety": sft_safety.objective,
    "sft_both": sft_both.objective,
    "sft_refusal": sft_refusal.objective,
}

__all__ = [
    "OBJECTIVES",
    "Objective",
    "cft",
    "dpo",
    "ip",
    "ipo",
    "kl",
    "kto",
    "orpo",
    "sft",
    "sft_both",
    "sft_refusal",
    "sft_safety",
    "simpo",
]
