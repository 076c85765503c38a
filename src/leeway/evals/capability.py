"""Capability: tasks with checkable answers, and the rules that grade them.

GSM8K (Cobbe et al. 2021, arXiv 2110.14168): the final number of a chat answer.

- strict: the number after the first `####`, as published.
- flexible: that number if there is one, else the one that opens the last `\\boxed{}` with a number, else the one
  after the last "answer is", else the last number.

White space, bold marks, brackets, dollars and `\\text{` may precede a number and anything may follow it. After one of
the three marks a quotient (`\\frac{1}{2}`, `1/2`) counts as its value; a bare last number does not. Commas, `{,}`,
`\\,` and `\\!` group thousands; `−` is a minus. Numbers are compared by value: "5.0" = 5, "1,234" = 1234, "$5" = 5,
"50%" = 50.

SuperGPQA (arXiv 2502.14739): the letter of a chat answer; an answer without one is wrong.

- parity: the rule of the published evaluation (github.com/SuperGPQA/SuperGPQA, eval/eval.py), reimplemented. Letters
  A to J in any case, in the last line and then in the whole answer, after the first of three cues found: "the … answer
  (or option) is", "answer:", the start of the text; else the options' texts after the same cues. A lower-case letter
  counts as found and is never right. It reads "the answer is a mixture" as `a` and "I think (C)" as `I`.
- fixed: only the item's own letters, in upper case (or in brackets or a box), never a word:
  1. the last claim with exactly one letter wins: "answer is", "answer:", "option is", `\\boxed{`. The letter is in
     bold, brackets or a box, ends its clause, or is followed by an explanation ("C because"). "A or B" names none.
  2. a claim that opens with exactly one option's text names that option.
  3. without such a claim, the last line if it makes no claim: a letter that is all of it or its label ("C) …"); else
     the only letter in brackets or bold; else the only "option X"; else the only option whose text it contains.

exact: for the user's own files; numbers by value, other text by its letters and digits.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from functools import cache

from leeway.data.gsm8k import COMMAND, IN_BOX
from leeway.data.supergpqa import LETTERS
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals.eval import NO_ANSWER, ItemEval, Prompt, Row
from leeway.generation.backend import Backend, Conversation, Tick
from leeway.hashing import digest

Grade = Callable[[CapabilityItem, str], tuple[bool, str]]


@dataclass(frozen=True)
class Capability(ItemEval):
    """Items of one task and the rule that grades them; each item is its own cluster.

    `shots` are (question, answer) turns before every item. Raises LeewayError if a shot is one of the items.
    """

    task: str
    items: Seq[CapabilityItem]
    grader: str
    grade: Grade
    max_new_tokens: int
    name: str = "capability"
    shots: Seq[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        questions = {question for question, _ in self.shots}
        if twice := next((i for i in self.items if i.prompt in questions), None):
            what = f"evals.capability: {self.task}: item {twice.id} is among its own {len(self.shots)} shots"
            raise LeewayError(what, fix="draw the shots from other examples")

    @property
    def key(self) -> str:
        return f"{self.name}-{self.task}"

    @property
    def hash(self) -> str:
        before = [[list(shot) for shot in self.shots]] if self.shots else []
        return digest(self.name, self.grader, self.max_new_tokens, [asdict(i) for i in self.items], *before)

    def conversation(self, item: CapabilityItem) -> Conversation:
        """Return the shots as user and assistant turns, then the item's question."""
        turns = [(role, text) for shot in self.shots for role, text in zip(("user", "assistant"), shot, strict=True)]
        return [{"role": role, "content": text} for role, text in [*turns, ("user", item.prompt)]]

    def prompts(self) -> Iterator[Prompt]:
        yield from (Prompt(f"item {i.id}", self.conversation(i), self.max_new_tokens) for i in self.items)

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        before = [[list(shot) for shot in self.shots]] if self.shots else []
        template = digest(backend.template_hash, self.name, self.grader, *before)
        rows = []
        for item, reply in zip(self.items, backend.complete(self.requests(), tick), strict=True):
            right, raw = self.grade(item, reply.text) if reply.failure is None else (math.nan, "")
            reason = None if reply.failure is None else f"{NO_ANSWER}{reply.failure}"
            graded = {"score": float(right), "unscored_reason": reason, "judge": self.grader, "judge_raw": raw}
            rows.append(self.row(item.id, item.prompt, reply, template_hash=template, **graded))
        return rows


NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")
PLAIN = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARKUP = re.compile(rf"(?:[\s*_\\($]|{COMMAND})*")
VALUE = re.compile(MARKUP.pattern + r"([-+]?\\?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")
SLASH = re.compile(r"\s*/\s*(\d[\d,]*(?:\.\d+)?)")
FRACTION = re.compile(r"(?:[\s*_($]|\\[($\[])*([-+]?)\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
HASHES = re.compile("####+")
ANSWER_IS = re.compile(r"answer\s*(?:is\s*[:=]?|:|=)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{(" + IN_BOX + r")\}")


def plain(text: str) -> str:
    """Replace typographic and LaTeX minus signs and thousands separators by `-` and `,`."""
    text = text.replace("−", "-").replace("{,}", ",")
    return re.sub(r"(?<=\d),?\\[,;!](?=\d{3})", ",", text)


def number(text: str) -> Decimal | None:
    """Return the value of a number without commas and dollars; None if the text is not one."""
    bare = text.strip().replace("\\", "").replace("$", "")
    return Decimal(bare.replace(",", "")) if PLAIN.fullmatch(bare) else None


def opening(text: str) -> Decimal | None:
    """Return the quotient or number that a text opens with after markup; None without one."""
    if fraction := FRACTION.match(text):
        sign, *parts = (part or "" for part in fraction.groups())
        return _quotient(sign + "".join(parts[:2]).strip(), "".join(parts[2:]).strip())
    found = VALUE.match(text)
    if not found:
        return None
    over = SLASH.match(text, found.end())
    return _quotient(found[1], over[1]) if over else number(found[1])


def _quotient(above: str, below: str) -> Decimal | None:
    """Return a / b with enough digits to be exact for comparison; None if undefined."""
    a, b = number(above), number(below)
    if a is None or not b:
        return None
    with localcontext(prec=max(50, len(above) + len(below) + 10)):
        return a / b


def strict(response: str) -> Decimal | None:
    text = plain(response)
    for mark in HASHES.finditer(text):
        if (value := opening(text[mark.end() :])) is not None:
            return value
    return None


def flexible(response: str) -> Decimal | None:
    if (hashed := strict(response)) is not None:
        return hashed
    text = plain(response)
    boxed = [m[1] for m in BOXED.finditer(text)]
    stated = [text[m.end() :] for m in ANSWER_IS.finditer(text)]
    for after in (boxed, stated):
        if values := [v for v in map(opening, reversed(after)) if v is not None]:
            return values[0]
    numbers = [m for m in NUMBER.findall(text) if m]
    return number(numbers[-1]) if numbers else None


def grade_gsm8k(reference: str, response: str, rule: str = "flexible") -> tuple[bool, str]:
    """Return (correct by `rule`, both rules' verdicts as JSON)."""
    gold = number(plain(reference))
    if gold is None:
        raise ValueError(f"the reference {reference!r} is not a number")
    by_rule = {"strict": strict(response), "flexible": flexible(response)}
    raw = {k: {"found": None if v is None else str(v), "right": v == gold} for k, v in by_rule.items()}
    return by_rule[rule] == gold, json.dumps(raw, sort_keys=True)


# markup around a letter in the published rule
_COMMAND = r"\\(?:boxed|mathbf|mathrm|text)\{"
_OPEN = rf"(?:[*${{(\[\\]*?{_COMMAND})*[*${{(\[\\]*?\s*"
_CLOSE = r"[\\}$)\]]*(?:[\s:.*)]|$)"
_FIRST = rf"^(?:[^\w\r\n]*?(?={_COMMAND}){_OPEN}|[^\w\r\n]*\s*)"
_THE = r"[Tt]he\s+(?:\w+\s+)?(?:answer|option)(?:\w+\s+)?\s+"
LETTER_CUES = (rf"{_THE}is?:?\s*{_OPEN}", rf"answer[*\s]*:\s*{_OPEN}", _FIRST)
TEXT_CUES = (rf"{_THE}is:?\s*{_OPEN}", rf"(?i:answer)\s*{_OPEN}", _FIRST)


@cache
def _by_letter() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(f"{cue}([{LETTERS}]){_CLOSE}", re.IGNORECASE) for cue in LETTER_CUES)


def parity(response: str, options: Seq[str], *, five_shot: bool = False) -> str | None:
    """Return the letter by the published rule; with five shots the answer ends at a new `Question:`."""
    if five_shot:
        found = parity(response.split("Question:", maxsplit=1)[0], options)
        return parity(response, options) if found is None else found
    text = response.rstrip()
    last = text.split("\n")[-1]
    if (letter := _first(_by_letter(), (last, text))) is not None:
        return letter
    texts = "|".join(map(re.escape, options))
    text_match = _first([re.compile(f"{cue}({texts}){_CLOSE}") for cue in TEXT_CUES], (last, text))
    return LETTERS[list(options).index(text_match)] if text_match else None


def _first(patterns: Seq[re.Pattern[str]], texts: Seq[str]) -> str | None:
    found = (pattern.search(text) for text in texts for pattern in patterns)
    return next((m[1] for m in found if m), None)


CLAIM = re.compile(
    r"(?:\banswer\b|\b(?:option|choice)\b)[\s*_]*(?:is|would be|must be|should be|:|=)[\s*_]*:?\s*|\\boxed(?=\{)",
    re.IGNORECASE,
)
_MARKUP = (
    r"(?:[\s*_$]|\\?[(\[{]|\\(?:boxed|mathbf|mathrm|textbf|text)\s*\{|(?i:(?:the\s+)?(?:option|choice|letter)\b))*+"
)
LETTER = re.compile(rf"(?P<open>{_MARKUP})(?P<letter>[A-Ja-j])(?![\w'’])(?P<rest>[^\n]*)")
ENDS = re.compile(r"\s*(?:$|[.,;:!)\]}*_$\\(–—-](?!\w))")
LABEL = re.compile(r"\s*(?:$|[).:\]])")
WHY = re.compile(r"\s+(?:because|since|as|which|is|for|based)\b")
AND = re.compile(r"[\s*_$\\)\]}]*(?:,|/|&|\bor\b|\band\b)[\s*_$\\(\[{]*(?:or\s+|and\s+)?[\s*_$\\(\[{]*[A-J](?![\w'’])")
BRACKETED = re.compile(r"\(\s*([A-J])\s*\)|\[\s*([A-J])\s*\]|\*\*\s*([A-J])\s*[.:)]?\s*\*\*")
NAMED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+([A-J])(?![\w'’])")


def fixed(response: str, options: Seq[str]) -> str | None:
    """Return the option letter by the `fixed` rule; None if the answer names none or several."""
    for claim in reversed(list(CLAIM.finditer(response))):
        clause = response[claim.end() :].partition("\n")[0]
        if letter := _named(clause, options, ENDS, WHY) or _by_text(clause, options, re.Pattern.match):
            return letter
    lines = [line for line in response.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if CLAIM.search(last):
        return None
    if by_label := _named(last, options, LABEL, None):
        return by_label
    for pattern in (BRACKETED, NAMED):
        if letters := {"".join(filter(None, m.groups())) for m in pattern.finditer(last)}:
            return letters.pop() if len(letters) == 1 and letters <= set(LETTERS[: len(options)]) else None
    return _by_text(last, options, re.Pattern.search)


def _named(text: str, options: Seq[str], ends: re.Pattern[str], continues: re.Pattern[str] | None) -> str | None:
    """Return the only letter that a text opens with, if it is not part of a word."""
    found = LETTER.match(text)
    if not found or found["letter"].upper() not in LETTERS[: len(options)]:
        return None
    letter, rest = found["letter"], found["rest"]
    if AND.match(rest):
        return None
    bracketed = bool(re.search(r"[(\[{]", found["open"])) and bool(re.match(r"\s*[.:]?\s*[$\\]*[)\]}]", rest))
    if bracketed or (re.search(r"[*_$]$", found["open"]) and re.match(r"[.:)]?[*_$]", rest)):
        return letter.upper()
    if letter.islower():
        return None
    its_text = rest.strip(" .:)*-").startswith(options[LETTERS.index(letter)])
    return letter if ends.match(rest) or its_text or (continues and continues.match(rest)) else None


Find = Callable[[re.Pattern[str], str], re.Match[str] | None]


def _by_text(response: str, options: Seq[str], find: Find) -> str | None:
    """Return the option if the response contains (or opens with) exactly one; of nested ones, the longest counts."""
    text = _bare(response)
    spans: list[tuple[int, int, str]] = []
    for letter, option in zip(LETTERS, options, strict=False):
        bare = _bare(option)
        found = find(re.compile(rf"(?<![\w.\-]){re.escape(bare)}(?![\w%]|[.,]\d|\s*[\^/])"), text) if bare else None
        if found:
            spans.append((*found.span(), letter))
    longest = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[:2] != s[:2] for o in spans)]
    return longest[0][2] if len(longest) == 1 else None


def _bare(text: str) -> str:
    """Lower-case, collapse white space, drop dollars, bold marks and end punctuation."""
    folded = re.sub(r"\\[()\[\]]|[$*]", "", text).casefold()
    return " ".join(folded.split()).strip(" .,;:!\"'")


def grade_supergpqa(
    item: CapabilityItem, response: str, rule: str = "fixed", *, five_shot: bool = False
) -> tuple[bool, str]:
    """Return (correct by `rule`, both rules' verdicts as JSON); an answer without an option is wrong."""
    answer = response.split("Question:", maxsplit=1)[0] if five_shot else response
    by_rule = {"fixed": fixed(answer, item.options), "parity": parity(response, item.options, five_shot=five_shot)}
    raw = {k: {"found": v or "not found", "right": v == item.reference} for k, v in by_rule.items()}
    return by_rule[rule] == item.reference, json.dumps(raw, sort_keys=True)


def normal(text: str) -> str:
    """Normalise (NFKC) and lower-case; replace runs of other than letters and digits by one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def grade_exact(reference: str, response: str) -> tuple[bool, str]:
    """Grade a numeric reference as GSM8K does; any other must equal the whole answer."""
    if number(reference) is not None:
        return grade_gsm8k(reference, response)
    right = normal(reference) == normal(response)
    return right, json.dumps({"rule": "exact", "right": right}, sort_keys=True)
