"""Who scores an answer. Each judge has a name and a content hash, on every row."""

from __future__ import annotations

from leeway.errors import LeewayError
from leeway.judges.judge import Judge, Verdict
from leeway.judges.keywords import KeywordJudge
from leeway.judges.organism import OrganismJudge

JUDGES: dict[str, type[KeywordJudge] | type[OrganismJudge]] = {
    "keywords": KeywordJudge,
    "organism": OrganismJudge,
}


def load_judge(name: str) -> Judge:
    if name not in JUDGES:
        raise LeewayError(f"evals.jailbreak.judge: no judge {name!r}", fix=f"one of: {', '.join(sorted(JUDGES))}")
    return JUDGES[name]()


__all__ = ["JUDGES", "Judge", "KeywordJudge", "OrganismJudge", "Verdict", "load_judge"]
