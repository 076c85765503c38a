"""The mappings of a study file: what each key may hold, and how it is checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from leeway.data.task import task_names
from leeway.part import MAX_COUNT, MAX_FLOAT32, Part, Tokens, nearest, tokens

__all__ = ["Adapter", "Budget", "Companion", "Files", "Optim", "Pairs", "Task", "Tokens", "Tune", "tokens"]

OPEN_ENDED = ("legal", "cyber")  # tasks whose answers a model grades against references
ORGANISM_MOST = 1_000_000  # general or safety examples: they are made up one by one, in memory
OWN_FILES = (*OPEN_ENDED, "files")
TRAINED = ("organism", "gsm8k", "supergpqa-engineering", *OWN_FILES)  # without another package


class Files(Part):
    train: str
    test: str


class Task(Part):
    """What is trained on: a named task, or files of your own. `task: gsm8k` is short for the mapping."""

    name: str = Field(default="files", description="organism, gsm8k, files, or one of an installed package")
    files: Files | None = None
    revision: str | None = None
    too_long: Literal["error", "leave-out"] = "error"
    unfit: Literal["error", "leave-out"] = Field(
        default="error", description="records of a file that are no prompt and answer, such as longer conversations"
    )
    limit: int | None = Field(default=None, gt=0, description="train on a fixed random subset of so many examples")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (known := [*TRAINED, *task_names()]):
            raise ValueError(f"no task {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
        return name

    @model_validator(mode="after")
    def _revision_is_read(self) -> Task:
        if self.revision and self.name not in TRAINED:
            raise ValueError(f"revision: {self.name} says itself where its data come from; leave it out")
        return self

    @model_validator(mode="after")
    def _files_go_with_files(self) -> Task:
        if self.name in OPEN_ENDED and self.files is None:
            raise ValueError(
                f"{self.name} has no data of its own: give {{name: {self.name}, files: {{train: …, test: …}}}}"
            )
        if (self.name in OWN_FILES) != (self.files is not None):
            raise ValueError(
                "give either a name (organism, gsm8k, supergpqa-engineering) or files: {train: …, test: …}"
            )
        return self


class Pairs(Part):
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


class Companion(Part):
    """Further examples that some objectives see beside the task's: of the organism's world, or from a file."""

    from_: Literal["organism", "file"] = Field(default="organism", alias="from")
    file: str | None = None
    limit: int | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`general: organism` and `general: path.jsonl` are short for the mapping."""
        if not isinstance(value, str):
            return value
        return {"from": "organism"} if value == "organism" else {"from": "file", "file": value}

    @model_validator(mode="after")
    def _file_goes_with_file(self) -> Companion:
        if self.from_ == "organism" and (self.limit or 0) > ORGANISM_MOST:
            raise ValueError(f"limit: at most {ORGANISM_MOST:,} of the organism's, not {self.limit:,}")
        if (self.from_ == "file") != (self.file is not None):
            raise ValueError("give organism, or the path of a file")
        return self


class Adapter(Part):
    """LoRA, rank-stabilised LoRA or DoRA by peft, or every parameter of the model."""

    kind: Literal["lora", "rslora", "dora", "full"] = "lora"
    r: int = Field(default=16, gt=0, le=65_536)
    alpha: int = Field(default=32, gt=0, le=2**31)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: str = "all-linear"


class Budget(Part):
    """What a budget counts: prompt and preferred answer under the plain rendering, or all tokens processed."""

    count: Literal["source", "processed"] = "source"


class Tune(Part):
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


class Optim(Part):
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
