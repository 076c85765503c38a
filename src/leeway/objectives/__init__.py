"""Fine-tuning objectives: one file each, its formula and source on top, its pure loss exposed as `<name>.loss`."""

from __future__ import annotations

from leeway.objectives import cft, dpo, ip, kl, orpo, sft
from leeway.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": sft.objective,
    "dpo": dpo.objective,
    "cft": cft.objective,
    "ip": ip.objective,
    "orpo": orpo.objective,
    "kl": kl.objective,
}

__all__ = ["OBJECTIVES", "Objective", "cft", "dpo", "ip", "kl", "orpo", "sft"]
