"""The study file, typed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, StrictInt, model_validator

from leeway.claims import Claims, build
from leeway.hashing import digest
from leeway.loader import FLOAT
from leeway.model import adapters
from leeway.part import Part, nearest
from leeway.paths import expand
from leeway.study.eval_parts import Evals
from leeway.study.measured import measured
from leeway.study.objective_spec import ObjectiveSpec, objectives
from leeway.study.parts import OPEN_ENDED, OWN_FILES, Adapter, Budget, Companion, Optim, Pairs, Task, Tokens

ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")
LONGEST_ALIAS = 64  # characters: it is part of file names


class _Dumper(yaml.SafeDumper):
    """Quotes a text that would be read as a float."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


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


class Spec(Part):
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
    task: Task
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
    general: Companion | None = None
    safety: Companion | None = None
    evals: Evals
    claims: Annotated[Claims | None, BeforeValidator(_claims)] = None
    _followed: tuple[str, ...] = PrivateAttr(())

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
            *self._companions_are_there(),
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
            if name in OWN_FILES and self.task.name != name:
                give = "task: {files: {train: …, test: …}}" if name == "files" else f"source, or task: {name}"
                yield f"evals.capability: {name} needs {give}"
        if self.task.name in OPEN_ENDED and self.optim.lr == "tuned":
            yield f"optim.lr: tuned chooses by exact answers, and {self.task.name} has none; give a rate"

    def _servable(self) -> Iterator[str]:
        """What vLLM can answer with: the base under a plain LoRA."""
        if self.evals.backend != "vllm":
            return
        if self.adapter.kind not in ("lora", "rslora"):
            yield f"evals.backend: vLLM serves no adapter of kind {self.adapter.kind}; use transformers"
        if trained := [o.alias for o in self.objectives if o.build().control_tokens]:
            yield f"evals.backend: vLLM serves no trained token, and {', '.join(trained)} has some; use transformers"

    def _companions_are_there(self) -> Iterator[str]:
        for kind in ("general", "safety"):
            wanting = [o.alias for o in self.objectives if o.build().companion == kind]
            if wanting and getattr(self, kind) is None:
                yield f"{kind} is missing, and {', '.join(wanting)} needs it: give {kind}: organism, or a file's path"

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

    def followed_by(self, chosen: Seq[str]) -> Spec:
        """The same study, with what of it followed from its model and task."""
        self._followed = tuple(chosen)
        return self

    @property
    def followed(self) -> tuple[str, ...]:
        """What of the study followed from its model and task (`by-model`, `by-task`), a line for each place."""
        return self._followed

    def _claims_fit(self) -> Iterator[str]:
        if self.claims is not None:
            aliases = [o.alias for o in self.objectives]
            for fault in self.claims.absent(aliases, measured(self.evals), self.budgets):
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
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
