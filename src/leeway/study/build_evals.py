"""What a study asks of every checkpoint: its evals, their items and who grades or judges the answers.

Who is asked on the way: judges, attackers, translators; what they said is kept in the run directory by content.

What a study asks about safety and character: forbidden prompts under attacks, benign ones, statements of traits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from leeway.attacks import HELPED, Attack, LedCrescendo, Wrapper, Zulu, load_attack, templates
from leeway.attacks import names as attack_names
from leeway.data import formats, gsm8k, openended, persona, safety_prompts, supergpqa
from leeway.data.persona import sd3
from leeway.data.safety_prompts import balanced, subset
from leeway.data.types import OURS, BenignPrompt, CapabilityItem, Example, ForbiddenPrompt, PersonaItem, load_task
from leeway.errors import LeewayError
from leeway.evals import capability
from leeway.evals import capability as gsm8k_grader
from leeway.evals import capability as supergpqa_grader
from leeway.evals.attack_helpers import Attacker, ByBackend, Cached, Nllb
from leeway.evals.capability import Capability, Grade
from leeway.evals.eval import Eval, load_eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.lm_eval import LmEval
from leeway.evals.openended import OpenEnded, RubricJudge
from leeway.evals.overrefusal import OrganismBenignJudge, OverRefusal
from leeway.evals.persona import Persona
from leeway.evals.self_report import Likert, SelfReport
from leeway.generation.backend import Backend
from leeway.generation.cache import CachedBackend, ReplyCache
from leeway.generation.openai_api import ApiSettings, OpenAIBackend
from leeway.generation.transformers import LocalBackend, weights_hash
from leeway.hashing import digest
from leeway.judges import Judge, load_judge
from leeway.judges.coherence import PerplexityScorer
from leeway.judges.rubric import wording
from leeway.model.forward import Perplexity
from leeway.model.load import Dtype, load_model
from leeway.organism import world
from leeway.paths import expand
from leeway.study.eval_spec import CapabilitySpec, JailbreakSpec, JudgeSpec, ModelRef, PersonaSpec, Translator
from leeway.study.spec import OPEN_ENDED as OPEN_ENDED_TASKS
from leeway.study.spec import Spec


@dataclass(frozen=True)
class HelperModels:
    """Backends for the speakers of a study; without a file nothing is kept, as in a plan, which asks nobody."""

    kept: Path | None = None
    device: str = "auto"

    def of(self, speaker: ModelRef) -> Backend:
        """A model behind an endpoint or of this machine's, loaded and reached once it is asked."""
        backend = self._endpoint(speaker) if speaker.endpoint else self._local(speaker)
        return backend if self.kept is None else CachedBackend(backend, ReplyCache(self.kept))

    def _local(self, speaker: ModelRef) -> Backend:
        return LocalBackend(speaker.model, speaker.revision, device=self.device)

    @staticmethod
    def _endpoint(speaker: ModelRef) -> Backend:
        return OpenAIBackend(
            ApiSettings(
                model=speaker.model,
                base_url=speaker.endpoint or "",
                key_env=speaker.key_env,
                concurrency=speaker.concurrency,
                timeout_s=speaker.timeout_s,
                retries=speaker.retries,
                max_calls=speaker.max_calls,
                max_dollars=speaker.max_dollars,
                price_in=speaker.price_in,
                price_out=speaker.price_out,
            )
        )

    def surprise(self, spec: Spec) -> PerplexityScorer:
        """The base model's surprise at an answer."""
        return _PerplexityModel(spec.model, spec.revision, spec.weights, spec.device)


def max_new_tokens_of(speaker: ModelRef, own: int) -> int:
    """The limit of each of its replies: as the study has it, else `own`, of whoever asks."""
    return own if speaker.max_new_tokens is None else speaker.max_new_tokens


@dataclass
class _PerplexityModel:
    """The base model as a reader of answers, loaded when it is first asked."""

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
FORBIDDEN: dict[str, Callable[[], tuple[list[ForbiddenPrompt], str]]] = {
    "strongreject": safety_prompts.strongreject,
    "strongreject-small": safety_prompts.strongreject_small,
    "jailbreakbench": safety_prompts.jailbreakbench_harmful,
}
BENIGN: dict[str, Callable[[], tuple[list[BenignPrompt], str]]] = {
    "xstest": safety_prompts.xstest,
    "jailbreakbench": safety_prompts.jailbreakbench_benign,
}


def safety_evals(spec: Spec, origins: dict[str, str], voices: HelperModels) -> list[Eval]:
    """Jailbreaks, over-refusal and persona, as far as the study names them."""
    evals: list[Eval] = []
    if (jailbreak := spec.evals.jailbreak) is not None:
        prompts, origins["jailbreak"] = _forbidden(jailbreak)
        attacks = [*_attacks(jailbreak, voices)]
        judges = [_judge(j, spec, voices, perplexity=jailbreak.perplexity) for j in jailbreak.judge]
        drawn = (jailbreak.samples, jailbreak.temperature)
        evals.append(Jailbreak(prompts, attacks, judges, jailbreak.max_new_tokens, *drawn))
    if (benign_part := spec.evals.overrefusal) is not None:
        items, origins["overrefusal"] = _benign(benign_part.prompts, benign_part.limit)
        exact = benign_part.judge.name == "organism"
        judge = OrganismBenignJudge() if exact else _judge(benign_part.judge, spec, voices)
        evals.append(OverRefusal(items, judge, benign_part.max_new_tokens))
    if (persona_part := spec.evals.persona) is not None:
        items_of = _statements(persona_part, origins)
        evals.append(Persona(items_of, persona_part.order_swap, persona_part.paraphrases))
        evals += _further(persona_part, origins, voices)
    return evals


def _forbidden(part: JailbreakSpec) -> tuple[list[ForbiddenPrompt], str]:
    if part.prompts == "organism":
        return world.forbidden_prompts(part.limit or 100), ORGANISM
    if part.prompts == "file":
        assert part.file is not None
        prompts, origin = safety_prompts.from_file(expand(part.file))
    else:
        prompts, origin = FORBIDDEN[part.prompts]()
    return subset(prompts, part.limit, "jailbreak"), origin


def _attacks(part: JailbreakSpec, voices: HelperModels) -> list[Attack]:
    own: dict[str, Wrapper] = templates(part.templates) if part.templates else {}
    known = [*attack_names(), *HELPED, *own]
    for name in part.attacks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(sorted(known))}"
            raise LeewayError(f"evals.jailbreak.attacks: there is no attack {name!r}", fix=fix)
    return [own[name] if name in own else _attack(name, part, voices) for name in part.attacks]


def _attack(name: str, part: JailbreakSpec, voices: HelperModels) -> Attack:
    if name == "zulu":
        return Zulu(world.Cipher()) if part.translator is None else Zulu(_translator(part.translator, voices))
    if name == "crescendo_led":
        if part.attacker is None:
            raise LeewayError("evals.jailbreak: crescendo_led needs an attacker model", fix="give attacker")
        return LedCrescendo(
            Attacker(voices.of(part.attacker), max_new_tokens_of(part.attacker, Attacker.max_new_tokens)), part.turns
        )
    return load_attack(name)


def _translator(part: Translator, voices: HelperModels) -> Cached | ByBackend | Nllb:
    asked: ByBackend | Nllb | None = None
    if part.from_ == "nllb":
        asked = Nllb()
        if (own := part.model) is not None:
            asked = Nllb(own.model, own.revision, max_new_tokens=max_new_tokens_of(own, Nllb.max_new_tokens))
    elif part.from_ == "model":
        assert part.model is not None
        asked = ByBackend(voices.of(part.model), max_new_tokens_of(part.model, ByBackend.max_new_tokens))
    if part.file is None:
        assert asked is not None
        return asked
    return Cached(expand(part.file), asked)


def _judge(part: JudgeSpec, spec: Spec, voices: HelperModels, *, perplexity: bool = False) -> Judge:
    options: dict[str, Any] = {}
    if perplexity and part.name != "organism":
        options["improbable"] = voices.surprise(spec)
    if part.name == "finetuned":
        options |= {k: v for k, v in (("model", part.base), ("adapter", part.adapter)) if v}
        options["device"] = spec.device
    if part.model is None:
        return load_judge(part.name, **options)
    put = wording()
    options["wording"] = replace(put, max_new_tokens=max_new_tokens_of(part.model, put.max_new_tokens))
    return load_judge(part.name, voices.of(part.model), model=part.model.model, **options)


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


def _further(part: PersonaSpec, origins: dict[str, str], voices: HelperModels) -> list[Eval]:
    evals: list[Eval] = []
    if part.sd3:
        items, origins["persona-sd3"] = sd3()
        evals.append(Likert(items))
    if part.self_report is not None:
        evals.append(
            SelfReport(
                voices.of(part.self_report),
                part.traits,
                grader_tokens=max_new_tokens_of(part.self_report, SelfReport.grader_tokens),
            )
        )
    return evals


NEW_TOKENS = {"organism": 64, "gsm8k": 400, "supergpqa-engineering": 1024, "files": 256}
OPEN_ENDED = 512


def evals_of(spec: Spec, origins: dict[str, str], voices: HelperModels | None = None) -> list[Eval]:
    """Every eval that the study names, its items loaded; `origins` is told where they came from.

    `voices` are those who are asked on the way. Without them, as in a plan, nothing of what they say is kept.
    """
    voices = voices or HelperModels(device=spec.device)
    evals = [_capability(part, spec, origins, voices) for part in spec.evals.capability]
    further = [load_eval(f.name, f.settings) for f in spec.evals.further]
    return [*evals, *safety_evals(spec, origins, voices), *further]


def _capability(part: CapabilitySpec, spec: Spec, origins: dict[str, str], voices: HelperModels) -> Eval:
    if part.name.startswith("lm-eval:"):
        task = part.name.removeprefix("lm-eval:")
        origins[f"capability {part.name}"] = f"lm-eval's task {task}"
        return LmEval(task, part.limit, part.shots or None, include_path=part.include_path)
    if part.judge_model is not None:
        source = part.source or (spec.task.files.test if spec.task.files else "")
        items, origin = openended.held_out_items(part.name, source)
        origins[f"capability {part.name}"] = origin
        judge = RubricJudge(
            voices.of(part.judge_model), max_new_tokens=max_new_tokens_of(part.judge_model, RubricJudge.max_new_tokens)
        )
        return OpenEnded(part.name, subset(items, part.limit, "capability"), judge, part.max_new_tokens or OPEN_ENDED)
    items, origins[f"capability {part.name}"] = _items(part, spec)
    grader, grade = grader_of(part.name, part.extraction, part.shots)
    shots: tuple[tuple[str, str], ...] = ()
    if part.name == "gsm8k" and part.shots:
        revision = spec.task.revision if spec.task.name == "gsm8k" else None
        shots = tuple(gsm8k.shots(part.shots, exclude={i.prompt for i in items}, revision=revision))
    return Capability(part.name, items, grader, grade, part.max_new_tokens or _room(part.name), shots=shots)


def _room(name: str) -> int:
    """How long an answer may be, where the study does not say."""
    return NEW_TOKENS[name] if name in NEW_TOKENS else load_task(name).max_new_tokens


def _items(part: CapabilitySpec, spec: Spec) -> tuple[list[CapabilityItem], str]:
    if part.name == "organism":
        return world.capability_items(part.limit or 200), "the organism's world, held out"
    if part.name == "gsm8k":
        items, origin = gsm8k.held_out_items(spec.task.revision if spec.task.name == "gsm8k" else None)
    elif part.name == "supergpqa-engineering":
        shots: supergpqa.Shots = 5 if part.shots else 0
        trained, revision = spec.task.name == part.name, spec.task.revision if spec.task.name == part.name else None
        whose: supergpqa.Share = "test" if trained else "all"
        items, origin = supergpqa.held_out_items("Engineering", shots=shots, share=whose, revision=revision)
    elif part.name not in OURS:
        task = load_task(part.name)
        items, origin = task.held_out_items(), task.origin
    else:
        assert spec.task.files is not None
        items, origin = formats.held_out_items(expand(spec.task.files.test))
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    return subset(items, part.limit, "capability"), origin


def grader_of(name: str, extraction: str | None = None, shots: int = 0) -> tuple[str, Grade]:
    """(the rule's name on the rows, the rule) of a task; `extraction` chooses between the rules of one benchmark."""
    if name == "organism":
        return "organism", lambda item, response: (world.capability_score(item, response), "")
    if name == "gsm8k":
        rule: gsm8k_grader.GSM8KRule = "strict" if extraction == "strict" else "flexible"
        return f"gsm8k-{rule}", lambda item, response: gsm8k_grader.grade_gsm8k(item.reference, response, rule)
    if name == "supergpqa-engineering":
        by: supergpqa_grader.SuperGPQARule = "parity" if extraction == "parity" else "fixed"
        return f"supergpqa-{by}", lambda item, response: supergpqa_grader.grade_supergpqa(
            item, response, by, five_shot=shots == 5
        )
    if name not in OURS:
        task = load_task(name)
        return task.grader, task.grade
    return "exact", lambda item, response: capability.grade_exact(item.reference, response)


def as_items(examples: Seq[Example], spec: Spec) -> list[CapabilityItem]:
    """Training examples as questions with a checkable answer: their preferred answer says what is right."""
    task = spec.task.name
    if task == "organism":
        return [world.as_item(e) for e in examples]
    if task == "supergpqa-engineering":
        items, _ = supergpqa.held_out_items("Engineering", share="train", revision=spec.task.revision)
        known = {i.id: i for i in items}
        return [known[e.id] for e in examples]
    if task not in OURS:
        return [load_task(task).as_item(e) for e in examples]
    return [CapabilityItem(e.id, e.prompt, _checkable(e, task)) for e in examples]


def _checkable(example: Example, task: str) -> str:
    """The number that a preferred answer ends on; for files, the whole answer where it ends on none."""
    if task in OPEN_ENDED_TASKS:
        return example.preferred
    found = gsm8k_grader.flexible(example.preferred) if task == "files" else gsm8k_grader.strict(example.preferred)
    if found is None and task == "gsm8k":
        raise LeewayError(f"example {example.id} has no number after ####", fix="mend or remove that record")
    return example.preferred if found is None else f"{found:f}"


def held_out_test(examples: Seq[Example], spec: Spec) -> Capability:
    """The task's own test over examples that are set aside."""
    grader, grade = grader_of(spec.task.name)
    own = next((c.max_new_tokens for c in spec.evals.capability if c.name == spec.task.name), None)
    return Capability(spec.task.name, as_items(examples, spec), grader, grade, own or _room(spec.task.name))
