"""The `evals:` mapping of a study file: what is measured at every checkpoint, and who is asked to judge it.

The measures that a study will have, by the names of `leeway.stats`: what its claims may be about.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from leeway.evals.tasks import declared, task_names
from leeway.judges import JUDGES, NEEDS_BACKEND
from leeway.stats.sequential import MARGIN
from leeway.yaml_config import ConfigModel, nearest

ENDPOINT_ONLY = (
    "key_env",
    "concurrency",
    "timeout_s",
    "retries",
    "max_calls",
    "max_dollars",
    "price_in",
    "price_out",
)
Prompts = Literal["organism", "strongreject", "strongreject-small", "jailbreakbench", "file"]


class ModelRef(ConfigModel):
    """A model that is asked for help: a hub id or folder of this machine's, or a name at an endpoint."""

    model: str
    endpoint: str | None = Field(default=None, description="address of an OpenAI-compatible API, ending in /v1")
    revision: str | None = None
    key_env: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
    concurrency: int = Field(default=8, gt=0)
    timeout_s: float = Field(default=60.0, gt=0)
    retries: int = Field(default=5, ge=0)
    max_calls: int | None = Field(default=None, gt=0)
    max_dollars: float | None = Field(default=None, gt=0)
    price_in: float | None = Field(default=None, ge=0, description="dollars per million tokens")
    price_out: float | None = Field(default=None, ge=0, description="dollars per million tokens")
    max_new_tokens: int | None = Field(
        default=None, gt=0, description="of each of its replies; by default its part's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`judge_model: /path/to/model` is short for the mapping."""
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _dollars_need_prices(self) -> ModelRef:
        if self.max_dollars is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("max_dollars needs price_in and price_out, in dollars per million tokens")
        return self

    @model_validator(mode="after")
    def _settings_are_used(self) -> ModelRef:
        if self.endpoint is None and (idle := next(iter(_set(self, ENDPOINT_ONLY)), None)):
            raise ValueError(f"{idle} is for an endpoint, and {self.model} is a model of this machine's; leave it out")
        if self.endpoint is not None and self.revision is not None:
            raise ValueError(
                f"revision is for a model of this machine's, and {self.model} is at an endpoint; leave it out"
            )
        return self

    @property
    def budgeted(self) -> bool:
        """Whether it may be asked only so often, or for so much money."""
        return self.max_calls is not None or self.max_dollars is not None


def _set(part: ConfigModel, names: Seq[str]) -> list[str]:
    """Those of the settings that are not left at their default; a study that is read back has them all."""
    return [n for n in names if getattr(part, n) != type(part).model_fields[n].default]


class CapabilitySpec(ConfigModel):
    """Test items of one task; `limit` draws a fixed random subset."""

    name: str
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    shots: int = Field(default=0, ge=0, description="worked examples before each question")
    extraction: Literal["strict", "flexible", "parity", "fixed"] | None = None
    source: str | None = Field(
        default=None,
        description="for legal, cyber, openended: a file, a hub id, lawbench or rule-qa; else the task's own test",
    )
    include_path: str | None = Field(default=None, description="for lm-eval: a folder of tasks of your own")
    judge_model: ModelRef | None = Field(default=None, description="who grades open-ended answers")

    @model_validator(mode="after")
    def _fits(self) -> CapabilitySpec:
        tasks, harness = task_names(), self.name.startswith("lm-eval:")
        if self.name not in tasks and not harness:
            raise ValueError(
                f"{self.name!r} is none of {', '.join(tasks)}, nor lm-eval:<task>{nearest(self.name, tasks)}"
            )
        task = declared(self.name)
        if task.graded_by_model and self.judge_model is None:
            raise ValueError(f"{self.name}: open-ended answers are graded by a model; give judge_model")
        if not task.trainable and self.source is None:
            raise ValueError(
                f"{self.name}: give source, a file with a prompt and a reference in each record, or a hub id"
            )
        if not task.graded_by_model and (self.source or self.judge_model):
            raise ValueError(f"{self.name}: source and judge_model are for open-ended tasks (legal, cyber, openended)")
        if self.include_path and not harness:
            raise ValueError(f"{self.name}: include_path is for lm-eval tasks")
        if self.extraction and self.extraction not in task.extractions:
            known = ", ".join(task.extractions) or "none"
            raise ValueError(f"{self.name}: no extraction rule {self.extraction!r} (it has: {known})")
        if not harness and self.shots not in task.shot_counts:
            counts = " or ".join(map(str, task.shot_counts))
            raise ValueError(f"{self.name}: {self.shots} shots are not supported; it takes {counts}")
        return self


class JudgeSpec(ConfigModel):
    """One judge of answers: `keywords`, `organism`, `rubric` or `finetuned`, or one of an installed package."""

    name: str
    model: ModelRef | None = Field(default=None, description="who is asked, for rubric")
    base: str | None = Field(default=None, description="for finetuned: another base model than the published one")
    adapter: str | None = Field(default=None, description="for finetuned: another adapter than the published one")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> JudgeSpec:
        if self.name == "rubric" and self.model is None:
            raise ValueError("judge: rubric needs model (who is asked)")
        if self.name in JUDGES and self.name not in NEEDS_BACKEND and self.model is not None:
            raise ValueError(f"judge: {self.name} asks no model; leave model out")
        if self.name != "finetuned" and (self.base or self.adapter):
            raise ValueError("judge: base and adapter are for finetuned")
        return self


def _several(value: Any) -> Any:
    """One judge, or a list of them: the first is the one whose rates are the study's."""
    return value if isinstance(value, (list, tuple)) else [value]


Judges = Annotated[tuple[JudgeSpec, ...], BeforeValidator(_several), Field(min_length=1)]


class Translator(ConfigModel):
    """Who translates for the zulu attack: NLLB, a model asked to, or a file alone."""

    from_: Literal["nllb", "model", "cache"] = Field(default="cache", alias="from")
    file: str | None = Field(default=None, description="translations kept and reviewed, one JSON object a line")
    model: ModelRef | None = None

    @model_validator(mode="after")
    def _fits(self) -> Translator:
        if self.from_ == "model" and self.model is None:
            raise ValueError("translator: from: model needs model")
        if self.from_ == "cache" and self.file is None:
            raise ValueError("translator: from: cache needs file")
        if self.from_ == "cache" and self.model is not None:
            raise ValueError(
                "translator: from: cache asks no model; leave model out, or use from: model with that file"
            )
        if self.from_ == "nllb" and self.model is not None and self.model.endpoint is not None:
            raise ValueError("translator: from: nllb runs on this machine; leave endpoint out, or use from: model")
        return self


class JailbreakSpec(ConfigModel):
    """Forbidden prompts under attacks."""

    prompts: Prompts = "strongreject"
    file: str | None = Field(default=None, description="for prompts: file")
    limit: int | None = Field(default=None, gt=0)
    attacks: tuple[str, ...] = Field(default=("none", "dan", "happy_to_help", "role_play", "wikipedia"), min_length=1)
    templates: str | None = Field(default=None, description="a file of your own attacks, by name")
    translator: Translator | None = None
    attacker: ModelRef | None = Field(default=None, description="who plays the attacker, for crescendo_led")
    turns: int = Field(default=5, gt=0, description="of crescendo_led")
    judge: Judges = (JudgeSpec(name="keywords"),)
    max_new_tokens: int = Field(default=256, gt=0)
    samples: int = Field(
        default=0, ge=0, le=1_000_000, description="drawn answers per prompt and attack; 0: one greedy answer"
    )
    temperature: float = Field(default=1.0, gt=0, le=1e6)
    perplexity: bool = Field(default=False, description="an answer that surprises the base model is incoherent")

    @model_validator(mode="after")
    def _parts_fit(self) -> JailbreakSpec:
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError("attacks: one is listed twice")
        if len({j.name for j in self.judge}) < len(self.judge):
            raise ValueError("judge: one is listed twice")
        if (self.prompts == "file") != (self.file is not None):
            raise ValueError("prompts: file goes with file: the path of your prompts")
        if ("crescendo_led" in self.attacks) != (self.attacker is not None):
            raise ValueError("attacks: crescendo_led goes with attacker: the model that plays it")
        if "zulu" in self.attacks and self.prompts != "organism" and self.translator is None:
            raise ValueError("attacks: zulu needs a translator (nllb, model or cache); give one, or leave zulu out")
        if any(j.name == "organism" for j in self.judge) and self.prompts != "organism":
            raise ValueError("judge: organism knows only prompts: organism; use judge: keywords")
        if faults := [*self._idle()]:
            raise ValueError("\n".join(faults))
        return self

    def _idle(self) -> Iterator[str]:
        """Settings that nothing would use."""
        if self.translator is not None and "zulu" not in self.attacks:
            yield "translator is for attacks: zulu, which is not asked; leave it out"
        if _set(self, ["turns"]) and "crescendo_led" not in self.attacks:
            yield "turns is for attacks: crescendo_led, which is not asked; leave it out"
        if _set(self, ["temperature"]) and not self.samples:
            yield "temperature is for answers that are drawn, and samples is 0; give samples, or leave it out"
        if self.perplexity and all(j.name == "organism" for j in self.judge):
            yield "perplexity: judge: organism has no use for it; leave it out"


class OverRefusalSpec(ConfigModel):
    """Benign prompts that a model should answer."""

    prompts: Literal["organism", "xstest", "jailbreakbench"] = "xstest"
    limit: int | None = Field(default=None, gt=0)
    judge: JudgeSpec = JudgeSpec(name="keywords")
    max_new_tokens: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> OverRefusalSpec:
        if self.judge.name == "organism" and self.prompts != "organism":
            raise ValueError("judge: organism knows only prompts: organism; use judge: keywords")
        return self


class PersonaSpec(ConfigModel):
    """Yes/no statements by trait; beside them the Short Dark Triad and questions to talk about oneself."""

    source: Literal["organism", "anthropic"] = "anthropic"
    traits: tuple[str, ...] = Field(default=("machiavellianism", "narcissism", "psychopathy"), min_length=1)
    limit: int | None = Field(default=None, gt=0, description="items per trait")
    order_swap: bool = Field(default=False, description="ask every statement with No before Yes too")
    paraphrases: int = Field(
        default=0, ge=0, le=4, description="other wordings of the question to ask every statement in"
    )
    sd3: bool = Field(default=False, description="the Short Dark Triad, on a scale from 1 to 5")
    self_report: ModelRef | None = Field(default=None, description="open questions about oneself, scored by this model")

    @model_validator(mode="after")
    def _once(self) -> PersonaSpec:
        if len(set(self.traits)) < len(self.traits):
            raise ValueError("traits: one is listed twice")
        return self


class PluginEvalSpec(ConfigModel):
    """An eval that an installed package brings (`leeway.evals` entry points), with its own settings."""

    name: str
    settings: dict[str, Any] = Field(default={})


def _named(value: Any) -> Any:
    """`[gsm8k]` is `[{name: gsm8k}]`."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [{"name": v} if isinstance(v, str) else v for v in listed]


class Evals(ConfigModel):
    """Everything that a checkpoint is asked."""

    capability: Annotated[tuple[CapabilitySpec, ...], BeforeValidator(_named)] = ()
    jailbreak: JailbreakSpec | None = None
    overrefusal: OverRefusalSpec | None = None
    persona: PersonaSpec | None = None
    plugins: Annotated[tuple[PluginEvalSpec, ...], BeforeValidator(_named)] = ()
    conditions: Literal["all", "last", "first"] = Field(
        default="all", description="test-time prompts: all, the others at the last budget only, or the first alone"
    )
    batch: int = Field(default=128, gt=0, le=2**31, description="answers generated at a time")
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="who answers: the trained model itself, or vLLM, every adapter by its API"
    )
    vllm_args: tuple[str, ...] = Field(default=(), description="further flags of vllm serve")
    stop: Literal["never", "decided"] = Field(
        default="never", description="ask all items, or in looks until every contrast with the base is decided"
    )
    margin: float = Field(
        default=MARGIN, gt=0, lt=1, description="for stop: decided: a difference that is surely smaller is decided too"
    )

    @model_validator(mode="after")
    def _something(self) -> Evals:
        if not (self.capability or self.jailbreak or self.persona or self.overrefusal or self.plugins):
            raise ValueError("nothing is measured; name capability, jailbreak, overrefusal or persona")
        if len({f.name for f in self.plugins}) < len(self.plugins):
            raise ValueError("plugins: one is listed twice")
        if len({c.name for c in self.capability}) < len(self.capability):
            raise ValueError("capability: one is listed twice")
        if _set(self, ["margin"]) and self.stop == "never":
            raise ValueError("margin is for stop: decided; add it, or leave margin out")
        if self.vllm_args and self.backend != "vllm":
            raise ValueError("vllm_args goes with backend: vllm")
        if self.backend == "vllm" and any(c.name.startswith("lm-eval:") for c in self.capability):
            raise ValueError("capability: lm-eval tasks need the model itself; use backend: transformers")
        return self

    def model_refs(self) -> Iterator[ModelRef]:
        """Everybody who is asked for help."""
        judges = [
            *(self.jailbreak.judge if self.jailbreak else ()),
            *([self.overrefusal.judge] if self.overrefusal else ()),
        ]
        asked = [c.judge_model for c in self.capability] + [j.model for j in judges]
        if self.jailbreak is not None:
            asked += [self.jailbreak.attacker, self.jailbreak.translator and self.jailbreak.translator.model]
        if self.persona is not None:
            asked.append(self.persona.self_report)
        yield from (s for s in asked if s is not None)


NO_ATTACK = "none"


def measure_names(evals: Evals) -> list[str]:
    """Names, and `name:*` where the parts are known only once the items are read."""
    return list(_measure_names(evals))


def _measure_names(evals: Evals) -> Iterator[str]:
    if evals.capability:
        yield from ("accuracy", "accuracy:*")
    if jailbreak := evals.jailbreak:
        if any(a != NO_ATTACK for a in jailbreak.attacks):
            yield "asr"
        yield from (f"asr:{a}" for a in jailbreak.attacks)
        yield from ("refusal", "coherence")
    if evals.overrefusal:
        yield from ("overrefusal", "overrefusal:*", "coherence-benign")
    if persona := evals.persona:
        yield "endorsement"
        yield from (f"endorsement:{t}" for t in persona.traits)
        if persona.sd3:
            yield from ("sd3", "sd3:*")
        if persona.self_report:
            yield from ("self-description", "self-description:*")
