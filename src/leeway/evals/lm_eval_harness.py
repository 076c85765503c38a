"""lm-eval as a library: found or missed in one line, its random numbers, log and bars apart, its model protocol."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import numpy as np
import torch

from leeway.errors import LeewayError
from leeway.evals.lm_eval_model import Answers
from leeway.generation.backend import Conversation

SEED = 1234  # of lm-eval's own draws: which examples are shots, say


def harness() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise LeewayError(
            f"evals.capability: lm-eval is not installed ({error})", fix="pip install 'leeway[lm-eval]'"
        ) from error


def manager(task: str, include_path: str | None) -> Any:
    """The index of tasks: a folder of one's own where the task is there, else lm-eval's too (a minute to read)."""
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
def kept_apart() -> Iterator[None]:
    """Leave the random numbers of others as they were, and keep lm-eval's log and bars from between our lines."""
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
    """Stands in for a model: keeps what it is asked and says nothing."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []

    def render(self, history: Conversation, generate: bool) -> str:
        return json.dumps([history, generate], ensure_ascii=False)

    def loglikelihood(self, pairs: Seq[tuple[str, str]]) -> list[tuple[float, bool]]:
        self.asked += [list(p) for p in pairs]
        return [(0.0, False)] * len(pairs)

    def generate(self, pairs: Seq[tuple[str, dict[str, Any]]]) -> list[str]:
        self.asked += [[context, json.dumps(settings, sort_keys=True, default=str)] for context, settings in pairs]
        return [""] * len(pairs)


def as_lm(answers: Recorder | Answers) -> Any:
    """lm-eval's model protocol over one of ours; its class exists only where the extra is installed."""
    harness()
    base = importlib.import_module("lm_eval.api.model").LM

    class Adapter(base):  # type: ignore[misc, valid-type]
        tokenizer_name = "leeway"

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return answers.loglikelihood([r.args for r in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return answers.generate([r.args for r in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise LeewayError(
                f"evals.capability: lm-eval:{requests[0].task_name} measures perplexity, which is no score in [0, 1]",
                fix="use a task with acc, acc_norm or exact_match",
            )

        def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
            return answers.render([dict(m) for m in chat_history], add_generation_prompt)

    return Adapter()
