"""The study file, typed.

The mappings of a study file: what each key may hold, and how it is checked.

The objectives of a study file: by name, with settings, under an alias, and from where they start.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from leeway.claims import Claims, build
from leeway.data.types import Task
from leeway.evals.tasks import TaskSettings, declared, load_task, task_names
from leeway.hashing import digest
from leeway.io import expand
from leeway.model import adapters
from leeway.objectives import Objective, load_objective, names
from leeway.study.eval_spec import Evals, measure_names
from leeway.yaml_config import MAX_COUNT, MAX_FLOAT32, ConfigModel, Tokens, dump, nearest, tokens

__all__ = ["Adapter", "AuxiliarySpec", "Budget", "Optim", "Pairs", "TaskFiles", "TaskSpec", "Tokens", "Tune", "tokens"]

ORGANISM_MOST = 1_000_000  # general or safety examples: they are made up one by one, in memory


class TaskFiles(ConfigModel):
    train: str
    test: str


class TaskSpec(ConfigModel):
    """What is trained on: a named task, or files of your own. `task: gsm8k` is short for the mapping."""

    name: str = Field(default="files", description="organism, gsm8k, files, or one of an installed package")
    files: TaskFiles | None = None
    revision: str | None = None
    too_long: Literal["error", "leave-out"] = "error"
    unsupported: Literal["error", "leave-out"] = Field(
        default="error",
        description="records of a file that are not one prompt and its answer",
    )
    limit: int | None = Field(default=None, gt=0, description="train on a fixed random subset of so many examples")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (known := task_names(trainable=True)):
            raise ValueError(f"no task {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
        return name

    @model_validator(mode="after")
    def _settings_are_used(self) -> TaskSpec:
        keys = declared(self.name).keys
        if "files" in keys and self.files is None:
            named = "" if self.name == "files" else f"name: {self.name}, "
            raise ValueError(f"{self.name} needs data files: give {{{named}files: {{train: …, test: …}}}}")
        for key in ("files", "revision"):
            if getattr(self, key) is not None and key not in keys:
                raise ValueError(f"{key}: task {self.name} does not use it; leave it out")
        if self.unsupported != "error" and "files" not in keys:
            raise ValueError(f"unsupported: task {self.name} reads no files; leave it out")
        return self

    @property
    def settings(self) -> TaskSettings:
        files = self.files.model_dump() if self.files else {"train": None, "test": None}
        return TaskSettings(
            revision=self.revision, train_file=files["train"], test_file=files["test"], unsupported=self.unsupported
        )

    def load(self) -> Task:
        return load_task(self.name, self.settings)


class Pairs(ConfigModel):
    """How dispreferred answers come about; all but `from` is for the strategies that ask the base model."""

    from_: Literal["dataset", "corrupted", "sampled-errors", "unsafe"] = Field(default="dataset", alias="from")
    samples: int = Field(default=4, gt=0, description="answers drawn per prompt, until one is accepted")
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=256, gt=0)
    filter: Literal["rules", "model"] = "rules"

    @model_validator(mode="after")
    def _settings_are_used(self) -> Pairs:
        if self.filter == "model" and self.from_ != "unsafe":
            raise ValueError(f"filter: model is for from: unsafe, and {self.from_} filters by rules; leave it out")
        given = {name: getattr(self, name) for name in ("samples", "temperature", "max_new_tokens")}
        idle = [name for name, value in given.items() if value != type(self).model_fields[name].default]
        if self.from_ in ("dataset", "corrupted") and idle:
            raise ValueError(
                f"{idle[0]} is for answers that are drawn, and from: {self.from_} draws none; leave it out"
            )
        return self


class AuxiliarySource(ConfigModel):
    """Where auxiliary examples come from: the organism's world, or a file."""

    from_: Literal["organism", "file"] = Field(default="organism", alias="from")
    file: str | None = None
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Accept `general: organism` and `general: path.jsonl`."""
        if not isinstance(value, str):
            return value
        return {"from": "organism"} if value == "organism" else {"from": "file", "file": value}

    @model_validator(mode="after")
    def _file_goes_with_file(self) -> AuxiliarySource:
        if self.from_ == "organism" and (self.limit or 0) > ORGANISM_MOST:
            raise ValueError(f"limit: at most {ORGANISM_MOST:,} of the organism's, not {self.limit:,}")
        if (self.from_ == "file") != (self.file is not None):
            raise ValueError("give organism, or the path of a file")
        return self


class AuxiliarySpec(ConfigModel):
    """Examples that some objectives see in addition to the task's."""

    general: AuxiliarySource | None = None
    safety: AuxiliarySource | None = None


class Adapter(ConfigModel):
    """LoRA, rank-stabilised LoRA or DoRA by peft, or every parameter of the model."""

    kind: Literal["lora", "rslora", "dora", "full"] = "lora"
    r: int = Field(default=16, gt=0, le=65_536)
    alpha: int = Field(default=32, gt=0, le=2**31)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: str = "all-linear"


class Budget(ConfigModel):
    """What a budget counts: prompt and preferred answer under the plain rendering, or all tokens processed."""

    count: Literal["source", "processed"] = "source"


class Tune(ConfigModel):
    """The sweep of `lr: tuned`: every rate for every objective, the best by capability on examples held out for it."""

    lrs: tuple[Annotated[float, Field(gt=0, le=MAX_FLOAT32)], ...] = Field(default=(3e-5, 1e-4, 3e-4), min_length=1)
    budget: Tokens = 25_000
    items: int = Field(default=100, gt=0, description="training examples set aside to choose by")


def _rate(value: Any) -> Any:
    """A rate for all, one for each objective, or `tuned`."""
    if value == "tuned":
        return value
    for rate in value.values() if isinstance(value, dict) else [value]:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= MAX_FLOAT32:
            raise ValueError(f"{rate!r} is no learning rate; give a number, {{sft: 1e-4, dpo: 5e-5}}, or tuned")
    return value


Lr = Annotated[float | dict[str, float] | Literal["tuned"], BeforeValidator(_rate)]


class Optim(ConfigModel):
    """AdamW, the same for every objective unless `lr` says otherwise."""

    lr: Lr = 1e-4
    tune: Tune = Tune()
    warmup_steps: int = Field(default=10, ge=0, le=MAX_COUNT)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    batch: int = Field(default=16, gt=0)
    clip: float = Field(default=1.0, gt=0, le=MAX_FLOAT32)
    weight_decay: float = Field(default=0.0, ge=0, le=MAX_FLOAT32)
    micro_tokens: int = Field(
        default=2048, gt=0, le=MAX_COUNT, description="positions that go through the model at a time"
    )
    layout: Literal["auto", "padded", "packed", "fused"] = "auto"

    @model_validator(mode="after")
    def _tune_is_used(self) -> Optim:
        if self.tune != Tune() and self.lr != "tuned":
            raise ValueError("tune is for lr: tuned, and a rate is given; set lr: tuned, or leave tune out")
        return self

    def lr_of(self, alias: str) -> float | None:
        """The learning rate of an objective; None where it is tuned."""
        if isinstance(self.lr, dict):
            return self.lr[alias]
        return None if self.lr == "tuned" else float(self.lr)


SHARES = ("p", "share")  # settings that are probabilities
WRITTEN = "written"  # the context under which a study file is checked
STAGE = ("start", "reference")  # what says that an objective goes on from elsewhere


class StartSpec(ConfigModel):
    """What a trajectory starts from instead of the base model: a saved adapter, or another's checkpoint here."""

    from_: str | None = Field(default=None, alias="from")
    budget: Tokens | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> StartSpec:
        if (self.adapter is None) == (self.from_ is None):
            raise ValueError("start: give {from: OBJECTIVE, budget: …}, or {adapter: FOLDER}")
        if (self.from_ is None) != (self.budget is None):
            raise ValueError("start: budget goes with from")
        return self


class ObjectiveSpec(ConfigModel):
    """An objective under the name it has in this study, with its settings."""

    alias: str
    kind: str
    settings: dict[str, Any] = Field(default={})
    start: StartSpec | None = None
    reference: Literal["start", "base"] = "start"

    def to_plain(self) -> str | dict[str, Any]:
        """As it is written in a study file."""
        if self.alias == self.kind:
            return {self.alias: self.settings} if self.settings else self.alias
        inner: dict[str, Any] = {self.kind: self.settings}
        if self.start:
            inner["start"] = self.start.model_dump(mode="json", by_alias=True, exclude_none=True)
            inner["reference"] = self.reference
        return {self.alias: inner}

    @model_validator(mode="after")
    def _reference_is_a_choice(self) -> ObjectiveSpec:
        if self.reference == "base" and self.start is None:
            raise ValueError("reference: base goes with a start, and without one it is the base anyway; leave it out")
        return self

    @property
    def starts_at(self) -> str:
        """What it starts from and is held against, by name."""
        if self.start is None:
            return "base"
        origin = self.start.adapter or f"{self.start.from_} at {self.start.budget}"
        return f"{origin}, reference: {self.reference}"

    def build(self) -> Objective:
        return load_objective(self.kind)(**self.settings)


def objectives(value: Any, info: ValidationInfo) -> Any:
    """`sft`, `{orpo: {weight: 0.1}}` or an alias `{orpo-0.2: {orpo: {weight: 0.2}}}` to one shape.

    A study that was checked and dumped, as workers get it, has that shape already; a study file may not have it.
    """
    if not isinstance(value, list):
        raise ValueError("give a list, such as [sft, dpo]")
    dumped = info.context != WRITTEN and all(isinstance(v, dict) and {"alias", "kind"} <= v.keys() for v in value)
    return value if dumped else [_objective(v) for v in value]


def _objective(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"alias": value, "kind": _known(value)}
    if isinstance(value, dict) and len(value) > 1 and (kind := next((k for k in value if k in names()), None)):
        _no_stage(kind, value)
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(
            f"{value!r} is not an objective: write sft, {{orpo: {{weight: 0.1}}}} or, under a name of your own, "
            "{my-orpo: {orpo: {weight: 0.1}}}"
        )
    ((alias, inner),) = value.items()
    inner = inner or {}
    known = alias in names()
    if known and isinstance(inner, dict):
        _no_stage(alias, inner)
    if known or not isinstance(inner, dict):
        return {"alias": alias, "kind": _known(alias), "settings": _settings(alias, inner)}
    staged = {k: inner[k] for k in STAGE if k in inner}
    kinds = [k for k in inner if k not in staged]
    if len(kinds) != 1:
        _known(alias)
    kind = _known(kinds[0])
    if "start" in staged and staged["start"] is None:
        raise ValueError(f"{alias}: its start is empty; give {{from: OBJECTIVE, budget: …}} or leave it out")
    return {"alias": alias, "kind": kind, "settings": _settings(kind, inner[kind] or {}), **staged}


def _no_stage(kind: str, given: dict[str, Any]) -> None:
    """A second stage is told from the first by its name."""
    if stage := next((k for k in STAGE if k in given), None):
        raise ValueError(
            f"{kind}: a {stage} needs a name of its own: write {{my-{kind}: {{{kind}: {{}}, {stage}: …}}}}"
        )


def _known(kind: Any) -> str:
    if kind not in (known := names()):
        raise ValueError(f"no objective {kind!r}{nearest(str(kind), known)} (there are: {', '.join(known)})")
    return str(kind)


def _settings(kind: str, given: Any) -> dict[str, Any]:
    made = load_objective(kind)
    fields = [f.name for f in dataclasses.fields(made)]  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise ValueError(f"{kind}: its settings are a mapping, such as {{{next(iter(fields), 'weight')}: 0.1}}")
    for key, value in ((str(k), v) for k, v in given.items()):
        if key not in fields:
            raise ValueError(
                f"{kind}: no setting {key!r}{nearest(key, fields)} (it has: {', '.join(fields) or 'none'})"
            )
        _check_setting(kind, made, key, value)
    return given


def _check_setting(kind: str, made: Any, key: str, value: Any) -> None:
    """Words where the objective's field takes words; a number of at least 0 (a share: at most 1) otherwise."""
    words = get_args(get_type_hints(made)[key])
    if words:
        if value not in words:
            raise ValueError(f"{kind}: {key} is {value!r}; {' or '.join(map(str, words))}")
    elif (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < math.inf
        or (key in SHARES and value > 1)
    ):
        most = " and at most 1" if key in SHARES else ""
        raise ValueError(f"{kind}: {key} is {value!r}; a number of at least 0{most}")


ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")
LONGEST_ALIAS = 64  # characters: it is part of file names


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
    faults += [f"alias {n!r} has {len(n)} characters; at most {LONGEST_ALIAS}" for n in names if len(n) > LONGEST_ALIAS]
    if faults:
        raise ValueError("\n".join(faults))
    return objectives


def _claims(value: Any) -> Any:
    """A list, or a mapping that holds one; a path or a name is read by the parser, which knows where the file is."""
    return value if value is None else build(value)


def _no_adapter(name: str) -> str:
    """Why nothing can be started from there, or nothing."""
    folder = expand(name)
    if not (name.strip() and folder.is_dir()):
        return "is no folder"
    adapter = (folder / adapters.WEIGHTS).is_file() and (folder / adapters.CONFIG).is_file()
    return "" if adapter or any(folder.glob("model*.safetensors")) else "holds no weights"


def _unlike(o: ObjectiveSpec, control: tuple[str, ...], *, whole: bool) -> Iterator[str]:
    """What a saved adapter has that this study does not train, as far as its settings tell."""
    assert o.start is not None
    config = expand(str(o.start.adapter)) / adapters.CONFIG
    if config.is_file() == whole and not _no_adapter(str(o.start.adapter)):
        kinds = ("an adapter", "whole weights") if whole else ("whole weights", "an adapter")
        yield f"{o.alias}: start.adapter {o.start.adapter!r} holds {kinds[0]}, and {kinds[1]} would be trained"
    if whole or not config.is_file():
        return
    try:
        has = bool(json.loads(config.read_text("utf-8")).get("trainable_token_indices"))
    except (ValueError, AttributeError):
        yield f"{o.alias}: start.adapter {o.start.adapter!r}: its {adapters.CONFIG} is damaged"
        return
    if has != bool(control):
        yield f"{o.alias}: {_only_one(o.start.adapter, control)}; start it from {_alike(control)}"


def _only_one(start: str | None, control: tuple[str, ...]) -> str:
    return f"its start {start!r} has {'no' if control else 'trained'} control tokens"


def _alike(control: tuple[str, ...]) -> str:
    return "the base model or from cft" if control else "the base model or from an objective without them"


RESAMPLED = ("steeper", "diverges", "coupled", "matched")  # claims that the joint bootstrap decides
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class Spec(ConfigModel):
    """A whole study."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(
        default=1, gt=0, le=1024, description="of each worker on a CPU: part of the study, since bits depend on it"
    )
    processes: int = Field(
        default=1, gt=0, le=64, description="that train one trajectory together, a shard of the model in each"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    task: TaskSpec
    pairs: Pairs = Pairs()
    adapter: Adapter = Adapter()
    objectives: Annotated[
        tuple[ObjectiveSpec, ...], BeforeValidator(objectives), Field(min_length=1), AfterValidator(_distinct)
    ]
    budgets: Annotated[tuple[Tokens, ...], Field(min_length=1), AfterValidator(_rising)]
    budget: Budget = Budget()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_once_each)] = (0,)
    optim: Optim = Optim()
    reference: Literal["live", "cached"] = Field(
        default="cached", description="computed beforehand and kept on disk, or beside the policy in every step"
    )
    auxiliary: AuxiliarySpec = AuxiliarySpec()
    evals: Evals
    claims: Annotated[Claims | None, BeforeValidator(_claims)] = None
    _resolved_defaults: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _live_in_shards(cls, raw: Any) -> Any:
        """Several processes that share a model ask its reference beside it, unless the study says otherwise."""
        alone = not isinstance(raw, dict) or raw.get("processes", 1) == 1
        return raw if alone else {"reference": "live", **raw}

    @model_validator(mode="after")
    def _whole(self) -> Spec:
        faults = [
            *self._evals_fit(),
            *self._servable(),
            *self._auxiliary_given(),
            *self._rates_fit(),
            *self._processes_fit(),
            *self._starts_are_there(),
            *self._starts_fit(),
            *self._claims_fit(),
        ]
        if self.adapter.kind == "full" and self.dtype == "bfloat16":
            faults.append("dtype: bfloat16 is too coarse for adapter.kind: full; leave dtype out, or use kind: lora")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _evals_fit(self) -> Iterator[str]:
        for name in (c.name for c in self.evals.capability if c.source is None):
            if "files" in declared(name).keys and self.task.name != name:
                give = "task: {files: {train: …, test: …}}" if name == "files" else f"source, or task: {name}"
                yield f"evals.capability: {name} needs {give}"
        if declared(self.task.name).graded_by_model and self.optim.lr == "tuned":
            yield f"optim.lr: tuned needs exact answers, and {self.task.name} is graded by a model; give a rate"

    def _servable(self) -> Iterator[str]:
        """What vLLM can answer with: the base under a plain LoRA."""
        if self.evals.backend != "vllm":
            return
        if self.adapter.kind not in ("lora", "rslora"):
            yield f"evals.backend: vLLM serves no adapter of kind {self.adapter.kind}; use transformers"
        if trained := [o.alias for o in self.objectives if o.build().control_tokens]:
            yield f"evals.backend: vLLM serves no trained token, and {', '.join(trained)} has some; use transformers"

    def _auxiliary_given(self) -> Iterator[str]:
        for kind in ("general", "safety"):
            users = [o.alias for o in self.objectives if o.build().auxiliary == kind]
            if users and getattr(self.auxiliary, kind) is None:
                yield (
                    f"auxiliary.{kind} is missing, and {', '.join(users)} needs it: "
                    f"give auxiliary: {{{kind}: organism}}, or a file's path"
                )

    def _rates_fit(self) -> Iterator[str]:
        aliases = [o.alias for o in self.objectives]
        given = self.optim.lr if isinstance(self.optim.lr, dict) else dict.fromkeys(aliases)
        if missing := [a for a in aliases if a not in given]:
            yield f"optim.lr: no rate for {', '.join(missing)}"
        if unknown := [a for a in given if a not in aliases]:
            yield f"optim.lr: {unknown[0]!r} is no objective of this study{nearest(unknown[0], aliases)}"

    def _processes_fit(self) -> Iterator[str]:
        if self.processes > 1 and self.optim.lr == "tuned":
            yield "processes: a sweep of learning rates runs in one process; give optim.lr a rate"
        if self.processes > 1 and ":" in self.device:
            yield f"processes: {self.processes} of them take a GPU each, and {self.device} is one; give device: cuda"
        if self.processes > 1 and self.reference == "cached":
            yield "processes: a cached reference is asked in one process; give reference: live, which is sharded too"
        if self.processes > 1 and self.optim.layout == "fused":
            yield "processes: the fused decoder knows no shards; give optim.layout: padded, or leave it out"

    def _starts_are_there(self) -> Iterator[str]:
        before: set[str] = set()
        for o in self.objectives:
            if o.start and o.start.from_ and o.start.from_ not in before:
                yield f"{o.alias}: start.from {o.start.from_!r} is not listed before it{nearest(o.start.from_, before)}"
            if o.start and o.start.adapter is not None and (fault := _no_adapter(o.start.adapter)):
                yield f"{o.alias}: start.adapter {o.start.adapter!r} {fault}: give the folder of a saved adapter"
            if o.start and o.start.from_ and o.start.budget not in self.budgets:
                yield f"{o.alias}: start.budget {o.start.budget} is not among the budgets {list(self.budgets)}"
            before.add(o.alias)

    def _starts_fit(self) -> Iterator[str]:
        """A trajectory trains what its start has trained: control tokens are new rows, and cannot come or go."""
        control = {o.alias: o.build().control_tokens for o in self.objectives}
        for o in self.objectives:
            if o.start is None:
                continue
            if o.start.adapter is not None:
                yield from _unlike(o, control[o.alias], whole=self.adapter.kind == "full")
            elif control[o.alias] != control.get(str(o.start.from_), control[o.alias]):
                fault = _only_one(o.start.from_, control[o.alias])
                yield f"{o.alias}: {fault}; start it from {_alike(control[o.alias])}"

    def with_resolved_defaults(self, lines: Seq[str]) -> Spec:
        self._resolved_defaults = tuple(lines)
        return self

    @property
    def resolved_defaults(self) -> tuple[str, ...]:
        """Return the values of each `auto` of the study file, as `place: value`."""
        return self._resolved_defaults

    def _claims_fit(self) -> Iterator[str]:
        if self.claims is not None:
            aliases = [o.alias for o in self.objectives]
            for fault in self.claims.absent(aliases, measure_names(self.evals), self.budgets):
                yield f"claims: {fault}"
            resampled = [c.analysis for c in self.claims.claims if c.analysis in RESAMPLED]
            if self.evals.stop == "decided" and resampled:
                yield (
                    f"claims: {resampled[0]} resamples prompts, which is not valid where they are asked until decided; "
                    "use evals.stop: never"
                )

    def objective(self, alias: str) -> ObjectiveSpec:
        return next(o for o in self.objectives if o.alias == alias)

    @property
    def weights(self) -> Literal["auto", "float32", "bfloat16"]:
        """What the weights are loaded in: float32 where they all train, unless the study asks otherwise."""
        return "float32" if self.adapter.kind == "full" and self.dtype == "auto" else self.dtype

    @property
    def hash(self) -> str:
        """Of everything that was asked; the claims are part of it where there are any."""
        return digest("study", self._plain())

    def _plain(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json", by_alias=True, exclude={"claims"})
        return plain if self.claims is None else {**plain, "claims": self.claims.to_plain()}

    def to_yaml(self) -> str:
        """The resolved study: every default written out."""
        plain = self._plain()
        plain["objectives"] = [o.to_plain() for o in self.objectives]
        return dump(plain)
