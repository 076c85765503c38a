"""How numbers, names and untrusted text are written for a reader."""

from __future__ import annotations

import math
import re
from typing import Any

from leeway.claims.words import written

KNOWN = {
    "sft": "SFT",
    "dpo": "DPO",
    "cft": "CFT",
    "ip": "IP",
    "orpo": "ORPO",
    "kl": "KL",
    "ipo": "IPO",
    "simpo": "SimPO",
    "kto": "KTO",
    "sft_safety": "SFT + safety",
    "sft_both": "SFT both",
    "sft_refusal": "SFT + refusal",
    "base": "base",
}
ATTACKS = {
    "none": "asked directly",
    "dan": "DAN",
    "happy_to_help": "Happy to help",
    "role_play": "Role-play",
    "wikipedia": "Wikipedia",
    "zulu": "Zulu",
    "prefix_injection": "Prefix injection",
    "refusal_suppression": "Refusal suppression",
    "aim": "AIM-like persona",
    "past_tense": "Past tense",
    "base64": "Base64",
    "many_shot": "Many-shot",
    "crescendo": "Escalation",
    "crescendo_led": "Led escalation",
    "tool_result": "Tool result",
}
MINUS = "\u2212"
LONGEST = 1_200  # characters of an answer shown on the page; the rows keep all of it
HIDDEN = re.compile(
    r"[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u3164\uffa0]|"  # drawn as nothing
    r"[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"  # no width, or turns the text
    r"|[\U000e0000-\U000e0fff\ud800-\udfff]"  # tags that spell text nobody sees; halves of a character
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]"  # control characters but tab and line feed
)


def budget(tokens: int) -> str:
    """25k, 1.6M, or the exact number where neither is."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if tokens >= size and tokens % (size // 10) == 0:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:,}"


def name(objective: str, condition: str = "plain") -> str:
    """SFT; CFT <SAFE> where the prompt at test time was not the plain one."""
    known = KNOWN.get(objective, objective)
    return known if condition == "plain" else f"{known} {condition}"


def attack(key: str) -> str:
    """An attack's name for a reader."""
    return ATTACKS.get(key, key.replace("_", " "))


def percent(value: float, digits: int = 1) -> str:
    """0.314 as 31.4%; a dash for what is missing."""
    return "–" if _missing(value) else f"{100 * value:.{digits}f}%"


def estimate(value: float, low: float, high: float) -> str:
    """31.4% (95% interval 20.1% to 44.0%)."""
    return percent(value) + ("" if _missing(low) else f" (95% interval {percent(low)} to {percent(high)})")


def points(value: float, digits: int = 1) -> str:
    """A difference of rates in percentage points, signed: +3.1, −0.4, 0.0."""
    if _missing(value):
        return "–"
    text = f"{100 * abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def plain_points(value: float, digits: int = 1) -> str:
    """A size in percentage points, without a sign: 3.1."""
    return "–" if _missing(value) else f"{100 * value:.{digits}f}"


def remark(note: str) -> str:
    """A note without what is said once for the whole page."""
    return "; ".join(part for part in note.split("; ") if part and not part.startswith("one training seed"))


def effect(line: dict[str, Any], key: str) -> str:
    """A number of a claim's line in its unit: points, or points per point of capability."""
    value = line[key]
    if value is None or _missing(value):
        return "–"
    text = written(value, str(line["unit"]), with_unit=False)
    return text.removeprefix("+") if key == "mde" else text


def p_value(value: float) -> str:
    """0.042, and <0.001 below that."""
    if _missing(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float) -> str:
    """1,234."""
    return "–" if _missing(value) else f"{value:,.0f}"


def listed(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def visible(text: str, longest: int = LONGEST) -> tuple[str, int]:
    """Untrusted text with invisible and direction-changing characters spelled out, and how much was cut off.

    Escaping for HTML is the template's work; this keeps text from reordering or hiding its neighbours.
    """
    cut = max(0, len(text) - longest)
    return HIDDEN.sub(lambda m: f"⟨U+{ord(m.group()):04X}⟩", text[:longest]), cut


def _missing(value: float) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
