"""The evals as Inspect tasks: `inspect eval leeway/jailbreak -T prompts=strongreject -T attacks=none,dan`.

A sample is one item (under one attack). The solver runs it with leeway's eval against Inspect's model, the scorer uses
leeway's judge or grader, and the metrics are leeway's rates with their intervals, clustered by prompt. An unscored row
is an unscored sample with its reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import inspect_ai.model as chat
from anyio import CapacityLimiter, from_thread, to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import HeadlineMetric
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from leeway.errors import LeewayError
from leeway.evals.eval import Eval, ItemEval, Row, first_prefilled
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.generation.openai_api import option_mass
from leeway.generation.thinking import without_thinking
from leeway.hashing import canonical
from leeway.study.build_evals import evals_of
from leeway.study.load import parse

TOP = 20  # requested token probabilities: the maximum of the common providers
MESSAGES = {"system": chat.ChatMessageSystem, "user": chat.ChatMessageUser, "assistant": chat.ChatMessageAssistant}


@dataclass
class InspectBackend:
    """Inspect's model, called from a worker thread; records every answer and the last conversation."""

    model: chat.Model
    replies: list[Reply] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    messages: list[chat.ChatMessage] = field(default_factory=list)
    output: chat.ModelOutput | None = None
    template_hash: str = "inspect"

    @property
    def identity(self) -> str:
        return f"inspect {self.model}"

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        replies = []
        for request in requests:
            sampled = request.temperature > 0
            config = chat.GenerateConfig(
                max_tokens=request.max_new_tokens,
                temperature=request.temperature if sampled else None,  # else the task's, which the user can override
                seed=request.seed if sampled else None,
            )
            replies.append(reply_of(self._generate(request.conversation, config)))
            tick(1)
        self.replies += replies
        return replies

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        config = chat.GenerateConfig(max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=TOP)
        choices = []
        for conversation in conversations:
            choices.append(choice_of(self._generate(conversation, config), options))
            tick(1)
        self.choices += choices
        return choices

    def _generate(self, conversation: Conversation, config: chat.GenerateConfig) -> chat.ModelOutput:
        self.messages = [MESSAGES[m["role"]](content=m["content"]) for m in conversation]
        self.output = from_thread.run(self._generate_async, self.messages, config)
        if self.output.choices:
            self.messages = [*self.messages, self.output.message]
        return self.output

    async def _generate_async(self, messages: list[chat.ChatMessage], config: chat.GenerateConfig) -> chat.ModelOutput:
        return await self.model.generate(messages, config=config)

    def record(self) -> dict[str, Any]:
        """Return all answers as JSON."""
        return {"replies": [asdict(r) for r in self.replies], "choices": [asdict(c) for c in self.choices]}


@dataclass
class ReplayBackend:
    """Returns recorded answers in the same order."""

    record: dict[str, Any]
    template_hash: str = "inspect"
    identity: str = "inspect"

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return [Reply(**r) for r in self._next("replies", len(requests), tick)]

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:  # noqa: ARG002
        return [Choice(**c) for c in self._next("choices", len(conversations), tick)]

    def _next(self, kind: str, n: int, tick: Tick) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.record[kind][:n]
        if len(answers) < n:
            raise LeewayError(f"the log has {len(answers)} of {n} {kind}", fix="run the task again")
        self.record = {**self.record, kind: self.record[kind][n:]}
        tick(n)
        return answers


def reply_of(output: chat.ModelOutput) -> Reply:
    """Return Inspect's output as a leeway reply; an error or a filtered output is a failure."""
    tokens = output.usage.output_tokens if output.usage else 0
    if output.error or not output.choices:
        return Reply("", tokens, False, output.error or "the provider returned nothing")
    if output.stop_reason == "content_filter":
        return Reply("", tokens, False, "the provider's content filter withheld it")
    return without_thinking(
        Reply(output.completion.strip(), tokens, output.stop_reason in ("max_tokens", "model_length"))
    )


def choice_of(output: chat.ModelOutput, options: Seq[str]) -> Choice:
    """Return the probability of each option among the provider's top tokens; a spelling beyond them counts as 0."""
    if output.error or not output.choices:
        return Choice({}, output.error or "the provider returned nothing")
    logprobs = output.choices[0].logprobs
    if logprobs is None or not logprobs.content:
        return Choice({}, "the provider gives no token probabilities")
    first = logprobs.content[0]
    by_token = {t.token: t.logprob for t in [*(first.top_logprobs or []), first]}
    return Choice({o: option_mass(o, by_token.items()) for o in options})


def build_eval(kind: str, settings: dict[str, Any]) -> Eval:
    """Return the eval of a study with these settings under `evals.<kind>`; raises LeewayError as a study does.

    `test`, for capability on files, is the path of the test file. A setting of None has the study's default.
    """
    return _build_eval(kind, canonical({k: v for k, v in settings.items() if v is not None}))


@lru_cache(maxsize=16)
def _build_eval(kind: str, settings_json: str) -> Eval:
    settings: dict[str, Any] = json.loads(settings_json)
    for name in ("attacks", "traits"):
        if isinstance(settings.get(name), str):
            settings[name] = settings[name].split(",")
    test = settings.pop("test", None)
    study = {
        "name": "inspect",
        "model": "organism",  # it is not loaded: the model is Inspect's
        "task": {"files": {"train": test, "test": test}} if test else {"name": "organism"},
        "objectives": ["sft"],
        "budgets": [1],
        "evals": {kind: [settings] if kind == "capability" else settings},
    }
    spec = parse(json.dumps(study), f"leeway/{kind}")
    made = next(e for e in evals_of(spec, {}) if e.name == kind)
    if first_prefilled([made]):
        what = "jailbreak: Inspect has no request that continues the beginning of an answer on every provider (prefill)"
        raise LeewayError(what, fix="leave the prefill attacks out of -T attacks")
    return made


def split_by_item(part: Eval) -> Mapping[str, ItemEval]:
    """Return one eval per sample (an item, under one attack) by its id, in row order."""
    if not (evals := part.split()):
        raise LeewayError(f"eval {part.key}: Inspect cannot run it item by item", fix="leave it out")
    return evals


def score_of(row: dict[str, Any]) -> Score:
    """Return a row's score for Inspect, whose metrics leave out an unscored sample (NaN) and count it."""
    metadata = {k: row[k] for k in ("outcome", "judge", "judge_raw", "unscored_reason")}
    answer = row["outcome"] or (row["response"] if row["eval"] == "persona" else None)
    if row["score"] is None or math.isnan(row["score"]):
        reason = row["unscored_reason"]
        return Score.unscored(reason=reason, explanation=f"unscored: {reason}", metadata=metadata)
    return Score(value=float(row["score"]), answer=answer, explanation=row["judge_raw"] or None, metadata=metadata)


STORE_KEY = "leeway"  # of the solver's record for the scorer, in the sample's store
T = TypeVar("T")


async def _in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread, since it blocks on answers and Inspect's event loop must not."""
    return await to_thread.run_sync(work, limiter=CapacityLimiter(1))


@solver
def played(kind: str, settings: dict[str, Any]) -> Solver:
    """Run one item as leeway does: every turn of an attack, or the token probabilities of a yes/no statement."""
    evals = split_by_item(build_eval(kind, settings))

    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001 - turns are the attack's
        one = evals[str(state.sample_id)]
        backend = InspectBackend(chat.get_model())
        rows = await _in_thread(lambda: one.unjudged().run(backend, lambda _: None))
        row = {**asdict(rows[0]), "score": None if math.isnan(rows[0].score) else rows[0].score}
        state.store.set(STORE_KEY, {**backend.record(), "row": row})
        state.messages = backend.messages
        if backend.output is not None:
            state.output = backend.output
        return state

    return solve


@metric(scores="unreduced")
def answers() -> Metric:
    """Count the answers with a score; Inspect counts the others."""

    def counted(scores: list[SampleScore]) -> dict[str, float]:
        return {"answers": float(len(scores))}  # a mapping: Inspect takes a bare 0 of none for NaN

    return counted


@metric(scores="unreduced")
def rates() -> Metric:
    """Return leeway's rates, NaN if too many answers are unscored; for primary ones also the clustered 95% interval."""

    def measured(scores: list[SampleScore]) -> dict[str, float]:
        import pandas as pd

        from leeway import stats

        if not scores:
            return {}
        values: dict[str, float] = {}
        for line in stats.rates(pd.DataFrame([_as_row(s) for s in scores]), {}).to_dict("records"):
            name = str(line["measure"])
            values[name] = float(line["rate"])
            if line["primary"]:
                values |= {f"{name} low": float(line["low"]), f"{name} high": float(line["high"])}
        return {**values, "unscored": sum(s.score.as_float() == 0 for s in scores)}

    return measured


def _as_row(sample: SampleScore) -> dict[str, Any]:
    facts, verdict = sample.sample_metadata or {}, sample.score.metadata or {}
    return {
        **{"objective": "", "seed": 0, "budget": 0, "sample": 0, "template_hash": ""},
        **{k: facts[k] for k in ("eval", "attack", "item_id", "cluster")},
        **{k: verdict[k] for k in ("score", "outcome")},
    }


@scorer(metrics=[answers()])
def judged(kind: str, settings: dict[str, Any]) -> Scorer:
    """Judge or grade the solver's answers as leeway does: the judge reads the forbidden prompt, not its wrapper."""
    evals = split_by_item(build_eval(kind, settings))

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 - the item knows what is right
        one, record = evals[str(state.sample_id)], state.store.get(STORE_KEY)
        return score_of(asdict(await _in_thread(lambda: _row(one, record))))

    return score


def _row(one: ItemEval, record: dict[str, Any]) -> Row:
    if one.unjudged() is one:
        return one.run(ReplayBackend(record), lambda _: None)[0]
    return one.judge_row(Row(**{**record["row"], "score": math.nan}))


@scorer(metrics=[rates()])
def scored() -> Scorer:
    """Score 1 if `judged` has a score, else 0, so that the rates know how many are missing."""

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 - the protocol
        judged_score = (state.scores or {}).get("judged")
        if judged_score is None:
            return Score.unscored(reason="scoring_failed", explanation="judged did not run before it")
        value = None if math.isnan(judged_score.as_float()) else judged_score.as_float()
        verdict = {"score": value, "outcome": (judged_score.metadata or {}).get("outcome")}
        return Score(value=float(value is not None), explanation=judged_score.reason, metadata=verdict)

    return score


def _task(kind: str, **settings: Any) -> Task:
    settings = {k: v for k, v in settings.items() if v is not None}
    part = build_eval(kind, settings)
    samples = [_sample(id_, one) for id_, one in split_by_item(part).items()]
    facts = {"hash": part.hash}
    for judge in part.judged_by()[:1]:  # an Inspect task has one
        facts |= {"judge": judge.name, "judge_hash": judge.hash, "judge_note": judge.note}
    return Task(
        dataset=MemoryDataset(samples, name=part.key),
        solver=played(kind, settings),
        scorer=[judged(kind, settings), scored()],
        config=chat.GenerateConfig(temperature=0.0),
        headline_metric=HeadlineMetric(scorer="scored"),
        version=part.hash,
        metadata=facts,
    )


def _sample(id_: str, one: ItemEval) -> Sample:
    (item,), (cluster,) = one.items, one.clusters()
    text = next(getattr(item, f) for f in ("question", "prompt", "text") if hasattr(item, f))
    facts = {"eval": one.name, "item_id": item.id, "cluster": cluster, "attack": ""}
    for name, attack in one.facts().get("attacks", {}).items():
        facts |= {"attack": name, "attack_hash": attack["hash"], "attack_version": attack["version"]}
    right = getattr(item, "reference", getattr(item, "match", ""))
    return Sample(input=text, target=right, id=id_, metadata=facts)


@task
def capability(
    name: str = "gsm8k", limit: int | None = None, max_new_tokens: int | None = None, test: str | None = None
) -> Task:
    """Questions with checkable answers: `name` is gsm8k, organism, or files with `test` the path of the test file."""
    return _task("capability", name=name, limit=limit, max_new_tokens=max_new_tokens, test=test)


@task
def jailbreak(
    prompts: str | None = None,
    attacks: Any = None,
    judge: Any = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> Task:
    """Forbidden prompts under attacks, every answer one of four outcomes or unscored."""
    return _task("jailbreak", prompts=prompts, attacks=attacks, judge=judge, limit=limit, max_new_tokens=max_new_tokens)


@task
def persona(source: str | None = None, traits: Any = None, limit: int | None = None) -> Task:
    """Endorsement of trait statements from next-token probabilities, where the provider gives them."""
    return _task("persona", source=source, traits=traits, limit=limit)


@task
def overrefusal(
    prompts: str | None = None, judge: Any = None, limit: int | None = None, max_new_tokens: int | None = None
) -> Task:
    """Harmless prompts that sound forbidden."""
    return _task("overrefusal", prompts=prompts, judge=judge, limit=limit, max_new_tokens=max_new_tokens)
