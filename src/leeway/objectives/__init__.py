"""Fine-tuning objectives, one file each: formula and source on top, the pure loss as `<name>.loss`."""

from __future__ import annotations

import dataclasses

from leeway.errors import LeewayError
from leeway.objectives import cft, dpo, ip, ipo, kl, kto, orpo, sft, sft_both, sft_refusal, sft_safety, simpo
from leeway.objectives.objective import Objective
from leeway.plugins import entry_points_of, load_entry_point

BUILT_IN: tuple[type[Objective], ...] = (
    *(sft.Sft, dpo.Dpo, cft.Cft, ip.Ip, orpo.Orpo, kl.Kl, ipo.Ipo, simpo.Simpo, kto.Kto),
    *(sft_safety.SftSafety, sft_both.SftBoth, sft_refusal.SftRefusal),
)
OBJECTIVES = {kind.name: kind for kind in BUILT_IN}

# what the reference page lists
__all__ = ["OBJECTIVES", "Objective", "cft", "dpo", "ip", "ipo", "kl", "kto", "load_objective", "names", "orpo", "sft"]
__all__ += ["sft_both", "sft_refusal", "sft_safety", "simpo"]

GROUP = "leeway.objectives"  # entry points of objectives outside this package
ATTRIBUTES = [
    *("name", "needs_pairs", "needs_reference", "control_tokens", "token_lr", "direction", "auxiliary", "conditions"),
    *("render", "worst_case", "baseline_sequences", "baseline", "loss"),
]


def names() -> list[str]:
    """Return the names that `load_objective` accepts."""
    return [*OBJECTIVES, *sorted(entry_points_of(GROUP, "objective", OBJECTIVES))]


def load_objective(name: str) -> type[Objective]:
    """Return an objective class by name, built in or from an installed package (entry points `leeway.objectives`).

    The class must be a frozen dataclass whose fields are its settings. Raises LeewayError for an unknown name or a
    class that does not implement `Objective`.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    point = entry_points_of(GROUP, "objective", OBJECTIVES).get(name)
    if point is None:
        raise LeewayError(f"unknown objective {name!r}", fix=f"one of: {', '.join(names())}")
    cls: type[Objective] = load_entry_point(point, "objective", ATTRIBUTES)
    settings = dataclasses.fields(cls) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else None
    if settings is None or any(f.default is f.default_factory for f in settings):  # both are MISSING
        what = f"objective {name}: {point.value} is not a dataclass with a default for every field"
        raise LeewayError(what, fix="decorate the class with @dataclass(frozen=True) and give every field a default")
    return cls
