"""What an endpoint sent, read: a reply, the probabilities of options, what it cost, or why it is no answer."""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from leeway.generation.backend import Choice, Reply, is_unicode

Body = dict[str, Any]

TOP = 20  # next tokens that endpoints tell the probability of, at most
REPLY_BYTES = 16 << 20  # of one body: more than any model's context takes as JSON
MOST_TOKENS = 2**40  # a count beyond is no count


@dataclass(frozen=True)
class Heard:
    """What one try brought: a body, or why there is none, whether to try again, and not before when."""

    data: Body | None = None
    why: str = ""
    again: bool = False
    wait_s: float = 0.0
    free: bool = False  # surely not billed


class NoAnswer(Exception):
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


def parsed(raw: bytes) -> Heard:
    """A body that is a JSON object; anything else is a failure, and may have been billed.

    Every text of an endpoint enters here: what no file can hold (a lone surrogate) is refused wherever it stands.
    """
    try:
        data = json.loads(raw)
        writable = is_unicode(json.dumps(data, ensure_ascii=False))
    except RecursionError:
        return Heard(why="what the endpoint sent is nested too deeply")
    except ValueError:
        return Heard(why="what the endpoint sent is not JSON")
    if not isinstance(data, dict):
        return Heard(why="what the endpoint sent is no JSON object")
    if not writable:
        return Heard(why="what the endpoint sent holds one half of a character")
    usage = data.get("usage")
    counts = usage.values() if isinstance(usage, dict) else ()
    if any(isinstance(n, int) and abs(n) > MOST_TOKENS for n in counts):
        return Heard(why="the endpoint's token count is out of range")
    return Heard(data=data)


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
        raise NoAnswer("what the endpoint sent holds no choices")
    return choices[0]


def reply_of(data: Body) -> Reply:
    """The text of an answer; a refusal in a field of its own is what the model said, and so an answer."""
    choice = _first(data)
    message, reason = choice.get("message"), str(choice.get("finish_reason"))
    if not isinstance(message, dict):
        raise NoAnswer("what the endpoint sent holds no message")
    if reason == "content_filter":
        raise NoAnswer("the endpoint's content filter stopped the answer")
    text = message.get("content")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    if text is None and reason == "length":
        text = ""  # the limit was reached before the answer began (in a thought, say)
    if not isinstance(text, str):
        raise NoAnswer(f"the endpoint sent no text (finish_reason {reason})")
    usage = usage_of(data)
    return Reply(text.strip(), usage[1] if usage else 0, reason == "length")


def choice_of(data: Body, options: Seq[str]) -> Choice:
    """exp(logprob) summed over an option's spellings, each with or without a space before it."""
    logprobs = _first(data).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        raise NoAnswer("the endpoint tells no logprobs")
    try:
        told = [(str(t["token"]), float(t["logprob"])) for t in content[0]["top_logprobs"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        told = []
    if not told or not all(p <= 1e-3 for _, p in told):  # NaN fails too
        raise NoAnswer("the endpoint's logprobs are none")
    top = sorted(told, key=lambda t: -t[1])[:TOP]
    mass = {}
    for option in options:
        forms = {option, option.lower(), option.upper()}
        mass[option] = math.fsum(math.exp(p) for t, p in top if _plain(t) in forms)
    return Choice(mass)


def _plain(token: str) -> str:
    """A token without the one space before it, in whichever way a tokenizer writes that."""
    return token[1:] if token[:1] in (" ", "▁", "Ġ") else token
