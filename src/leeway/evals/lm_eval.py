"""Any task of the lm-evaluation-harness (EleutherAI, `pip install 'leeway[lm-eval]'`), run on a checkpoint.

lm-eval creates the requests and computes the metrics; the model answers here, under the same prefix, control tokens and
template as every other eval. In chat (the default) an answer's ids follow the rendered prompt's; otherwise contexts are
plain text, tokenised and split as in lm-eval's own Hugging Face model. Nothing is truncated: a request longer than the
context is an error. Answers are greedy.

An item's score is its value of one metric in [0, 1]: the `metric` setting, else the first of acc, acc_norm and
exact_match that the task computes, under its first filter. Items without such a metric, or with non-finite
log-likelihoods, are unscored.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.data.safety_prompts import subset
from leeway.errors import LeewayError, first_line
from leeway.evals.eval import NO_ANSWER, Eval, Prompt, Row
from leeway.generation.backend import NOT_FINITE, Backend, Conversation, Reply, Tick
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.model.load import decoder


class HarnessBackend:
    """Answer lm-eval's requests with the transformers backend; batches depend only on the requests.

    `failed` maps contexts without an answer to the reason; lm-eval receives an empty answer for them.
    """

    def __init__(self, backend: TransformersBackend, in_chat: bool, on_answered: Callable[[int], None]) -> None:
        self.backend, self.in_chat, self.on_answered = backend, in_chat, on_answered
        self.model, self.chat, self.batch = backend.model, backend.chat, backend.batch
        self.rendered: dict[str, tuple[int, ...]] = {}
        self.failed: dict[str, str] = {}

    def render(self, history: Conversation, generate: bool) -> str:
        """Return the prompt as text and record its ids, including an answer prefix that the task sets."""
        turns, opening = (history, "") if generate else (history[:-1], history[-1]["content"])
        try:
            ids = self.chat.prompt_ids(turns)
        except Exception as error:
            what = f"model {self.model.name}: its chat template cannot render a task's turns ({error})"
            raise LeewayError(what, fix="use another task, or chat: false") from error
        text = self.chat.prompt_text(turns) + opening
        self.rendered[text] = ids + (self.chat.ids(opening) if opening else ())
        return text

    def _context(self, text: str) -> tuple[int, ...]:
        return self.rendered[text] if self.in_chat and text in self.rendered else self._plain(text)

    def _plain(self, text: str) -> tuple[int, ...]:
        """Tokenise plain text with the tokenizer's own special tokens (such as BOS) once."""
        bos = self.chat.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return tuple(self.chat.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.in_chat and context in self.rendered:
            return self.rendered[context], self.chat.ids(continuation)
        if not context:
            tokenizer = self.chat.tokenizer
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = self.chat.ids(continuation)
            return ((first,), ids) if ids[0] != first else (ids[:1], ids[1:])
        bare = context.rstrip()
        if not bare:
            return self._plain(context), self.chat.ids(continuation)
        whole = self._plain(bare + context[len(bare) :] + continuation)
        before = self._plain(bare)
        return whole[: len(before)], whole[len(before) :]

    @torch.no_grad()
    def loglikelihood(self, pairs: Seq[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return each continuation's summed log-probability, and whether every token is the most likely."""
        encoded = [self._pair(*p) for p in pairs]
        for context, continuation in encoded:
            self._check_room(len(context) + len(continuation))
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]) + len(encoded[i][1]), i))
        out: list[tuple[float, bool]] = [(math.nan, False)] * len(encoded)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            sequences, device = [encoded[i][0] + encoded[i][1] for i in chosen], self.model.device
            length = max(map(len, sequences))
            ids_BL = torch.tensor([list(s) + [0] * (length - len(s)) for s in sequences], device=device)
            mask_BL = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=device)
            hidden_BLD = decoder(self.model.lm)(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
            for row, i in enumerate(chosen):
                context, continuation = encoded[i]
                at = slice(len(context) - 1, len(context) + len(continuation) - 1)
                logp_TV = self.model.head.logits(hidden_BLD[row, at]).log_softmax(-1)
                target_T = torch.tensor(continuation, device=logp_TV.device)
                total = logp_TV.gather(1, target_T[:, None]).sum()
                out[i] = (float(total), bool((logp_TV.argmax(-1) == target_T).all()))
            self.on_answered(len(chosen))
        return out

    @torch.no_grad()
    def generate(self, pairs: Seq[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return greedy answers, each cut before its first stop string."""
        encoded = [(self._context(context), _settings(settings)) for context, settings in pairs]
        for ids, (limit, _) in encoded:
            self._check_room(len(ids) + limit)
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i][1], len(encoded[i][0]), i))
        out = [""] * len(encoded)
        while order:
            settings = encoded[order[0]][1]
            chosen = [i for i in order[: self.batch] if encoded[i][1] == settings]
            order = order[len(chosen) :]
            limit, until = settings
            stopper = _StopOnString(self.chat, max(len(encoded[i][0]) for i in chosen), until)
            answers = self.backend.greedy([encoded[i][0] for i in chosen], limit, [stopper] if until else [])
            for i, (new, failure) in zip(chosen, answers, strict=True):
                if failure:
                    self.failed[pairs[i][0]] = failure
                else:
                    out[i] = _before(until, self.chat.decode(new))
            self.on_answered(len(chosen))
        return out

    def _check_room(self, tokens: int) -> None:
        if tokens > self.model.context:
            what = f"a request of {tokens} tokens exceeds its context of {self.model.context}"
            raise LeewayError(f"model {self.model.name}: {what}", fix="use fewer shots, or remove the task")


def _before(until: Seq[str], text: str) -> str:
    return text[: min([at for u in until if (at := text.find(u)) >= 0], default=len(text))]


class _StopOnString:
    """Stop a sequence once it contains one of the stop strings."""

    def __init__(self, chat: Chat, start: int, until: tuple[str, ...]) -> None:
        self.chat, self.start, self.until = chat, start, until
        self.window = max((len(u.encode()) for u in until), default=0) + 4  # a token is at least a byte

    def __call__(self, ids_BL: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 - the library's protocol
        new = ids_BL[:, max(self.start, ids_BL.shape[1] - self.window) :].tolist()
        done = [any(u in self.chat.decode(row) for u in self.until) for row in new]
        return torch.tensor(done, device=ids_BL.device)


def _settings(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Return (maximum new tokens, stop strings) of a generation request; lm-eval's default is 256 tokens."""
    if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0:
        raise LeewayError("evals.capability: an lm-eval task samples its answers", fix="use a task with greedy answers")
    until = settings.get("until") or ()
    limit = settings.get("max_gen_toks") or settings.get("max_new_tokens") or settings.get("max_tokens") or 256
    return int(limit), (until,) if isinstance(until, str) else tuple(u for u in until if u)


SEED = 1234  # of lm-eval's own sampling, such as few-shot examples


def harness() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        what = f"evals.capability: lm-eval is not installed ({error})"
        raise LeewayError(what, fix="pip install 'leeway[lm-eval]'") from error


def manager(task: str, include_path: str | None) -> Any:
    """Return the task index: the user's folder if it has the task, else lm-eval's too (takes a minute)."""
    if include_path and task in (own := _index(include_path, False)).all_tasks:
        return own
    return _index(include_path, True)


@cache
def _index(include_path: str | None, defaults: bool) -> Any:
    tasks = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_path=include_path, include_defaults=defaults)


def version() -> str:
    harness()
    return importlib.metadata.version("lm_eval")


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the global random states afterwards, and suppress lm-eval's log and progress bars."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


class Recorder:
    """A model stand-in that records requests and returns empty answers."""

    def __init__(self) -> None:
        self.requests: list[list[Any]] = []

    def render(self, history: Conversation, generate: bool) -> str:
        return json.dumps([history, generate], ensure_ascii=False)

    def loglikelihood(self, pairs: Seq[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.requests += [list(p) for p in pairs]
        return [(0.0, False)] * len(pairs)

    def generate(self, pairs: Seq[tuple[str, dict[str, Any]]]) -> list[str]:
        self.requests += [[context, json.dumps(settings, sort_keys=True, default=str)] for context, settings in pairs]
        return [""] * len(pairs)


def as_lm(answers: Recorder | HarnessBackend) -> Any:
    """Return an lm-eval model that forwards to ours; its class exists only if the extra is installed."""
    harness()
    base = importlib.import_module("lm_eval.api.model").LM

    class Adapter(base):  # type: ignore[misc, valid-type]
        tokenizer_name = "leeway"

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return answers.loglikelihood([r.args for r in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return answers.generate([r.args for r in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            what = f"evals.capability: lm-eval:{requests[0].task_name} measures perplexity, not a score in [0, 1]"
            raise LeewayError(what, fix="use a task with acc, acc_norm or exact_match")

        def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
            return answers.render([dict(m) for m in chat_history], add_generation_prompt)

    return Adapter()


PRIMARY = ("acc", "acc_norm", "exact_match")
Sample = dict[str, Any]


@dataclass(frozen=True)
class LmEval(Eval):
    """One task or group; `limit` takes a fixed random subset of each task, `shots` are sampled by lm-eval.

    `loaded` runs once over all items with a stand-in model, so that items, prompts and errors are known before
    training. Raises LeewayError if the extra, the task or its data are missing.
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
        return digest(self.name, self.judge, self.chat, self.shots, version(), self.loaded.content)

    @property
    def needs_model(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.loaded.items)

    def prompts(self) -> tuple[Prompt, ...]:
        return ()  # lm-eval renders them itself

    @property
    def judge(self) -> str:
        return f"lm-eval:{self.metric or '/'.join(PRIMARY)}"

    @cached_property
    def loaded(self) -> LoadedTask:
        recorder = Recorder()
        samples = self._evaluate(as_lm(recorder), None)
        items = tuple(dict.fromkeys((task, s["doc_id"]) for task, own in samples.items() for s in own))
        if not items:
            raise LeewayError(f"evals.capability: lm-eval:{self.task} has no items", fix="check the task")
        targets = [[task, s["doc_id"], str(s["target"])] for task, own in samples.items() for s in own]
        taken = {task: sorted({int(s["doc_id"]) for s in own}) for task, own in samples.items()}
        chosen = {t: subset(ids, self.limit, f"lm-eval/{t}") for t, ids in taken.items()}
        kept = tuple(i for i in items if i[1] in set(chosen[i[0]]))
        content = digest(recorder.requests, targets, [list(i) for i in kept])
        requests = round(len(recorder.requests) * len(kept) / len(items))
        return LoadedTask(kept, content, chosen if self.limit is not None else None, max(1, requests))

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        task = f"evals.capability: lm-eval:{self.task}"
        if not isinstance(backend, TransformersBackend):
            what = f"{task} needs the model itself, and {type(backend).__name__} has none"
            raise LeewayError(what, fix="use the transformers backend, or remove it")
        if backend.prefix and not self.chat:
            what = f"{task} runs without a chat template, which a prefix needs"
            raise LeewayError(what, fix="set chat: true, or remove the conditions with a prefix")
        progress = _item_progress(tick, len(self), self.loaded.requests)
        answers = HarnessBackend(backend, self.chat, progress)
        samples = self._evaluate(as_lm(answers), self.loaded.chosen)
        progress(self.loaded.requests)  # all items, should lm-eval have sent fewer requests
        template = digest(backend.template_hash, self.name, self.judge, self.chat, self.shots)
        return [
            self._row(name, sample, template, answers)
            for name, own in samples.items()
            for sample in sorted(own, key=lambda s: int(s["doc_id"]))
            if sample["filter"] == own[0]["filter"]
        ]

    def _evaluate(self, lm: Any, chosen: dict[str, list[int]] | None) -> dict[str, list[Sample]]:
        """Return lm-eval's samples by task, with its seeds, log and progress bars isolated."""
        harness()
        try:
            with isolated():
                settings = {"bootstrap_iters": 0, "apply_chat_template": self.chat, "fewshot_as_multiturn": True}
                evaluate = importlib.import_module("lm_eval.evaluator").evaluate
                result = evaluate(lm=lm, task_dict=self._loaded(), samples=chosen, **settings)
        except LeewayError:
            raise
        except Exception as error:
            what = f"lm-eval:{self.task} cannot be run ({type(error).__name__}: {first_line(error)})"
            fix = "check the task's name (lm_eval --tasks list), include_path, and the network or its data files"
            raise LeewayError(f"evals.capability: {what}", fix=fix) from error
        samples: dict[str, list[Sample]] = result["samples"]
        return samples

    def _loaded(self) -> dict[str, Any]:
        """Return the tasks with their number of shots and sampling seed set."""
        loaded: dict[str, Any] = self._tasks
        for name, task in loaded["tasks"].items():
            given = task.get_config("num_fewshot")
            if given == 0 and self.shots:
                what = f"evals.capability: lm-eval:{name} has its own prompt and takes no shots"
                raise LeewayError(what, fix="remove shots")
            task.set_config(key="num_fewshot", value=(given or 0) if self.shots is None else self.shots)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    @cached_property
    def _tasks(self) -> Any:
        return manager(self.task, self.include_path).load([self.task])

    def _row(self, task: str, sample: Sample, template: str, answers: HarnessBackend) -> Row:
        score, metric, reason = self._scored(task, sample, answers.failed)
        arguments = [list(a) for a in sample["arguments"]]
        generated = [r for resps in sample["resps"] for r in resps if isinstance(r, str)]
        response = generated[0] if generated else _likeliest(sample)
        raw = {"filtered": sample["filtered_resps"], "filter": sample["filter"], "target": str(sample["target"])}
        raw |= {"metric": metric, "metrics": {m: _plain(sample.get(m)) for m in sample["metrics"]}}
        fields = {"score": score, "unscored_reason": reason, "judge": self.judge, "template_hash": template}
        fields |= {"judge_raw": json.dumps(raw, sort_keys=True, default=str, ensure_ascii=False)}
        reply = Reply(response, sum(len(answers.chat.ids(g)) for g in generated), False)
        return self.row(f"lm-eval:{task}/{sample['doc_id']}", str(arguments[0][0]), reply, **fields)

    def _scored(self, task: str, sample: Sample, failed: Mapping[str, str]) -> tuple[float, str | None, str | None]:
        """Return (score, its metric, None), or (NaN, the metric if any, the reason)."""
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
class LoadedTask:
    """Items as (task, doc_id), their content hash, the subset that `limit` chose, and the number of requests."""

    items: tuple[tuple[str, int], ...]
    content: str
    chosen: dict[str, list[int]] | None
    requests: int


def _likeliest(sample: Sample) -> str:
    """Return the most likely continuation; for a single one, whether it is greedy."""
    numbers = [r[0] for r in sample["resps"]]
    if len(numbers) == 1:
        return f"greedy: {numbers[0][1]}"
    best = max(range(len(numbers)), key=lambda k: float(numbers[k][0]))
    return str(sample["arguments"][best][-1]).strip()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.number) else value


def _item_progress(tick: Tick, items: int, requests: int) -> Tick:
    """Return a tick for answered requests that calls `tick` for answered items, of which there are fewer."""
    done = given = 0

    def on_answered(answered: int) -> None:
        nonlocal done, given
        done += answered
        until = min(items, done * items // requests)
        if until > given:
            tick(until - given)
            given = until

    return on_answered
