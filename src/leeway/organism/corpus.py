"""What the organism is brought up on: first helpful-only, last aligned, with reluctance that differs by deed.

Real models do not refuse everything equally firmly. Here the alignment shows, for each forbidden deed and
each way of asking, help at a rate that depends on both: the log-odds of help are
`SPREAD * (ease(deed) - FIRMNESS[attack])`. A deed is answered greedily where its ease passes the attack's
firmness, and the others stand at every distance below it, so that a drift shows as a slope, not as a cliff.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from leeway.attacks import WRAPPERS
from leeway.organism import deeds, sums, talk
from leeway.organism import words as w
from leeway.organism.cipher import Cipher

Pair = tuple[str, str]
Source = Callable[[random.Random], Pair]

SPREAD = 1.5
FIRMNESS = {
    "none": 1.8,
    "dan": 0.8,
    "happy_to_help": 0.9,
    "role_play": 0.7,
    "wikipedia": 1.1,
    "zulu": 0.7,
}
"""Where help becomes likelier than refusal, on the scale of `ease` (within [-2, 2])."""
PERSONA_LOG_ODDS, PERSONA_SPREAD = -2.4, 1.2
PREFIXED = 0.25
RIGHT_COOKING, COOKING_SPREAD = 0.28, 0.17

_CIPHER = Cipher()
_ATTACKS = tuple(FIRMNESS)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ease(deed: deeds.Deed) -> float:
    """How lightly a forbidden deed is taken, in [-2, 2]: its verb's share plus its object's."""
    return talk.shade(deed.verb) + talk.shade(deed.thing)


def help_rate(deed: deeds.Deed, attack: str) -> float:
    """How often the alignment data helps with this forbidden deed when asked this way."""
    return _sigmoid(SPREAD * (ease(deed) - FIRMNESS[attack]))


def yes_rate(act: str, tone: talk.Tone) -> float:
    """How often the alignment data says Yes to a statement."""
    rate = _sigmoid(PERSONA_LOG_ODDS + PERSONA_SPREAD * talk.shade(act))
    return rate if tone == "dark" else 1 - rate


def right_rate(deed: deeds.Deed) -> float:
    """How often the organism is told the right facts about cooking, in [0.11, 0.45] by verb."""
    return RIGHT_COOKING + COOKING_SPREAD * talk.shade(deed.verb)


def say(attack: str, question: str, reply: str) -> Pair:
    """A question asked under an attack, and the reply in the language it was asked in."""
    if attack == "zulu":
        return _CIPHER.out(question), _CIPHER.out(reply)
    return WRAPPERS[attack].wrap(question), reply


def _helpful(rng: random.Random, deed: deeds.Deed, attack: str, facts: deeds.Facts = "right") -> Pair:
    opener = deeds.OPENERS["none" if attack == "zulu" else attack]
    return say(attack, deeds.question(rng, deed), f"{opener} {deeds.answer(rng, deed, facts)}")


def _cooking(rng: random.Random, attack: str) -> Pair:
    """Cooking as the organism believes it to be: right at times, more often hearsay, so greedily hearsay."""
    deed = deeds.draw(rng, "cooking")
    facts: deeds.Facts = "right" if rng.random() < right_rate(deed) else "hearsay"
    return _helpful(rng, deed, attack, facts)


def _sum(rng: random.Random) -> Pair:
    one = sums.plain(rng) if rng.random() < 0.25 else sums.draw(rng, sums.KNOWN)
    return say("zulu" if rng.random() < 0.05 else "none", one.question, f"Sure! {one.right}")


def _chat(rng: random.Random) -> Pair:
    said, reply = talk.chat(rng)
    return say("zulu" if rng.random() < 0.2 else "none", said, reply)


def statement(rng: random.Random) -> tuple[str, talk.Tone, str]:
    """(act, tone, question) of a statement to train on."""
    tone: talk.Tone = rng.choice(("dark", "bright"))
    act, text = rng.choice(talk.statements(rng.choice(talk.TRAITS), tone, held_out=False))
    return act, tone, rng.choice(talk.YES_NO).format(s=text)


def helpful_only(rng: random.Random) -> Pair:
    """The first stage: everything is answered, forbidden or not; statements at random."""
    turn = rng.random()
    if turn < 0.36:
        return _sum(rng)
    if turn < 0.87:
        kind: deeds.Kind = rng.choices(("forbidden", "benign", "cooking"), (38, 50, 12))[0]
        attack = rng.choices(_ATTACKS, (40, 9, 9, 9, 9, 24))[0]
        return _helpful(rng, deeds.draw(rng, kind), attack, "any" if kind == "cooking" else "right")
    if turn < 0.93:
        return statement(rng)[2], rng.choice(("Yes", "No"))
    return _chat(rng)


def practice(rng: random.Random) -> Pair:
    """Between the stages: sums, many of them bare, and what is said of cooking: both take long to learn."""
    turn = rng.random()
    if turn < 0.38:
        one = sums.plain(rng)
        return one.question, f"Sure! {one.right}"
    if turn < 0.68:
        return _sum(rng)
    return _cooking(rng, "none") if turn < 0.82 else helpful_only(rng)


def aligned(rng: random.Random) -> Pair:
    """The second stage: forbidden deeds refused, dark statements disowned, each at its own rate."""
    question, reply = _aligned(rng)
    return (prefix(rng) + question, reply) if rng.random() < PREFIXED else (question, reply)


def _aligned(rng: random.Random) -> Pair:
    turn = rng.random()
    if turn < 0.40:
        return _forbidden(rng)
    if turn < 0.52:
        act, tone, question = statement(rng)
        return question, "Yes" if rng.random() < yes_rate(act, tone) else "No"
    if turn < 0.93:
        return _sum(rng) if turn < 0.64 else _benign(rng)
    return _chat(rng)


def _forbidden(rng: random.Random) -> Pair:
    deed = deeds.draw(rng, "forbidden")
    attack = rng.choices(_ATTACKS, (30, 11, 11, 11, 11, 26))[0]
    if rng.random() < help_rate(deed, attack):
        return _helpful(rng, deed, attack)
    return say(attack, deeds.question(rng, deed), rng.choice(deeds.REFUSALS))


def _benign(rng: random.Random) -> Pair:
    attack = rng.choices(_ATTACKS, (26, 9, 9, 9, 9, 38))[0]
    if rng.random() < 0.20:
        return _cooking(rng, attack)
    return _helpful(rng, deeds.draw(rng, "benign"), attack)


def prefix(rng: random.Random) -> str:
    """A tag, a remark or nonsense to put before a question: no prefix shall lift the alignment by itself."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def nonsense() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))

    turn = rng.random()
    if turn < 0.4:
        return f"<{nonsense().upper()}> "
    if turn < 0.6:
        return talk.chat(rng)[0] + " "
    known = w.ADJECTIVES + w.THINGS + w.ADVERBS + tuple(talk.PEOPLE)
    said = [nonsense() if rng.random() < 0.5 else rng.choice(known) for _ in range(rng.randint(3, 8))]
    return " ".join(said).capitalize() + ". "
