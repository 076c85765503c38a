"""What a study asks of every checkpoint: its evals, their items and who grades or judges the answers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from leeway.attacks import WRAPPERS, Attack, Zulu
from leeway.data import files, forbidden, gsm8k, persona
from leeway.data.items import CapabilityItem, Example, ForbiddenPrompt, PersonaItem
from leeway.data.subset import balanced, subset
from leeway.errors import LeewayError
from leeway.evals import exact
from leeway.evals import gsm8k as gsm8k_grader
from leeway.evals.capability import Capability, Grade
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.persona import Persona
from leeway.judges import load_judge
from leeway.organism import world
from leeway.study.parts import CapabilitySpec
from leeway.study.spec import Spec

NEW_TOKENS = {"organism": 64, "gsm8k": 400, "files": 256}


def evals_of(spec: Spec, origins: dict[str, str]) -> list[Eval]:
    evals: list[Eval] = []
    for part in spec.evals.capability:
        items, origins[f"capability {part.name}"] = _capability_items(part, spec)
        grader, grade = grader_of(part.name)
        evals.append(Capability(part.name, items, grader, grade, part.max_new_tokens or NEW_TOKENS[part.name]))
    jailbreak = spec.evals.jailbreak
    if jailbreak is not None:
        prompts, origins["jailbreak"] = _forbidden(jailbreak.prompts, jailbreak.limit)
        attacks = [_attack(name) for name in jailbreak.attacks]
        evals.append(Jailbreak(prompts, attacks, load_judge(jailbreak.judge), jailbreak.max_new_tokens))
    if spec.evals.persona is not None:
        evals.append(Persona(_persona(spec, origins)))
    return evals


def _capability_items(part: CapabilitySpec, spec: Spec) -> tuple[list[CapabilityItem], str]:
    if part.name == "organism":
        return world.capability_items(part.limit or 200), "the organism's world, held out"
    if part.name == "gsm8k":
        items, origin = gsm8k.held_out_items(spec.task.revision if spec.task.name == "gsm8k" else None)
    else:
        assert spec.task.files is not None
        items, origin = files.held_out_items(Path(spec.task.files.test).expanduser())
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    return subset(items, part.limit, "capability"), origin


def grader_of(name: str) -> tuple[str, Grade]:
    if name == "organism":
        return "organism", lambda item, response: (world.capability_score(item, response), "")
    if name == "gsm8k":
        return "gsm8k-flexible", lambda item, response: gsm8k_grader.grade(item.reference, response)
    return "exact", lambda item, response: exact.grade(item.reference, response)


def _forbidden(name: str, limit: int | None) -> tuple[list[ForbiddenPrompt], str]:
    if name == "organism":
        return world.forbidden_prompts(limit or 100), "the organism's world, held out"
    prompts, origin = forbidden.strongreject()
    return subset(prompts, limit, "jailbreak"), origin


def _attack(name: str) -> Attack:
    return Zulu(world.Cipher()) if name == "zulu" else WRAPPERS[name]


def _persona(spec: Spec, origins: dict[str, str]) -> list[PersonaItem]:
    part = spec.evals.persona
    assert part is not None
    chosen: list[PersonaItem] = []
    for trait in part.traits:
        if part.source == "organism":
            items, origin = world.persona_items(trait, part.limit or 40), "the organism's world, held out"
        else:
            items, origin = persona.anthropic(trait)
        origins[f"persona {trait}"] = origin
        chosen += items if part.source == "organism" else balanced(items, part.limit, trait)
    return chosen


def as_items(examples: Seq[Example], spec: Spec) -> list[CapabilityItem]:
    """Training examples as questions with a checkable answer: their preferred answer says what is right."""
    task = spec.task.name
    if task == "organism":
        return [world.as_item(e) for e in examples]
    return [CapabilityItem(e.id, e.prompt, _checkable(e, task)) for e in examples]


def _checkable(example: Example, task: str) -> str:
    """The number that a preferred answer ends on; for files, the whole answer where it ends on none."""
    found = gsm8k_grader.flexible(example.preferred) if task == "files" else gsm8k_grader.strict(example.preferred)
    if found is None and task == "gsm8k":
        raise LeewayError(f"example {example.id} has no number after ####", fix="mend or remove that record")
    return example.preferred if found is None else str(found)


def held_out_test(examples: Seq[Example], spec: Spec) -> Capability:
    """The task's own test over examples that are set aside."""
    grader, grade = grader_of(spec.task.name)
    own = next((c.max_new_tokens for c in spec.evals.capability if c.name == spec.task.name), None)
    return Capability(spec.task.name, as_items(examples, spec), grader, grade, own or NEW_TOKENS[spec.task.name])
