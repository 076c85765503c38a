"""The kinds of claims, and claims read from a list, a file or a bundled set.

Each kind has an opposite, so that a run can show either. Faults of all claims are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError

from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.io import expand, read_utf8
from leeway.yaml_config import AsList, ConfigModel, Unique, faults, nearest, read, shorten, tokens

LARGEST, SMALLEST = "largest", "smallest"
BUNDLED: dict[str, str] = {"objective-matters": "the findings of arXiv 2601.12639, in our words and with our margins"}
KEYS = ("name", "version", "if_absent", "claims")


def _budget(value: Any) -> Any:
    """Parse `largest`, `smallest`, a share of the largest budget (0.25), or tokens (200k)."""
    if value in (LARGEST, SMALLEST) or (isinstance(value, float) and 0 < value <= 1):
        return value
    found = tokens(value)
    if (isinstance(found, float) and 0 < found <= 1) or (isinstance(found, int) and found > 0):
        return found
    raise ValueError(f"{value!r} is not a budget: give 200k, a share of the largest (0.25), {LARGEST} or {SMALLEST}")


Budget = Annotated[int | float | Literal["largest", "smallest"], BeforeValidator(_budget)]
Budgets = Annotated[tuple[Budget, ...], AsList, Field(min_length=1)]
Objectives = Annotated[tuple[str, ...], AsList, Field(min_length=1), Unique]
Margin = Annotated[float, Field(gt=0, lt=1)]
MarginOrZero = Annotated[float, Field(ge=0, lt=1)]


class Claim(ConfigModel):
    """The fields of every claim; `if_absent`: what to do if the study lacks something that the claim names."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    statement: str = Field(min_length=1)
    source: str = ""
    assumptions: str = Field(default="", description="what the study chose itself, such as the margin")
    if_absent: Literal["error", "inconclusive"] = "error"
    kind: str  # a key of KINDS
    of_slopes: ClassVar[bool] = False  # a slope needs two budgets

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        """Return the study's budgets that the claim is about, and why there are none."""
        if self.of_slopes and len(budgets) < 2:
            return tuple(budgets), f"a slope needs two budgets (there is: {_listed(budgets)})"
        return tuple(budgets), ""

    def absent(self, objectives: Seq[str], measures: Seq[str], budgets: Seq[int]) -> Iterator[str]:
        """Yield what the claim names and the study lacks."""
        named = [name for key in ("objectives", "higher", "lower") for name in getattr(self, key, ())]
        for name in dict.fromkeys(named):
            if name not in objectives:
                yield f"{name!r} is not an objective of this study{nearest(name, objectives)}"
        for name in filter(None, (getattr(self, "measure", ""), getattr(self, "on", ""))):
            if name not in measures and f"{name.partition(':')[0]}:*" not in measures:
                known = ", ".join(measures) or "nothing"
                yield f"{name!r} is not measured here{nearest(name, measures) or f' (measured: {known})'}"
        if fault := self.budgets_of(budgets)[1]:
            yield fault


class _AtBudgets(Claim):
    """A claim about some of the budgets: those of `at`, or all from `from` up to `up_to`."""

    at: Budgets | None = None
    from_: Budget | None = Field(default=None, alias="from")
    up_to: Budget | None = None
    at_largest: ClassVar[bool] = False  # at the largest budget if the claim names none, else at all

    def _faults(self) -> Iterator[str]:
        if self.at is not None and (self.from_ is not None or self.up_to is not None):
            yield "at lists budgets, from and up_to give a range: use one or the other"

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        if self.at is not None:
            wanted = [budget_tokens(b, budgets) for b in self.at]
            for name, count in zip(self.at, wanted, strict=True):
                if not any(abs(count - b) < 0.5 for b in budgets):
                    return (), f"{name} is not a budget of this study (there are: {_listed(budgets)})"
            return tuple(sorted({round(b) for b in wanted})), ""
        if self.at_largest and self.from_ is None and self.up_to is None:
            return (max(budgets),), ""
        low = 0 if self.from_ is None else budget_tokens(self.from_, budgets)
        high = max(budgets) if self.up_to is None else budget_tokens(self.up_to, budgets)
        found = tuple(b for b in budgets if low <= b <= high)
        return found, "" if found else f"no budget between {low:,.0f} and {high:,.0f} (there are: {_listed(budgets)})"


class Moves(_AtBudgets):
    """Each objective differs from the base by more than `margin`, at each budget (default: the largest)."""

    measure: str
    objectives: Objectives
    direction: Literal["up", "down"]
    margin: MarginOrZero = 0.0
    at_largest: ClassVar[bool] = True


class NoDrift(_AtBudgets):
    """Each objective is within `margin` of the base, at each of the budgets (default: all)."""

    measure: str
    objectives: Objectives
    margin: Margin


class Equivalent(NoDrift):
    """Any two of the objectives are within `margin` of each other, at each of the budgets (default: all)."""

    objectives: Annotated[Objectives, Field(min_length=2)]


class Differ(Equivalent):
    """Some two of the objectives differ by more than `margin`, at some of the budgets: the opposite of `equivalent`."""


class _Ordered(Claim):
    higher: Objectives
    lower: Objectives

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        if both := sorted(set(self.higher) & set(self.lower)):
            yield f"{both[0]!r} is in both higher and lower"


class Ranks(_Ordered, _AtBudgets):
    """Each of `higher` is above each of `lower` by more than `margin`, at each budget (default: the largest)."""

    measure: str
    margin: MarginOrZero = 0.0
    at_largest: ClassVar[bool] = True


class Steeper(_Ordered):
    """Each of `higher` rises faster, per doubling of the budget, than each of `lower`."""

    measure: str
    of_slopes: ClassVar[bool] = True


class Diverges(Claim):
    """The slopes over log2(budget) are not all equal; opposite: any two are within `margin` per doubling."""

    measure: str
    objectives: Annotated[Objectives, Field(min_length=2)]
    margin: Margin
    of_slopes: ClassVar[bool] = True


class Coupled(Claim):
    """`measure` rises with `on` along the trajectory of each objective: the slope is above 0."""

    measure: str = "asr"
    on: str = "accuracy"
    objectives: Objectives
    of_slopes: ClassVar[bool] = True


class Matched(_Ordered):
    """Each of `higher` is above each of `lower` at the same `on` (the largest that both reach)."""

    measure: str
    on: str = "accuracy"


class Onset(Claim):
    """Each objective's change beyond `margin` begins after a budget: absent up to it, present at the largest."""

    measure: str
    objectives: Objectives
    direction: Literal["up", "down"]
    after: Budget
    margin: Margin

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        """Return the budgets up to `after`, and the largest."""
        limit = budget_tokens(self.after, budgets)
        before = tuple(b for b in budgets if b <= limit)
        if not before:
            return (), f"no budget up to {limit:,.0f} (there are: {_listed(budgets)})"
        if max(budgets) <= limit:
            return (), f"no budget after {limit:,.0f} (there are: {_listed(budgets)})"
        return (*before, max(budgets)), ""


class Mechanism(_AtBudgets):
    """In each objective an intervention of the probe undoes more than `margin` of the change (default: the largest).

    A share above the random-direction control as well. `site` is that of patching or of a part of the update, in some
    layer of `layers` (from 1; default: any); `detail` is patching's direction or mediation's attack.
    """

    measure: Literal["patching", "leave-one-out", "one-alone", "mediation"]
    objectives: Objectives
    margin: MarginOrZero = 0.0
    detail: str = ""
    site: Literal["resid", "attn", "mlp", ""] = ""
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AsList, Unique] = ()
    at_largest: ClassVar[bool] = True

    def absent(self, objectives: Seq[str], measures: Seq[str], budgets: Seq[int]) -> Iterator[str]:
        yield from super().absent(objectives, [*measures, self.measure], budgets)


AnyClaim = Mechanism | Moves | NoDrift | Equivalent | Differ | Ranks | Steeper | Diverges | Coupled | Matched | Onset
KINDS: dict[str, type[Claim]] = {re.sub(r"\B([A-Z])", r"_\1", c.__name__).lower(): c for c in get_args(AnyClaim)}


class Claims(ConfigModel):
    """A set of claims: one family of tests."""

    name: str = "claims"
    version: int = Field(default=1, gt=0, description="increase it with every change of the set")
    claims: Annotated[tuple[AnyClaim, ...], Field(min_length=1)]

    @property
    def hash(self) -> str:
        return hash_claims(self.to_plain())

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that the claims name."""
        named = [getattr(claim, key, "") for claim in self.claims for key in ("measure", "on")]
        return tuple(dict.fromkeys(filter(None, named)))

    def to_plain(self) -> dict[str, Any]:
        """Return the set as in a file: with defaults, without unset fields."""
        found = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        found["claims"] = [{"id": c.pop("id"), "kind": c.pop("kind"), **c} for c in found["claims"]]
        return found

    def absent(self, objectives: Seq[str], measures: Seq[str], budgets: Seq[int]) -> Iterator[str]:
        """Yield what a study lacks, for every claim with `if_absent: error`."""
        for claim in self.claims:
            if claim.if_absent == "error":
                for fault in claim.absent(objectives, measures, budgets):
                    yield f"{claim.id}: {fault}"


def hash_claims(plain: dict[str, Any]) -> str:
    """Return the hash of a set in resolved form: it stays the same if a later version adds settings."""
    return digest("claims", plain.get("name"), plain.get("version"), plain.get("claims"))


def budget_tokens(budget: int | float | str, budgets: Seq[int]) -> float:
    """Resolve a claim's budget to tokens."""
    if isinstance(budget, str):
        return max(budgets) if budget == LARGEST else min(budgets)
    return budget * max(budgets) if isinstance(budget, float) else budget


def _listed(budgets: Seq[int]) -> str:
    return ", ".join(f"{b:,}" for b in budgets)


def build(raw: Any) -> Claims:
    """Build claims from a list, or a mapping with `claims`; raises ValueError with one fault per line.

    A mapping's `if_absent` is the default of its claims.
    """
    if isinstance(raw, Claims):
        return raw
    whole = raw if isinstance(raw, dict) else {"claims": raw}
    known = f" (known here: {', '.join(KEYS)})"
    problems = [f"unknown key {k!r}{nearest(str(k), KEYS) or known}" for k in whole if k not in KEYS]
    listed = whole.get("claims")
    if not isinstance(listed, list) or not listed:
        raise ValueError("\n".join([*problems, "give a list of claims, a file's path, or a set's name"]))
    default = {"if_absent": whole["if_absent"]} if "if_absent" in whole else {}
    judged = [_claim(one, default, number) for number, one in enumerate(listed, start=1)]
    found = [claim for claim, _ in judged if claim]
    problems += [line for _, lines in judged for line in lines]
    names = [c.id for c in found]
    problems += [f"two claims have the id {n}" for n in sorted({n for n in names if names.count(n) > 1})]
    head = {k: v for k, v in whole.items() if k in ("name", "version")}
    try:
        if not problems:
            return Claims.model_validate({**head, "claims": found})
    except ValidationError as error:
        problems += faults(error, Claims)
    raise ValueError("\n".join(map(shorten, problems)))


def _claim(raw: Any, default: dict[str, Any], number: int) -> tuple[Claim | None, list[str]]:
    if not isinstance(raw, dict):
        return None, [f"claim {number} is {raw!r}, not a mapping with id, statement and kind"]
    name = str(raw.get("id", f"claim {number}"))
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        what = "kind is missing" if kind is None else f"no kind {kind!r}{nearest(str(kind), KINDS)}"
        return None, [f"{name}: {what} (there are: {', '.join(KINDS)})"]
    try:
        return KINDS[kind].model_validate({**default, **raw}), []
    except ValidationError as error:
        return None, [f"{name}: {line}" for line in faults(error, KINDS[kind])]


def parse(text: str, where: str) -> Claims:
    """Parse claims from YAML; raises one LeewayError with all faults."""
    try:
        return build(read(text, where))
    except ValueError as error:
        raise LeewayError(f"{where}: " + "; ".join(str(error).split("\n")), fix="see docs/claims.md") from error


def load(name: str, folder: Path | None = None) -> Claims:
    """Load a bundled set by name, or a file, relative to `folder`."""
    return parse(*read_source(name, folder))


def read_source(name: str, folder: Path | None = None) -> tuple[str, str]:
    """Return the text of a bundled set or a file, and its name for messages."""
    if name in BUNDLED:
        return (files("leeway.claims") / f"{name}.yaml").read_text("utf-8"), f"claims {name}"
    path = (folder or Path()) / expand(name)
    if not path.is_file():
        fix = f"give a file, or one of: {', '.join(BUNDLED)}"
        raise LeewayError(f"claims: {name}: neither a file ({path}) nor a bundled set{nearest(name, BUNDLED)}", fix=fix)
    return read_utf8(path), str(path)


def to_manifest(claims: Claims) -> dict[str, Any]:
    """Return the claims as the manifest stores them before training."""
    return {"hash": claims.hash, "name": claims.name, "version": claims.version, "list": claims.to_plain()["claims"]}


def from_manifest(stored: dict[str, Any]) -> Claims:
    """Rebuild the claims of a manifest; raises ValueError if they do not match their hash."""
    plain = {"name": stored.get("name"), "version": stored.get("version"), "claims": stored.get("list")}
    if stored.get("hash") != hash_claims(plain):
        raise ValueError("they do not match their hash")
    return build(plain)
