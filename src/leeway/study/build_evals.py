"""Build a study's evals from its settings: items, attacks, judges, and the helper models they query."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from leeway.attacks import NEEDS_HELPER, Attack, LedCrescendo, Wrapper, Zulu, attack_names, load_attack, load_templates
from leeway.cache import Cache
from leeway.data import free_form, persona, safety_prompts
from leeway.data.safety_prompts import balanced, subset
from leeway.data.types import BenignPrompt, Example, ForbiddenPrompt, FreeFormQuestion, PersonaItem
from leeway.errors import LeewayError
from leeway.evals.alignment import PUBLISHED, Alignment, ModelAlignmentJudge, OrganismAlignmentJudge
from leeway.evals.attack_helpers import Attacker, LlmTranslator, Nllb, TranslationFile
from leeway.evals.capability import Capability
from leeway.evals.eval import Eval, load_eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.lm_eval import LmEval
from leeway.evals.openended import OpenEnded, RubricJudge
from leeway.evals.overrefusal import OrganismBenignJudge, OverRefusal
from leeway.evals.persona import Persona
from leeway.evals.self_report import Likert, SelfReport
from leeway.evals.sycophancy import Sycophancy, general_items
from leeway.evals.tasks import BuiltInTask, TaskSettings, load_task
from leeway.generation.backend import Backend
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import ApiSettings, OpenAIBackend
from leeway.generation.transformers import LocalBackend
from leeway.hashing import digest
from leeway.io import expand
from leeway.judges import GUARDS, JUDGES, NEEDS_BACKEND, Judge, load_judge
from leeway.judges.coherence import PerplexityScorer
from leeway.judges.rubric import wording
from leeway.model.forward import Perplexity
from leeway.model.load import load_model, weights_hash
from leeway.organism import world
from leeway.study.eval_spec import (
    ENDPOINT_ONLY,
    AlignmentSpec,
    CapabilitySpec,
    JailbreakSpec,
    JudgeSpec,
    ModelRef,
    PersonaSpec,
    SycophancySpec,
    Translator,
)
from leeway.study.spec import Spec
from leeway.yaml_config import nearest


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


@dataclass
class _PerplexityModel:
    """The base model as a perplexity scorer (`PerplexityScorer`), loaded at first use."""

    spec: Spec

    @cached_property
    def identity(self) -> str:
        return digest("perplexity", weights_hash(self.spec.model, self.spec.revision), self.spec.weight_dtype)

    def shares(self, prompts: Seq[str], texts: Seq[str]) -> list[float]:
        return self._model.shares(prompts, texts)

    @cached_property
    def _model(self) -> Perplexity:
        s = self.spec
        return Perplexity(load_model(s.model, revision=s.revision, dtype=s.weight_dtype, device=s.device))


ORGANISM = "the organism's world, held out"
BENIGN = {"xstest": safety_prompts.xstest, "jailbreakbench": safety_prompts.jailbreakbench_benign}


def _safety_evals(spec: Spec, origins: dict[str, str], helpers: HelperModels) -> list[Eval]:
    """Return the jailbreak, over-refusal and persona evals that the study names."""
    evals: list[Eval] = []
    if (jailbreak := spec.evals.jailbreak) is not None:
        prompts, origins["jailbreak"] = forbidden_prompts(jailbreak)
        scorer = _PerplexityModel(spec) if jailbreak.perplexity else None
        judges = [build_judge(j, helpers, scorer) for j in jailbreak.judge]
        sampling = (jailbreak.max_new_tokens, jailbreak.samples, jailbreak.temperature)
        evals.append(Jailbreak(prompts, _attacks(jailbreak, helpers), judges, *sampling))
    if (benign_part := spec.evals.overrefusal) is not None:
        items, origins["overrefusal"] = _benign(benign_part.prompts, benign_part.limit)
        judge = build_benign_judge(benign_part.judge, helpers)
        evals.append(OverRefusal(items, judge, benign_part.max_new_tokens))
    if spec.evals.persona is not None:
        evals += _persona_evals(spec.evals.persona, origins, helpers)
    return evals


def forbidden_prompts(part: JailbreakSpec) -> tuple[list[ForbiddenPrompt], str]:
    """Return the prompts that the study names, and where they come from."""
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
    if unknown := next((name for name in part.attacks if name not in known), None):
        fix = nearest(unknown, known).removeprefix("; ") or f"one of: {', '.join(sorted(known))}"
        raise LeewayError(f"evals.jailbreak.attacks: no attack {unknown!r}", fix=fix)
    return [own[name] if name in own else _attack(name, part, helpers) for name in part.attacks]


def _attack(name: str, part: JailbreakSpec, helpers: HelperModels) -> Attack:
    if name == "zulu":
        return Zulu(world.Cipher()) if part.translator is None else Zulu(_translator(part.translator, helpers))
    if name == "crescendo_led":
        assert part.attacker is not None
        limit = part.attacker.max_new_tokens or Attacker.max_new_tokens
        return LedCrescendo(Attacker(helpers.of(part.attacker), limit), part.turns)
    return load_attack(name)


def _translator(part: Translator, helpers: HelperModels) -> TranslationFile | LlmTranslator | Nllb:
    model: LlmTranslator | Nllb | None = None
    if part.from_ == "nllb":
        model = Nllb()
        if (own := part.model) is not None:
            model = Nllb(own.model, own.revision, max_new_tokens=own.max_new_tokens or Nllb.max_new_tokens)
    elif part.from_ == "model":
        assert part.model is not None
        limit = part.model.max_new_tokens or LlmTranslator.max_new_tokens
        model = LlmTranslator(helpers.of(part.model), limit)
    if part.file is None:
        assert model is not None
        return model
    return TranslationFile(expand(part.file), model)


def build_judge(part: JudgeSpec, helpers: HelperModels, perplexity: PerplexityScorer | None = None) -> Judge:
    """Return the judge of answers to forbidden prompts that `part` names."""
    options: dict[str, Any] = {}
    if perplexity is not None and part.name != "organism":
        options["perplexity"] = perplexity
    if part.name == "finetuned":
        options |= {k: v for k, v in (("model", part.base), ("adapter", part.adapter)) if v}
        options["device"] = helpers.device
    if part.name in GUARDS:
        options |= {"model": part.model.model, "revision": part.model.revision} if part.model else {}
        return load_judge(part.name, device=helpers.device, **options)
    if part.model is None:
        return load_judge(part.name, **options)
    rubric = wording()
    options["wording"] = replace(rubric, max_new_tokens=part.model.max_new_tokens or rubric.max_new_tokens)
    return load_judge(part.name, helpers.of(part.model), model=part.model.model, **options)


def judge_from_options(
    name: str, model: str | None, endpoint: str | None, key_env: str, helpers: HelperModels
) -> Judge:
    """Return a judge by name, with `model` (a folder, hub id or API name) if it uses one. Raises LeewayError."""
    if endpoint and not model:
        raise LeewayError(f"judge {name}: an endpoint without a model", fix="give --model, the name it serves")
    if name in NEEDS_BACKEND and not model:
        raise LeewayError(f"judge {name}: no model given", fix="give --model")
    if name in JUDGES and name not in (*NEEDS_BACKEND, *GUARDS) and model:
        raise LeewayError(f"judge {name}: it uses no model", fix="leave --model out")
    if name in GUARDS and endpoint:
        raise LeewayError(f"judge {name}: a guard model runs on this machine", fix="leave --endpoint out")
    if not endpoint and key_env != ModelRef.model_fields["key_env"].default:
        raise LeewayError(f"judge {name}: --key-env needs --endpoint", fix="give --endpoint, or leave --key-env out")
    backend = None
    if model and name not in GUARDS:
        backend = helpers.of(ModelRef(model=model, endpoint=endpoint, key_env=key_env))
    return load_judge(name, backend, **({"model": model} if model else {}))


def build_benign_judge(part: JudgeSpec, helpers: HelperModels) -> Judge:
    """Return the judge of answers to benign prompts that `part` names."""
    return OrganismBenignJudge() if part.name == "organism" else build_judge(part, helpers)


def _benign(name: str, limit: int | None) -> tuple[list[BenignPrompt], str]:
    if name == "organism":
        return world.benign_items(limit or 100), ORGANISM
    items, origin = BENIGN[name]()
    return subset(items, limit, "overrefusal"), origin


def _persona_evals(part: PersonaSpec, origins: dict[str, str], helpers: HelperModels) -> list[Eval]:
    chosen: list[PersonaItem] = []
    for trait in part.traits:
        if part.source == "organism":
            items, origins[f"persona {trait}"] = world.persona_items(trait, part.limit or 40), ORGANISM
            chosen += items
        else:
            items, origins[f"persona {trait}"] = persona.anthropic(trait)
            chosen += balanced(items, part.limit, trait)
    evals: list[Eval] = [Persona(chosen, part.order_swap, part.paraphrases)]
    if part.sd3:
        likert_items, origins["persona-sd3"] = persona.sd3()
        evals.append(Likert(likert_items))
    if (grader := part.self_report) is not None:
        limit = grader.max_new_tokens or SelfReport.grader_tokens
        evals.append(SelfReport(helpers.of(grader), part.traits, grader_tokens=limit))
    return evals


def build_alignment(part: AlignmentSpec, origins: dict[str, str], helpers: HelperModels) -> Alignment:
    """Return the free-form questions with the judge that rates their answers; record their sources in `origins`."""
    items: list[FreeFormQuestion] = []
    for source in part.questions:
        if source == "organism":
            found, origin = world.free_form_questions(part.limit or 100), ORGANISM
        else:
            found, origin = free_form.questions(source)
        items += subset(found, part.limit, f"alignment {source}")
        origins[f"alignment {source}"] = origin
    sampling = (part.max_new_tokens, part.samples, part.temperature)
    if part.judge_model is None:
        return Alignment(items, OrganismAlignmentJudge(), *sampling)
    published = part.judge_prompts == "published"
    if published and (bare := next((i for i in items if not set(PUBLISHED["alignment"]) & set(i.judge_prompts)), None)):
        what = f"evals.alignment: {bare.id} has no judge prompt of its own"
        raise LeewayError(what, fix="use judge_prompts: own, or a set with judge_prompts (aligned or correct)")
    if not published:  # unused, so no part of the eval's hash
        items = [replace(i, judge_prompts={}) for i in items]
    judge = ModelAlignmentJudge(helpers.of(part.judge_model), part.judge_model.model, published)
    if part.judge_model.max_new_tokens:
        judge = replace(judge, max_new_tokens=part.judge_model.max_new_tokens)
    return Alignment(items, judge, *sampling)


def _sycophancy(part: SycophancySpec, origins: dict[str, str]) -> Sycophancy:
    if part.items == "organism":
        origins["sycophancy"] = ORGANISM
        return Sycophancy(world.opinion_items(part.limit or 100), part.max_new_tokens, "sums")
    origins["sycophancy"] = "questions of Leeway's own"
    return Sycophancy(subset(general_items(), part.limit, "sycophancy"), part.max_new_tokens)


def evals_of(spec: Spec, origins: dict[str, str], helpers: HelperModels | None = None) -> list[Eval]:
    """Return every eval that the study names with its items loaded; record their sources in `origins`.

    Without `helpers`, as in a plan, replies of helper models are not cached.
    """
    helpers = helpers or HelperModels(device=spec.device)
    evals = [_capability(part, spec, origins, helpers) for part in spec.evals.capability]
    evals += _safety_evals(spec, origins, helpers)
    if spec.evals.alignment is not None:
        evals.append(build_alignment(spec.evals.alignment, origins, helpers))
    if spec.evals.sycophancy is not None:
        evals.append(_sycophancy(spec.evals.sycophancy, origins))
    return evals + [load_eval(p.name, p.settings) for p in spec.evals.plugins]


def _capability(part: CapabilitySpec, spec: Spec, origins: dict[str, str], helpers: HelperModels) -> Eval:
    if part.name.startswith("lm-eval:"):
        name = part.name.removeprefix("lm-eval:")
        origins[f"capability {part.name}"] = f"lm-eval's task {name}"
        return LmEval(name, part.limit, part.shots or None, include_path=part.include_path)
    # a task that the study trains on too is read by the settings of training
    settings = spec.task.settings if spec.task.name == part.name else TaskSettings(trained=False)
    settings = replace(settings, source=part.source, limit=part.limit, shots=part.shots, extraction=part.extraction)
    task = load_task(part.name, settings)
    items, origin = task.held_out_items()
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    origins[f"capability {part.name}"] = origin
    items, length = subset(items, part.limit, "capability"), part.max_new_tokens or task.max_new_tokens
    if part.judge_model is not None:
        limit = part.judge_model.max_new_tokens or RubricJudge.max_new_tokens
        judge = RubricJudge(helpers.of(part.judge_model), max_new_tokens=limit)
        return OpenEnded(part.name, items, judge, length)
    shots = task.few_shot(items) if isinstance(task, BuiltInTask) else ()
    return Capability(part.name, items, task.grader, task.grade, length, shots=shots)


def held_out_test(examples: Seq[Example], spec: Spec) -> Capability:
    """Return the task's own test over training examples that are set aside."""
    task = spec.task.load()
    own = next((c.max_new_tokens for c in spec.evals.capability if c.name == task.name), None)
    items = [task.as_item(e) for e in examples]
    return Capability(task.name, items, task.grader, task.grade, own or task.max_new_tokens)
