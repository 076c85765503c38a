"""Inspect's model as a backend: leeway's evals ask it from a worker thread, and what it said is kept for the scorer."""

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

TOP = 20  # token probabilities asked for: as many as the common providers give
MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
WORD_STARTS = str.maketrans({"Ġ": " ", "▁": " "})  # how two kinds of tokenizer write a space before a word


@dataclass
class Live:
    """Asks Inspect's model, from a thread beside its event loop; keeps every answer and the last conversation."""

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
        found = []
        for request in requests:
            drawn = request.temperature > 0
            config = GenerateConfig(
                max_tokens=request.max_new_tokens,
                temperature=request.temperature if drawn else None,  # else the task's, which the user may override
                seed=request.seed if drawn else None,
            )
            found.append(reply_of(self._ask(request.conversation, config)))
            tick(1)
        self.replies += found
        return found

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        config = GenerateConfig(max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=TOP)
        found = []
        for conversation in conversations:
            found.append(choice_of(self._ask(conversation, config), options))
            tick(1)
        self.choices += found
        return found

    def _ask(self, conversation: Conversation, config: GenerateConfig) -> ModelOutput:
        self.messages = [MESSAGES[m["role"]](content=m["content"]) for m in conversation]
        self.output = from_thread.run(self._generate, self.messages, config)
        if self.output.choices:
            self.messages = [*self.messages, self.output.message]
        return self.output

    async def _generate(self, messages: list[ChatMessage], config: GenerateConfig) -> ModelOutput:
        return await self.model.generate(messages, config=config)

    def heard(self) -> dict[str, Any]:
        """All that was said, as JSON."""
        return {
            "replies": [asdict(r) for r in self.replies],
            "choices": [asdict(c) for c in self.choices],
        }


@dataclass
class Said:
    """Says again what was heard, in the same order."""

    heard: dict[str, Any]
    template_hash: str = "inspect"
    identity: str = "inspect"

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return [Reply(**r) for r in self._next("replies", len(requests), tick)]

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:  # noqa: ARG002
        return [Choice(**c) for c in self._next("choices", len(conversations), tick)]

    def _next(self, kind: str, n: int, tick: Tick) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.heard[kind][:n]
        if len(found) < n:
            raise LeewayError(f"the log holds {len(found)} of {n} {kind}", fix="run the task again")
        self.heard = {**self.heard, kind: self.heard[kind][n:]}
        tick(n)
        return found


def reply_of(output: ModelOutput) -> Reply:
    """The answer as leeway's backends give it; what a provider withheld is no answer."""
    tokens = output.usage.output_tokens if output.usage else 0
    if output.error or not output.choices:
        return Reply("", tokens, False, output.error or "the provider returned nothing")
    if output.stop_reason == "content_filter":
        return Reply("", tokens, False, "the provider's content filter withheld it")
    return Reply(output.completion.strip(), tokens, output.stop_reason in ("max_tokens", "model_length"))


def choice_of(output: ModelOutput, options: Seq[str]) -> Choice:
    """Probability of each option among the tokens that the provider tells; a spelling beyond them counts as 0."""
    if output.error or not output.choices:
        return Choice({}, output.error or "the provider returned nothing")
    told = output.choices[0].logprobs
    if told is None or not told.content:
        return Choice({}, "the provider gives no token probabilities")
    first = told.content[0]
    logprobs = {t.token: t.logprob for t in [*(first.top_logprobs or []), first]}
    return Choice({o: _mass(o, logprobs) for o in options})


def _mass(option: str, logprobs: dict[str, float]) -> float:
    forms = {f"{space}{form}" for form in (option, option.lower(), option.upper()) for space in ("", " ")}
    return math.fsum(math.exp(p) for token, p in logprobs.items() if token.translate(WORD_STARTS) in forms)
