"""Any endpoint that speaks OpenAI's chat completions: bounded concurrency, retries, a budget, reasons for failures.

What is sent and read: https://platform.openai.com/docs/api-reference/chat. A request that fails is a `Reply` or a
`Choice` with a failure, and the others go on; only what no request gets past (no key, no such model) raises.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from leeway.errors import LeewayError
from leeway.generation.api_reply import (
    REPLY_BYTES,
    TOP,
    Body,
    Heard,
    NoAnswer,
    choice_of,
    parsed,
    reply_of,
    retry_after,
    usage_of,
)
from leeway.generation.api_settings import ApiSettings, Gate, Spent
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.hashing import derive_seed, digest

Said = TypeVar("Said", Reply, Choice)

AGAIN = (408, 409, 425, 429)  # and every 5xx
LONGEST_WAIT_S = 300.0  # an endpoint that asks for more is not waited for
LONGEST_BACKOFF_S = 60.0


class UnreadableReply(Exception):
    """A body that is not read to its end, and why."""


@dataclass
class OpenAIBackend:
    """Asks `settings.base_url` for chat completions; `prefix` stands before the first user message.

    Greedy at temperature 0; above, `top_p` is 1 and the seed is a function of the request's `seed` and `sample`:
    whether an endpoint honours it, and is greedy to the bit, is the endpoint's affair. `who` and `template` stand in
    for identity and template hash where somebody knows better than an address (a server of our own).
    """

    settings: ApiSettings
    prefix: str = ""
    who: str = ""
    template: str = ""
    spent: Spent = field(default_factory=Spent)
    served: set[str] = field(default_factory=set)  # the model names that replies carried, for the manifest

    @property
    def identity(self) -> str:
        return self.who or self.settings.identity

    @property
    def template_hash(self) -> str:
        """The endpoint renders with a template that we do not see: it is the endpoint's, and our prefix."""
        return self.template or digest("endpoint", self.settings.identity, self.prefix)

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """One reply per request, in their order. `new_tokens` is the endpoint's own count, 0 where it tells none."""
        replies: dict[int, Reply] = {}

        def told(i: int, reply: Reply) -> None:
            replies[i] = reply
            tick(1)

        self.complete_each(requests, told)
        return [replies[i] for i in range(len(requests))]

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Mass of each option among the TOP most probable next tokens: a lower bound of its mass in the vocabulary."""
        choices: dict[int, Choice] = {}

        def told(i: int, choice: Choice) -> None:
            choices[i] = choice
            tick(1)

        self.choose_each(conversations, options, told)
        return [choices[i] for i in range(len(conversations))]

    def complete_each(self, requests: Seq[Request], told: Callable[[int, Reply], None]) -> None:
        """Call `told(place, reply)` as each reply comes."""
        self._drive([self._asking(r) for r in requests], reply_of, lambda why: Reply("", 0, False, why), told)

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], told: Callable[[int, Choice], None]
    ) -> None:
        """Call `told(place, choice)` as each choice comes."""
        drawing = {"temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": TOP}
        bodies = [self._body(c, 1, drawing) for c in conversations]
        self._drive(bodies, lambda data: choice_of(data, options), lambda why: Choice({}, why), told)

    def _asking(self, request: Request) -> Body:
        if request.temperature == 0:
            return self._body(request.conversation, request.max_new_tokens, {"temperature": 0.0})
        seed = derive_seed("endpoint", request.seed, request.sample) % 2**31
        drawing = {"temperature": request.temperature, "top_p": 1.0, "seed": seed}
        return self._body(request.conversation, request.max_new_tokens, drawing)

    def _body(self, conversation: Conversation, limit: int, drawing: Body) -> Body:
        turns = [dict(m) for m in conversation]
        first = next((m for m in turns if m["role"] == "user"), None)
        if first and self.prefix:
            first["content"] = self.prefix + first["content"]
        body = {"model": self.settings.model, "messages": turns, self.settings.limit_field: limit, **drawing}
        return {k: v for k, v in (body | self.settings.extra).items() if v is not None}

    def _drive(
        self,
        bodies: Seq[Body],
        read: Callable[[Body], Said],
        failed: Callable[[str], Said],
        told: Callable[[int, Said], None],
    ) -> None:
        """Ask all, at most `concurrency` at a time, begun in their order; Ctrl-C cancels what is under way."""
        if not bodies:
            return
        key = self.settings.key()

        async def ask_all() -> None:
            waiting = iter(enumerate(bodies))
            async with _client(self.settings, key) as client:
                line = _Line(self.settings, client, key, Gate(self.settings, self.spent))

                async def worker() -> None:
                    for i, body in waiting:
                        told(i, self._read(await line.ask(body), read, failed))

                await _together([worker() for _ in range(min(self.settings.concurrency, len(bodies)))])

        _run(ask_all)

    def _read(self, heard: Heard, read: Callable[[Body], Said], failed: Callable[[str], Said]) -> Said:
        if heard.data is None:
            return failed(heard.why)
        name = str(heard.data.get("model") or "")
        self.served |= {name} - {""}
        if self.settings.served and name != self.settings.served:
            return failed(f"answered by {name or 'nobody named'}, not by {self.settings.served}")
        usage = usage_of(heard.data)
        self.spent.tokens_in += usage[0] if usage else 0
        self.spent.tokens_out += usage[1] if usage else 0
        try:
            return read(heard.data)
        except NoAnswer as why:
            return failed(str(why))


@dataclass
class _Line:
    """One connection pool to an endpoint: tries, waits and pays."""

    settings: ApiSettings
    client: Any
    key: str
    gate: Gate

    async def ask(self, body: Body) -> Heard:
        bound = self._bound(body)
        heard = Heard(why="never asked")
        for tried in range(1 + self.settings.retries):
            if tried:
                await asyncio.sleep(max(heard.wait_s, self._backoff(tried)))
            if spent := await self.gate.enter(bound):
                return Heard(why=f"{spent} (before that: {heard.why})" if tried else spent)
            cost = bound
            try:
                heard = await self._try(body)
                usage = usage_of(heard.data) if heard.data else None
                cost = 0.0 if heard.free else self.settings.price(*usage) if usage else bound
            finally:
                await self.gate.leave(bound, cost)
            if not heard.again:
                return heard
        return Heard(why=f"{heard.why} ({1 + self.settings.retries} tries)")

    def _bound(self, body: Body) -> float:
        """Dollars at most: no tokenizer makes more tokens than bytes, but for what a template adds."""
        sent = len(json.dumps(body, ensure_ascii=False).encode()) + 64 * len(body.get("messages", ()))
        limit = body.get(self.settings.limit_field)
        return self.settings.price(sent, limit if isinstance(limit, int) else 2**17)

    def _backoff(self, tried: int) -> float:
        """Exponential, with jitter over its upper half, so that requests refused together come back apart."""
        jitter = random.SystemRandom().uniform(0.5, 1.0)  # nobody else's random numbers are spent
        return min(self.settings.backoff_s * 2.0 ** (tried - 1), LONGEST_BACKOFF_S) * jitter

    async def _try(self, body: Body) -> Heard:
        openai: Any = import_module("openai")
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                sent = self.client.chat.completions.with_raw_response.create(
                    model=body.get("model", ""), messages=body.get("messages", []), extra_body=body
                )
                heard = await sent
        except (TimeoutError, openai.APITimeoutError):
            return Heard(why=f"no answer within {self.settings.timeout_s:g} s", again=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except UnreadableReply as error:
            return Heard(why=str(error))
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, UnreadableReply):  # some versions wrap it
                return Heard(why=str(error.__cause__))
            return Heard(why=f"the connection broke ({type(error.__cause__ or error).__name__})", again=True)
        return parsed(heard.content)

    def _refused(self, error: Any) -> Heard:
        """An HTTP error: not billed; tried again where that may help."""
        told = error.body.get("message") or error.body.get("detail") if isinstance(error.body, dict) else error.body
        text = str(told or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no half characters
        said = " ".join(text.replace(self.key, "[key]").split())[:200]
        code = int(error.status_code)
        if code == 401:
            raise LeewayError(
                f"{self.settings.base_url}: the key was refused (HTTP 401)",
                fix=f"check what {name} holds" if (name := self.settings.key_env) else "it wants one: set key_env",
            )
        if code == 404:
            raise LeewayError(
                f"{self.settings.base_url}: no model {self.settings.model!r} there, or no such address (HTTP 404)",
                fix="check model and base_url (it ends before /chat/completions, mostly with /v1)",
            )
        wait = retry_after(error.response.headers)
        if wait > LONGEST_WAIT_S:
            return Heard(why=f"HTTP {code}: asks to come back in {wait:.0f} s", free=True)
        return Heard(
            why=f"HTTP {code}: {said or 'no reason given'}", again=code in AGAIN or code >= 500, wait_s=wait, free=True
        )


def _client(settings: ApiSettings, key: str) -> Any:
    try:
        openai: Any = import_module("openai")
    except ImportError as error:
        raise LeewayError("an endpoint needs the openai client", fix="pip install 'leeway[api]'") from error
    here = urlsplit(settings.base_url).hostname in ("localhost", "127.0.0.1", "::1")
    http = openai.DefaultAsyncHttpxClient(
        trust_env=not here,  # no proxy leads back here
        headers={"Accept-Encoding": "identity"},  # a limit on what is read must be one on what it becomes
        event_hooks={"response": [_limit_body]},
    )
    return openai.AsyncOpenAI(
        api_key=key, base_url=settings.base_url, timeout=settings.timeout_s, max_retries=0, http_client=http
    )


async def _limit_body(response: Any) -> None:
    """Make reading a response's body raise UnreadableReply after REPLY_BYTES, or at once where it is compressed."""
    httpx: Any = import_module(type(response).__module__.partition(".")[0])  # the client's own: httpx or its successor
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnreadableReply("the endpoint compressed its answer")
    whole, limit = response.stream, REPLY_BYTES

    class Limited(httpx.AsyncByteStream):  # type: ignore[misc]  # its type comes with the optional client
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in whole:
                size += len(chunk)
                if size > limit:
                    raise UnreadableReply(f"the endpoint sent more than {limit >> 20} MiB")
                yield chunk

        async def aclose(self) -> None:
            await whole.aclose()

    response.stream = Limited()


async def _together(work: Seq[Coroutine[Any, Any, None]]) -> None:
    """All at once; the first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in work:
                group.create_task(coroutine)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _run(work: Callable[[], Awaitable[None]]) -> None:
    """Run to the end in a loop of our own; in another thread where this one already runs a loop (a notebook's)."""

    async def main() -> None:
        await work()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, main()).result()
