"""A backend for any endpoint that implements OpenAI's chat completions, under limits.

A failed request becomes a `Reply` or `Choice` with a failure and the others continue. Only an error that every request
would meet (no key, unknown model) raises.

There is a budget for every attempt, and a time and size limit for every reply. The openai client retries and honours
Retry-After (https://platform.openai.com/docs/api-reference/chat); every attempt it makes passes through
`ApiClient._send`, which counts it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from leeway.errors import LeewayError
from leeway.generation import masking
from leeway.generation.backend import CUT_THINKING, Choice, Conversation, Reply, Request, Tick, is_prefilled, spellings
from leeway.generation.thinking import without_thinking
from leeway.hashing import derive_seed, digest

Body = dict[str, Any]

MAX_REPLY_BYTES = 16 << 20  # of one body: more than any model's context takes as JSON
MAX_TOKEN_COUNT = 2**40  # a larger count in `usage` is an error of the endpoint
DEFAULT_OUTPUT_TOKENS = 2**17  # upper bound of a reply's length where the request sets none
TEMPLATE_TOKENS = 64  # upper bound of what a chat template adds to one message

_last_failure: ContextVar[str] = ContextVar("last_failure")  # of the current request's attempts
_last_body: ContextVar[Body | ReplyError] = ContextVar("last_body")  # of its successful one


@dataclass(frozen=True)
class ApiSettings:
    """An OpenAI-compatible endpoint, its model, its limits and its budget. Raises LeewayError if they are inconsistent.

    `key_env` names the environment variable with the key (empty: no key); the key is never part of the settings.
    `served` is the model name that every reply must carry (a dated one behind an alias); `version` is free text for
    what a name does not identify, such as the weights of a local server: both are part of the identity. `extra` is
    merged into every request body and overrides it; null removes a field. `retries` are the client's attempts after
    the first. `max_calls` counts attempts, retries included. `max_dollars` needs prices in dollars per million tokens.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 5
    max_calls: int | None = None
    max_dollars: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    served: str = ""
    version: str = ""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise LeewayError(f"endpoint of model {self.model!r}: {fault[0]}", fix=fault[1])

    def _fault(self) -> tuple[str, str] | None:
        """Return (what is wrong, the fix)."""
        url = urlsplit(self.base_url)
        if not self.model:
            return "no model name", "set model"
        if url.scheme not in ("http", "https") or not url.hostname:
            return f"base_url: {url.scheme}://{url.hostname or ''} is not a URL", "give http(s)://host/v1"
        if "@" in self.base_url or url.query:  # a password with a slash is no part of the host
            return "base_url holds a user, a password or a query", "put the key into the variable that key_env names"
        if fault := masking.variable_fault(self.key_env):
            return f"key_env {fault}", ""
        for name in ("concurrency", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                return f"{name}: {getattr(self, name)} is out of range", "give a number above 0"
        for name in ("retries", "max_calls", "max_dollars", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                return f"{name}: {value} is out of range", "give a number from 0"
        if self.max_dollars is not None and (self.price_in is None or self.price_out is None):
            return "max_dollars without prices", "set price_in and price_out, in dollars per million tokens"
        try:
            json.dumps(self.extra)
        except (TypeError, ValueError) as error:
            return f"extra cannot be sent ({error})", "give plain JSON values"
        return None

    @property
    def identity(self) -> str:
        """Hash of all settings that shape a reply: not the key, retries, limits or budget."""
        shape = (self.extra, self.served, self.version, self.limit_field)
        return digest("endpoint", self.base_url.rstrip("/"), self.model, *shape)

    def key(self) -> str:
        """Return the API key. Raises LeewayError if its variable is missing or malformed."""
        if not self.key_env:
            return "none"
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            what = f"endpoint of model {self.model!r}: the environment variable {self.key_env} is not set"
            fix = f"export {self.key_env}=…, or set key_env to the variable that holds the key (empty for none)"
            raise LeewayError(what, fix=fix)
        if not (key.isascii() and key.isprintable() and " " not in key):
            what = f"endpoint of model {self.model!r}: the value of {self.key_env} is not a valid key"
            raise LeewayError(what, fix="set it to the key alone, without spaces or quotes")
        return key

    @property
    def may_use_proxy(self) -> bool:
        return urlsplit(self.base_url).hostname not in ("localhost", "127.0.0.1", "::1")

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Return dollars; 0 without prices."""
        return ((self.price_in or 0.0) * tokens_in + (self.price_out or 0.0) * tokens_out) / 1e6


def check_access(settings: ApiSettings, timeout_s: float) -> None:
    """Ask an endpoint for its models. Raises LeewayError without a key, a connection, or if the key is refused.

    Any other answer passes: not every server lists its models, and the request is no completion, so it costs nothing.
    """
    openai, key = _openai_client(), settings.key()
    client = openai.OpenAI(
        api_key=key,
        base_url=settings.base_url,
        timeout=timeout_s,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=settings.may_use_proxy, follow_redirects=False),
    )
    with client:
        try:
            client.models.list()
        except openai.AuthenticationError:
            fix = f"check the value of {name}" if (name := settings.key_env) else "set key_env"
            raise LeewayError(f"{settings.base_url}: the key was refused (HTTP 401)", fix=fix) from None
        except openai.APIConnectionError:
            what = f"endpoint of model {settings.model!r}: {settings.base_url} cannot be reached"
            raise LeewayError(what, fix="start the server, or correct endpoint") from None
        except (openai.OpenAIError, ValueError):
            return


def _openai_client() -> Any:
    try:
        return import_module("openai")
    except ImportError as error:
        raise LeewayError("an endpoint needs the openai client", fix="pip install 'leeway[api]'") from error


@dataclass
class Spending:
    """Attempts, dollars and tokens since the backend was made."""

    calls: int = 0
    dollars: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


class SpendLimiter:
    """Admit an attempt only if the budget covers it and all attempts in flight at their upper bounds."""

    def __init__(self, settings: ApiSettings, spent: Spending) -> None:
        self.settings, self.spent = settings, spent
        self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()
        self._queue = asyncio.Lock()  # first in, first out

    async def acquire(self, bound: float) -> str:
        """Reserve `bound` dollars, waiting if an attempt in flight may free enough; return "" or why it is refused."""
        async with self._queue, self._changed:
            while True:
                if self.settings.max_calls is not None and self.spent.calls >= self.settings.max_calls:
                    return f"the budget of {self.settings.max_calls} calls is spent"
                limit = self.settings.max_dollars
                if limit is None or self.spent.dollars + self._reserved + bound <= limit:
                    break
                if not self._in_flight:
                    cost = f"${self.spent.dollars:.4g}, and the next could cost ${bound:.2g}"
                    return f"the budget of ${limit:g} is spent ({cost})"
                await self._changed.wait()
            self.spent.calls += 1
            self._in_flight += 1
            self._reserved += bound
            return ""

    async def release(self, bound: float, cost: float) -> None:
        """Replace a reservation by the actual cost, both in dollars."""
        async with self._changed:
            self._in_flight -= 1
            self._reserved = self._reserved - bound if self._in_flight else 0.0
            self.spent.dollars += cost
            self._changed.notify_all()


class ReplyError(Exception):
    """No usable reply; the message is the reason, in one printable line: it goes into rows, tables and terminals."""

    def __init__(self, reason: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in reason))


def parse_body(raw: bytes, key: str = "") -> Body:
    """Parse a JSON object.

    Raises ReplyError, also for lone surrogates, which no file can store, for absurd counts, and for one that quotes
    the API key, plain or encoded.
    """
    try:
        data = json.loads(raw)
        text = json.dumps(data, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise ReplyError("the reply is nested too deeply") from None
    except UnicodeEncodeError:
        raise ReplyError("the reply holds a lone surrogate") from None
    except ValueError:
        raise ReplyError("the reply is not JSON") from None
    if not isinstance(data, dict):
        raise ReplyError("the reply is not a JSON object")
    if masking.quotes(text, key):
        raise ReplyError("the reply quotes the API key")
    usage = data.get("usage")
    counts = usage.values() if isinstance(usage, dict) else ()
    if any(isinstance(n, int) and abs(n) > MAX_TOKEN_COUNT for n in counts):
        raise ReplyError("the endpoint's token count is out of range")
    return data


def token_usage(data: Body) -> tuple[int, int] | None:
    """Return (prompt tokens, completion tokens) as the endpoint reports them; None if it does not."""
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    tokens_in, tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(tokens_in, int) and isinstance(tokens_out, int) and tokens_in >= 0 and tokens_out >= 0):
        return None
    return tokens_in, tokens_out


class _AttemptRefused(BaseException):
    """No more attempts. Not an Exception, because some versions of the client retry after every Exception."""


class ApiClient:
    """One connection pool to an endpoint. Use it as an async context manager, inside one event loop."""

    def __init__(self, settings: ApiSettings, spent: Spending) -> None:
        openai: Any = _openai_client()
        self.settings, self.spent = settings, spent
        self._key = settings.key()
        self._limiter = SpendLimiter(settings, spent)
        attempt = self._send

        class LimitedClient(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]  # comes with the optional client
            async def send(self, request: Any, **options: Any) -> Any:
                return await attempt(super().send, request, options)

        self._openai = openai
        httpx = openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0]  # or httpx2
        self._httpx: Any = import_module(httpx)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=settings.base_url,
            timeout=settings.timeout_s,
            max_retries=settings.retries,
            http_client=LimitedClient(
                trust_env=settings.may_use_proxy,
                headers={"Accept-Encoding": "identity"},  # a small compressed body can expand without limit
                follow_redirects=False,  # a redirect would hand the prompt to another host
                limits=self._httpx.Limits(max_keepalive_connections=settings.concurrency),
            ),
        )

    async def __aenter__(self) -> ApiClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def post(self, body: Body) -> Body:
        """Request one chat completion. Raises ReplyError, or LeewayError if no request can succeed (wrong key)."""
        _last_failure.set("")
        try:
            # without the client's types: converting to and from them takes longer than the request itself
            await self._client.post("/chat/completions", cast_to=self._httpx.Response, body=body)
        except _AttemptRefused as refused:
            raise ReplyError(str(refused)) from None
        except self._openai.APIStatusError as error:
            raise ReplyError(self._status_failure(error) + _attempts(error)) from None
        except self._openai.APIConnectionError as error:
            raise ReplyError(_last_failure.get() + _attempts(error)) from None
        if isinstance(parsed := _last_body.get(), ReplyError):
            raise parsed
        return parsed

    async def _send(self, send: Callable[..., Awaitable[Any]], request: Any, options: dict[str, Any]) -> Any:
        """Send one attempt within its limits; the client retries after the httpx errors raised here.

        Cost: the endpoint's token counts, 0 for an HTTP error, the upper bound for everything that may be billed.
        """
        bound = self._max_cost(request.content)
        if refusal := await self._limiter.acquire(bound):
            previous = _last_failure.get()
            raise _AttemptRefused(f"{refusal} (before that: {previous})" if previous else refusal)
        cost = bound
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self._receive(await send(request, **options | {"stream": True}))
            if not response.is_success:
                _last_failure.set(f"HTTP {response.status_code}")
                cost = 0.0
            else:
                _last_body.set(parsed := self._parse(response.content))
                if not isinstance(parsed, ReplyError) and (usage := token_usage(parsed)):
                    cost = self.settings.price(*usage)
                    self.spent.tokens_in += usage[0]
                    self.spent.tokens_out += usage[1]
            return response
        except (TimeoutError, self._httpx.TimeoutException) as error:
            _last_failure.set(f"no answer within {self.settings.timeout_s:g} s")
            raise self._httpx.ReadTimeout("", request=request) from error
        except Exception as error:
            _last_failure.set(f"the connection broke ({type(error).__name__})")
            raise
        finally:
            await self._limiter.release(bound, cost)

    def _parse(self, raw: bytes) -> Body | ReplyError:
        try:
            return parse_body(raw, self._key)
        except ReplyError as error:
            return error

    async def _receive(self, response: Any) -> Any:
        """Read a body of at most MAX_REPLY_BYTES; refuse a compressed one."""
        try:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise _AttemptRefused("the endpoint compressed its reply")
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    raise _AttemptRefused(f"the endpoint sent more than {MAX_REPLY_BYTES >> 20} MiB")
        finally:
            await response.aclose()
        return self._httpx.Response(
            response.status_code, headers=response.headers, content=bytes(content), request=response.request
        )

    def _max_cost(self, content: bytes) -> float:
        """Return an upper bound in dollars: no tokenizer makes more tokens than bytes."""
        if not (self.settings.price_in or self.settings.price_out):
            return 0.0
        body = json.loads(content)
        limit = body.get(self.settings.limit_field)
        tokens_in = len(content) + TEMPLATE_TOKENS * len(body.get("messages") or ())
        return self.settings.price(tokens_in, limit if isinstance(limit, int) else DEFAULT_OUTPUT_TOKENS)

    def _status_failure(self, error: Any) -> str:
        """Describe an HTTP error without the key. Raises LeewayError if every request would fail the same way."""
        code, headers = int(error.status_code), error.response.headers
        if code == 401:
            fix = f"check the value of {name}" if (name := self.settings.key_env) else "set key_env"
            raise LeewayError(f"{self.settings.base_url}: the key was refused (HTTP 401)", fix=fix)
        if code == 404:
            what = f"{self.settings.base_url}: no model {self.settings.model!r}, or no such address (HTTP 404)"
            raise LeewayError(what, fix="check model and base_url (it ends before /chat/completions, usually with /v1)")
        reason = error.body.get("message") or error.body.get("detail") if isinstance(error.body, dict) else error.body
        if "location" in headers:
            reason = f"redirects are not followed: {headers['location']}"
        text = str(reason or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # no lone surrogates
        text = " ".join(masking.mask(text, self._key).split())[:200] or "no reason given"
        wait = masking.mask(headers.get("retry-after", ""), self._key)
        return f"HTTP {code}: {text}" + (f" (Retry-After: {wait[:40]})" if wait else "")


def _attempts(error: Any) -> str:
    """Return " (n attempts)" from the client's retry counter; "" after a single one."""
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return f" ({retries + 1} attempts)" if retries else ""


CONTINUE = "continue_final_message"  # field of a request to vLLM
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
        replies: dict[int, Reply] = {}

        def on_result(i: int, reply: Reply) -> None:
            replies[i] = without_thinking(reply, opened=self._opens_thought(requests[i]))
            on_reply(i, replies[i])

        bodies = map(self._completion_body, requests)  # as they are sent: all at once would fill the memory
        self._request_all(bodies, len(requests), parse_reply, lambda failure: Reply("", 0, False, failure), on_result)
        return [replies[i] for i in range(len(requests))]

    def _opens_thought(self, request: Request) -> bool:  # noqa: ARG002 - an endpoint's template is unknown
        """Whether the rendered prompt ends inside a thought."""
        return False

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], on_choice: Callable[[int, Choice], None]
    ) -> list[Choice]:
        """Return one choice per conversation, in order; call `on_choice(index, choice)` as each arrives."""
        sampling = {"temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        choices: dict[int, Choice] = {}

        def on_result(i: int, choice: Choice) -> None:
            choices[i] = choice
            on_choice(i, choice)

        bodies = (self._body(c, 1, sampling) for c in conversations)
        parse = partial(parse_choice, options=options)
        self._request_all(bodies, len(conversations), parse, lambda failure: Choice({}, failure), on_result)
        return [choices[i] for i in range(len(conversations))]

    def _completion_body(self, request: Request) -> Body:
        if request.temperature == 0:
            return self._body(request.conversation, request.max_new_tokens, {"temperature": 0.0})
        seed = derive_seed("endpoint", request.seed, request.sample) % 2**31
        sampling = {"temperature": request.temperature, "top_p": 1.0, "seed": seed}
        return self._body(request.conversation, request.max_new_tokens, sampling)

    def _body(self, conversation: Conversation, limit: int, sampling: Body) -> Body:
        if is_prefilled(conversation):
            require_prefill(self.settings)
        messages = [dict(m) for m in conversation]
        first = next((m for m in messages if m["role"] == "user"), None)
        if first and self.prefix:
            first["content"] = self.prefix + first["content"]
        body = {"model": self.settings.model, "messages": messages, self.settings.limit_field: limit, **sampling}
        return {k: v for k, v in (body | self.settings.extra).items() if v is not None}

    def _request_all(
        self,
        bodies: Iterable[Body],
        n: int,
        parse: Callable[[Body], Parsed],
        failed: Callable[[str], Parsed],
        on_result: Callable[[int, Parsed], None],
    ) -> None:
        """Send all `n` in order, at most `concurrency` at once. An error or Ctrl-C cancels the requests in flight."""

        async def request_all() -> None:
            pending = iter(enumerate(bodies))
            async with ApiClient(self.settings, self.spent) as client:

                async def worker() -> None:
                    for i, body in pending:
                        try:
                            result = parse(self._checked(await client.post(body)))
                        except ReplyError as error:
                            result = failed(str(error))
                        on_result(i, result)

                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.settings.concurrency, n)):
                            group.create_task(worker())
                except BaseExceptionGroup as errors:
                    raise errors.exceptions[0] from None

        if n:
            _run(request_all())

    def _checked(self, data: Body) -> Body:
        name = str(data.get("model") or "")
        self.served |= {name} - {""}
        if self.settings.served and name != self.settings.served:
            raise ReplyError(f"the reply is from model {name or '(none)'}, not {self.settings.served}")
        return data


def require_prefill(settings: ApiSettings) -> None:
    """Raise LeewayError unless requests ask the endpoint to continue a started answer: the API itself cannot."""
    if not settings.extra.get(CONTINUE):
        what = f"endpoint of model {settings.model!r}: it cannot continue the beginning of an answer (prefill): the "
        what += f"protocol has no field for it, and extra does not set vLLM's, {CONTINUE}"
        raise LeewayError(what, fix="leave the prefill attacks out, or measure a local model or a study with vLLM")


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
    reasoning = message.get("reasoning_content") or message.get("reasoning")  # as servers with a parser return it
    reasoning, usage = reasoning if isinstance(reasoning, str) else "", token_usage(data)
    tokens = usage[1] if usage else 0
    if not text and reason == "length" and (reasoning or _reasoning_tokens(data)):
        return Reply("", tokens, True, CUT_THINKING, reasoning.strip())
    if text is None and reason == "length":
        text = ""  # the limit was reached before the answer began
    if not isinstance(text, str):
        raise ReplyError(f"the reply has no text (finish_reason {reason})")
    return Reply(text.strip(), tokens, reason == "length", None, reasoning.strip())


def _reasoning_tokens(data: Body) -> int:
    """Return the number of hidden reasoning tokens that the endpoint reports, or 0."""
    details = (data.get("usage") or {}).get("completion_tokens_details")
    count = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return count if isinstance(count, int) else 0


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
