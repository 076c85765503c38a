"""Open-ended questions: a judge model rates each response against a reference on the scales of `openended.yaml`.

    score = mean over the scales of (mark - lowest) / (highest - lowest)        in [0, 1]

A missing, fractional or out-of-range mark leaves the response unscored: nothing is clipped or guessed. The judge reads
question, reference and response in the configured order, never the model's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Literal

from leeway.data.types import CapabilityItem
from leeway.evals.eval import NO_ANSWER, ItemEval, JudgeRef, Prompt, Row, user_message
from leeway.generation.backend import Backend, Reply, Request, Tick
from leeway.hashing import digest
from leeway.yaml_config import package_data

Order = Literal["reference-first", "answer-first"]


rubric = cache(partial(package_data, "leeway.evals", "openended.yaml"))


def score(marks: dict[str, int]) -> float:
    """Return the mean of the marks, each scaled to [0, 1]."""
    low, high = int(rubric()["lowest"]), int(rubric()["highest"])
    return sum((m - low) / (high - low) for m in marks.values()) / len(marks)


def parse(text: str) -> dict[str, int] | str:
    """Return the marks of the last JSON object that names a scale, or the fault."""
    scales = tuple(rubric()["dimensions"])
    objects = [o for o in _objects(text) if any(s in o for s in scales)]
    if not objects:
        return "no JSON object with marks"
    marks: dict[str, int] = {}
    for scale in scales:
        mark = objects[-1].get(scale)
        if mark is None:
            return f"no mark for {scale}"
        if isinstance(mark, bool) or not isinstance(mark, (int, float)) or not math.isfinite(mark) or mark != int(mark):
            return f"the mark for {scale} is {mark!r}, no whole number"
        if not rubric()["lowest"] <= mark <= rubric()["highest"]:
            return f"the mark for {scale} is {mark!r}, out of range"
        marks[scale] = int(mark)
    return marks


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            at = text.find("{", at + 1)
            continue
        if isinstance(value, dict):
            yield value
        at = text.find("{", end)


@dataclass(frozen=True)
class RubricJudge:
    """Mark responses with a judge model, greedily, one attempt each."""

    backend: Backend
    order: Order = "reference-first"
    max_new_tokens: int = 512
    name: str = "rubric"

    @property
    def hash(self) -> str:
        model = self.backend.identity, self.backend.template_hash
        return digest(self.name, rubric(), self.order, self.max_new_tokens, *model)

    def prompt(self, item: CapabilityItem, response: str) -> str:
        """Return the judge's prompt; delimiter lines depend on the texts, so a response cannot forge them."""
        text = rubric()
        mark = digest("openended", item.prompt, item.reference, response)
        pieces = {"question": item.prompt, "reference": item.reference, "answer": response}
        rest = ("reference", "answer") if self.order == "reference-first" else ("answer", "reference")
        order = ("question", *rest)
        shown = [f"{text['titles'][k]}, between the lines {mark}:\n{mark}\n{pieces[k]}\n{mark}" for k in order]
        scales = [
            f"- {name}: {d['asks']} {text['lowest']} = {d['low']}; {text['highest']} = {d['high']}."
            for name, d in text["dimensions"].items()
        ]
        example = json.dumps(dict.fromkeys(text["dimensions"], (text["lowest"] + text["highest"]) // 2))
        return "\n\n".join([text["task"], *shown, "\n".join(scales), f"{text['reply']} {example}"])

    def request(self, item: CapabilityItem, response: str) -> Request:
        return Request(user_message(self.prompt(item, response)), self.max_new_tokens)


@dataclass(frozen=True)
class OpenEnded(ItemEval):
    """Open-ended questions of one task (`legal`, `cyber`, `openended`); each item is its own cluster."""

    task: str
    items: Seq[CapabilityItem]
    judge: RubricJudge
    max_new_tokens: int
    name: str = "capability"

    @property
    def key(self) -> str:
        return f"{self.name}-{self.task}"

    @property
    def hash(self) -> str:
        return digest(self.name, self.judge.hash, self.max_new_tokens, [asdict(i) for i in self.items])

    def prompts(self) -> Iterator[Prompt]:
        yield from (Prompt(f"item {i.id}", user_message(i.prompt), self.max_new_tokens) for i in self.items)

    def judged_by(self) -> list[JudgeRef]:
        return [JudgeRef(self.judge.name, self.judge.hash)]

    def judge_requests(self) -> Iterator[tuple[str, Request]]:
        yield from ((self.judge.name, self.judge.request(i, "")) for i in self.items)

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        replies = backend.complete(self.requests(), tick)
        answered = [(i, r.text) for i, r in zip(self.items, replies, strict=True) if r.failure is None]
        requests = [self.judge.request(*pair) for pair in answered]
        marked = iter(self.judge.backend.complete(requests, lambda _: None))
        template = digest(backend.template_hash, self.name, self.judge.hash)
        return [
            self._row(i, r, next(marked) if r.failure is None else None, template)
            for i, r in zip(self.items, replies, strict=True)
        ]

    def _row(self, item: CapabilityItem, reply: Reply, marked: Reply | None, template: str) -> Row:
        value, reason = _verdict(reply, marked)
        judged: dict[str, Any] = {"judge": self.judge.name, "judge_raw": "" if marked is None else marked.text}
        judged |= {"score": value, "unscored_reason": reason, "template_hash": template}
        return self.row(item.id, item.prompt, reply, **judged)


def _verdict(reply: Reply, marked: Reply | None) -> tuple[float, str | None]:
    """Return (score, None), or (NaN, the reason)."""
    if marked is None:
        return math.nan, f"{NO_ANSWER}{reply.failure}"
    if marked.failure is not None:
        return math.nan, f"{NO_ANSWER}judge: {marked.failure}"
    marks = parse(marked.text)
    if isinstance(marks, str):
        return math.nan, f"judge: {marks}" + (" (its reply was cut off)" if marked.cut else "")
    return score(marks), None
