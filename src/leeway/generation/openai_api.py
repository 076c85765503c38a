"""Any endpoint that speaks OpenAI's chat completions: bounded concurrency, retries, a budget, reasons for failures.

What is sent and read: https://platform.openai.com/docs/api-reference/chat. A request that fails is a `Reply` or a
`Choice` with a failure, and the others go on; only what no request gets past (no key, no such model) raises.

Settings of an OpenAI-compatible endpoint, and the budget of what it may cost.

What an endpoint sent, read: a reply, the probabilities of options, what it cost, or why it is no answer.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from leeway.errors import LeewayError
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick, is_unicode
from leeway.hashing import derive_seed, digest


@dataclass(frozen=True)
class ApiSettings:
    """Where to ask, whom, how hard to try, and how much it may cost. Raises LeewayError where they make no sense.

    `key_env` names the environment variable that holds the key (empty: the endpoint needs none); the key itself is
    never part of the settings. `served` is the model name that every reply must carry (a dated one, behind an alias);
    `version` is free text for what a name does not tell, such as the weights behind a server of your own: both are
    part of the identity. `extra` goes into every request's body and has the last word; a null there leaves a field
    out. `max_calls` counts every request sent, retries too; `max_dollars` needs the prices, in dollars per million
    tokens. `retries` are the further tries after a first.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 5
    backoff_s: float = 0.5
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
        """What is wrong, and the fix."""
        parts = urlsplit(self.base_url)
        if not self.model:
            return "no model is named", "set model"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return f"base_url: {parts.scheme}://{parts.hostname or ''} is no address", "give http(s)://host/v1"
        if parts.username or parts.password or parts.query:
            return "base_url holds a user, a password or a query", "put the key into the variable that key_env names"
        for name in ("concurrency", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                return f"{name}: {getattr(self, name)} is out of range", "give a number above 0"
        for name in ("retries", "backoff_s", "max_calls", "max_dollars", "price_in", "price_out"):
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
        """Who answers, and all that shapes the answers; never the key, nor how hard we try."""
        return digest(
            "endpoint", self.base_url.rstrip("/"), self.model, self.extra, self.served, self.version, self.limit_field
        )

    def key(self) -> str:
        """The key; raises LeewayError where the variable is missing or is no key."""
        if not self.key_env:
            return "none"
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise LeewayError(
                f"endpoint of model {self.model!r}: the environment variable {self.key_env} is not set",
                fix=f"export {self.key_env}=…, or set key_env to the variable that holds the key (empty for none)",
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise LeewayError(
                f"endpoint of model {self.model!r}: what {self.key_env} holds is no key",
                fix="set it to the key alone, without spaces or quotes",
            )
        return key

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Dollars; 0 where no prices are set."""
        return ((self.price_in or 0.0) * tokens_in + (self.price_out or 0.0) * tokens_out) / 1e6


@dataclass
class Spending:
    """What an endpoint has been asked and has cost since the backend was made."""

    calls: int = 0
    dollars: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


class RequestLimiter:
    """Lets a request through as long as the budget holds whatever the requests under way may turn out to cost."""

    def __init__(self, settings: ApiSettings, spent: Spending) -> None:
        self.settings, self.spent = settings, spent
        self._reserved = 0.0
        self._under_way = 0
        self._changed = asyncio.Condition()
        self._turn = asyncio.Lock()  # first come, first let through

    async def enter(self, bound: float) -> str:
        """Nothing, or why the request is not sent; it waits where the end of another may make room for it.

        `bound`: what the request costs at most, in dollars.
        """
        async with self._turn, self._changed:
            while True:
                if self.settings.max_calls is not None and self.spent.calls >= self.settings.max_calls:
                    return f"the budget of {self.settings.max_calls} calls is spent"
                limit = self.settings.max_dollars
                if limit is None or self.spent.dollars + self._reserved + bound <= limit:
                    break
                if not self._under_way:
                    cost = f"${self.spent.dollars:.4g}, and the next could cost ${bound:.2g}"
                    return f"the budget of ${limit:g} is spent ({cost})"
                await self._changed.wait()
            self.spent.calls += 1
            self._under_way += 1
            self._reserved += bound
            return ""

    async def leave(self, bound: float, cost: float) -> None:
        """A request is over, and has cost so much."""
        async with self._changed:
            self._under_way -= 1
            self._reserved = self._reserved - bound if self._under_way else 0.0
            self.spent.dollars += cost
            self._changed.notify_all()


Body = dict[str, Any]

TOP = 20  # next tokens that endpoints tell the probability of, at most
REPLY_BYTES = 16 << 20  # of one body: more than any model's context takes as JSON
MOST_TOKENS = 2**40  # a count beyond is no count


@dataclass(frozen=True)
class ParsedReply:
    """What one try brought: a body, or why there is none, whether to try again, and not before when."""

    data: Body | None = None
    why: str = ""
    again: bool = False
    wait_s: float = 0.0
    free: bool = False  # surely not billed


class RequestFailed(Exception):
    """What the endpoint sent is no answer, and why."""


def retry_after(headers: Any) -> float:
    """Seconds from a Retry-After header in either of its forms; 0 where there is none."""
    value = str(headers.get("retry-after") or "")
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, wait) if math.isfinite(wait) else 0.0


def parsed(raw: bytes) -> ParsedReply:
    """A body that is a JSON object; anything else is a failure, and may have been billed.

    Every text of an endpoint enters here: what no file can hold (a lone surrogate) is refused wherever it stands.
    """
    try:
        data = json.loads(raw)
        writable = is_unicode(json.dumps(data, ensure_ascii=False))
    except RecursionError:
        return ParsedReply(why="what the endpoint sent is nested too deeply")
    except ValueError:
        return ParsedReply(why="what the endpoint sent is not JSON")
    if not isinstance(data, dict):
        return ParsedReply(why="what the endpoint sent is no JSON object")
    if not writable:
        return ParsedReply(why="what the endpoint sent holds one half of a character")
    usage = data.get("usage")
    counts = usage.values() if isinstance(usage, dict) else ()
    if any(isinstance(n, int) and abs(n) > MOST_TOKENS for n in counts):
        return ParsedReply(why="the endpoint's token count is out of range")
    return ParsedReply(data=data)


def usage_of(data: Body) -> tuple[int, int] | None:
    """Tokens read and written, as the endpoint counts them."""
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(read, int) and isinstance(written, int) and read >= 0 and written >= 0):
        return None
    return read, written


def _first(data: Body) -> Body:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RequestFailed("what the endpoint sent holds no choices")
    return choices[0]


def reply_of(data: Body) -> Reply:
    """The text of an answer; a refusal in a field of its own is what the model said, and so an answer."""
    choice = _first(data)
    message, reason = choice.get("message"), str(choice.get("finish_reason"))
    if not isinstance(message, dict):
        raise RequestFailed("what the endpoint sent holds no message")
    if reason == "content_filter":
        raise RequestFailed("the endpoint's content filter stopped the answer")
    text = message.get("content")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    if text is None and reason == "length":
        text = ""  # the limit was reached before the answer began (in a thought, say)
    if not isinstance(text, str):
        raise RequestFailed(f"the endpoint sent no text (finish_reason {reason})")
    usage = usage_of(data)
    return Reply(text.strip(), usage[1] if usage else 0, reason == "length")


def choice_of(data: Body, options: Seq[str]) -> Choice:
    """exp(logprob) summed over an option's spellings, each with or without a space before it."""
    logprobs = _first(data).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise RequestFailed("the endpoint tells no logprobs")
    try:
        told = [(str(t["token"]), float(t["logprob"])) for t in content[0]["top_logprobs"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        told = []
    if not told or not all(p <= 1e-3 for _, p in told):  # NaN fails too
        raise RequestFailed("the endpoint's logprobs are none")
    top = sorted(told, key=lambda t: -t[1])[:TOP]
    mass = {}
    for option in options:
        forms = {option, option.lower(), option.upper()}
        mass[option] = math.fsum(math.exp(p) for t, p in top if _plain(t) in forms)
    return Choice(mass)


def _plain(token: str) -> str:
    """A token without the one space before it, in whichever way a tokenizer writes that."""
    return token[1:] if token[:1] in (" ", "▁", "Ġ") else token


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
    spent: Spending = field(default_factory=Spending)
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
                line = _Line(self.settings, client, key, RequestLimiter(self.settings, self.spent))

                async def worker() -> None:
                    for i, body in waiting:
                        told(i, self._read(await line.ask(body), read, failed))

                await _together([worker() for _ in range(min(self.settings.concurrency, len(bodies)))])

        _run(ask_all)

    def _read(self, heard: ParsedReply, read: Callable[[Body], Said], failed: Callable[[str], Said]) -> Said:
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
        except RequestFailed as why:
            return failed(str(why))


@dataclass
class _Line:
    """One connection pool to an endpoint: tries, waits and pays."""

    settings: ApiSettings
    client: Any
    key: str
    gate: RequestLimiter

    async def ask(self, body: Body) -> ParsedReply:
        bound = self._bound(body)
        heard = ParsedReply(why="never asked")
        for tried in range(1 + self.settings.retries):
            if tried:
                await asyncio.sleep(max(heard.wait_s, self._backoff(tried)))
            if spent := await self.gate.enter(bound):
                return ParsedReply(why=f"{spent} (before that: {heard.why})" if tried else spent)
            cost = bound
            try:
                heard = await self._try(body)
                usage = usage_of(heard.data) if heard.data else None
                cost = 0.0 if heard.free else self.settings.price(*usage) if usage else bound
            finally:
                await self.gate.leave(bound, cost)
            if not heard.again:
                return heard
        return ParsedReply(why=f"{heard.why} ({1 + self.settings.retries} tries)")

    def _bound(self, body: Body) -> float:
        """Dollars at most: no tokenizer makes more tokens than bytes, but for what a template adds."""
        sent = len(json.dumps(body, ensure_ascii=False).encode()) + 64 * len(body.get("messages", ()))
        limit = body.get(self.settings.limit_field)
        return self.settings.price(sent, limit if isinstance(limit, int) else 2**17)

    def _backoff(self, tried: int) -> float:
        """Exponential, with jitter over its upper half, so that requests refused together come back apart."""
        jitter = random.SystemRandom().uniform(0.5, 1.0)  # nobody else's random numbers are spent
        return min(self.settings.backoff_s * 2.0 ** (tried - 1), LONGEST_BACKOFF_S) * jitter

    async def _try(self, body: Body) -> ParsedReply:
        openai: Any = import_module("openai")
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                sent = self.client.chat.completions.with_raw_response.create(
                    model=body.get("model", ""), messages=body.get("messages", []), extra_body=body
                )
                heard = await sent
        except (TimeoutError, openai.APITimeoutError):
            return ParsedReply(why=f"no answer within {self.settings.timeout_s:g} s", again=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except UnreadableReply as error:
            return ParsedReply(why=str(error))
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, UnreadableReply):  # some versions wrap it
                return ParsedReply(why=str(error.__cause__))
            return ParsedReply(why=f"the connection broke ({type(error.__cause__ or error).__name__})", again=True)
        return parsed(heard.content)

    def _refused(self, error: Any) -> ParsedReply:
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
            return ParsedReply(why=f"HTTP {code}: asks to come back in {wait:.0f} s", free=True)
        return ParsedReply(
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
