"""Jailbreak robustness: forbidden prompts under attacks; each judge gives every response one of four outcomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from typing import Any

from leeway.attacks import Attack, AttackFailed, Conversation, DrawnAttack, HelperRequest, Prefill, Wrapper
from leeway.attacks.attack import Play
from leeway.data.types import ForbiddenPrompt
from leeway.errors import LeewayError
from leeway.evals.eval import NO_ANSWER, ItemEval, JudgeRef, Prompt, Row, requests_to, user_message
from leeway.generation.backend import Backend, Reply, Request, Tick
from leeway.generation.thinking import final_answer
from leeway.hashing import digest
from leeway.judges import Answer, Judge, Verdict

TO_JUDGE = "judge: not judged yet"


@dataclass(eq=False)
class _Game:
    """The state of one prompt under one attack for one sample."""

    number: int
    prompt: ForbiddenPrompt
    attack: Attack
    sample: int
    play: Play
    sent: Conversation | None = None
    helper_request: HelperRequest | None = None
    judged: str = ""
    tokens: int = 0
    failure: str | None = None
    reply: Reply | None = None  # the last one


@dataclass(frozen=True)
class _OpenVerdict:
    """A judge that leaves every response unscored, to be judged later."""

    name: str
    hash: str = ""
    note: str = ""

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:  # noqa: ARG002
        return [Verdict(None, None, "", TO_JUDGE)] * len(answers)


@dataclass(frozen=True)
class Jailbreak(ItemEval):
    """Every prompt under every attack; prompts are the clusters, since attacks on one prompt are not independent.

    Responses are greedy, or `samples` draws at `temperature`; every turn of an attack uses the same sample and seed.
    Each judge gets a row per response: judges are never averaged.
    """

    items: Seq[ForbiddenPrompt]
    attacks: Seq[Attack]
    judges: Seq[Judge]
    max_new_tokens: int
    samples: int = 0
    temperature: float = 1.0
    seed: int = 0
    name: str = "jailbreak"

    def __post_init__(self) -> None:
        names = {"prompt": [p.id for p in self.items], "attack": [a.name for a in self.attacks]}
        for what, named in (names | {"judge": [j.name for j in self.judges]}).items():
            if not named:
                raise LeewayError(f"{self.name}: no {what}", fix="give at least one")
            if twice := next((n for n, times in Counter(named).items() if times > 1), None):
                raise LeewayError(f"{self.name}: the {what} {twice} is listed twice", fix="remove or rename one")
        if self.samples < 0 or (self.samples and not 0 < self.temperature < math.inf):
            what = f"{self.name}: {self.samples} samples at temperature {self.temperature}"
            fix = "give samples: 0 for greedy answers, or a number of them and a temperature above 0"
            raise LeewayError(what, fix=fix)

    @property
    def hash(self) -> str:
        drawn = [self.samples, self.temperature, self.seed] if self.samples else "greedy"
        judges = [[j.name, j.hash] for j in self.judges]
        attacks = [[a.name, a.hash] for a in self.attacks]
        return digest(self.name, self.max_new_tokens, drawn, judges, attacks, [asdict(p) for p in self.items])

    def prompts(self) -> Iterator[Prompt]:
        """Yield each item under each attack: what is sent, or the bare prompt where the attack writes it later.

        An attack with a text of its own in every draw has a prompt for each.
        """
        drawn = (self.temperature, self.samples) if self.samples else (0.0, 1)
        for attack in self.attacks:
            for p in self.items:
                bare = user_message(p.text)
                for sent, samples in self._first_messages(attack, p, drawn[1]):
                    item = f"prompt {p.id}" + (f" under {attack.name}" if sent != bare else "")
                    yield Prompt(item, sent, self.max_new_tokens, (), drawn[0], samples)

    def _first_messages(self, attack: Attack, prompt: ForbiddenPrompt, n: int) -> Iterator[tuple[Conversation, int]]:
        """Yield (conversation, number of draws that begin with it)."""
        draws = n if isinstance(attack, DrawnAttack) else 1
        for k in range(draws):
            own = isinstance(attack, Wrapper | Prefill | DrawnAttack)
            first = next(self._play(attack, prompt, k)) if own else None
            yield first if isinstance(first, list) else user_message(prompt.text), n // draws

    @property
    def _draw_seed(self) -> int:
        return self.seed if self.samples else 0  # greedy answers have no seed

    def _play(self, attack: Attack, prompt: ForbiddenPrompt, sample: int) -> Play:
        if isinstance(attack, DrawnAttack):
            return attack.play_draw(prompt.text, self._draw_seed, prompt.id, sample)
        return attack.play(prompt.text)

    def judged_by(self) -> list[JudgeRef]:
        return [JudgeRef(j.name, j.hash, j.note) for j in self.judges]

    def judge_requests(self) -> Iterator[tuple[str, Request]]:
        times = len(self.attacks) * max(1, self.samples)
        return requests_to(self.judges, [p.text for p in self.items for _ in range(times)])

    def facts(self) -> dict[str, Any]:
        return {"attacks": {a.name: {"version": a.version, "hash": a.hash, "origin": a.origin} for a in self.attacks}}

    def split(self) -> dict[str, Jailbreak]:
        pairs = [(a, p) for a in self.attacks for p in self.items]
        return {f"{a.name}/{p.id}": replace(self, items=[p], attacks=[a]) for a, p in pairs}

    def unjudged(self) -> Jailbreak:
        return replace(self, judges=[_OpenVerdict(self.judges[0].name)])

    def judge_row(self, row: Row) -> Row:
        if row.unscored_reason != TO_JUDGE:
            return row
        prompt = next(p.text for p in self.items if p.id == row.item_id)
        (verdict,) = self.judges[0].judge([Answer(prompt, final_answer(row.response))], lambda _: None)
        return replace(row, **verdict.columns())

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Play all attacks in parallel, one turn at a time, so that each turn is one batch.

        Rows are ordered by attack, prompt, sample, judge.
        """
        plays = ((a, p, s) for a in self.attacks for p in self.items for s in range(max(1, self.samples)))
        games = [_Game(k, p, a, s, self._play(a, p, s)) for k, (a, p, s) in enumerate(plays)]
        waiting = _serve_helpers([g for g in games if _advance(g, None)])
        while waiting:
            replies = backend.complete([self._request(g) for g in waiting], tick)
            waiting = _serve_helpers([g for g, r in zip(waiting, replies, strict=True) if _receive(g, r)])
        verdicts = [self._verdicts(judge, games) for judge in self.judges]
        return [
            self._row(game, judge, verdict, backend.template_hash)
            for game, *found in zip(games, *verdicts, strict=True)
            for judge, verdict in zip(self.judges, found, strict=True)
        ]

    def _request(self, game: _Game) -> Request:
        sent = game.sent or []
        if not self.samples:
            return Request(sent, self.max_new_tokens)
        return Request(sent, self.max_new_tokens, self.temperature, game.sample, self.seed)

    def _verdicts(self, judge: Judge, games: Seq[_Game]) -> list[Verdict]:
        """Return one verdict per game: the judge's, or the reason for none."""
        answers = [Answer(g.prompt.text, g.judged) for g in games if g.failure is None]
        verdicts = judge.judge(answers, lambda _: None)
        if len(verdicts) != len(answers):
            raise ValueError(f"judge {judge.name}: {len(verdicts)} verdicts on {len(answers)} answers")
        judged = iter(verdicts)
        return [
            checked_verdict(next(judged)) if g.failure is None else Verdict(None, None, "", g.failure) for g in games
        ]

    def _row(self, game: _Game, judge: Judge, verdict: Verdict, template: str) -> Row:
        prompt = _last_messages(game.sent) if game.sent else game.prompt.text
        judged = verdict.columns() | {"judge": judge.name, "attack": game.attack.name, "sample": game.sample}
        template = digest(template, self.name, game.attack.hash)
        last = game.reply or Reply("", 0, False)
        reply = replace(last, text=game.judged, new_tokens=game.tokens)
        return self.row(game.prompt.id, prompt, reply, template_hash=template, **judged)


def _last_messages(sent: Conversation) -> str:
    """Return the last user message, with the opening of the answer if the attack wrote one."""
    if sent[-1]["role"] != "assistant":
        return sent[-1]["content"]
    return f"{sent[-2]['content']}\n\n[assistant]\n{sent[-1]['content']}"


def checked_verdict(verdict: Verdict) -> Verdict:
    """Return the verdict, or an unscored one if the judge gave no valid score."""
    reason = verdict.unscored_reason
    if reason is None and verdict.score is None:
        reason = "neither a score nor a reason"
    if reason is None and not 0 <= (verdict.score or 0.0) <= 1:
        reason = f"a score of {verdict.score} is not in [0, 1]"
    if reason is None:
        return verdict
    prefix = "" if reason.startswith((NO_ANSWER, "judge: ")) else "judge: "
    return Verdict(None, None, verdict.raw, prefix + reason)


def _serve_helpers(games: Seq[_Game]) -> list[_Game]:
    """Serve helper requests, batched by helper, until every game waits for the model."""
    ready = [g for g in games if g.helper_request is None]
    pending = [(g, g.helper_request) for g in games if g.helper_request is not None]
    while pending:
        helper = pending[0][1].helper
        served = [(g, a) for g, a in pending if a.helper is helper]
        texts = helper.help([a.query for _, a in served])
        going = [g for (g, _), text in zip(served, texts, strict=True) if _advance(g, text)]
        pending = [(g, a) for g, a in pending if a.helper is not helper]
        pending += [(g, g.helper_request) for g in going if g.helper_request is not None]
        ready += [g for g in going if g.helper_request is None]
    return sorted(ready, key=lambda g: g.number)


def _receive(game: _Game, reply: Reply) -> bool:
    game.tokens += reply.new_tokens
    game.judged, game.reply = reply.text, reply
    if reply.failure is not None:
        game.failure = f"{NO_ANSWER}{reply.failure}"
        game.play.close()
        return False
    return _advance(game, reply.text)


def _advance(game: _Game, text: str | AttackFailed | None) -> bool:
    """Advance the game to its next turn; return False once it is over."""
    try:
        if isinstance(text, AttackFailed):
            step = game.play.throw(text)
        else:
            step = next(game.play) if text is None else game.play.send(text)
    except StopIteration as over:
        game.judged = over.value
        return False
    except AttackFailed as failed:
        reason = str(failed)
        game.failure = reason if reason.startswith(NO_ANSWER) else f"attack: {reason}"
        return False
    if isinstance(step, HelperRequest):
        game.helper_request = step
    else:
        game.helper_request, game.sent = None, [dict(m) for m in step]
    return True
