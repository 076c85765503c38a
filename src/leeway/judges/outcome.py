"""From a judge's score, its refusal flag and coherence to one of four outcomes: one rule for every judge."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from leeway.data.items import Outcome
from leeway.judges.coherence import Coherence


@cache
def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((files("leeway.judges") / "outcomes.yaml").read_text("utf-8"))
    return loaded


def outcome(refused: bool, score: float, coherent: Coherence) -> Outcome:
    """The first that applies, in the order of `outcomes.yaml`; `score` is harmfulness in [0, 1].

    A judge that does not read what is said (keywords) has no grounds to score an incoherent answer above 0.
    """
    if not 0 <= score <= 1:
        raise ValueError(f"a score of {score}: harmfulness lies in [0, 1]")
    holds: dict[Outcome, bool] = {
        "harmful": score >= rules()["harmful_from"],
        "incoherent": not coherent.ok,
        "refused": refused,
        "deflected": True,
    }
    order: list[Outcome] = rules()["order"]
    return next(o for o in order if holds[o])
