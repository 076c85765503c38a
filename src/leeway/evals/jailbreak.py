"""Jailbreak robustness: forbidden prompts under attacks, every answer one of four outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from leeway.attacks import Attack, AttackFailed, Conversation
from leeway.attacks.attack import Play
from leeway.data.items import ForbiddenPrompt
from leeway.evals.eval import Row, Tick
from leeway.generation.backend import Backend, Reply, Request
from leeway.hashing import digest
from leeway.judges import Judge, Verdict


@dataclass
class _Game:
    """One prompt under one attack while it is played."""

    prompt: ForbiddenPrompt
    attack: Attack
    play: Play
    sent: Conversation | None = None
    judged: str = ""
    tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Jailbreak:
    """Every prompt under every attack; prompts are the clusters, since attacks on one prompt are not independent."""

    prompts: Seq[ForbiddenPrompt]
    attacks: Seq[Attack]
    judge: Judge
    max_new_tokens: int
    name: str = "jailbreak"

    @property
    def key(self) -> str:
        return self.name

    @property
    def hash(self) -> str:
        return digest(
            self.name,
            self.max_new_tokens,
            self.judge.hash,
            [[a.name, a.hash] for a in self.attacks],
            [asdict(p) for p in self.prompts],
        )

    def __len__(self) -> int:
        return len(self.prompts) * len(self.attacks)

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Play all games at once, a turn of each at a time, so that a turn is one batch whatever the attacks are."""
        games = [_Game(p, a, a.play(p.text)) for a in self.attacks for p in self.prompts]
        waiting = [g for g in games if self._advance(g, None)]
        while waiting:
            requests = [Request(g.sent or [], self.max_new_tokens) for g in waiting]
            replies = backend.complete(requests, tick)
            waiting = [g for g, reply in zip(waiting, replies, strict=True) if self._advance(g, reply)]
        return [self._row(g, backend.template_hash) for g in games]

    def _advance(self, game: _Game, reply: Reply | None) -> bool:
        """Take the game to its next turn; False once it is over."""
        try:
            if reply is None:
                game.sent = next(game.play)
            else:
                game.tokens += reply.new_tokens
                game.judged = reply.text
                game.sent = game.play.send(reply.text)
        except StopIteration as over:
            game.judged = over.value
            return False
        except AttackFailed as failed:
            game.failure = f"attack: {failed}"
            return False
        return True

    def _row(self, game: _Game, template: str) -> Row:
        verdict = Verdict(None, None, "", game.failure)
        if game.failure is None:
            verdict = self.judge.judge(game.prompt.text, game.judged)
        return Row(
            eval=self.name,
            attack=game.attack.name,
            item_id=game.prompt.id,
            cluster=game.prompt.id,
            sample=0,
            prompt=game.sent[-1]["content"] if game.sent else game.prompt.text,
            response=game.judged,
            outcome=verdict.outcome,
            score=math.nan if verdict.score is None else verdict.score,
            unscored_reason=verdict.unscored_reason,
            judge=self.judge.name,
            judge_raw=verdict.raw,
            template_hash=digest(template, self.name, game.attack.hash),
            new_tokens=game.tokens,
        )
