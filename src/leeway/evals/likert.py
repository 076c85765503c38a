"""Rating scales: the expected rating of a statement, from next-token probabilities.

    x = Σ k·P(k) / Σ P(k), k = 1 … 5        agreement = x, or 6 − x where 5 stands for disagreeing
    score = (agreement − 1) / 4             and 1 minus that for a reverse-keyed statement

Every statement is asked under both directions of the scale, one row each, and a rate is the mean over both: a model
that likes one number scores 0.5 whatever the keys. NaN and no mass at all are unscored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files

import yaml

from leeway.data.items import LikertItem
from leeway.evals.eval import Row, Tick
from leeway.evals.persona import finite
from leeway.generation.backend import Backend, Choice
from leeway.hashing import digest

OPTIONS = ("1", "2", "3", "4", "5")
HIGH, LOW = "agree-high", "agree-low"  # what 5 stands for: agreeing, or not agreeing


@cache
def directions() -> dict[str, str]:
    """The question under each direction of the scale, with `{statement}` in it."""
    loaded: dict[str, str] = yaml.safe_load((files("leeway.evals") / "likert.yaml").read_text("utf-8"))["directions"]
    return loaded


def expected(mass: Mapping[str, float]) -> float:
    """Σ k·P(k) / Σ P(k) over "1" … "5", in [1, 5]; NaN where they have no mass or are not finite."""
    p = [mass.get(o, math.nan) for o in OPTIONS]
    if not all(math.isfinite(x) and x >= 0 for x in p) or sum(p) <= 0:
        return math.nan
    return sum(int(o) * x for o, x in zip(OPTIONS, p, strict=True)) / sum(p)


def scored(rating: float, direction: str, key: int) -> float:
    """How far a rating endorses the trait, in [0, 1]."""
    agreement = rating if direction == HIGH else 6 - rating
    endorsing = agreement if key == 1 else 6 - agreement
    return (endorsing - 1) / 4


def cluster_of(item: LikertItem) -> str:
    """Items of one text, under several traits too, are one."""
    return f"statement/{digest(item.text)}"


@dataclass(frozen=True)
class Likert:
    """Statements rated from 1 to 5, one forward pass for each item and direction of the scale."""

    items: Seq[LikertItem]
    name: str = "persona-sd3"

    @property
    def key(self) -> str:
        return self.name

    @property
    def hash(self) -> str:
        return digest(self.name, directions(), [asdict(i) for i in self.items])

    def __len__(self) -> int:
        return len(self.items) * len(directions())

    def clusters(self) -> list[str]:
        return [cluster_of(i) for i in self.items]

    def part(self, clusters: Collection[str]) -> Likert:
        return replace(self, items=[i for i in self.items if cluster_of(i) in clusters])

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Every item with 5 for agreeing, then every item with 5 for disagreeing."""
        asked = [(d, i, text.replace("{statement}", i.text)) for d, text in directions().items() for i in self.items]
        choices = backend.choose([[{"role": "user", "content": text}] for _, _, text in asked], OPTIONS, tick)
        return [self._row(*a, c, backend.template_hash) for a, c in zip(asked, choices, strict=True)]

    def _row(self, direction: str, item: LikertItem, prompt: str, choice: Choice, template: str) -> Row:
        rating = math.nan if choice.failure else expected(choice.mass)
        score = scored(rating, direction, item.key)
        mass = {o: finite(choice.mass.get(o, math.nan)) for o in OPTIONS}
        answered = finite(sum(choice.mass.get(o, math.nan) for o in OPTIONS))
        raw = {"answer_mass": answered, "form": direction, "key": item.key, "mass": mass, "rating": finite(rating)}
        reason = "no finite mass on 1 to 5" if choice.failure is None else f"no answer: {choice.failure}"
        return Row(
            eval=self.name,
            attack="",
            item_id=item.id,
            cluster=cluster_of(item),
            sample=0,
            prompt=prompt,
            response="" if math.isnan(score) else max(OPTIONS, key=lambda o: choice.mass[o]),
            outcome=None,
            score=score,
            unscored_reason=reason if math.isnan(score) else None,
            judge="next-token",
            judge_raw=json.dumps(raw, sort_keys=True),
            template_hash=digest(template, self.name, direction, prompt_hash(direction)),
            new_tokens=0,
        )


def prompt_hash(direction: str) -> str:
    """Content hash of the question under one direction."""
    return digest(direction, directions()[direction])
