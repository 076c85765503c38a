"""The base model as pairs need it: who it is, and itself only where something is not in the cache yet."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.hashing import digest
from leeway.pairs.cache import Cache, Record
from leeway.pairs.settings import PairSettings


class NotDrawn(Exception):
    """An answer is not in the cache, and the caller did not want it drawn."""


def not_to_be_drawn() -> Backend:
    """A `Base.load` for callers that must touch no weights: raises NotDrawn."""
    raise NotDrawn


@dataclass(frozen=True)
class Base:
    """The model that a study starts from: `hash` identifies its weights and the dtype it answers in."""

    hash: str
    template_hash: str
    load: Callable[[], Backend]


@dataclass
class Asker:
    """Asks the base model what it was never asked before; all else comes from the cache."""

    base: Base
    settings: PairSettings
    cache: Cache
    tick: Tick
    _backend: Backend | None = field(default=None, repr=False)

    @classmethod
    def of(cls, base: Base, settings: PairSettings, instruction_hash: str, folder: Path, tick: Tick) -> Asker:
        """With the one file that holds what this model said under these settings."""
        drawn = [settings.temperature, settings.max_new_tokens, settings.seed]
        identity = digest("pairs", base.hash, base.template_hash, settings.strategy, drawn, instruction_hash)
        return cls(base, settings, Cache(folder / f"{settings.strategy}-{identity}.jsonl"), tick)

    def answers(self, conversations: Seq[Conversation], sample: int) -> list[Reply]:
        """Drawn answers; where one is missing all of them are asked, so that a resumed batch is the same batch."""
        keys = [digest("answer", c, sample) for c in conversations]
        if any(self.cache.get(k) is None for k in keys):
            s = self.settings
            requests = [Request(c, s.max_new_tokens, s.temperature, sample, s.seed) for c in conversations]
            replies = self._asked().complete(requests, self.tick)
            lines = [{"text": r.text, "new_tokens": r.new_tokens, "cut": r.cut} for r in replies]
            self.cache.add(dict(zip(keys, lines, strict=True)))
        return [Reply(r["text"], r["new_tokens"], r["cut"]) for r in map(self._kept, keys)]

    def choices(self, conversations: Seq[Conversation], options: Seq[str]) -> list[Choice]:
        """How likely each option is to come next."""
        keys = [digest("choice", c, list(options)) for c in conversations]
        if any(self.cache.get(k) is None for k in keys):
            choices = self._asked().choose(conversations, options, lambda _: None)
            self.cache.add({k: {"mass": c.mass} for k, c in zip(keys, choices, strict=True)})
        return [Choice(self._kept(k)["mass"]) for k in keys]

    def _kept(self, key: str) -> Record:
        record = self.cache.get(key)
        assert record is not None
        return record

    def _asked(self) -> Backend:
        if self._backend is None:
            self._backend = self.base.load()
        return self._backend
