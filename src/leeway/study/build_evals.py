"""Build a study's evals from its settings: items, attacks, judges, and the helper models they query."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from leeway.attacks import NEEDS_HELPER, Attack, LedCrescendo, Wrapper, Zulu, attack_names, load_attack, load_templates
from leeway.cache import Cache
from leeway.data import persona, safety_prompts
from leeway.data.persona import sd3
from leeway.data.safety_prompts import balanced, subset
from leeway.data.types import BenignPrompt, Example, ForbiddenPrompt, PersonaItem
from leeway.errors import LeewayError
from leeway.evals.attack_helpers import Attacker, LlmTranslator, Nllb, TranslationFile
from leeway.evals.capability import Capability
from leeway.evals.eval import Eval, load_eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.lm_eval import LmEval
from leeway.evals.openended import OpenEnded, RubricJudge
from leeway.evals.overrefusal import OrganismBenignJudge, OverRefusal
from leeway.evals.persona import Persona
from leeway.evals.self_report import Likert, SelfReport
from leeway.evals.tasks import BuiltInTask, TaskSettings, load_task
from leeway.generation.backend import Backend
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import OpenAIBackend
from leeway.generation.openai_client import ApiSettings
from leeway.generation.transformers import LocalBackend, weights_hash
from leeway.hashing import digest
from leeway.io import expand
from leeway.judges import Judge, load_judge
from leeway.judges.rubric import wording
from leeway.model.forward import Perplexity
from leeway.model.load import Dtype, load_model
from leeway.organism import world
from leeway.study.eval_spec import (
    ENDPOINT_ONLY,
    CapabilitySpec,
    JailbreakSpec,
    JudgeSpec,
    ModelRef,
    PersonaSpec,
    Translator,
)
from leeway.study.spec import Spec


@dataclass(frozen=True)
class HelperModels:
    """Backends of a study's judge, attacker and translator models, cached in `cache` if given."""

    cache: Cache | None = None
    device: str = "auto"

    def of(self, model: ModelRef) -> Backend:
        """Return a backend for an endpoint or a local model, loaded at its first request."""
        backend: Backend
        if model.endpoint:
            settings = {name: getattr(model, name) for name in ("model", *ENDPOINT_ONLY)}
            backend = OpenAIBackend(ApiSettings(base_url=model.endpoint, **settings))
        else:
            backend = LocalBackend(model.model, model.revision, device=self.device)
        return backend if self.cache is None else CachedBackend(backend, self.cache.records("replies"))


def max_new_tokens_of(model: ModelRef, own: int) -> int:
    """Return the reply limit of the study, else `own`."""
    return own if model.max_new_tokens is None else model.max_new_tokens


@dataclass
class _PerplexityModel:
    """The base model as a perplexity scorer (`PerplexityScorer`), loaded at first use."""

    name: str
    revision: str | None
    dtype: Dtype
    device: str

    @cached_property
    def identity(self) -> str:
        return digest("perplexity", weights_hash(self.name, self.revision), self.dtype)

    def shares(self, prompts: Seq[str], texts: Seq[str]) -> list[float]:
        return self._model.shares(prompts, texts)

    @cached_property
    def _model(self) -> Perplexity:
        return Perplexity(load_model(self.name, revision=self.revision, dtype=self.dtype, device=self.device))


ORGANISM = "the organism's world, held out"
BENIGN: dict[str, Callable[[], tuple[list[BenignPrompt], str]]] = {
    "xstest": safety_prompts.xstest,
    "jailbreakbench": safety_prompts.jailbreakbench_benign,
}


def safety_evals(spec: Spec, origins: dict[str, str], helpers: HelperModels) -> list[Eval]:
    """Return the jailbreak, over-refusal and persona evals that the study names."""
    evals: list[Eval] = []
    if (jailbreak := spec.evals.jailbreak) is not None:
        prompts, origins["jailbreak"] = _forbidden(jailbreak)
        attacks = [*_attacks(jailbreak, helpers)]
        judges = [_judge(j, spec, helpers, perplexity=jailbreak.perplexity) for j in jailbreak.judge]
        sampling = (jailbreak.samples, jailbreak.temperature)
        evals.append(Jailbreak(prompts, attacks, judges, jailbreak.max_new_tokens, *sampling))
    if (benign_part := spec.evals.overrefusal) is not None:
        items, origins["overrefusal"] = _benign(benign_part.prompts, benign_part.limit)
        exact = benign_part.judge.name == "organism"
        judge = OrganismBenignJudge() if exact else _judge(benign_part.judge, spec, helpers)
        evals.append(OverRefusal(items, judge, benign_part.max_new_tokens))
    if (persona_part := spec.evals.persona) is not None:
        items_of = _statements(persona_part, origins)
        evals.append(Persona(items_of, persona_part.order_swap, persona_part.paraphrases))
        evals += _other_persona_evals(persona_part, origins, helpers)
    return evals


def _forbidden(part: JailbreakSpec) -> tuple[list[ForbiddenPrompt], str]:
    if part.prompts == "organism":
        return world.forbidden_prompts(part.limit or 100), ORGANISM
    if part.prompts == "file":
        assert part.file is not None
        prompts, origin = safety_prompts.from_file(expand(part.file))
    else:
        prompts, origin = safety_prompts.forbidden(part.prompts)
    return subset(prompts, part.limit, "jailbreak"), origin


def _attacks(part: JailbreakSpec, helpers: HelperModels) -> list[Attack]:
    own: dict[str, Wrapper] = load_templates(part.templates) if part.templates else {}
    known = [*attack_names(), *NEEDS_HELPER, *own]
    for name in part.attacks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(sorted(known))}"
            raise LeewayError(f"evals.jailbreak.attacks: no attack {name!r}", fix=fix)
    return [own[name] if name in own else _attack(name, part, helpers) for name in part.attacks]


def _attack(name: str, part: JailbreakSpec, helpers: HelperModels) -> Attack:
    if name == "zulu":
        return Zulu(world.Cipher()) if part.translator is None else Zulu(_translator(part.translator, helpers))
    if name == "crescendo_led":
        if part.attacker is None:
            raise LeewayError("evals.jailbreak: crescendo_led needs an attacker model", fix="give attacker")
        return LedCrescendo(
            Attacker(helpers.of(part.attacker), max_new_tokens_of(part.attacker, Attacker.max_new_tokens)), part.turns
        )
    return load_attack(name)


def _translator(part: Translator, helpers: HelperModels) -> TranslationFile | LlmTranslator | Nllb:
    model: LlmTranslator | Nllb | None = None
    if part.from_ == "nllb":
        model = Nllb()
        if (own := part.model) is not None:
            model = Nllb(own.model, own.revision, max_new_tokens=max_new_tokens_of(own, Nllb.max_new_tokens))
    elif part.from_ == "model":
        assert part.model is not None
        model = LlmTranslator(helpers.of(part.model), max_new_tokens_of(part.model, LlmTranslator.max_new_tokens))
    if part.file is None:
        assert model is not None
        return model
    return TranslationFile(expand(part.file), model)


def _judge(part: JudgeSpec, spec: Spec, helpers: HelperModels, *, perplexity: bool = False) -> Judge:
    options: dict[str, Any] = {}
    if perplexity and part.name != "organism":
        options["perplexity"] = _PerplexityModel(spec.model, spec.revision, spec.weight_dtype, spec.device)
    if part.name == "finetuned":
        options |= {k: v for k, v in (("model", part.base), ("adapter", part.adapter)) if v}
        options["device"] = spec.device
    if part.model is None:
        return load_judge(part.name, **options)
    put = wording()
    options["wording"] = replace(put, max_new_tokens=max_new_tokens_of(part.model, put.max_new_tokens))
    return load_judge(part.name, helpers.of(part.model), model=part.model.model, **options)


def _benign(name: str, limit: int | None) -> tuple[list[BenignPrompt], str]:
    if name == "organism":
        return world.benign_items(limit or 100), ORGANISM
    items, origin = BENIGN[name]()
    return subset(items, limit, "overrefusal"), origin


def _statements(part: PersonaSpec, origins: dict[str, str]) -> list[PersonaItem]:
    chosen: list[PersonaItem] = []
    for trait in part.traits:
        if part.source == "organism":
            items, origin = world.persona_items(trait, part.limit or 40), ORGANISM
        else:
            items, origin = persona.anthropic(trait)
        origins[f"persona {trait}"] = origin
        chosen += items if part.source == "organism" else balanced(items, part.limit, trait)
    return chosen


def _other_persona_evals(part: PersonaSpec, origins: dict[str, str], helpers: HelperModels) -> list[Eval]:
    evals: list[Eval] = []
    if part.sd3:
        items, origins["persona-sd3"] = sd3()
        evals.append(Likert(items))
    if part.self_report is not None:
        evals.append(
            SelfReport(
                helpers.of(part.self_report),
                part.traits,
                grader_tokens=max_new_tokens_of(part.self_report, SelfReport.grader_tokens),
            )
        )
    return evals


def evals_of(spec: Spec, origins: dict[str, str], helpers: HelperModels | None = None) -> list[Eval]:
    """Return every eval that the study names with its items loaded; record their sources in `origins`.

    Without `helpers`, as in a plan, replies of helper models are not cached.
    """
    helpers = helpers or HelperModels(device=spec.device)
    evals = [_capability(part, spec, origins, helpers) for part in spec.evals.capability]
    plugins = [load_eval(p.name, p.settings) for p in spec.evals.plugins]
    return [*evals, *safety_evals(spec, origins, helpers), *plugins]


def _capability(part: CapabilitySpec, spec: Spec, origins: dict[str, str], helpers: HelperModels) -> Eval:
    if part.name.startswith("lm-eval:"):
        name = part.name.removeprefix("lm-eval:")
        origins[f"capability {part.name}"] = f"lm-eval's task {name}"
        return LmEval(name, part.limit, part.shots or None, include_path=part.include_path)
    task = load_task(part.name, task_settings(part, spec))
    items, origin = task.held_out_items()
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    origins[f"capability {part.name}"] = origin
    items, length = subset(items, part.limit, "capability"), part.max_new_tokens or task.max_new_tokens
    if part.judge_model is not None:
        judge = RubricJudge(
            helpers.of(part.judge_model), max_new_tokens=max_new_tokens_of(part.judge_model, RubricJudge.max_new_tokens)
        )
        return OpenEnded(part.name, items, judge, length)
    shots = task.few_shot(items) if isinstance(task, BuiltInTask) else ()
    return Capability(part.name, items, task.grader, task.grade, length, shots=shots)


def task_settings(part: CapabilitySpec, spec: Spec) -> TaskSettings:
    """Return the settings of an evaluated task: those of training where the study trains on it too."""
    trained = spec.task.name == part.name
    settings = spec.task.settings if trained else TaskSettings(trained=False)
    return replace(settings, source=part.source, limit=part.limit, shots=part.shots, extraction=part.extraction)


def held_out_test(examples: Seq[Example], spec: Spec) -> Capability:
    """Return the task's own test over training examples that are set aside."""
    task = spec.task.load()
    own = next((c.max_new_tokens for c in spec.evals.capability if c.name == task.name), None)
    items = [task.as_item(e) for e in examples]
    return Capability(task.name, items, task.grader, task.grade, own or task.max_new_tokens)
