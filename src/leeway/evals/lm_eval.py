"""Any task of the lm-evaluation-harness (EleutherAI, `pip install 'leeway[lm-eval]'`) on the checkpoint as it stands.

lm-eval makes the requests and computes the metrics; the model answers them here, so that prefix, control tokens and
template are those of every other eval. In chat (the default) an answer's ids are joined to the rendered prompt's;
without it contexts are plain text, tokenised and split as lm-eval's own Hugging Face model does. Nothing is truncated:
what does not fit into the context is an error. Answers are greedy.

An item's score is its own value of one metric, in [0, 1]: the one that is set, else the first of acc, acc_norm and
exact_match that the task computes, under its first filter. A task without one, and a model whose log-likelihoods are no
numbers, leave items unscored.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from leeway.data.subset import subset
from leeway.errors import LeewayError, first_line
from leeway.evals.eval import NO_ANSWER, Row, Tick
from leeway.evals.lm_eval_harness import SEED, Recorder, as_lm, harness, kept_apart, manager, version
from leeway.evals.lm_eval_model import Answers
from leeway.generation.backend import NOT_FINITE, Backend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest

PRIMARY = ("acc", "acc_norm", "exact_match")
Sample = dict[str, Any]


@dataclass(frozen=True)
class LmEval:
    """One task, or one group of tasks; `limit` takes a fixed random subset of each, `shots` are drawn by lm-eval.

    `prepared` runs once over all items with a stand-in for the model, so that items, prompts and faults are known
    before anything is trained. Raises LeewayError where the extra, the task or its data are missing.
    """

    task: str
    limit: int | None = None
    shots: int | None = None
    metric: str | None = None
    chat: bool = True
    include_path: str | None = None
    name: str = "capability"

    @property
    def key(self) -> str:
        return f"{self.name}-lm-eval-{self.task}"

    @property
    def hash(self) -> str:
        return digest(self.name, self.judge, self.chat, self.shots, version(), self.prepared.content)

    def __len__(self) -> int:
        return len(self.prepared.items)

    @property
    def judge(self) -> str:
        return f"lm-eval:{self.metric or '/'.join(PRIMARY)}"

    @cached_property
    def prepared(self) -> Prepared:
        stand_in = Recorder()
        samples = self._evaluate(as_lm(stand_in), None)
        items = tuple(dict.fromkeys((task, s["doc_id"]) for task, found in samples.items() for s in found))
        if not items:
            raise LeewayError(f"evals.capability: lm-eval:{self.task} has no items", fix="check the task")
        targets = [[task, s["doc_id"], str(s["target"])] for task, found in samples.items() for s in found]
        taken = {task: sorted({int(s["doc_id"]) for s in found}) for task, found in samples.items()}
        chosen = {t: subset(ids, self.limit, f"lm-eval/{t}") for t, ids in taken.items()}
        kept = tuple(i for i in items if i[1] in set(chosen[i[0]]))
        content = digest(stand_in.asked, targets, [list(i) for i in kept])
        requests = round(len(stand_in.asked) * len(kept) / len(items))
        return Prepared(kept, content, chosen if self.limit is not None else None, max(1, requests))

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        if not isinstance(backend, TransformersBackend):
            raise LeewayError(
                f"evals.capability: lm-eval:{self.task} needs the model itself, and {type(backend).__name__} has none",
                fix="use the transformers backend for it, or leave it out",
            )
        if backend.prefix and not self.chat:
            raise LeewayError(
                f"evals.capability: lm-eval:{self.task} asks without a chat template, where no prefix can stand",
                fix="set chat: true for it, or leave out what is measured under a prefix",
            )
        told = _Told(tick, len(self), self.prepared.requests)
        answers = Answers(backend, self.chat, told)
        samples = self._evaluate(as_lm(answers), self.prepared.chosen)
        told.finish()
        template = digest(backend.template_hash, self.name, self.judge, self.chat, self.shots)
        return [
            self._row(task, sample, template, answers)
            for task, found in samples.items()
            for sample in sorted(_first_filter(found), key=lambda s: int(s["doc_id"]))
        ]

    def _evaluate(self, lm: Any, chosen: dict[str, list[int]] | None) -> dict[str, list[Sample]]:
        """lm-eval's samples by task. Its seeds, log and bars stay inside."""
        harness()
        try:
            with kept_apart():
                found = importlib.import_module("lm_eval.evaluator").evaluate(
                    lm=lm,
                    task_dict=self._loaded(),
                    samples=chosen,
                    bootstrap_iters=0,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=True,
                )
        except LeewayError:
            raise
        except Exception as error:
            raise LeewayError(
                f"evals.capability: lm-eval:{self.task} cannot be run ({type(error).__name__}: {first_line(error)})",
                fix="check the task's name (lm_eval --tasks list), include_path, and the network or its data files",
            ) from error
        samples: dict[str, list[Sample]] = found["samples"]
        return samples

    def _loaded(self) -> dict[str, Any]:
        """The tasks with their shots set and their draws at the beginning."""
        loaded: dict[str, Any] = self._tasks
        for name, task in loaded["tasks"].items():
            given = task.get_config("num_fewshot")
            if given == 0 and self.shots:
                raise LeewayError(
                    f"evals.capability: lm-eval:{name} has its own prompt and takes no shots", fix="leave shots out"
                )
            task.set_config(key="num_fewshot", value=(given or 0) if self.shots is None else self.shots)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        loaded: dict[str, Any] = manager(self.task, self.include_path).load([self.task])
        return loaded

    def _row(self, task: str, sample: Sample, template: str, answers: Answers) -> Row:
        score, metric, reason = self._scored(task, sample, answers.failed)
        said = sample["filtered_resps"]
        arguments = [list(a) for a in sample["arguments"]]
        generated = [r for resps in sample["resps"] for r in resps if isinstance(r, str)]
        response = generated[0] if generated else _likeliest(sample)
        raw = {
            "filtered": said,
            "filter": sample["filter"],
            "metric": metric,
            "metrics": {m: _plain(sample.get(m)) for m in sample["metrics"]},
            "target": str(sample["target"]),
        }
        return Row(
            eval=self.name,
            attack="",
            item_id=f"lm-eval:{task}/{sample['doc_id']}",
            cluster=f"lm-eval:{task}/{sample['doc_id']}",
            sample=0,
            prompt=str(arguments[0][0]),
            response=response,
            outcome=None,
            score=score,
            unscored_reason=reason,
            judge=self.judge,
            judge_raw=json.dumps(raw, sort_keys=True, default=str, ensure_ascii=False),
            template_hash=template,
            new_tokens=sum(len(answers.chat.ids(g)) for g in generated),
        )

    def _scored(self, task: str, sample: Sample, failed: Mapping[str, str]) -> tuple[float, str | None, str | None]:
        """(score, its metric, None), or (NaN, the metric where there is one, why it is not scored)."""
        wanted = (self.metric,) if self.metric else PRIMARY
        metric = next((m for m in sample["metrics"] if m in wanted), None)
        if metric is None:
            has = ", ".join(sample["metrics"]) or "none"
            return math.nan, None, f"lm-eval: {task} computes no {' or '.join(wanted)} per item (it has: {has})"
        numbers = [r[0] for resps in sample["resps"] for r in resps if isinstance(r, (tuple, list))]
        if any(math.isnan(float(n)) for n in numbers):
            return math.nan, metric, NO_ANSWER + NOT_FINITE
        if failure := next((failed[a[0]] for a in sample["arguments"] if a[0] in failed), None):
            return math.nan, metric, NO_ANSWER + failure
        value = sample.get(metric)
        if not isinstance(value, (bool, int, float, np.number)) or not 0 <= float(value) <= 1:
            return math.nan, metric, f"lm-eval: {metric} is {_plain(value)!r}, not a value in [0, 1]"
        return float(value), metric, None


@dataclass(frozen=True)
class Prepared:
    """What a task asks: (task, doc_id) of each item, a hash over all of it, what `limit` chose, how many requests."""

    items: tuple[tuple[str, int], ...]
    content: str
    chosen: dict[str, list[int]] | None
    requests: int


def _first_filter(samples: Seq[Sample]) -> list[Sample]:
    return [s for s in samples if s["filter"] == samples[0]["filter"]]


def _likeliest(sample: Sample) -> str:
    """The continuation with the largest log-likelihood; where there is one alone, whether it is the greedy one."""
    numbers = [r[0] for r in sample["resps"]]
    if len(numbers) == 1:
        return f"greedy: {numbers[0][1]}"
    best = max(range(len(numbers)), key=lambda k: float(numbers[k][0]))
    return str(sample["arguments"][best][-1]).strip()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.number) else value


class _Told:
    """Turns answered requests into answered items, which there are fewer of."""

    def __init__(self, tick: Tick, items: int, requests: int) -> None:
        self.tick, self.items, self.requests, self.done, self.given = tick, items, requests, 0, 0

    def __call__(self, answered: int) -> None:
        self.done += answered
        self._give(min(self.items, self.done * self.items // self.requests))

    def finish(self) -> None:
        self._give(self.items)

    def _give(self, until: int) -> None:
        if until > self.given:
            self.tick(until - self.given)
            self.given = until
