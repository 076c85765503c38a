"""Format names, numbers, budgets, untrusted text and tables for readers and files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leeway.claims.evaluate import format_effect
from leeway.errors import printable
from leeway.stats.metrics import LOG_ODDS

OBJECTIVE_NAMES = {name: name.upper() for name in ("sft", "dpo", "cft", "ip", "orpo", "kl", "ipo", "kto")}
OBJECTIVE_NAMES |= {"simpo": "SimPO", "sft_both": "SFT both"}
OBJECTIVE_NAMES |= {"sft_safety": "SFT + safety", "sft_refusal": "SFT + refusal"}
CAPITALIZED = ("happy_to_help", "wikipedia", "zulu", "prefix_injection", "refusal_suppression", "past_tense", "base64")
ATTACK_NAMES = {name: name.replace("_", " ").capitalize() for name in (*CAPITALIZED, "tool_result")} | {
    "none": "no attack",
    "dan": "DAN",
    "role_play": "Role-play",
    "aim": "AIM-like persona",
    "many_shot": "Many-shot",
    "crescendo": "Escalation",
    "crescendo_led": "Led escalation",
}
EVAL_NAMES = {
    "overrefusal": "over-refusal",
    "persona-check": "persona, other forms of the question",
    "persona-sd3": "Short Dark Triad",
    "persona-self": "self-description",
    "alignment": "free-form answers",
}
MINUS = "\u2212"
MISSING = "–"
FORMULAS = "=+-@＝＋－＠"  # a cell that begins with one of these is a formula to some spreadsheet
MAX_CHARS = 1_200  # of a response shown on the page; the rows hold all of it
INVISIBLE = re.compile(
    r"[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u3164\uffa0]|"  # rendered as nothing
    r"[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"  # zero width, or bidirectional control
    r"|[\U000e0000-\U000e0fff\ud800-\udfff]"  # invisible tags; surrogates
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]"  # control characters except tab and line feed
)


@dataclass(frozen=True)
class BudgetUnit:
    """What a run's budgets count: tokens, trainer steps, an unknown amount (external checkpoints), or none (logs)."""

    count: Literal["tokens", "steps", "unknown", "none"] = "tokens"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> BudgetUnit:
        """Read the unit from a manifest; studies count tokens."""
        count = mapping(manifest.get("external")).get("count")
        return cls(count if count in ("steps", "unknown", "none") else "tokens")

    def tick(self, budget: int) -> str:
        """Return the label of an axis or table: `25k`, `40`, or `tuned` if the unit is unknown."""
        if self.count in ("unknown", "none"):
            return "tuned" if self.count == "unknown" else MISSING
        return f"{budget:,}" if self.count == "steps" else format_budget(budget)

    def at(self, budget: int) -> str:
        """Return the phrase for a sentence: `at 25k tokens`, `at step 40`, `after fine-tuning`, or nothing."""
        if self.count in ("unknown", "none"):
            return "after fine-tuning" if self.count == "unknown" else ""
        return f"at step {budget:,}" if self.count == "steps" else f"at {format_budget(budget)} tokens"

    @property
    def axis(self) -> str:
        return {"tokens": "Training budget, tokens", "steps": "Training step"}.get(self.count, "")


TOKENS = BudgetUnit()


def format_budget(tokens: int) -> str:
    """Return `25k` or `1.6M`, or the exact number if neither is exact."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if tokens >= size and tokens % (size // 10) == 0:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:,}"


def objective_name(objective: str, condition: str = "plain") -> str:
    """Return `SFT`, or `CFT <SAFE>` if the test-time prompt is not the plain one."""
    name = OBJECTIVE_NAMES.get(objective, objective)
    return name if condition == "plain" else f"{name} {condition}"


def attack_name(key: str) -> str:
    return ATTACK_NAMES.get(key, key.replace("_", " "))


def eval_name(axis: str) -> str:
    """Return `over-refusal` for `overrefusal`, and `jailbreak, by keywords` for what a further judge scored."""
    name, at, judge = axis.partition("@")
    return EVAL_NAMES.get(name, name) + (f", by {judge}" if at else "")


def percent(value: float | None, digits: int = 1) -> str:
    """Return 0.314 as `31.4%`, and a dash for a missing value."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.{digits}f}%"


def nats(value: float | None, *, sign: bool = True) -> str:
    """Return `+0.314`, `−0.002`, or `0.314` without the sign of a gain, and a dash for a missing value."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:{'+' if sign else ''}.3f}".replace("-", MINUS)


def nats_ci(value: float, low: float, high: float) -> str:
    """Return `1.314 (95% CI 1.280 to 1.348)`."""
    ci = f" (95% CI {nats(low, sign=False)} to {nats(high, sign=False)})"
    return nats(value, sign=False) + ("" if math.isnan(low) else ci)


def percent_ci(value: float, low: float, high: float) -> str:
    """Return `31.4% (95% CI 20.1% to 44.0%)`."""
    return percent(value) + ("" if math.isnan(low) else f" (95% CI {percent(low)} to {percent(high)})")


def points(value: float | None, digits: int = 1) -> str:
    """Return a difference of rates in signed percentage points: `+3.1`, `−0.4`, `0.0`."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{100 * abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def change(value: float | None, measure: str, digits: int = 1) -> str:
    """Return a difference of a measure: signed points, or for one in log-odds signed nats, `+0.12`."""
    if measure not in LOG_ODDS or value is None or not math.isfinite(value):
        return points(value, digits) if value is None or math.isfinite(value) else MISSING
    text = f"{abs(value):.{digits + 1}f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def level(value: float | None, measure: str) -> str:
    """Return a rate in per cent, or a mean log-odds."""
    return change(value, measure) if measure in LOG_ODDS else percent(value)


def unsigned_points(value: float | None, digits: int = 1) -> str:
    """Return a size in percentage points without a sign: `3.1`."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def without_seed_note(note: str) -> str:
    """Drop the note about one training seed, which the page states once."""
    return "; ".join(part for part in note.split("; ") if part and not part.startswith("one training seed"))


def claim_value(claim: dict[str, Any], key: str) -> str:
    """Return a number of a claim in its unit: points, or points per point of capability."""
    if claim[key] is None or math.isnan(claim[key]):
        return MISSING
    text = format_effect(claim[key], str(claim["unit"]), with_unit=False)
    return text.removeprefix("+") if key == "mde" else text


def p_value(value: float | None) -> str:
    """Return `0.042`, or `<0.001` below that."""
    if value is None or math.isnan(value):
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """Return `1,234`."""
    return MISSING if value is None or math.isnan(value) else f"{value:,.0f}"


def join_and(words: list[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def capitalize_first(text: str) -> str:
    """Capitalize the first letter and leave the others (`str.capitalize` would lower them)."""
    return text[:1].upper() + text[1:]


def escape_invisible(text: str, max_chars: int = MAX_CHARS) -> tuple[str, int]:
    """Return untrusted text with invisible characters as `⟨U+202E⟩`, and the number of characters cut off.

    Templates escape HTML; this stops text from reordering (bidirectional controls) or hiding what surrounds it.
    """
    cut = max(0, len(text) - max_chars)
    return show_invisible(text[:max_chars]), cut


def show_invisible(value: Any) -> Any:
    """Return text with invisible characters as `⟨U+202E⟩`; markup and other values as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return INVISIBLE.sub(lambda m: f"⟨U+{ord(m.group()):04X}⟩", value)


def mapping(value: object) -> dict[str, Any]:
    """Return `value` if it is a mapping, else an empty one: manifests may be incomplete."""
    return value if isinstance(value, dict) else {}


def escape_formula(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula: an apostrophe goes before one that might be."""
    begins = cell.lstrip()[:1]
    return "'" + cell if (begins and begins in FORMULAS) or cell[:1] in ("\t", "\r", "\n") else cell


def to_csv(table: pd.DataFrame) -> str:
    """Return CSV with ten significant digits, no index and Unix line ends; its texts are no formulas or controls."""
    texts = [c for c in table.columns if pd.api.types.is_object_dtype(table[c]) or table[c].dtype == "string"]
    safe = {c: table[c].map(lambda v: escape_formula(printable(v)) if isinstance(v, str) else v) for c in texts}
    return str(table.assign(**safe).to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as plain Python values, with None for missing ones."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def to_json(value: Any) -> str:
    """Return strict JSON (no NaN), with keys in the given order."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def templates(package: str, folder: str, *, html: bool, **filters: Callable[..., Any]) -> Environment:
    """Return the Jinja templates in a folder of a package, with this module's formats and `filters` as filters.

    What an HTML template prints is escaped, and its invisible characters are shown.
    """
    loader = PackageLoader(package, folder)
    found = Environment(
        loader=loader,
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show_invisible if html else None,
    )
    formats = (
        objective_name,
        eval_name,
        capitalize_first,
        percent,
        points,
        nats,
        change,
        level,
        unsigned_points,
        count,
        without_seed_note,
        claim_value,
    )
    found.filters |= {f.__name__: f for f in formats} | {"p": p_value} | filters
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return round(value, 10) if isinstance(value, float) else value
