"""Fine-tuning objectives: one file each, its formula and source on top, its pure loss exposed as `<name>.loss`."""

from __future__ import annotations

import dataclasses

from leeway.errors import LeewayError
from leeway.objectives import cft, dpo, ip, ipo, kl, kto, orpo, sft, sft_both, sft_refusal, sft_safety, simpo
from leeway.objectives.objective import Objective
from leeway.plugins import entry_points_of, load_entry_point

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

GROUP = "leeway.objectives"  # entry points of objectives outside this package
NEEDS = [
    *("name", "needs_pairs", "needs_reference", "control_tokens", "direction", "companion", "conditions"),
    *("render", "worst_case", "baseline_sequences", "baseline", "loss"),
]


def names() -> list[str]:
    """Of every objective that `load_objective` knows."""
    return [*OBJECTIVES, *sorted(entry_points_of(GROUP, "objective", OBJECTIVES))]


def load_objective(name: str) -> type[Objective]:
    """Its class by name, from here or an installed package (`leeway.objectives` entry points).

    The class has to be a frozen dataclass whose fields are its settings. Raises LeewayError where there is none of this
    name or the package's is no objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    point = entry_points_of(GROUP, "objective", OBJECTIVES).get(name)
    if point is None:
        raise LeewayError(f"there is no objective {name!r}", fix=f"one of: {', '.join(names())}")
    found: type[Objective] = load_entry_point(point, "objective", NEEDS)
    settings = dataclasses.fields(found) if isinstance(found, type) and dataclasses.is_dataclass(found) else None
    if settings is None or any(f.default is f.default_factory for f in settings):  # both are MISSING
        raise LeewayError(
            f"objective {name}: {point.value} is no dataclass whose settings have defaults",
            fix="decorate its class with @dataclass(frozen=True), and give every field a default",
        )
    return found


__all__ = [
    "OBJECTIVES",
    "Objective",
    "cft",
    "dpo",
    "ip",
    "ipo",
    "kl",
    "kto",
    "load_objective",
    "names",
    "orpo",
    "sft",
    "sft_both",
    "sft_refusal",
    "sft_safety",
    "simpo",
]
