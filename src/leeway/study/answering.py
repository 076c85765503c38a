"""What an eval asks of a checkpoint and of its judges, in tokens: prompts counted, answers assumed."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from leeway.data.chat import Chat
from leeway.data.items import CapabilityItem
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.openended import OpenEnded
from leeway.evals.overrefusal import OverRefusal
from leeway.evals.persona import Persona
from leeway.evals.selfreport import SelfReport, rubric
from leeway.judges import Answer
from leeway.judges.rubric import RubricJudge
from leeway.study.costs import EvalCost
from leeway.study.prepare import Prepared, questions
from leeway.study.spec import Spec

MEAN_ANSWER = 0.5  # of max_new_tokens, of a checkpoint's answer and of a judge's: assumed


def eval_costs(prepared: Prepared) -> tuple[tuple[EvalCost, ...], tuple[str, ...]]:
    """(each eval at one checkpoint, what is left out of the count)."""
    found = tuple(_cost(e, prepared) for e in prepared.evals)
    return found, tuple(_left_out(prepared.spec))


def pair_cost(prepared: Prepared) -> EvalCost | None:
    """What drawing the pairs takes at most; none where they are given or have been drawn."""
    if prepared.pairs is not None:
        return None
    asked = prepared.spec.pairs
    each = sum(_length(e.prompt, prepared.chat) for e in prepared.companions.task)
    answers = prepared.examples * asked.samples
    drawn = answers * MEAN_ANSWER * asked.max_new_tokens
    return EvalCost("pairs", answers, each * asked.samples, asked.max_new_tokens, drawn)


def longest(prepared: Prepared) -> int:
    """Tokens of the longest prompt that an eval asks, with its answer at its limit."""
    rooms = [
        _length(text, prepared.chat) + int(getattr(e, "max_new_tokens", 0))
        for e in prepared.evals
        for _, text in questions(e)
    ]
    return max(rooms, default=0)


def _length(text: str, chat: Chat) -> int:
    return len(chat.prompt_ids([{"role": "user", "content": text}]))


def _cost(e: Eval, prepared: Prepared) -> EvalCost:
    chat, limit = prepared.chat, int(getattr(e, "max_new_tokens", 0))
    asked = list(questions(e))
    counted = sum(_length(text, chat) for _, text in asked)
    if isinstance(e, Jailbreak):
        counted = _under_attacks(e, chat)
    elif isinstance(e, Persona):
        counted = sum(_length(form.ask(i), chat) for form in e.forms for i in e.items)
    elif isinstance(e, OverRefusal):
        counted *= e.samples
    cost = EvalCost(e.key, len(e), counted, limit, len(e) * MEAN_ANSWER * limit)
    return _judged(e, cost, chat)


def _under_attacks(e: Jailbreak, chat: Chat) -> int:
    """A wrapper's text as it is; of other attacks the bare prompt, once."""
    plain = sum(_length(p.text, chat) for p in e.prompts)
    wrapped = [(p, a) for a in e.attacks if hasattr(a, "wrap") for p in e.prompts]
    others = sum(not hasattr(a, "wrap") for a in e.attacks)
    return (sum(_length(a.wrap(p.text), chat) for p, a in wrapped) + others * plain) * max(1, e.samples)


def _judged(e: Eval, cost: EvalCost, chat: Chat) -> EvalCost:
    """With the calls of whoever is asked to judge: what is sent around an answer, and the answer."""
    told: list[tuple[str, int, int, int, int]] = []  # judge, calls, tokens around the answers, limit of a reply
    each = int(MEAN_ANSWER * cost.max_new_tokens)
    if isinstance(e, Jailbreak):
        times = len(e.attacks) * max(1, e.samples)
        for judge in e.judges:
            if isinstance(judge, RubricJudge):
                around = sum(_around(judge, p.text, chat) for p in e.prompts) * times
                told.append((judge.name, len(e), around, each, judge.wording.max_new_tokens))
    elif isinstance(e, OverRefusal) and isinstance(e.judge, RubricJudge):
        around = sum(_around(e.judge, i.text, chat) for i in e.items) * e.samples
        told.append((e.judge.name, len(e), around, each, e.judge.wording.max_new_tokens))
    elif isinstance(e, OpenEnded):
        told.append((e.judge.name, len(e), _of_items(e, e.items, chat), each, e.judge.max_new_tokens))
    elif isinstance(e, SelfReport):
        around = len(e) * _length(rubric("", "", e.traits), chat)
        told.append((e.judge, len(e), around, each, e.grader_tokens))
    if not told:
        return cost
    return EvalCost(
        cost.name,
        cost.answers,
        cost.prompt_tokens,
        cost.max_new_tokens,
        cost.answer_tokens,
        " and ".join(name for name, *_ in told),
        sum(calls for _, calls, *_ in told),
        sum(float(around + calls * answer) for _, calls, around, answer, _ in told),
        sum(calls * MEAN_ANSWER * limit for _, calls, _, _, limit in told),
    )


def _around(judge: RubricJudge, prompt: str, chat: Chat) -> int:
    sent = judge.request(Answer(prompt, "")).conversation
    return sum(len(chat.ids(m["content"])) for m in sent)


def _of_items(e: OpenEnded, items: Seq[CapabilityItem], chat: Chat) -> int:
    return sum(_length(e.judge.prompt(i, ""), chat) for i in items)


def _left_out(spec: Spec) -> list[str]:
    """What a study asks for and no line prices."""
    found: list[str] = []
    jailbreak = spec.evals.jailbreak
    if jailbreak is not None and jailbreak.translator is not None:
        found.append("not priced: the zulu attack's translations, out and back")
    if jailbreak is not None and any(a.startswith("crescendo") for a in jailbreak.attacks):
        found.append("not priced: a multi-turn attack's further turns, and who leads it")
    if jailbreak is not None and any(j.name == "finetuned" for j in jailbreak.judge):
        found.append("not priced: the fine-tuned judge's forward passes")
    if any(c.name.startswith("lm-eval:") for c in spec.evals.capability):
        found.append("not priced: lm-eval's tasks")
    return found
