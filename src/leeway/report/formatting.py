"""How numbers, names and untrusted text are written for a reader.

What a run's budgets count, in words: tokens, steps of somebody's trainer, or nothing that is known.

Tables as CSV files, and any file put in place whole or not at all.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from leeway.claims.evaluate import written

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


def format_budget(tokens: int) -> str:
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


@dataclass(frozen=True)
class Scale:
    """How a checkpoint's place in its training is written."""

    count: Literal["tokens", "steps", "unknown"] = "tokens"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Scale:
        """Read the unit of budgets from a manifest; without one, budgets are tokens."""
        known = manifest.get("external")
        count = known.get("count") if isinstance(known, dict) else None
        return cls("steps" if count == "steps" else "unknown" if count == "unknown" else "tokens")

    def tick(self, budget: int) -> str:
        """On an axis or in a table: 25k; 40; `tuned` where it is not known."""
        if self.count == "unknown":
            return "tuned"
        return f"{budget:,}" if self.count == "steps" else format_budget(budget)

    def at(self, budget: int) -> str:
        """In a sentence: `at 25k tokens`, `at step 40`, `after fine-tuning`."""
        if self.count == "unknown":
            return "after fine-tuning"
        return f"at step {budget:,}" if self.count == "steps" else f"at {format_budget(budget)} tokens"

    @property
    def axis(self) -> str:
        return {"tokens": "Training budget, tokens", "steps": "Training step", "unknown": ""}[self.count]


TOKENS = Scale()


def csv(table: pd.DataFrame) -> str:
    """Ten significant digits, no index, Unix line ends."""
    return str(table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, with null for what is missing."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def dump(value: Any) -> str:
    """JSON that any reader accepts: no NaN, keys in the order given."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return round(value, 10) if isinstance(value, float) else value


def unscored(rows: pd.DataFrame) -> pd.DataFrame:
    """How many answers of each evaluation have no score, and why; 0 where all have one."""
    table = rows.assign(missing=rows["score"].isna(), reason=rows["unscored_reason"].fillna("no reason given"))
    asked = table.groupby("eval").size().rename("answers")
    counts = table[table["missing"]].groupby(["eval", "reason"]).size().rename("unscored").reset_index()
    clean = pd.DataFrame({"eval": [e for e in asked.index if e not in set(counts["eval"])]})
    found = pd.concat([counts, clean.assign(reason="", unscored=0)], ignore_index=True)
    found = found.join(asked, on="eval").sort_values(["eval", "reason"])
    return found[["eval", "answers", "unscored", "reason"]].reset_index(drop=True)
