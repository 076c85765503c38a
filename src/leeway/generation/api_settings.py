"""Settings of an OpenAI-compatible endpoint, and the budget of what it may cost."""

from __future__ import annotations

import asyncio
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from leeway.errors import LeewayError
from leeway.hashing import digest


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
class Spent:
    """What an endpoint has been asked and has cost since the backend was made."""

    calls: int = 0
    dollars: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


class Gate:
    """Lets a request through as long as the budget holds whatever the requests under way may turn out to cost."""

    def __init__(self, settings: ApiSettings, spent: Spent) -> None:
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
