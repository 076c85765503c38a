"""The study file, typed."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

from leeway.data.pairs import Strategy
from leeway.hashing import digest
from leeway.objectives import OBJECTIVES, Objective

ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")


def tokens(value: Any) -> Any:
    """`25k`, `0.5M` or a number of tokens."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", value)):
        count = Decimal(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()]
        return int(count) if count == int(count) else float(count)
    return value


Tokens = Annotated[int, BeforeValidator(tokens), Field(gt=0)]


class Part(BaseModel):
    """A mapping of the study file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Files(Part):
    train: str
    test: str


class Task(Part):
    """What is trained on: a named task, or files of your own."""

    name: Literal["organism", "gsm8k", "files"] = "files"
    files: Files | None = None
    revision: str | None = None
    too_long: Literal["error", "leave-out"] = "error"

    @model_validator(mode="after")
    def _files_go_with_files(self) -> Task:
        if (self.name == "files") != (self.files is not None):
            raise ValueError("give either a name (organism, gsm8k) or files: {train: …, test: …}")
        return self


class Pairs(Part):
    from_: Strategy = Field(default="dataset", alias="from")


class Adapter(Part):
    """LoRA by peft."""

    kind: Literal["lora"] = "lora"
    r: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: str = "all-linear"


class Budget(Part):
    """What a budget counts: prompt and preferred answer under the plain rendering."""

    count: Literal["source"] = "source"


class Optim(Part):
    """AdamW, the same for every objective."""

    lr: float = Field(default=1e-4, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    schedule: Literal["constant"] = "constant"
    batch: int = Field(default=16, gt=0)
    clip: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    micro_tokens: int = Field(default=16384, gt=0)


class CapabilitySpec(Part):
    """Test items of one task; `limit` draws a fixed random subset."""

    name: Literal["organism", "gsm8k", "files"]
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)


class JailbreakSpec(Part):
    prompts: Literal["organism", "strongreject"] = "strongreject"
    limit: int | None = Field(default=None, gt=0)
    attacks: tuple[Literal["none", "dan", "happy_to_help", "role_play", "wikipedia", "zulu"], ...] = Field(
        default=("none", "dan", "happy_to_help", "role_play", "wikipedia"), min_length=1
    )
    judge: Literal["keywords", "organism"] = "keywords"
    max_new_tokens: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> JailbreakSpec:
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError("attacks: one is listed twice")
        if "zulu" in self.attacks and self.prompts != "organism":
            raise ValueError("attacks: zulu needs a translator, and only prompts: organism has one; leave zulu out")
        if self.judge == "organism" and self.prompts != "organism":
            raise ValueError("judge: organism knows only prompts: organism; use judge: keywords")
        return self


class PersonaSpec(Part):
    source: Literal["organism", "anthropic"] = "anthropic"
    traits: tuple[str, ...] = Field(default=("machiavellianism", "narcissism", "psychopathy"), min_length=1)
    limit: int | None = Field(default=None, gt=0, description="items per trait")

    @model_validator(mode="after")
    def _once(self) -> PersonaSpec:
        if len(set(self.traits)) < len(self.traits):
            raise ValueError("traits: one is listed twice")
        return self


def _named(value: Any) -> Any:
    """`[gsm8k]` is `[{name: gsm8k}]`."""
    listed = value if isinstance(value, list) else [value]
    return [{"name": v} if isinstance(v, str) else v for v in listed]


class Evals(Part):
    capability: Annotated[tuple[CapabilitySpec, ...], BeforeValidator(_named)] = ()
    jailbreak: JailbreakSpec | None = None
    persona: PersonaSpec | None = None
    batch: int = Field(default=128, gt=0, description="answers generated at a time")

    @model_validator(mode="after")
    def _something(self) -> Evals:
        if not (self.capability or self.jailbreak or self.persona):
            raise ValueError("nothing is measured; name capability, jailbreak or persona")
        if len({c.name for c in self.capability}) < len(self.capability):
            raise ValueError("capability: one is listed twice")
        return self


class ObjectiveSpec(Part):
    """An objective under the name it has in this study, with its settings."""

    alias: str
    kind: str
    settings: dict[str, Any] = {}

    def to_plain(self) -> str | dict[str, Any]:
        """As it is written in a study file."""
        inner = self.settings if self.alias == self.kind else {self.kind: self.settings}
        return {self.alias: inner} if inner else self.alias

    def build(self) -> Objective:
        return OBJECTIVES[self.kind](**self.settings)


def _objectives(value: Any) -> Any:
    """`sft`, `{orpo: {weight: 0.1}}` or an alias `{orpo-0.2: {orpo: {weight: 0.2}}}` to one shape."""
    if not isinstance(value, list):
        raise ValueError("give a list, such as [sft, dpo]")
    return [_objective(v) for v in value]


def _objective(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"alias": value, "kind": _known(value)}
    if isinstance(value, dict) and {"alias", "kind"} <= value.keys():
        return value
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(f"{value!r} is not an objective: write sft, {{orpo: {{weight: 0.1}}}} or an alias of one")
    ((alias, inner),) = value.items()
    inner = inner or {}
    if alias not in OBJECTIVES and isinstance(inner, dict) and len(inner) == 1:
        ((kind, settings),) = inner.items()
        return {"alias": alias, "kind": _known(kind), "settings": _settings(kind, settings or {})}
    return {"alias": alias, "kind": _known(alias), "settings": _settings(alias, inner)}


def _known(kind: Any) -> str:
    if kind not in OBJECTIVES:
        raise ValueError(f"no objective {kind!r}{nearest(str(kind), OBJECTIVES)} (there are: {', '.join(OBJECTIVES)})")
    return str(kind)


def _settings(kind: str, given: Any) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(OBJECTIVES[kind])]  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise ValueError(f"{kind}: its settings are a mapping, such as {{{next(iter(fields), 'weight')}: 0.1}}")
    for key, value in given.items():
        if key not in fields:
            raise ValueError(
                f"{kind}: no setting {key!r}{nearest(key, fields)} (it has: {', '.join(fields) or 'none'})"
            )
        _check_setting(kind, key, value)
    return given


def _check_setting(kind: str, key: str, value: Any) -> None:
    if key == "towards":
        if value not in ("reverse", "forward"):
            raise ValueError(f"{kind}: {key} is {value!r}; reverse or forward")
    elif (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < math.inf
        or (key == "p" and value > 1)
    ):
        most = " and at most 1" if key == "p" else ""
        raise ValueError(f"{kind}: {key} is {value!r}; a number of at least 0{most}")


def nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


# checks of one key stand with the key, so that a fault elsewhere in the file does not hide theirs
def _rising(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in itertools.pairwise(budgets)):
        raise ValueError(f"{list(budgets)} must rise; write {sorted(set(budgets))}")
    return budgets


def _once_each(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("one is listed twice")
    return values


def _distinct(objectives: tuple[ObjectiveSpec, ...]) -> tuple[ObjectiveSpec, ...]:
    names = [o.alias for o in objectives]
    faults = [f"{n!r} is listed twice; give one an alias" for n in sorted({n for n in names if names.count(n) > 1})]
    faults += [f"{n!r} is the base model's name" for n in names if n == "base"]
    faults += [f"alias {n!r} must be lower-case letters, digits, . _ -" for n in names if not ALIAS.fullmatch(n)]
    if faults:
        raise ValueError("\n".join(faults))
    return objectives


class Spec(Part):
    """A whole study."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(
        default=1, gt=0, description="of each worker on a CPU: part of the study, since bits depend on it"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    task: Task
    pairs: Pairs = Pairs()
    adapter: Adapter = Adapter()
    objectives: Annotated[
        tuple[ObjectiveSpec, ...], BeforeValidator(_objectives), Field(min_length=1), AfterValidator(_distinct)
    ]
    budgets: Annotated[tuple[Tokens, ...], Field(min_length=1), AfterValidator(_rising)]
    budget: Budget = Budget()
    seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1), AfterValidator(_once_each)] = (0,)
    optim: Optim = Optim()
    evals: Evals

    @model_validator(mode="after")
    def _whole(self) -> Spec:
        if any(c.name == "files" for c in self.evals.capability) and self.task.name != "files":
            raise ValueError("evals.capability: files needs task: {files: {train: …, test: …}}")
        return self

    @property
    def hash(self) -> str:
        return digest("study", self.model_dump(mode="json", by_alias=True))

    def to_yaml(self) -> str:
        """The resolved study: every default written out."""
        plain = self.model_dump(mode="json", by_alias=True)
        plain["objectives"] = [o.to_plain() for o in self.objectives]
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
