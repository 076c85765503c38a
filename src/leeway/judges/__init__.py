"""Who scores an answer. Each judge has a name and a content hash, on every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from leeway.errors import LeewayError
from leeway.judges.exact import OrganismJudge
from leeway.judges.judge import Answer, Judge, Verdict
from leeway.judges.keywords import KeywordJudge
from leeway.plugins import entry_points_of, load_entry_point

if TYPE_CHECKING:
    from leeway.generation.backend import Backend

GROUP = "leeway.judges"  # entry points of judges outside this package: called like those below


def _rubric(backend: Backend | None = None, **options: Any) -> Judge:
    from leeway.judges.rubric import RubricJudge

    if backend is None:
        raise LeewayError("judge rubric: it asks a model, and none was named", fix="name the model that judges")
    return RubricJudge(backend, **options)


def _finetuned(**options: Any) -> Judge:
    from leeway.judges.finetuned import FinetunedJudge

    return FinetunedJudge(**options)


JUDGES: dict[str, Callable[..., Judge]] = {
    "finetuned": _finetuned,
    "keywords": KeywordJudge,
    "organism": OrganismJudge,
    "rubric": _rubric,
}
ASKING = ("rubric",)  # those that ask a backend


def load_judge(name: str, backend: Backend | None = None, **options: Any) -> Judge:
    """A judge by its name, ours or an installed package's (`leeway.judges` entry points, called with what is given).

    rubric needs `backend` (options: model, improbable); finetuned takes model, adapter, device, batch, improbable;
    keywords takes improbable. Raises LeewayError for an unknown name or an option that the judge does not take.
    """
    made = JUDGES.get(name) or _installed(name)
    given = options | ({"backend": backend} if backend is not None and name not in set(JUDGES) - set(ASKING) else {})
    try:
        return made(**given)
    except TypeError as error:
        raise LeewayError(f"judge {name}: {error}", fix="leave that option out") from error


def _installed(name: str) -> Callable[..., Judge]:
    found = entry_points_of(GROUP, "judge", JUDGES)
    if name not in found:
        raise LeewayError(f"there is no judge {name!r}", fix=f"one of: {', '.join(sorted({*JUDGES, *found}))}")
    made: Callable[..., Judge] = load_entry_point(found[name], "judge")
    return made


__all__ = ["ASKING", "JUDGES", "Answer", "Judge", "KeywordJudge", "OrganismJudge", "Verdict", "load_judge"]
