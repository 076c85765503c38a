"""What a study asks of every checkpoint: its evals, their items and who grades or judges the answers."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from leeway.data import files, gsm8k, openended, supergpqa
from leeway.data.items import CapabilityItem, Example
from leeway.data.subset import subset
from leeway.data.task import OURS, load_task
from leeway.errors import LeewayError
from leeway.evals import exact
from leeway.evals import gsm8k as gsm8k_grader
from leeway.evals import supergpqa as supergpqa_grader
from leeway.evals.capability import Capability, Grade
from leeway.evals.eval import Eval
from leeway.evals.further import load_eval
from leeway.evals.lm_eval import LmEval
from leeway.evals.openended import OpenEnded, RubricJudge
from leeway.organism import world
from leeway.paths import expand
from leeway.study.asked_safety import safety_evals
from leeway.study.eval_parts import CapabilitySpec
from leeway.study.parts import OPEN_ENDED as OPEN_ENDED_TASKS
from leeway.study.spec import Spec
from leeway.study.voices import Voices, limit_of

NEW_TOKENS = {"organism": 64, "gsm8k": 400, "supergpqa-engineering": 1024, "files": 256}
OPEN_ENDED = 512


def evals_of(spec: Spec, origins: dict[str, str], voices: Voices | None = None) -> list[Eval]:
    """Every eval that the study names, its items loaded; `origins` is told where they came from.

    `voices` are those who are asked on the way. Without them, as in a plan, nothing of what they say is kept.
    """
    voices = voices or Voices(device=spec.device)
    evals = [_capability(part, spec, origins, voices) for part in spec.evals.capability]
    further = [load_eval(f.name, f.settings) for f in spec.evals.further]
    return [*evals, *safety_evals(spec, origins, voices), *further]


def _capability(part: CapabilitySpec, spec: Spec, origins: dict[str, str], voices: Voices) -> Eval:
    if part.name.startswith("lm-eval:"):
        task = part.name.removeprefix("lm-eval:")
        origins[f"capability {part.name}"] = f"lm-eval's task {task}"
        return LmEval(task, part.limit, part.shots or None, include_path=part.include_path)
    if part.judge_model is not None:
        source = part.source or (spec.task.files.test if spec.task.files else "")
        items, origin = openended.held_out_items(part.name, source)
        origins[f"capability {part.name}"] = origin
        judge = RubricJudge(
            voices.of(part.judge_model), max_new_tokens=limit_of(part.judge_model, RubricJudge.max_new_tokens)
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
        items, origin = files.held_out_items(expand(spec.task.files.test))
    if not items:
        raise LeewayError(f"evals.capability: {part.name} has no items ({origin})", fix="check the test file")
    return subset(items, part.limit, "capability"), origin


def grader_of(name: str, extraction: str | None = None, shots: int = 0) -> tuple[str, Grade]:
    """(the rule's name on the rows, the rule) of a task; `extraction` chooses between the rules of one benchmark."""
    if name == "organism":
        return "organism", lambda item, response: (world.capability_score(item, response), "")
    if name == "gsm8k":
        rule: gsm8k_grader.Rule = "strict" if extraction == "strict" else "flexible"
        return f"gsm8k-{rule}", lambda item, response: gsm8k_grader.grade(item.reference, response, rule)
    if name == "supergpqa-engineering":
        by: supergpqa_grader.Rule = "parity" if extraction == "parity" else "fixed"
        return f"supergpqa-{by}", lambda item, response: supergpqa_grader.grade(
            item, response, by, five_shot=shots == 5
        )
    if name not in OURS:
        task = load_task(name)
        return task.grader, task.grade
    return "exact", lambda item, response: exact.grade(item.reference, response)


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
