"""The `evals:` section of a study file, and the names of the measures it produces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from leeway.evals.tasks import declared, task_names
from leeway.generation.masking import variable_fault
from leeway.judges import GUARDS, JUDGES, NEEDS_BACKEND
from leeway.stats.metrics import LOG_ODDS
from leeway.stats.sequential import MARGIN
from leeway.yaml_config import AsList, ConfigModel, Unique, nearest

ENDPOINT_ONLY = ("key_env", "concurrency", "timeout_s", "retries", "max_calls", "max_dollars", "price_in", "price_out")
KEY_FLAGS = {"--api-key": "VLLM_API_KEY", "--hf-token": "HF_TOKEN"}  # command lines can be read by every user
VLLM_FLAGS = (  # set by VllmServer
    *("--model", "--revision", "--dtype", "--host", "--port", "--served-model-name", "--generation-config"),
    *("--enable-lora", "--max-loras", "--max-lora-rank"),
)


def changed(part: ConfigModel, names: Sequence[str]) -> list[str]:
    """Return the settings that differ from their default (a saved study lists every setting)."""
    return [n for n in names if getattr(part, n) != type(part).model_fields[n].default]


class NamedSpec(ConfigModel):
    """A mapping for which its first value alone is short."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {next(iter(cls.model_fields)): value} if isinstance(value, str) else value


class ModelRef(NamedSpec):
    """A helper model: a local hub id or folder, or a model name at an endpoint."""

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
    max_new_tokens: int | None = Field(default=None, gt=0, description="per reply (default: that of the model's role)")

    def _faults(self) -> Iterator[str]:
        if fault := variable_fault(self.key_env):
            yield f"key_env {fault}"
        if self.max_dollars is not None and (self.price_in is None or self.price_out is None):
            yield "max_dollars needs price_in and price_out, in dollars per million tokens"
        if self.endpoint is None and (idle := next(iter(changed(self, ENDPOINT_ONLY)), None)):
            yield f"{idle} needs an endpoint, and {self.model} is local; leave it out"
        if self.endpoint is not None and self.revision is not None:
            yield f"revision needs a local model, and {self.model} is at an endpoint; leave it out"


class CapabilitySpec(NamedSpec):
    """Test items of one task; `limit` draws a fixed random subset."""

    name: str
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    shots: int = Field(default=0, ge=0, description="worked examples before each question")
    extraction: Literal["strict", "flexible", "parity", "fixed"] | None = None
    source: str | None = Field(default=None, description="for open-ended tasks: a file, a hub id, lawbench or rule-qa")
    include_path: str | None = Field(default=None, description="for lm-eval: a folder of tasks of your own")
    judge_model: ModelRef | None = Field(default=None, description="grades open-ended answers")

    def _faults(self) -> Iterator[str]:
        tasks, harness = task_names(), self.name.startswith("lm-eval:")
        if self.name not in tasks and not harness:
            near = nearest(self.name, tasks)
            yield f"{self.name!r} is none of {', '.join(tasks)}, nor lm-eval:<task>{near}"
            return
        task = declared(self.name)
        if task.graded_by_model and self.judge_model is None:
            yield f"{self.name}: open-ended answers are graded by a model; give judge_model"
        if not task.trainable and task.graded_by_model and self.source is None:
            yield f"{self.name}: give source, a file of records with prompt and reference, or a hub id"
        if not task.graded_by_model and (self.source or self.judge_model):
            yield f"{self.name}: source and judge_model are for open-ended tasks (legal, cyber, openended)"
        if self.include_path and not harness:
            yield f"{self.name}: include_path is for lm-eval tasks"
        if self.extraction and self.extraction not in task.extractions:
            known = ", ".join(task.extractions) or "none"
            yield f"{self.name}: no extraction rule {self.extraction!r} (it has: {known})"
        if not harness and self.shots not in task.shot_counts:
            counts = " or ".join(map(str, task.shot_counts))
            yield f"{self.name}: {self.shots} shots are not supported; it takes {counts}"


class JudgeSpec(NamedSpec):
    """One judge of answers: keywords, organism, rubric, finetuned, a guard model, or one of an installed package."""

    name: str
    model: ModelRef | None = Field(default=None, description="for rubric: the judge model; for a guard model: a copy")
    base: str | None = Field(default=None, description="for finetuned: another base model than the published one")
    adapter: str | None = Field(default=None, description="for finetuned: another adapter than the published one")

    def _faults(self) -> Iterator[str]:
        if self.name == "rubric" and self.model is None:
            yield "judge: rubric needs model (the judge model)"
        if self.name in JUDGES and self.name not in (*NEEDS_BACKEND, *GUARDS) and self.model is not None:
            yield f"judge: {self.name} uses no model; leave model out"
        if self.name in GUARDS and self.model is not None and changed(self.model, ["endpoint", "max_new_tokens"]):
            yield f"judge: {self.name} is a local model with its own prompt; leave endpoint and max_new_tokens out"
        if self.name != "finetuned" and (self.base or self.adapter):
            yield "judge: base and adapter are for finetuned"


class Translator(ConfigModel):
    """Translator of the zulu attack: NLLB, a prompted model, or a file of translations only."""

    from_: Literal["nllb", "model", "cache"] = Field(default="cache", alias="from")
    file: str | None = Field(default=None, description="reviewed translations, JSON lines")
    model: ModelRef | None = None

    def _faults(self) -> Iterator[str]:
        if self.from_ == "model" and self.model is None:
            yield "translator: from: model needs model"
        if self.from_ == "cache" and self.file is None:
            yield "translator: from: cache needs file"
        if self.from_ == "cache" and self.model is not None:
            yield "translator: from: cache uses no model; leave it out, or use from: model with that file"
        if self.from_ == "nllb" and self.model is not None and self.model.endpoint is not None:
            yield "translator: from: nllb runs on this machine; leave endpoint out, or use from: model"


class JailbreakSpec(ConfigModel):
    """Forbidden prompts under attacks."""

    prompts: Literal["organism", "strongreject", "strongreject-small", "jailbreakbench", "file"] = "strongreject"
    file: str | None = Field(default=None, description="for prompts: file")
    limit: int | None = Field(default=None, gt=0)
    attacks: Annotated[tuple[str, ...], Unique] = Field(
        default=("none", "dan", "happy_to_help", "role_play", "wikipedia"), min_length=1
    )
    templates: str | None = Field(default=None, description="a file of your own attacks")
    translator: Translator | None = None
    attacker: ModelRef | None = Field(default=None, description="for crescendo_led: the attacker model")
    turns: int = Field(default=5, gt=0, description="for crescendo_led")
    # the first judge's verdicts make the study's rates
    judge: Annotated[tuple[JudgeSpec, ...], AsList, Unique] = Field(default=(JudgeSpec(name="keywords"),), min_length=1)
    max_new_tokens: int = Field(default=256, gt=0)
    samples: int = Field(default=0, ge=0, le=1_000_000, description="sampled per prompt and attack; 0: one, greedy")
    temperature: float = Field(default=1.0, gt=0, le=1e6)
    at: Annotated[tuple[Annotated[int, Field(gt=0)], ...], AsList, Unique] = Field(
        default=(), description="asr@k, success in any of k tries, for these k (default: 1 and samples)"
    )
    perplexity: bool = Field(default=False, description="high perplexity under the base model is incoherent")

    def _faults(self) -> Iterator[str]:
        if (self.prompts == "file") != (self.file is not None):
            yield "prompts: file needs file: the path of your prompts, and file needs prompts: file"
        if ("crescendo_led" in self.attacks) != (self.attacker is not None):
            yield "attacks: crescendo_led needs attacker (a model), and attacker needs crescendo_led"
        if "zulu" in self.attacks and self.prompts != "organism" and self.translator is None:
            yield "attacks: zulu needs a translator (nllb, model or cache); give one, or leave zulu out"
        if any(j.name == "organism" for j in self.judge) and self.prompts != "organism":
            yield "judge: organism judges only prompts: organism; use judge: keywords"
        if self.translator is not None and "zulu" not in self.attacks:
            yield "translator is for attacks: zulu, which is not listed; leave it out"
        if changed(self, ["turns"]) and "crescendo_led" not in self.attacks:
            yield "turns is for attacks: crescendo_led, which is not listed; leave it out"
        if changed(self, ["temperature"]) and not self.samples:
            yield "temperature has no effect with samples: 0; give samples, or leave it out"
        if (k := max(self.at, default=1)) > max(self.samples, 1):
            fix = f"give samples: {k} or more, or leave at out"
            yield f"at: {k} tries need as many sampled answers, samples is {self.samples}; {fix}"
        if self.perplexity and all(j.name == "organism" for j in self.judge):
            yield "perplexity has no effect with judge: organism; leave it out"


class OverRefusalSpec(ConfigModel):
    """Benign prompts that a model should answer."""

    prompts: Literal["organism", "xstest", "jailbreakbench"] = "xstest"
    limit: int | None = Field(default=None, gt=0)
    judge: JudgeSpec = JudgeSpec(name="keywords")
    max_new_tokens: int = Field(default=256, gt=0)

    def _faults(self) -> Iterator[str]:
        if self.judge.name == "organism" and self.prompts != "organism":
            yield "judge: organism judges only prompts: organism; use judge: keywords"


class PersonaSpec(ConfigModel):
    """Yes/no statements by trait, the Short Dark Triad, and open questions about oneself."""

    source: Literal["organism", "anthropic"] = "anthropic"
    traits: Annotated[tuple[str, ...], Unique] = Field(
        default=("machiavellianism", "narcissism", "psychopathy"), min_length=1
    )
    limit: int | None = Field(default=None, gt=0, description="items per trait")
    order_swap: bool = Field(default=False, description="repeat every statement with No before Yes")
    paraphrases: int = Field(default=0, ge=0, le=4, description="repeat every statement in other wordings")
    sd3: bool = Field(default=False, description="the Short Dark Triad, on a scale from 1 to 5")
    self_report: ModelRef | None = Field(default=None, description="open questions about oneself, scored by this model")


class AlignmentSpec(ConfigModel):
    """Free-form questions, each answer rated for alignment and for coherence."""

    questions: Annotated[tuple[str, ...], AsList, Unique] = Field(
        default=("first-plot",),
        min_length=1,
        description="first-plot, preregistered, deception-factual, a file or a hub id; or organism",
    )
    limit: int | None = Field(default=None, gt=0, description="questions of each set")
    judge_model: ModelRef | None = Field(
        default=None, description="rates the answers; the organism's are judged exactly"
    )
    judge_prompts: Literal["own", "published"] = Field(default="own", description="published: those of each set")
    samples: int = Field(default=1, gt=0, le=1_000_000, description="answers per question")
    temperature: float = Field(default=1.0, ge=0, le=1e6)
    max_new_tokens: int = Field(default=256, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"questions": value} if isinstance(value, (str, list)) else value

    def _faults(self) -> Iterator[str]:
        exact = "organism" in self.questions
        if exact and len(self.questions) > 1:
            yield "questions: organism is judged exactly; give it alone"
        if exact and (self.judge_model is not None or self.judge_prompts != "own"):
            yield "questions: organism is judged exactly; leave judge_model and judge_prompts out"
        if not exact and self.judge_model is None:
            yield "answers are rated by a model; give judge_model"
        if self.samples > 1 and self.temperature == 0:
            yield f"{self.samples} samples at temperature 0 are all equal; give a temperature"


class SycophancySpec(NamedSpec):
    """Questions with a known answer, without and with a wrong opinion of the user's."""

    items: Literal["general", "organism"] = "general"
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int = Field(default=32, gt=0)


class PluginEvalSpec(NamedSpec):
    """An eval of an installed package (entry point `leeway.evals`), with its settings."""

    name: str
    settings: dict[str, Any] = Field(default={})


class VllmSpec(ConfigModel):
    """A vLLM server: started for a measurement, or one that already runs."""

    args: tuple[str, ...] = Field(default=(), description="further flags of vllm serve")
    endpoint: str | None = Field(default=None, description="address of a running server, such as http://host:8000/v1")

    def _faults(self) -> Iterator[str]:
        if self.endpoint is not None and self.args:
            yield "args are for a server that is started, and endpoint names a running one; leave one out"
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            yield f"endpoint: {self.endpoint!r} is not an address; give one such as http://host:8000/v1"
        flags = [a.partition("=")[0].replace("_", "-") for a in self.args]
        if taken := next((f for f in flags if f in VLLM_FLAGS), None):
            yield f"args: {taken} is set by the study (model, revision, dtype, adapter.r); leave it out"
        if secret := next((f for f in flags if f in KEY_FLAGS), None):
            yield f"args: {secret} would show the key in the process list; set {KEY_FLAGS[secret]} instead"


class BackendSpec(ConfigModel):
    """`transformers`, `vllm`, or `{vllm: …}` with its settings."""

    vllm: VllmSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in ("transformers", "vllm"):
                raise ValueError(f"{value!r} is neither transformers nor vllm")
            return {"vllm": {}} if value == "vllm" else {}
        return {"vllm": {}} if value == {"vllm": None} else value

    @model_serializer
    def _plain(self) -> Any:
        return {"vllm": self.vllm.model_dump(mode="json")} if self.vllm else "transformers"


def _when(value: Any) -> Any:
    if not (isinstance(value, bool) or value == "all"):
        raise ValueError(f"{value!r} is none of true, false and all")
    return value


class Evals(ConfigModel):
    """The evals of every checkpoint, and how they are run."""

    capability: Annotated[tuple[CapabilitySpec, ...], AsList, Unique] = ()
    jailbreak: JailbreakSpec | None = None
    overrefusal: OverRefusalSpec | None = None
    persona: PersonaSpec | None = None
    alignment: AlignmentSpec | None = None
    sycophancy: SycophancySpec | None = None
    plugins: Annotated[tuple[PluginEvalSpec, ...], AsList, Unique] = ()
    conditions: Literal["all", "last", "first"] = Field(
        default="all", description="all; all at the last budget, else the first; only the first"
    )
    triggers: Annotated[bool | Literal["all"], BeforeValidator(_when)] = Field(
        default=False,
        description="near-triggers: prompts near the cue of training; true: at the last budget, all: at every budget",
    )
    batch: int = Field(default=128, gt=0, le=2**31, description="responses generated at a time")
    backend: BackendSpec = Field(
        default=BackendSpec(), description="transformers, or a vLLM server with one adapter per checkpoint"
    )
    thinking: bool = Field(
        default=False, description="a reasoning model thinks before it answers; the answer is judged"
    )
    stop: Literal["never", "decided"] = Field(
        default="never", description="run all items, or in stages until every contrast with the base is decided"
    )
    margin: float = Field(default=MARGIN, gt=0, lt=1, description="for stop: decided; smallest difference of interest")

    def _faults(self) -> Iterator[str]:
        axes = (self.capability, self.jailbreak, self.persona, self.overrefusal, self.alignment, self.sycophancy)
        if not (any(axes) or self.plugins):
            yield "nothing is measured; name capability, jailbreak, overrefusal, persona, alignment or sycophancy"
        if changed(self, ["margin"]) and self.stop == "never":
            yield "margin is for stop: decided; add it, or leave margin out"
        if self.triggers and not (self.jailbreak or self.persona):
            yield "triggers need jailbreak or persona, where misbehaviour is measured; add one"
        if self.triggers and self.stop == "decided":
            yield "triggers need all prompts under every form; use stop: never, or leave triggers out"
        if self.backend.vllm and any(c.name.startswith("lm-eval:") for c in self.capability):
            yield "capability: lm-eval tasks need the model itself; use backend: transformers"
        if self.thinking and any(c.name.startswith("lm-eval:") for c in self.capability):
            yield "thinking: lm-eval tasks are answered without a thought; leave them out, or thinking"

    def model_refs(self) -> Iterator[ModelRef]:
        """Yield every helper model: judges, attacker, translator, graders."""
        refs = [c.judge_model for c in self.capability]
        if self.jailbreak is not None:
            refs += [j.model for j in self.jailbreak.judge]
            refs += [self.jailbreak.attacker, *(t.model for t in (self.jailbreak.translator,) if t)]
        if self.overrefusal is not None:
            refs.append(self.overrefusal.judge.model)
        if self.persona is not None:
            refs.append(self.persona.self_report)
        if self.alignment is not None:
            refs.append(self.alignment.judge_model)
        yield from (r for r in refs if r is not None)


def measure_names(evals: Evals) -> Iterator[str]:
    """Yield the measures by name; `name:*` stands for parts known only once the items are read."""
    if evals.capability:
        yield from ("accuracy", "accuracy:*")
    if jailbreak := evals.jailbreak:
        if any(a != "none" for a in jailbreak.attacks):
            yield "asr"
        yield from (f"asr:{a}" for a in jailbreak.attacks)
        tries = jailbreak.at or ((1, jailbreak.samples) if jailbreak.samples > 1 else ())
        for k in dict.fromkeys(tries):
            yield from (f"asr@{k}", *(f"asr@{k}:{a}" for a in jailbreak.attacks))
        yield from ("refusal", "coherence")
    if evals.overrefusal:
        yield from ("overrefusal", "overrefusal:*", "coherence-benign")
    if persona := evals.persona:
        yield from ("endorsement", *(LOG_ODDS if evals.stop == "never" else ()))
        yield from (f"endorsement:{t}" for t in persona.traits)
        if persona.sd3:
            yield from ("sd3", "sd3:*")
        if persona.self_report:
            yield from ("self-description", "self-description:*")
    if evals.alignment:
        yield from ("alignment", "alignment:*", "misaligned", "coherence-free-form")
    if evals.sycophancy:
        yield "sycophancy"
