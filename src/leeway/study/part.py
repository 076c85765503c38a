"""What every mapping of a study file is, and how a misspelt word finds its nearest known one."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Part(BaseModel):
    """A mapping of the study file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no 1, and `no`, which YAML reads as false, no word."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(value).lower()} is no value here; a word such as yes or no goes into quotes")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types inside an annotation."""
    return {annotation}.union(*(_kinds(a) for a in get_args(annotation))) if get_args(annotation) else {annotation}


def nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
