"""From chat text to token ids, by the model's own template.

Prompt, answer and end of turn are tokenised separately and their ids concatenated: slicing the tokens of the whole text
by the prompt's length is wrong where tokens merge across the boundary. The template writes the BOS token, if there is
one; no special token is added to it.
"""

from __future__ import annotations

import copy
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.hashing import digest

THINK, END_THINK = "<think>", "</think>"  # around a thought, as Qwen 3, DeepSeek-R1 and others write it
OPENED = re.compile(rf"{THINK}\s*$")
PROBE_QUESTION = "leeway-probe-question"
PROBE_ANSWER = "leeway-probe-answer"
CACHED = 4096  # rendered sequences
RENDER_S = 2.0  # of CPU time for one conversation, which takes well under a millisecond


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds` of CPU time; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        raise TimeoutError(f"it takes over {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@dataclass(frozen=True)
class Sequence:
    """Token ids of one prompt and its answer; ids from `target_start` on are targets.

    Token statistics are computed at the targets, and from `measured_from` on if an objective also uses earlier tokens
    (a KL over the prompt): those tokens are measured but are not targets.
    """

    ids: tuple[int, ...]
    target_start: int
    measured_from: int | None = None

    @property
    def targets(self) -> int:
        return len(self.ids) - self.target_start

    @property
    def start(self) -> int:
        """Return the position of the first measured token."""
        return self.target_start if self.measured_from is None else self.measured_from

    @property
    def measured(self) -> int:
        return len(self.ids) - self.start

    def with_prompt(self) -> Sequence:
        """Return the sequence with its prompt measured too, except the first token, which nothing predicts."""
        return replace(self, measured_from=1)

    def without_targets(self) -> Sequence:
        """Return the sequence with the same tokens measured and no targets."""
        return replace(self, target_start=len(self.ids), measured_from=self.start)


@dataclass
class Chat:
    """A tokenizer with its chat template. `prefix` precedes the first user message (a control token, for example).

    What the template writes before every answer (an empty thought, for example) is part of the prompt, in training and
    at test time, and never a target. `thinking` leaves it out of prompts: the model then thinks before it answers.
    """

    tokenizer: Any
    prefix: str = ""
    thinking: bool = False
    closing_ids: tuple[int, ...] = field(init=False)
    _lead: str = field(init=False)
    _opener: str = field(init=False)  # of a thought, which only the prompt of a new answer has
    _special: dict[int, str] = field(init=False, repr=False)
    _spellings: re.Pattern[str] = field(init=False, repr=False)
    _rendered: dict[tuple[str, str, str], Sequence] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        if "strftime_now" in template:
            what = "its chat template writes today's date, so prompts would change from day to day"
            fix = "copy the model's folder and put a fixed date into the template in place of strftime_now"
            raise self._error(what, fix)
        if not template:
            what = "its tokenizer has no chat template"
            fix = "put chat_template into tokenizer_config.json (or chat_template.jinja), or use the chat model"
            raise self._error(what, fix)
        self._read_special_tokens()
        self._opener, self._lead, closing = self._turn_shape()
        self.closing_ids = self._closing(closing)

    def _error(self, what: str, fix: str) -> LeewayError:
        return LeewayError(f"model {self.tokenizer.name_or_path}: {what}", fix=fix)

    def with_prefix(self, prefix: str) -> Chat:
        """Return the chat with another text before the first user message."""
        other = copy.copy(self)
        other.prefix = prefix
        return other

    def with_thinking(self) -> Chat:
        """Return the chat with thinking on. Raises LeewayError if its template does not support thinking."""
        if not self.supports_thinking:
            what = "its chat template has neither enable_thinking nor <think>"
            raise self._error(what, "leave evals.thinking out")
        other = copy.copy(self)
        other.thinking = True
        return other

    @property
    def supports_thinking(self) -> bool:
        template = str(self.tokenizer.chat_template)
        return "enable_thinking" in template or THINK in template

    def opens_thought(self, conversation: list[dict[str, str]]) -> bool:
        """Whether the prompt of a conversation ends inside a thought."""
        prefilled = conversation[-1]["role"] == "assistant"
        return self.thinking and not prefilled and bool(OPENED.search(self.prompt_text(conversation)))

    def with_control_tokens(self, tokens: tuple[str, ...]) -> Chat:
        """Return the chat over a copy of its tokenizer with `tokens` added, their ids after the last one in use."""
        from tokenizers import AddedToken

        taken = [t for t in tokens if t in self.tokenizer.get_vocab()]
        if taken:
            raise self._error(f"its tokenizer already has {taken[0]}", "leave cft out")
        other = copy.copy(self)
        other.tokenizer = copy.deepcopy(self.tokenizer)
        other.tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
        other._read_special_tokens()
        other._rendered = {}
        return other

    @property
    def template_hash(self) -> str:
        thinking = ["thinking"] if self.thinking else []
        return digest("chat", str(self.tokenizer.chat_template), self.prefix, self._lead, *thinking)

    def prompt_text(self, conversation: list[dict[str, str]]) -> str:
        """Return the rendered conversation up to the start of the assistant's answer."""
        turns = [dict(m) for m in conversation]
        if self.prefix:
            first = next(i for i, m in enumerate(turns) if m["role"] == "user")
            turns[first]["content"] = self.prefix + turns[first]["content"]
        if self.thinking:
            return self._render(turns, add_generation_prompt=True, **self._thinking_kwargs)
        return self._render(turns, add_generation_prompt=True).removesuffix(self._opener)

    @property
    def _thinking_kwargs(self) -> dict[str, bool]:
        return {"enable_thinking": True} if "enable_thinking" in str(self.tokenizer.chat_template) else {}

    def prompt_ids(self, conversation: list[dict[str, str]]) -> tuple[int, ...]:
        """Return the ids of the rendered conversation and of what the template writes before an answer.

        A conversation that ends with an assistant turn is continued: its text follows as the beginning of the answer,
        which has no thought.
        """
        *before, last = conversation
        if last["role"] == "assistant":
            return self.without_thinking().prompt_ids(before) + self.ids(last["content"])
        lead = "" if self.thinking else self._lead
        return self.ids(self.prompt_text(conversation)) + (self.ids(lead) if lead else ())

    def without_thinking(self) -> Chat:
        """Return the chat of training, whose answers have no thought."""
        if not self.thinking:
            return self
        other = copy.copy(self)
        other.thinking = False
        return other

    def sequence(self, prompt: str, answer: str) -> Sequence:
        """Return one user turn and its answer; targets are the answer and the end of the turn. Cached across epochs."""
        key = (self.prefix, prompt, answer)
        if key not in self._rendered:
            if len(self._rendered) >= CACHED:
                self._rendered.clear()
            self._rendered[key] = self._sequence(prompt, answer)
        return self._rendered[key]

    def _sequence(self, prompt: str, answer: str) -> Sequence:
        prompt_ids = self.without_thinking().prompt_ids([{"role": "user", "content": prompt}])
        return Sequence(prompt_ids + self.ids(answer) + self.closing_ids, len(prompt_ids))

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def spelled(self, text: str) -> str | None:
        """Return a special token that `text` spells, which the tokenizer would read as that token, or None."""
        if not self._spellings.search(text):
            return None
        return next((self._special[i] for i in self.ids(text) if i in self._special), None)

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens, except those around a thought."""
        marks = {i for i, text in self._special.items() if text in (THINK, END_THINK)}
        if marks.isdisjoint(ids):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode([i for i in ids if i in marks or i not in self._special]))

    def _render(self, turns: list[dict[str, str]], **arguments: bool) -> str:
        try:
            with cpu_limit(RENDER_S):
                return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **arguments))
        except Exception as error:  # a template may raise anything
            what = f"its chat template fails ({type(error).__name__}: {first_line(error)[:200]})"
            raise self._error(what, "correct the template, or use the model with its own") from error

    def _turn_shape(self) -> tuple[str, str, str]:
        """Return what the template opens a new answer's thought with, and writes before and after a given answer.

        The opener is empty if a rendered answer begins with it too (its thought is then closed before the answer).
        """
        user = [{"role": "user", "content": PROBE_QUESTION}]
        prompt = self._render(user, add_generation_prompt=True)
        whole = self._render([*user, {"role": "assistant", "content": PROBE_ANSWER}], add_generation_prompt=False)
        if PROBE_QUESTION not in prompt or prompt == self._render(user, add_generation_prompt=False):
            what = "its chat template ignores add_generation_prompt"
            raise self._error(what, "correct the template so that a prompt ends where the assistant begins")
        opened, prompt = prompt, prompt if whole.startswith(prompt) else OPENED.sub("", prompt)
        if not whole.startswith(prompt) or whole[len(prompt) :].count(PROBE_ANSWER) != 1:
            what = "its chat template renders an answered prompt differently from the prompt alone"
            fix = "correct the template so that the rendered prompt is a prefix of the rendered conversation"
            raise self._error(what, fix)
        lead, closing = whole[len(prompt) :].split(PROBE_ANSWER)
        return opened[len(prompt) :], lead, closing

    def _closing(self, text: str) -> tuple[int, ...]:
        """Return the ids that end a turn: up to the first special token after the answer, else the tokenizer's EOS."""
        ids = self.ids(text)
        for k, i in enumerate(ids):
            if i in self._special:
                return ids[: k + 1]
        if self.tokenizer.eos_token_id is None:
            raise self._error(
                "neither its chat template nor its tokenizer ends a turn", "set eos_token in tokenizer_config.json"
            )
        return (*ids, int(self.tokenizer.eos_token_id))

    def _read_special_tokens(self) -> None:
        added = {i: str(t.content) for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        own = zip(self.tokenizer.all_special_ids, map(str, self.tokenizer.all_special_tokens), strict=True)
        self._special = dict(own) | added
        self._spellings = re.compile("|".join(map(re.escape, self._special.values())) or "(?!)")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end a generated answer: the template's end of turn and the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return tuple(sorted({self.closing_ids[-1]} | ({int(eos)} if eos is not None else set())))
