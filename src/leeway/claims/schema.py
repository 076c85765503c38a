"""What may be claimed, typed: each kind is a statement with a contrary, so that a run can show the one or the other.

Claims from a list, a file or a set that ships with Leeway; every fault of every claim at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.io import expand
from leeway.yaml_config import ConfigModel, faults, nearest, read, tokens

LARGEST, SMALLEST = "largest", "smallest"
BASE = "base"


def _place(value: Any) -> Any:
    """`largest`, `smallest`, a share of the largest budget (0.25), or tokens (200k)."""
    if value in (LARGEST, SMALLEST) or (isinstance(value, float) and 0 < value <= 1):
        return value
    found = tokens(value)
    if isinstance(found, float) and 0 < found <= 1:
        return found
    if isinstance(found, int) and found > 0:
        return found
    raise ValueError(f"{value!r} is no budget: give 200k, a share of the largest such as 0.25, {LARGEST} or {SMALLEST}")


def _several(value: Any) -> Any:
    """One, or a list of them."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({v for v in values if values.count(v) > 1}):
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


Place = Annotated[int | float | Literal["largest", "smallest"], BeforeValidator(_place)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_several), Field(min_length=1)]
Objectives = Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1), AfterValidator(_each_once)]
Margin = Annotated[float, Field(gt=0, lt=1)]
Beyond = Annotated[float, Field(ge=0, lt=1)]


class Claim(ConfigModel):
    """What every claim has: a name, a sentence, where it comes from, and what happens where it cannot be put."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    says: str = Field(min_length=1)
    source: str = ""
    ours: str = Field(default="", description="what of it is this study's own choice, such as the margin")
    if_absent: Literal["error", "inconclusive"] = "error"

    @property
    def analysis(self) -> str:
        return str(getattr(self, "kind", ""))

    def objectives_named(self) -> tuple[str, ...]:
        """Every objective that the claim is about, once."""
        found: list[str] = []
        for name in ("objectives", "higher", "lower"):
            found += getattr(self, name, ())
        return tuple(dict.fromkeys(found))

    def measures_named(self) -> tuple[str, ...]:
        return tuple(m for m in (getattr(self, "measure", ""), getattr(self, "on", "")) if m)

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        """(the study's budgets that the claim is about, why there are none)."""
        return tuple(budgets), ""

    def absent(self, objectives: Seq[str], measures: Seq[str], budgets: Seq[int]) -> Iterator[str]:
        """What the claim names that a study lacks."""
        for name in self.objectives_named():
            if name not in objectives:
                yield f"{name!r} is no objective of this study{nearest(name, objectives)}"
        for name in self.measures_named():
            if name not in measures and f"{name.partition(':')[0]}:*" not in measures:
                known = ", ".join(measures) or "nothing"
                yield f"{name!r} is not measured here{nearest(name, measures) or f' (there is: {known})'}"
        if fault := self.budgets_of(budgets)[1]:
            yield fault


class _Placed(Claim):
    """A claim about some of the budgets: `at` those, or all `from` one and `up_to` another."""

    at: Places | None = None
    from_: Place | None = Field(default=None, alias="from")
    up_to: Place | None = None

    @model_validator(mode="after")
    def _one_way(self) -> _Placed:
        if self.at is not None and (self.from_ is not None or self.up_to is not None):
            raise ValueError("at names budgets, from and up_to a span of them: give one or the other")
        return self

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        if self.at is not None:
            return at_exactly(self.at, budgets)
        low = 0 if self.from_ is None else tokens_of(self.from_, budgets)
        high = max(budgets) if self.up_to is None else tokens_of(self.up_to, budgets)
        found = tuple(b for b in budgets if low <= b <= high)
        return (
            found,
            "" if found else f"no budget lies between {low:,.0f} and {high:,.0f} (there are: {_listed(budgets)})",
        )


class Moves(_Placed):
    """Each objective moves from the base by more than `margin`, at each budget (default: the largest)."""

    kind: Literal["moves"] = "moves"
    measure: str
    objectives: Objectives
    direction: Literal["up", "down"]
    margin: Beyond = 0.0

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        return _largest_by_default(self, budgets)


class NoDrift(_Placed):
    """Each objective stays within `margin` of the base, at each of the budgets (default: every one)."""

    kind: Literal["no_drift"] = "no_drift"
    measure: str
    objectives: Objectives
    margin: Margin


class Alike(_Placed):
    """Any two of the objectives lie within `margin` of each other, at each of the budgets (default: every one)."""

    kind: Literal["alike"] = "alike"
    measure: str
    objectives: Annotated[Objectives, Field(min_length=2)]
    margin: Margin


class Differ(_Placed):
    """Some two of the objectives lie further apart than `margin`, at some of the budgets: the contrary of `alike`."""

    kind: Literal["differ"] = "differ"
    measure: str
    objectives: Annotated[Objectives, Field(min_length=2)]
    margin: Margin


class _Ordered(Claim):
    higher: Objectives
    lower: Objectives

    @model_validator(mode="after")
    def _apart(self) -> _Ordered:
        if both := sorted(set(self.higher) & set(self.lower)):
            raise ValueError(f"{both[0]!r} stands on both sides")
        return self


class Ranks(_Ordered, _Placed):
    """Each of `higher` lies above each of `lower` by more than `margin`, at each budget (default: the largest)."""

    kind: Literal["ranks"] = "ranks"
    measure: str
    margin: Beyond = 0.0

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        return _largest_by_default(self, budgets)


class Steeper(_Ordered):
    """Each of `higher` rises faster, per doubling of the budget, than each of `lower`."""

    kind: Literal["steeper"] = "steeper"
    measure: str

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        return _two(budgets)


class Diverges(Claim):
    """The slopes over log2(budget) are not all equal; contrary: any two lie within `margin` per doubling."""

    kind: Literal["diverges"] = "diverges"
    measure: str
    objectives: Annotated[Objectives, Field(min_length=2)]
    margin: Margin

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        return _two(budgets)


class Coupled(Claim):
    """Along the trajectory of each objective `measure` rises with `on`: the slope is above 0."""

    kind: Literal["coupled"] = "coupled"
    measure: str = "asr"
    on: str = "accuracy"
    objectives: Objectives

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        return _two(budgets)


class Matched(_Ordered):
    """Each of `higher` lies above each of `lower` where the two have the same `on` (the largest that both reach)."""

    kind: Literal["matched"] = "matched"
    measure: str
    on: str = "accuracy"


class Onset(Claim):
    """Each objective's move beyond `margin` begins after a budget: not yet there up to it, and there at the largest."""

    kind: Literal["onset"] = "onset"
    measure: str
    objectives: Objectives
    direction: Literal["up", "down"]
    after: Place
    margin: Margin

    def budgets_of(self, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
        """The budgets up to `after`, and the largest."""
        limit = tokens_of(self.after, budgets)
        before = tuple(b for b in budgets if b <= limit)
        if not before:
            return (), f"no budget up to {limit:,.0f} (there are: {_listed(budgets)})"
        if max(budgets) <= limit:
            return (), f"no budget after {limit:,.0f} (there are: {_listed(budgets)})"
        return (*before, max(budgets)), ""


KINDS: dict[str, type[Claim]] = {
    "moves": Moves,
    "no_drift": NoDrift,
    "alike": Alike,
    "differ": Differ,
    "ranks": Ranks,
    "steeper": Steeper,
    "diverges": Diverges,
    "coupled": Coupled,
    "matched": Matched,
    "onset": Onset,
}

AnyClaim = (
    Moves | NoDrift | Alike | Differ | Ranks | Steeper | Diverges | Coupled | Matched | Onset
)  # told apart by kind


class Claims(ConfigModel):
    """Claims that belong together: one family of tests."""

    name: str = "claims"
    version: int = Field(default=1, gt=0, description="raised by whoever changes the set")
    claims: Annotated[tuple[AnyClaim, ...], Field(min_length=1)]

    @property
    def hash(self) -> str:
        return hash_of(self.to_plain())

    def to_plain(self) -> dict[str, Any]:
        """As it is written in a file: every default that holds, nothing that is not set."""
        found = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        found["claims"] = [{"id": c.pop("id"), "kind": c.pop("kind"), **c} for c in found["claims"]]
        return found

    def absent(self, objectives: Seq[str], measures: Seq[str], budgets: Seq[int]) -> Iterator[str]:
        """What is named that a study lacks, by every claim that does not allow for it."""
        for claim in self.claims:
            if claim.if_absent == "error":
                for fault in claim.absent(objectives, measures, budgets):
                    yield f"{claim.id}: {fault}"


def hash_of(plain: dict[str, Any]) -> str:
    """Of a set as it is written down, resolved: a later version with further settings reads the same hash."""
    return digest("claims", plain.get("name"), plain.get("version"), plain.get("claims"))


def tokens_of(place: int | float | str, budgets: Seq[int]) -> float:
    """A place on the scale of budgets, in tokens."""
    if isinstance(place, str):
        return max(budgets) if place == LARGEST else min(budgets)
    return place * max(budgets) if isinstance(place, float) else place


def at_exactly(places: Seq[int | float | str], budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
    found = [tokens_of(p, budgets) for p in places]
    for place, budget in zip(places, found, strict=True):
        if not any(abs(budget - b) < 0.5 for b in budgets):
            return (), f"{place} is no budget of this study (there are: {_listed(budgets)})"
    return tuple(sorted({round(b) for b in found})), ""


def _largest_by_default(claim: _Placed, budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
    if claim.at is None and claim.from_ is None and claim.up_to is None:
        return (max(budgets),), ""
    return _Placed.budgets_of(claim, budgets)


def _two(budgets: Seq[int]) -> tuple[tuple[int, ...], str]:
    return tuple(budgets), "" if len(budgets) > 1 else f"a slope needs two budgets (there is: {_listed(budgets)})"


def _listed(budgets: Seq[int]) -> str:
    return ", ".join(f"{b:,}" for b in budgets)


BUNDLED: dict[str, str] = {"objective-matters": "what arXiv 2601.12639 reports, in our words and with our margins"}
SET = ("name", "version", "if_absent", "claims")
KNOWN = f" (known here: {', '.join(SET)})"


def build(raw: Any) -> Claims:
    """A list of claims, or a mapping with `claims`; raises ValueError, one fault a line.

    `if_absent` beside the list holds for every claim that does not say otherwise.
    """
    if isinstance(raw, Claims):
        return raw
    whole = raw if isinstance(raw, dict) else {"claims": raw}
    said = [f"unknown key {k!r}{nearest(str(k), SET) or KNOWN}" for k in whole if k not in SET]
    listed = whole.get("claims")
    if not isinstance(listed, list) or not listed:
        raise ValueError("\n".join([*said, "give a list of claims, a file's path, or a set's name"]))
    default = {"if_absent": whole["if_absent"]} if "if_absent" in whole else {}
    found: list[Claim] = []
    for place, one in enumerate(listed, start=1):
        claim, wrong = _claim(one, default, place)
        found += [claim] if claim else []
        said += wrong
    names = [c.id for c in found]
    said += [f"{n} is the id of two claims" for n in sorted({n for n in names if names.count(n) > 1})]
    head = {k: v for k, v in whole.items() if k in ("name", "version")}
    try:
        if not said:
            return Claims.model_validate({**head, "claims": found})
    except ValidationError as error:
        said += faults(error, Claims)
    raise ValueError("\n".join(said))


def _claim(raw: Any, default: dict[str, Any], place: int) -> tuple[Claim | None, list[str]]:
    if not isinstance(raw, dict):
        return None, [f"claim {place} is {raw!r}, not a mapping with id, says and kind"]
    called = str(raw.get("id", f"claim {place}"))
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        what = "kind is missing" if kind is None else f"no kind {kind!r}{nearest(str(kind), KINDS)}"
        return None, [f"{called}: {what} (there are: {', '.join(KINDS)})"]
    try:
        return KINDS[kind].model_validate({**default, **raw}), []
    except ValidationError as error:
        return None, [f"{called}: {line}" for line in faults(error, KINDS[kind])]


def parse(text: str, where: str) -> Claims:
    """Claims from YAML; all faults in one LeewayError."""
    try:
        return build(read(text, where))
    except ValueError as error:
        raise LeewayError(f"{where}: " + "; ".join(str(error).split("\n")), fix="docs/claims.md shows how") from error


def load(name: str, folder: Path | None = None) -> Claims:
    """A set by its name, or a file, its path taken from `folder`."""
    return parse(*text_of(name, folder))


def text_of(name: str, folder: Path | None = None) -> tuple[str, str]:
    """(what a set or a file holds, where it is)."""
    if name in BUNDLED:
        return (files("leeway.claims") / f"{name}.yaml").read_text("utf-8"), f"claims {name}"
    path = (folder or Path()) / expand(name)
    if not path.is_file():
        fix = f"give a file, or one of: {', '.join(BUNDLED)}"
        raise LeewayError(f"claims: {name}: neither a file ({path}) nor a set{nearest(name, BUNDLED)}", fix=fix)
    try:
        return path.read_text("utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error


def stored(claims: Claims) -> dict[str, Any]:
    """As a manifest keeps them: what was claimed before anything was trained."""
    plain = claims.to_plain()
    return {"hash": claims.hash, "name": claims.name, "version": claims.version, "list": plain["claims"]}


def restored(kept: dict[str, Any]) -> Claims:
    """What a manifest keeps; raises ValueError where it is not what its hash was taken of."""
    plain = {"name": kept.get("name"), "version": kept.get("version"), "claims": kept.get("list")}
    if kept.get("hash") != hash_of(plain):
        raise ValueError("they are not what their hash was taken of")
    return build(plain)
