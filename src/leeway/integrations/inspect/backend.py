"""Inspect's model as a backend for leeway's evals, and a replay of its answers for the scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from typing import Any

from anyio import from_thread
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
)

from leeway.errors import LeewayError
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick

TOP = 20  # requested token probabilities: the maximum of the common providers
MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
WORD_STARTS = str.maketrans({"Ġ": " ", "▁": " "})  # how BPE and SentencePiece write a space before a word


@dataclass
class InspectBackend:
    """Inspect's model, called from a worker thread; records every answer and the last conversation."""

    model: Model
    replies: list[Reply] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    messages: list[ChatMessage] = field(default_factory=list)
    output: ModelOutput | None = None
    template_hash: str = "inspect"

    @property
    def identity(self) -> str:
        return f"inspect {self.model}"

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        replies = []
        for request in requests:
            sampled = request.temperature > 0
            config = GenerateConfig(
                max_tokens=request.max_new_tokens,
                temperature=request.temperature if sampled else None,  # else the task's, which the user can override
                seed=request.seed if sampled else None,
            )
            replies.append(reply_of(self._generate(request.conversation, config)))
            tick(1)
        self.replies += replies
        return replies

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        config = GenerateConfig(max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=TOP)
        choices = []
        for conversation in conversations:
            choices.append(choice_of(self._generate(conversation, config), options))
            tick(1)
        self.choices += choices
        return choices

    def _generate(self, conversation: Conversation, config: GenerateConfig) -> ModelOutput:
        self.messages = [MESSAGES[m["role"]](content=m["content"]) for m in conversation]
        self.output = from_thread.run(self._generate_async, self.messages, config)
        if self.output.choices:
            self.messages = [*self.messages, self.output.message]
        return self.output

    async def _generate_async(self, messages: list[ChatMessage], config: GenerateConfig) -> ModelOutput:
        return await self.model.generate(messages, config=config)

    def record(self) -> dict[str, Any]:
        """Return all answers as JSON."""
        return {
            "replies": [asdict(r) for r in self.replies],
            "choices": [asdict(c) for c in self.choices],
        }


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


def reply_of(output: ModelOutput) -> Reply:
    """Return Inspect's output as a leeway reply; an error or a filtered output is a failure."""
    tokens = output.usage.output_tokens if output.usage else 0
    if output.error or not output.choices:
        return Reply("", tokens, False, output.error or "the provider returned nothing")
    if output.stop_reason == "content_filter":
        return Reply("", tokens, False, "the provider's content filter withheld it")
    return Reply(output.completion.strip(), tokens, output.stop_reason in ("max_tokens", "model_length"))


def choice_of(output: ModelOutput, options: Seq[str]) -> Choice:
    """Return the probability of each option among the provider's top tokens; a spelling beyond them counts as 0."""
    if output.error or not output.choices:
        return Choice({}, output.error or "the provider returned nothing")
    logprobs = output.choices[0].logprobs
    if logprobs is None or not logprobs.content:
        return Choice({}, "the provider gives no token probabilities")
    first = logprobs.content[0]
    by_token = {t.token: t.logprob for t in [*(first.top_logprobs or []), first]}
    return Choice({o: _mass(o, by_token) for o in options})


def _mass(option: str, logprobs: dict[str, float]) -> float:
    forms = {f"{space}{form}" for form in (option, option.lower(), option.upper()) for space in ("", " ")}
    return math.fsum(math.exp(p) for token, p in logprobs.items() if token.translate(WORD_STARTS) in forms)
