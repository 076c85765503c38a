"""Forbidden prompts, always from public data at run time, never from this source tree."""

from __future__ import annotations

from leeway.data.items import ForbiddenPrompt
from leeway.data.read import Source, field, load

# Souly et al. 2024, arXiv 2402.10260: 313 prompts, and the published subset of 60.
STRONGREJECT = Source(("strongreject/strongreject_dataset.csv",), "walledai/StrongREJECT")


def strongreject(revision: str | None = None) -> tuple[list[ForbiddenPrompt], str]:
    loaded = load(STRONGREJECT, revision=revision)
    return [
        ForbiddenPrompt(f"strongreject/{n}", field(r, ("forbidden_prompt", "prompt"), f"strongreject, record {n + 1}"))
        for n, r in enumerate(loaded.records)
    ], loaded.origin
