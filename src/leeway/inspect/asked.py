"""An eval by its settings alone, as the study file has them: the same items, attacks, grader and judge."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.hashing import canonical
from leeway.study.asked import evals_of
from leeway.study.eval_parts import Evals
from leeway.study.parse import parse

LISTS = ("attacks", "traits")


@dataclass(frozen=True)
class Single:
    """One item of an eval (under one attack, for a jailbreak), as an eval of its own."""

    part: Any  # an eval of one item
    item: Any
    attack: Any = None

    @property
    def id(self) -> str:
        return f"{self.attack.name}/{self.item.id}" if self.attack else str(self.item.id)


def known() -> tuple[str, ...]:
    """The axes that a study file can ask for here."""
    return tuple(k for k in ("capability", "jailbreak", "persona", "overrefusal") if k in Evals.model_fields)


def asked(kind: str, settings: dict[str, Any]) -> Eval:
    """The eval that a study with these settings under `evals.<kind>` would ask; raises LeewayError as a study does.

    `test`, of capability on files, is the path of the user's test file. What is None is left to the study's default.
    """
    return _asked(kind, canonical({k: v for k, v in settings.items() if v is not None}))


@lru_cache(maxsize=16)
def _asked(kind: str, settings_json: str) -> Eval:
    settings: dict[str, Any] = json.loads(settings_json)
    for name in LISTS:
        if isinstance(settings.get(name), str):
            settings[name] = settings[name].split(",")
    test = settings.pop("test", None)
    study = {
        "name": "inspect",
        "model": "organism",  # nothing of it is loaded: Inspect brings the model
        "task": {"files": {"train": test, "test": test}} if test else {"name": "organism"},
        "objectives": ["sft"],
        "budgets": [1],
        "evals": {kind: [settings] if kind == "capability" else settings},
    }
    spec = parse(json.dumps(study), f"leeway/{kind}")
    return next(e for e in evals_of(spec, {}) if e.name == kind)


def singles(part: Any) -> dict[str, Single]:
    """Every item under every attack by its id, in the order of the eval's own rows."""
    if isinstance(part, Jailbreak):
        pairs = [(a, p) for a in part.attacks for p in part.prompts]
        return _by_id(Single(replace(part, prompts=[p], attacks=[a]), p, a) for a, p in pairs)
    field = next((f for f in ("items", "prompts") if hasattr(part, f)), None)
    if field is None:
        raise LeewayError(f"eval {part.key}: Inspect cannot ask it, it has no items", fix="leave it out")
    items: Seq[Any] = getattr(part, field)
    return _by_id(Single(replace(part, **{field: [item]}), item) for item in items)


def _by_id(found: Iterable[Single]) -> dict[str, Single]:
    return {one.id: one for one in found}
