"""SuperGPQA (arXiv 2502.14739): the letter of a chat answer, by two rules; an answer without one is wrong.

parity: what the benchmark's published evaluation reads (github.com/SuperGPQA/SuperGPQA, eval/eval.py), written anew.
Letters A to J, whatever their case, in the last line and then in the whole answer, by the first of three cues that is
there: "the … answer (or option) is", "answer:", the text's beginning. Where none is, the options' texts by the same
cues. A letter that is read in lower case counts as found and is never right. It reads "the answer is a mixture" as `a`
and "I think (C)" as `I`.

fixed: only the item's letters, in upper case (or in brackets or a box), and never a word:

1. the last claim that names one letter wins: "answer is", "answer:", "option is", `\\boxed{`. The letter is in bold,
   brackets or a box, or ends its clause, or goes on as an explanation ("C because"). "A or B" names none.
2. a claim that opens with exactly one option's text names that option.
3. where no claim names an option, the last line, if it makes none: a letter that is all of it or its label ("C) …");
   else the only letter in brackets or bold; else the only "option X"; else the only option whose text is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cache
from typing import Literal

from leeway.data.items import CapabilityItem
from leeway.data.supergpqa import LETTERS

Rule = Literal["parity", "fixed"]

# what may stand around a letter in the published rule
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
    """The letter as written, by the published rule; with five shots a new `Question:` ends the answer first."""
    if five_shot:
        found = parity(response.split("Question:", maxsplit=1)[0], options)
        return parity(response, options) if found is None else found
    text = response.rstrip()
    last = text.split("\n")[-1]
    if (letter := _first(_by_letter(), (last, text))) is not None:
        return letter
    texts = "|".join(map(re.escape, options))
    said = _first([re.compile(f"{cue}({texts}){_CLOSE}") for cue in TEXT_CUES], (last, text))
    return LETTERS[list(options).index(said)] if said else None


def _first(patterns: Seq[re.Pattern[str]], texts: Seq[str]) -> str | None:
    found = (pattern.search(text) for text in texts for pattern in patterns)
    return next((m[1] for m in found if m), None)


CLAIM = re.compile(
    r"(?:\banswer\b|\b(?:option|choice)\b)[\s*_]*(?:is|would be|must be|should be|:|=)[\s*_]*:?\s*|\\boxed(?=\{)",
    re.IGNORECASE,
)
_DRESS = (
    r"(?:[\s*_$]|\\?[(\[{]|\\(?:boxed|mathbf|mathrm|textbf|text)\s*\{|(?i:(?:the\s+)?(?:option|choice|letter)\b))*+"
)
LETTER = re.compile(rf"(?P<open>{_DRESS})(?P<letter>[A-Ja-j])(?![\w'’])(?P<rest>[^\n]*)")
ENDS = re.compile(r"\s*(?:$|[.,;:!)\]}*_$\\(–—-](?!\w))")
LABEL = re.compile(r"\s*(?:$|[).:\]])")
WHY = re.compile(r"\s+(?:because|since|as|which|is|for|based)\b")
AND = re.compile(r"[\s*_$\\)\]}]*(?:,|/|&|\bor\b|\band\b)[\s*_$\\(\[{]*(?:or\s+|and\s+)?[\s*_$\\(\[{]*[A-J](?![\w'’])")
BRACKETED = re.compile(r"\(\s*([A-J])\s*\)|\[\s*([A-J])\s*\]|\*\*\s*([A-J])\s*[.:)]?\s*\*\*")
NAMED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+([A-J])(?![\w'’])")


def fixed(response: str, options: Seq[str]) -> str | None:
    """The letter of the option that an answer names by the rule above; None where it names none, or several."""
    for claim in reversed(list(CLAIM.finditer(response))):
        said = response[claim.end() :].partition("\n")[0]
        letter = _named(said, options, ENDS, WHY) or _by_text(said, options, re.Pattern.match)
        if letter:
            return letter
    lines = [line for line in response.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if CLAIM.search(last):
        return None
    by_label = _named(last, options, LABEL, None)
    if by_label:
        return by_label
    for pattern in (BRACKETED, NAMED):
        letters = {"".join(filter(None, m.groups())) for m in pattern.finditer(last)}
        if letters:
            return letters.pop() if len(letters) == 1 and letters <= set(LETTERS[: len(options)]) else None
    return _by_text(last, options, re.Pattern.search)


def _named(said: str, options: Seq[str], ends: re.Pattern[str], goes_on: re.Pattern[str] | None) -> str | None:
    """The letter that a text opens with, where it is a letter and no word, and the only one."""
    found = LETTER.match(said)
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
    return letter if ends.match(rest) or its_text or (goes_on and goes_on.match(rest)) else None


Finds = Callable[[re.Pattern[str], str], re.Match[str] | None]


def _by_text(said: str, options: Seq[str], find: Finds) -> str | None:
    """The one option whose text stands in (or opens) a text; an option inside a longer one that also does is not it."""
    text = _bare(said)
    spans: list[tuple[int, int, str]] = []
    for letter, option in zip(LETTERS, options, strict=False):
        bare = _bare(option)
        found = find(re.compile(rf"(?<![\w.\-]){re.escape(bare)}(?![\w%]|[.,]\d|\s*[\^/])"), text) if bare else None
        if found:
            spans.append((*found.span(), letter))
    longest = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[:2] != s[:2] for o in spans)]
    return longest[0][2] if len(longest) == 1 else None


def _bare(text: str) -> str:
    """Lower case, one space between words, without dollars, bold marks and what ends a sentence."""
    folded = re.sub(r"\\[()\[\]]|[$*]", "", text).casefold()
    return " ".join(folded.split()).strip(" .,;:!\"'")


def grade(item: CapabilityItem, response: str, rule: Rule = "fixed", *, five_shot: bool = False) -> tuple[bool, str]:
    """(right by `rule`, both rules' verdicts as JSON): an answer in which no option is found is wrong."""
    answer = response.split("Question:", maxsplit=1)[0] if five_shot else response
    by_rule = {
        "fixed": fixed(answer, item.options),
        "parity": parity(response, item.options, five_shot=five_shot),
    }
    raw = {k: {"found": v or "not found", "right": v == item.reference} for k, v in by_rule.items()}
    return by_rule[rule] == item.reference, json.dumps(raw, sort_keys=True)
