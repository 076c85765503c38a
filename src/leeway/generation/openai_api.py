"""A backend for any endpoint that implements OpenAI's chat completions.

A failed request becomes a `Reply` or `Choice` with a failure and the others continue. Only an error that every request
would meet (no key, unknown model) raises.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick, spellings
from leeway.generation.openai_client import ApiClient, ApiSettings, Body, ReplyError, Spending, token_usage
from leeway.hashing import derive_seed, digest

TOP_LOGPROBS = 20  # the largest number that endpoints return

Parsed = TypeVar("Parsed", Reply, Choice)


@dataclass
class OpenAIBackend:
    """Chat completions from `settings.base_url`; `prefix` is put before the first user message.

    Greedy at temperature 0; above, `top_p` is 1 and the seed is a function of the request's `seed` and `sample`.
    Whether the endpoint honours the seed, and is deterministic at temperature 0, depends on the endpoint.
    `identity_override` and `template_override` replace identity and template hash if more is known than an address.
    """

    settings: ApiSettings
    prefix: str = ""
    identity_override: str = ""
    template_override: str = ""
    spent: Spending = field(default_factory=Spending)
    served: set[str] = field(default_factory=set)  # the model names in replies, for the manifest

    @property
    def identity(self) -> str:
        return self.identity_override or self.settings.identity

    @property
    def template_hash(self) -> str:
        """Hash of the endpoint (its chat template is unknown) and the prefix."""
        return self.template_override or digest("endpoint", self.settings.identity, self.prefix)

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order. `new_tokens` is the endpoint's own count, 0 if it reports none."""
        return self.complete_each(requests, lambda *_: tick(1))

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return each option's mass among the TOP_LOGPROBS next tokens: a lower bound of its probability."""
        return self.choose_each(conversations, options, lambda *_: tick(1))

    def complete_each(self, requests: Seq[Request], on_reply: Callable[[int, Reply], None]) -> list[Reply]:
        """Return one reply per request, in order; call `on_reply(index, reply)` as each arrives."""
        bodies = [self._completion_body(r) for r in requests]
        return self._request_all(bodies, parse_reply, lambda failure: Reply("", 0, False, failure), on_reply)

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], on_choice: Callable[[int, Choice], None]
    ) -> list[Choice]:
        """Return one choice per conversation, in order; call `on_choice(index, choice)` as each arrives."""
        sampling = {"temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        bodies = [self._body(c, 1, sampling) for c in conversations]
        return self._request_all(
            bodies, lambda data: parse_choice(data, options), lambda failure: Choice({}, failure), on_choice
        )

    def _completion_body(self, request: Request) -> Body:
        if request.temperature == 0:
            return self._body(request.conversation, request.max_new_tokens, {"temperature": 0.0})
        seed = derive_seed("endpoint", request.seed, request.sample) % 2**31
        sampling = {"temperature": request.temperature, "top_p": 1.0, "seed": seed}
        return self._body(request.conversation, request.max_new_tokens, sampling)

    def _body(self, conversation: Conversation, limit: int, sampling: Body) -> Body:
        messages = [dict(m) for m in conversation]
        first = next((m for m in messages if m["role"] == "user"), None)
        if first and self.prefix:
            first["content"] = self.prefix + first["content"]
        body = {"model": self.settings.model, "messages": messages, self.settings.limit_field: limit, **sampling}
        return {k: v for k, v in (body | self.settings.extra).items() if v is not None}

    def _request_all(
        self,
        bodies: Seq[Body],
        parse: Callable[[Body], Parsed],
        failed: Callable[[str], Parsed],
        on_result: Callable[[int, Parsed], None],
    ) -> list[Parsed]:
        """Send all in order, at most `concurrency` at once. An error or Ctrl-C cancels the requests in flight."""
        results: dict[int, Parsed] = {}

        async def request_all() -> None:
            pending = iter(enumerate(bodies))
            async with ApiClient(self.settings, self.spent) as client:

                async def worker() -> None:
                    for i, body in pending:
                        try:
                            results[i] = parse(self._checked(await client.post(body)))
                        except ReplyError as error:
                            results[i] = failed(str(error))
                        on_result(i, results[i])

                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.settings.concurrency, len(bodies))):
                            group.create_task(worker())
                except BaseExceptionGroup as errors:
                    raise errors.exceptions[0] from None

        if bodies:
            _run(request_all())
        return [results[i] for i in range(len(bodies))]

    def _checked(self, data: Body) -> Body:
        name = str(data.get("model") or "")
        self.served |= {name} - {""}
        if self.settings.served and name != self.settings.served:
            raise ReplyError(f"the reply is from model {name or '(none)'}, not {self.settings.served}")
        return data


def parse_reply(data: Body) -> Reply:
    """Return the text of a reply; a `refusal` field counts as text. Raises ReplyError if there is none."""
    choice = _first_choice(data)
    message, reason = choice.get("message"), str(choice.get("finish_reason"))
    if not isinstance(message, dict):
        raise ReplyError("the reply has no message")
    if reason == "content_filter":
        raise ReplyError("the endpoint's content filter stopped the reply")
    text = message.get("content")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    if text is None and reason == "length":
        text = ""  # the limit was reached before the answer began (while reasoning, for example)
    if not isinstance(text, str):
        raise ReplyError(f"the reply has no text (finish_reason {reason})")
    usage = token_usage(data)
    return Reply(text.strip(), usage[1] if usage else 0, reason == "length")


def parse_choice(data: Body, options: Seq[str]) -> Choice:
    """Return each option's mass among the top tokens. Raises ReplyError."""
    logprobs = _first_choice(data).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise ReplyError("the reply has no logprobs")
    try:
        tokens = [(str(t["token"]), float(t["logprob"])) for t in content[0]["top_logprobs"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        tokens = []
    if not tokens or not all(p <= 1e-3 for _, p in tokens):  # NaN fails too
        raise ReplyError("the reply's logprobs are invalid")
    top = sorted(tokens, key=lambda t: -t[1])[:TOP_LOGPROBS]
    return Choice({option: option_mass(option, top) for option in options})


def option_mass(option: str, logprobs: Iterable[tuple[str, float]]) -> float:
    """Return the summed probability of an option's spellings."""
    counted = spellings(option)
    return math.fsum(math.exp(p) for token, p in logprobs if token in counted)


def _first_choice(data: Body) -> Body:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ReplyError("the reply has no choices")
    return choices[0]


def _run(task: Coroutine[Any, Any, None]) -> None:
    """Run in a new event loop; in another thread if this one already runs a loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(task)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, task).result()
