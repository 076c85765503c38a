"""From a row to an Inspect score: unscored stays unscored, with its reason."""

from __future__ import annotations

import math
from typing import Any

from inspect_ai.scorer import Score


def score_of(row: dict[str, Any]) -> Score:
    """A row's score under Inspect's notion of an unscored sample (NaN, which its metrics leave out and count)."""
    told = {
        "outcome": row["outcome"],
        "judge": row["judge"],
        "judge_raw": row["judge_raw"],
        "unscored_reason": row["unscored_reason"],
    }
    answer = row["outcome"] or (row["response"] if row["eval"] == "persona" else None)
    if row["score"] is None or math.isnan(row["score"]):
        reason = row["unscored_reason"]
        return Score.unscored(reason=reason, explanation=f"unscored: {reason}", metadata=told)
    return Score(value=float(row["score"]), answer=answer, explanation=row["judge_raw"] or None, metadata=told)
