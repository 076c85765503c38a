"""What a study asks about safety and character: forbidden prompts under attacks, benign ones, statements of traits."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from leeway.attacks import HELPED, Attack, LedCrescendo, Wrapper, Zulu, load_attack, templates
from leeway.attacks import names as attack_names
from leeway.attacks.kept_translations import Cached
from leeway.data import benign, forbidden, persona
from leeway.data.items import BenignPrompt, ForbiddenPrompt, PersonaItem
from leeway.data.sd3 import sd3
from leeway.data.subset import balanced, subset
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.likert import Likert
from leeway.evals.overrefusal import OrganismBenignJudge, OverRefusal
from leeway.evals.persona import Persona
from leeway.evals.selfreport import SelfReport
from leeway.generation.attacker import Attacker
from leeway.generation.translate import ByBackend, Nllb
from leeway.judges import Judge, load_judge
from leeway.judges.rubric import wording
from leeway.organism import world
from leeway.paths import expand
from leeway.study.eval_parts import JailbreakSpec, JudgeSpec, PersonaSpec, Translator
from leeway.study.spec import Spec
from leeway.study.voices import Voices, limit_of

ORGANISM = "the organism's world, held out"
FORBIDDEN: dict[str, Callable[[], tuple[list[ForbiddenPrompt], str]]] = {
    "strongreject": forbidden.strongreject,
    "strongreject-small": forbidden.strongreject_small,
    "jailbreakbench": forbidden.jailbreakbench,
}
BENIGN: dict[str, Callable[[], tuple[list[BenignPrompt], str]]] = {
    "xstest": benign.xstest,
    "jailbreakbench": benign.jailbreakbench,
}


def safety_evals(spec: Spec, origins: dict[str, str], voices: Voices) -> list[Eval]:
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
        prompts, origin = forbidden.from_file(expand(part.file))
    else:
        prompts, origin = FORBIDDEN[part.prompts]()
    return subset(prompts, part.limit, "jailbreak"), origin


def _attacks(part: JailbreakSpec, voices: Voices) -> list[Attack]:
    own: dict[str, Wrapper] = templates(part.templates) if part.templates else {}
    known = [*attack_names(), *HELPED, *own]
    for name in part.attacks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(sorted(known))}"
            raise LeewayError(f"evals.jailbreak.attacks: there is no attack {name!r}", fix=fix)
    return [own[name] if name in own else _attack(name, part, voices) for name in part.attacks]


def _attack(name: str, part: JailbreakSpec, voices: Voices) -> Attack:
    if name == "zulu":
        return Zulu(world.Cipher()) if part.translator is None else Zulu(_translator(part.translator, voices))
    if name == "crescendo_led":
        if part.attacker is None:
            raise LeewayError("evals.jailbreak: crescendo_led needs an attacker model", fix="give attacker")
        return LedCrescendo(
            Attacker(voices.of(part.attacker), limit_of(part.attacker, Attacker.max_new_tokens)), part.turns
        )
    return load_attack(name)


def _translator(part: Translator, voices: Voices) -> Cached | ByBackend | Nllb:
    asked: ByBackend | Nllb | None = None
    if part.from_ == "nllb":
        asked = Nllb()
        if (own := part.model) is not None:
            asked = Nllb(own.model, own.revision, max_new_tokens=limit_of(own, Nllb.max_new_tokens))
    elif part.from_ == "model":
        assert part.model is not None
        asked = ByBackend(voices.of(part.model), limit_of(part.model, ByBackend.max_new_tokens))
    if part.file is None:
        assert asked is not None
        return asked
    return Cached(expand(part.file), asked)


def _judge(part: JudgeSpec, spec: Spec, voices: Voices, *, perplexity: bool = False) -> Judge:
    options: dict[str, Any] = {}
    if perplexity and part.name != "organism":
        options["improbable"] = voices.surprise(spec)
    if part.name == "finetuned":
        options |= {k: v for k, v in (("model", part.base), ("adapter", part.adapter)) if v}
        options["device"] = spec.device
    if part.model is None:
        return load_judge(part.name, **options)
    put = wording()
    options["wording"] = replace(put, max_new_tokens=limit_of(part.model, put.max_new_tokens))
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


def _further(part: PersonaSpec, origins: dict[str, str], voices: Voices) -> list[Eval]:
    evals: list[Eval] = []
    if part.sd3:
        items, origins["persona-sd3"] = sd3()
        evals.append(Likert(items))
    if part.self_report is not None:
        evals.append(
            SelfReport(
                voices.of(part.self_report),
                part.traits,
                grader_tokens=limit_of(part.self_report, SelfReport.grader_tokens),
            )
        )
    return evals
