"""What every mapping of a file that people write is, and how a misspelt word finds its nearest known one."""

from __future__ import annotations

import difflib
import re
from decimal import Decimal
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


class Part(BaseModel):
    """A mapping of such a file."""

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


def tokens(value: Any) -> Any:
    """`25k`, `0.5M` or a number of tokens."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number of tokens; give one, such as 25k")
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kKmM]?)\s*", value)):
        count = Decimal(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()]
        return int(count) if count == int(count) else float(count)
    return value


MAX_COUNT = 2**53  # beyond it a float, as JSON and tables hold numbers, does not count exactly
MAX_FLOAT32 = 3.4e38
Tokens = Annotated[int, BeforeValidator(tokens), Field(gt=0, le=MAX_COUNT)]
