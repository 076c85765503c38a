"""Judges score answers; every row carries its judge's name and content hash."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leeway.errors import LeewayError
from leeway.generation.backend import Backend
from leeway.judges.judge import Answer, Judge, OrganismJudge, Verdict
from leeway.judges.keywords import KeywordJudge
from leeway.judges.refusal_classifier import RefusalClassifier
from leeway.judges.rubric import RubricJudge
from leeway.plugins import entry_points_of, load_entry_point

GROUP = "leeway.judges"  # entry points of other packages, called as those below


def _finetuned(**options: Any) -> Judge:
    from leeway.judges.finetuned import FinetunedJudge

    return FinetunedJudge(**options)


def _guard(name: str, **options: Any) -> Judge:
    from leeway.judges.guard import GuardJudge

    return GuardJudge(name, **options)


GUARDS = ("harmbench", "llama-guard-3", "llama-guard-4", "wildguard")  # local models, each with a published input
JUDGES: dict[str, Callable[..., Judge]] = {
    "finetuned": _finetuned,
    "keywords": KeywordJudge,
    "organism": OrganismJudge,
    "refusal-classifier": RefusalClassifier,
    "rubric": RubricJudge,
    **{name: partial(_guard, name) for name in GUARDS},
}
NEEDS_BACKEND = ("rubric",)


def load_judge(name: str, backend: Backend | None = None, **options: Any) -> Judge:
    """Return a built-in judge, or one from another package (`leeway.judges` entry points).

    rubric needs `backend` (options: model, perplexity); finetuned takes model, adapter, device, batch, perplexity; a
    guard model takes model, revision, device, batch, perplexity; keywords and refusal-classifier take perplexity.
    Raises LeewayError for an unknown name or option.
    """
    factory = JUDGES.get(name)
    if factory is None:
        installed = entry_points_of(GROUP, "judge", JUDGES)
        if name not in installed:
            raise LeewayError(f"unknown judge {name!r}", fix=f"one of: {', '.join(sorted({*JUDGES, *installed}))}")
        factory = load_entry_point(installed[name], "judge")
    if backend is not None and (name in NEEDS_BACKEND or name not in JUDGES):
        options["backend"] = backend
    elif name in NEEDS_BACKEND:
        raise LeewayError(f"judge {name}: no judge model", fix="set the judge's model")
    try:
        return factory(**options)
    except TypeError as error:
        raise LeewayError(f"judge {name}: {error}", fix="leave that option out") from error


__all__ = ["GUARDS", "JUDGES", "NEEDS_BACKEND"]
__all__ += ["Answer", "Judge", "KeywordJudge", "OrganismJudge", "RefusalClassifier", "Verdict", "load_judge"]
