"""The study file as types: every key, its default, and the checks across keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, StrictInt, field_validator, model_validator

from leeway.claims.schema import Claims, build
from leeway.data.types import Task
from leeway.evals.tasks import TaskSettings, declared, load_task, task_names
from leeway.hashing import digest
from leeway.model.packaged import is_local
from leeway.probe.spec import ProbeSpec
from leeway.study.controls import Controls, control_faults
from leeway.study.eval_spec import Evals, NamedSpec, changed, measure_names
from leeway.study.objective_spec import ObjectiveSpec, check_aliases, parse_objectives, start_faults
from leeway.yaml_config import MAX_COUNT, MAX_FLOAT32, ConfigModel, Tokens, Unique, dump, nearest

MAX_ORGANISM_EXAMPLES = 1_000_000  # general or safety examples of the organism's world are generated in memory
RESAMPLED = ("steeper", "diverges", "coupled", "matched")  # analyses of claims that use the joint bootstrap
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class TaskFiles(ConfigModel):
    train: str
    test: str


class TaskSpec(NamedSpec):
    """What is trained on: a task by name, or the user's own files. `task: gsm8k` is short for the mapping."""

    name: str = Field(default="files", description="organism, gsm8k, files, or one of an installed package")
    files: TaskFiles | None = None
    revision: str | None = None
    too_long: Literal["error", "leave-out"] = "error"
    unsupported: Literal["error", "leave-out"] = Field(
        default="error", description="records of a file that are not one prompt and its answer"
    )
    limit: int | None = Field(default=None, gt=0, description="train on a fixed random subset of so many examples")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (known := task_names(trainable=True)):
            raise ValueError(f"no task {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
        return name

    def _faults(self) -> Iterator[str]:
        keys = declared(self.name).keys
        if "files" in keys and self.files is None:
            named = "" if self.name == "files" else f"name: {self.name}, "
            yield f"{self.name} needs data files: give {{{named}files: {{train: …, test: …}}}}"
        for key in ("files", "revision"):
            if getattr(self, key) is not None and key not in keys:
                yield f"{key}: task {self.name} does not use it; leave it out"
        if self.unsupported != "error" and "files" not in keys:
            yield f"unsupported: task {self.name} reads no files; leave it out"

    @property
    def settings(self) -> TaskSettings:
        train, test = (self.files.train, self.files.test) if self.files else (None, None)
        return TaskSettings(self.revision, train, test, self.unsupported)

    def load(self) -> Task:
        return load_task(self.name, self.settings)


class Pairs(ConfigModel):
    """Where rejected answers come from. All keys but `from` are for answers that the base model generates."""

    from_: Literal["dataset", "corrupted", "sampled-errors", "unsafe"] = Field(default="dataset", alias="from")
    samples: int = Field(default=4, gt=0, description="generated per prompt, until one is accepted")
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=256, gt=0)
    filter: Literal["rules", "model"] = "rules"

    def _faults(self) -> Iterator[str]:
        if self.filter == "model" and self.from_ != "unsafe":
            yield f"filter: model is for from: unsafe, and {self.from_} filters by rules; leave it out"
        idle = changed(self, ("samples", "temperature", "max_new_tokens"))
        if self.from_ in ("dataset", "corrupted") and idle:
            why = f"is for answers that are generated, and from: {self.from_} generates none"
            yield f"{idle[0]} {why}; leave it out"


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

    def _faults(self) -> Iterator[str]:
        if self.from_ == "organism" and (self.limit or 0) > MAX_ORGANISM_EXAMPLES:
            yield f"limit: at most {MAX_ORGANISM_EXAMPLES:,} of the organism's, not {self.limit:,}"
        if (self.from_ == "file") != (self.file is not None):
            yield "give organism, or the path of a file"


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

    def _faults(self) -> Iterator[str]:
        if self.kind == "full" and (idle := changed(self, ("r", "alpha", "dropout", "targets"))):
            yield f"{idle[0]} has no effect with kind: full, which trains all weights; leave it out"


class Budget(ConfigModel):
    """What a budget counts: tokens of the plain prompt and the preferred answer, or all tokens processed."""

    count: Literal["source", "processed"] = "source"


class Tune(ConfigModel):
    """The sweep of `lr: tuned`: the rate of each objective with the best capability on held-out training examples."""

    lrs: tuple[Annotated[float, Field(gt=0, le=MAX_FLOAT32)], ...] = Field(default=(3e-5, 1e-4, 3e-4), min_length=1)
    budget: Tokens = 25_000
    items: int = Field(default=100, gt=0, description="training examples held out for the choice")


def _rate(value: Any) -> Any:
    """Check a rate for all objectives, one rate for each, or `tuned`."""
    if value == "tuned":
        return value
    for rate in value.values() if isinstance(value, dict) else [value]:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= MAX_FLOAT32:
            raise ValueError(f"{rate!r} is not a learning rate; give a number, {{sft: 1e-4, dpo: 5e-5}}, or tuned")
    return value


Lr = Annotated[float | dict[str, float] | Literal["tuned"], BeforeValidator(_rate)]


class Optim(ConfigModel):
    """AdamW, the same for every objective unless `lr` differs."""

    lr: Lr = 1e-4
    tune: Tune = Tune()
    warmup_steps: int = Field(default=10, ge=0, le=MAX_COUNT)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    batch: int = Field(default=16, gt=0)
    clip: float = Field(default=1.0, gt=0, le=MAX_FLOAT32)
    weight_decay: float = Field(default=0.0, ge=0, le=MAX_FLOAT32)
    micro_tokens: int = Field(default=2048, gt=0, le=MAX_COUNT, description="positions per forward pass")
    layout: Literal["auto", "padded", "packed", "fused"] = "auto"

    def _faults(self) -> Iterator[str]:
        if self.tune != Tune() and self.lr != "tuned":
            yield "tune is for lr: tuned, and a rate is given; set lr: tuned, or leave tune out"

    def lr_of(self, alias: str) -> float | None:
        """Return the learning rate of an objective, or None if it is tuned."""
        if isinstance(self.lr, dict):
            return self.lr[alias]
        return None if self.lr == "tuned" else float(self.lr)


# a check of one key is its validator, not the model's, so that an error elsewhere does not hide it
def _rising(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in itertools.pairwise(budgets)):
        raise ValueError(f"{list(budgets)} must rise; write {sorted(set(budgets))}")
    return budgets


class Spec(ConfigModel):
    """A whole study."""

    RENAMED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("data", "dataset", "datasets", "train_file", "train_data", "dataset_name"), "task"),
        **dict.fromkeys(("base", "base_model", "model_name", "model_name_or_path"), "model"),
        **dict.fromkeys(("learning_rate", "learning-rate"), "optim.lr"),
        **dict.fromkeys(("batch_size", "per_device_train_batch_size", "train_batch_size"), "optim.batch"),
        **dict.fromkeys(("warmup", "num_warmup_steps"), "optim.warmup_steps"),
        **dict.fromkeys(("optimizer", "optimiser", "training"), "optim"),
        **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "optim.schedule"),
        **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clipping"), "optim.clip"),
        **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_steps", "tokens", "train_tokens"), "budgets"),
        **dict.fromkeys(("lora", "peft"), "adapter"),
        **dict.fromkeys(("rank", "lora_r", "lora_rank"), "adapter.r"),
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "target_modules": "adapter.targets",
        **dict.fromkeys(("loss", "losses", "method", "methods"), "objectives"),
        **dict.fromkeys(("eval", "evaluation", "benchmarks"), "evals"),
    }

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(
        default=1, gt=0, le=1024, description="per CPU worker; part of the study: results depend on it bit for bit"
    )
    processes: int = Field(
        default=1, gt=0, le=64, description="that train one trajectory, each with a shard of the model"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    task: TaskSpec
    pairs: Pairs = Pairs()
    adapter: Adapter = Adapter()
    objectives: Annotated[
        tuple[ObjectiveSpec, ...], BeforeValidator(parse_objectives), Field(min_length=1), AfterValidator(check_aliases)
    ]
    budgets: Annotated[tuple[Tokens, ...], Field(min_length=1), AfterValidator(_rising)]
    budget: Budget = Budget()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), Unique] = (0,)
    optim: Optim = Optim()
    reference: Literal["live", "cached"] = Field(
        default="cached", description="cached: computed once and stored on disk; live: in every step"
    )
    auxiliary: AuxiliarySpec = AuxiliarySpec()
    evals: Evals
    controls: Controls = Controls()
    probe: Annotated[ProbeSpec | None, BeforeValidator(lambda v: {} if v is True else v)] = None
    claims: Annotated[Claims | None, BeforeValidator(lambda v: None if v is None else build(v))] = None
    _resolved_defaults: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _live_if_sharded(cls, raw: Any) -> Any:
        """Default to a live reference where several processes share the model."""
        single = not isinstance(raw, dict) or raw.get("processes", 1) == 1
        return raw if single else {"reference": "live", **raw}

    def _faults(self) -> Iterator[str]:
        yield from self._evals_fit()
        yield from self._vllm_fits()
        yield from self._auxiliary_given()
        yield from self._rates_fit()
        yield from self._processes_fit()
        yield from start_faults(self.objectives, self.budgets, full=self.adapter.kind == "full")
        yield from self._claims_fit()
        yield from self._probe_fits()
        yield from control_faults(self)
        if self.revision is not None and is_local(self.model):
            yield f"revision is a commit of a hub model, and {self.model} is on this machine; leave it out"
        if self.adapter.kind == "full" and self.dtype == "bfloat16":
            yield "dtype: bfloat16 is too coarse for adapter.kind: full; leave dtype out, or use kind: lora"

    def _evals_fit(self) -> Iterator[str]:
        for name in (c.name for c in self.evals.capability if c.source is None):
            if "files" in declared(name).keys and self.task.name != name:
                give = "task: {files: {train: …, test: …}}" if name == "files" else f"source, or task: {name}"
                yield f"evals.capability: {name} needs {give}"
        if declared(self.task.name).graded_by_model and self.optim.lr == "tuned":
            yield f"optim.lr: tuned needs exact answers, and {self.task.name} is graded by a model; give a rate"

    def _vllm_fits(self) -> Iterator[str]:
        if self.evals.backend.vllm is None:
            return
        if self.adapter.kind not in ("lora", "rslora"):
            yield f"evals.backend: vLLM does not serve adapters of kind {self.adapter.kind}; use transformers"
        if trained := [o.alias for o in self.objectives if o.build().control_tokens]:
            yield f"evals.backend: vLLM does not serve trained tokens, which {', '.join(trained)} has; use transformers"

    def _auxiliary_given(self) -> Iterator[str]:
        for kind in ("general", "safety"):
            users = [o.alias for o in self.objectives if o.build().auxiliary == kind]
            if users and getattr(self.auxiliary, kind) is None:
                fix = f"give auxiliary: {{{kind}: organism}}, or a file's path"
                yield f"auxiliary.{kind} is missing, and {', '.join(users)} needs it: {fix}"

    def _rates_fit(self) -> Iterator[str]:
        aliases = [o.alias for o in self.objectives]
        given = self.optim.lr if isinstance(self.optim.lr, dict) else dict.fromkeys(aliases)
        if missing := [a for a in aliases if a not in given]:
            yield f"optim.lr: no rate for {', '.join(missing)}"
        if unknown := [a for a in given if a not in aliases]:
            yield f"optim.lr: {unknown[0]!r} is not an objective of this study{nearest(unknown[0], aliases)}"
        if self.adapter.kind == "full" and (scaled := [o.alias for o in self.objectives if o.build().token_lr != 1]):
            yield f"{scaled[0]}: token_lr is for new rows next to an adapter; leave it out, or use adapter.kind: lora"

    def _processes_fit(self) -> Iterator[str]:
        if self.processes == 1:
            return
        if self.optim.lr == "tuned":
            yield "processes: a sweep of learning rates runs in one process; give optim.lr a rate"
        if ":" in self.device:
            yield f"processes: {self.processes} processes need a GPU each, and {self.device} is one; give device: cuda"
        if self.reference == "cached":
            yield "processes: a cached reference is computed in one process; give reference: live, which is sharded"
        if self.optim.layout == "fused":
            yield "processes: the fused decoder does not support shards; give optim.layout: padded, or leave it out"

    def _claims_fit(self) -> Iterator[str]:
        if self.claims is None:
            return
        aliases = [o.alias for o in self.objectives]
        for fault in self.claims.absent(aliases, [*measure_names(self.evals)], self.budgets):
            yield f"claims: {fault}"
        resampled = [c.kind for c in self.claims.claims if c.kind in RESAMPLED]
        if self.evals.stop == "decided" and resampled:
            why = f"{resampled[0]} resamples prompts, which is not valid under sequential stopping"
            yield f"claims: {why}; use evals.stop: never"

    def _probe_fits(self) -> Iterator[str]:
        if self.probe is not None:
            aliases = tuple(o.alias for o in self.objectives)
            yield from (f"probe.{fault}" for fault in self.probe.absent(aliases, self.budgets))

    def with_resolved_defaults(self, lines: Sequence[str]) -> Spec:
        self._resolved_defaults = tuple(lines)
        return self

    @property
    def resolved_defaults(self) -> tuple[str, ...]:
        """Return the values of each `auto` of the study file, as `place: value`."""
        return self._resolved_defaults

    def objective(self, alias: str) -> ObjectiveSpec:
        return next(o for o in self.objectives if o.alias == alias)

    @property
    def weight_dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """Return the dtype to load weights in: float32 where all of them train, unless `dtype` is given."""
        return "float32" if self.adapter.kind == "full" and self.dtype == "auto" else self.dtype

    @property
    def hash(self) -> str:
        return digest("study", self._plain())

    def _plain(self) -> dict[str, Any]:
        # default controls are left out: a run from before them keeps its hash, and gains them when it is resumed
        left_out = {"claims", "probe"} | ({"controls"} if self.controls == Controls() else set())
        plain = self.model_dump(mode="json", by_alias=True, exclude=left_out)
        if not self.evals.triggers:  # as with controls
            del plain["evals"]["triggers"]
        if not self.evals.thinking:
            del plain["evals"]["thinking"]
        if self.evals.jailbreak and not self.evals.jailbreak.at:
            del plain["evals"]["jailbreak"]["at"]
        for axis in ("alignment", "sycophancy"):
            if plain["evals"][axis] is None:
                del plain["evals"][axis]
        return plain if self.claims is None else {**plain, "claims": self.claims.to_plain()}

    def to_yaml(self) -> str:
        """Return the study with every default written out."""
        plain = self._plain()
        if self.probe is not None:
            plain["probe"] = self.probe.model_dump(mode="json")
        plain["objectives"] = [o.to_plain() for o in self.objectives]
        return dump(plain)
