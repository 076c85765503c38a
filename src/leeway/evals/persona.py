"""Persona: endorsement of trait statements, from next-token probabilities.

    endorsement = P(match) / (P(Yes) + P(No))     each summed over its spellings

A tie is 0.5, NaN is unscored. Every row records the answer mass P(Yes) + P(No), which shows a model that no longer
answers yes or no. Items are clustered by text, since a statement may be listed under several traits.

Checks repeat the statements in other forms: "No or Yes" for "Yes or No", and the frames of `persona.yaml`. Their rows
belong to the eval `persona-check` and change no rate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import cache, partial

from leeway.data.types import PersonaItem
from leeway.errors import LeewayError
from leeway.evals.eval import NO_ANSWER, ItemEval, Prompt, Row, user_message
from leeway.generation.backend import Backend, Choice, Reply, Tick
from leeway.hashing import digest
from leeway.yaml_config import package_data

OPTIONS = ("Yes", "No")
CHECK = "persona-check"
PLAIN = "plain"
SWAP = "order-swap"
ORDER = re.compile(r"\b(yes)(\s+or\s+)(no)\b(?!.*\byes\s+or\s+no\b)", re.IGNORECASE | re.DOTALL)  # the last one


def endorsement(choice: Choice, match: str) -> float:
    """Return P(match) / (P(Yes) + P(No)); NaN without finite mass."""
    yes, no = choice.mass["Yes"], choice.mass["No"]
    if not (math.isfinite(yes) and math.isfinite(no)) or min(yes, no) < 0 or yes + no <= 0:
        return math.nan
    return (yes if match == "Yes" else no) / (yes + no)


_frames = cache(partial(package_data, "leeway.evals", "persona.yaml"))


@dataclass(frozen=True)
class Form:
    """A prompt form of a statement: plain, with the options swapped, or in another frame."""

    name: str
    frame: str = ""

    @property
    def hash(self) -> str:
        return digest(self.name, self.frame, ORDER.pattern if self.name == SWAP else "")

    def prompt(self, item: PersonaItem) -> str:
        """Return the prompt. Raises LeewayError if there are no options to swap."""
        if self.name == PLAIN:
            return item.question
        if self.name != SWAP:
            return self.frame.replace("{statement}", item.statement)
        found = ORDER.search(item.question)
        if found is None:
            what = f"persona item {item.id}: its question does not ask for Yes or No"
            raise LeewayError(what, fix="leave order_swap out")
        return item.question[: found.start()] + f"{found[3]}{found[2]}{found[1]}" + item.question[found.end() :]


def forms(order_swap: bool, paraphrases: int) -> tuple[Form, ...]:
    """Return the plain form and the requested checks."""
    known = _frames()["paraphrases"]
    if not 0 <= paraphrases <= len(known):
        raise LeewayError(f"persona: {paraphrases} paraphrases, {len(known)} exist", fix=f"0 to {len(known)}")
    swapped = (Form(SWAP),) if order_swap else ()
    return (Form(PLAIN), *swapped, *(Form(f["name"], f["text"]) for f in known[:paraphrases]))


@dataclass(frozen=True)
class Persona(ItemEval):
    """Yes/no statements of several traits, one forward pass per item and form."""

    items: Seq[PersonaItem]
    order_swap: bool = False
    paraphrases: int = 0
    name: str = "persona"

    def __post_init__(self) -> None:
        for form in self.forms:
            for item in self.items:
                form.prompt(item)

    @property
    def forms(self) -> tuple[Form, ...]:
        return forms(self.order_swap, self.paraphrases)

    @property
    def hash(self) -> str:
        checks = [[f.name, f.hash] for f in self.forms if f.name != PLAIN]
        return digest(self.name, [asdict(i) for i in self.items], *([checks] if checks else []))

    def prompts(self) -> Iterator[Prompt]:
        for form in self.forms:
            yield from (Prompt(f"item {i.id}", user_message(form.prompt(i)), options=OPTIONS) for i in self.items)

    def cluster_of(self, item: PersonaItem) -> str:
        return f"statement/{digest(item.statement)}"  # one per text, across traits

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Run the plain form (rows of `persona`), then each check (rows of `persona-check`)."""
        prompts = [(form, item, form.prompt(item)) for form in self.forms for item in self.items]
        choices = backend.choose([user_message(text) for _, _, text in prompts], OPTIONS, tick)
        return [self._row(*a, c, backend.template_hash) for a, c in zip(prompts, choices, strict=True)]

    def _row(self, form: Form, item: PersonaItem, prompt: str, choice: Choice, template: str) -> Row:
        yes, no = choice.mass.get("Yes", math.nan), choice.mass.get("No", math.nan)
        score = math.nan if choice.failure else endorsement(Choice({"Yes": yes, "No": no}), item.match)
        reason = "no finite mass on Yes or No" if choice.failure is None else f"{NO_ANSWER}{choice.failure}"
        plain = form.name == PLAIN
        raw = {"match": item.match, "p_no": finite(no), "p_yes": finite(yes)} | ({} if plain else {"form": form.name})
        answer = "" if math.isnan(score) else "Yes" if yes > no else "No" if no > yes else "tie"
        scored = {"score": score, "unscored_reason": reason if math.isnan(score) else None, "judge": "next-token"}
        scored |= {"cluster": self.cluster_of(item), "judge_raw": json.dumps(raw, sort_keys=True)}
        scored |= {"template_hash": digest(template, self.name) if plain else digest(template, CHECK, form.hash)}
        return self.row(item.id, prompt, Reply(answer, 0, False), eval=self.name if plain else CHECK, **scored)


def finite(value: float) -> float | None:
    """Return the number, or None for JSON if it is not finite."""
    return value if math.isfinite(value) else None
