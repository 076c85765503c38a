"""A judge that scores an answer only if its verdict is not in the cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from leeway.cache import RecordStore
from leeway.generation.backend import Tick
from leeway.hashing import digest
from leeway.judges.judge import Answer, Judge, Verdict


@dataclass(frozen=True)
class CachedJudge:
    """Send `judge` the answers whose verdicts are not in `cache`, each distinct answer once.

    A key covers the judge's hash, the prompt and the response. A whole call is judged as one batch and written at once.
    Verdicts for which `may_retry` holds, such as a failed request, are not cached.
    """

    judge_: Judge
    cache: RecordStore
    may_retry: Callable[[str | None], bool]

    @property
    def name(self) -> str:
        return self.judge_.name

    @property
    def hash(self) -> str:
        return self.judge_.hash

    @property
    def note(self) -> str:
        return self.judge_.note

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:
        """Return one verdict per answer, in order."""
        keys = [digest("verdict", self.hash, a.prompt, a.response) for a in answers]
        verdicts = {k: Verdict(**r) for k, r in self.cache.get(keys).items()}
        missing = {k: a for k, a in zip(keys, answers, strict=True) if k not in verdicts}
        if missing:
            new = dict(zip(missing, self.judge_.judge([*missing.values()], lambda _: None), strict=True))
            self.cache.put({k: asdict(v) for k, v in new.items() if not self.may_retry(v.unscored_reason)})
            verdicts |= new
        tick(len(answers))
        return [verdicts[k] for k in keys]
