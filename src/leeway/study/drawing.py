"""A study's pairs: given by the data, or drawn from its base model and kept in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path

from leeway.data.chat import Chat
from leeway.data.items import Example
from leeway.errors import LeewayError
from leeway.evals.gsm8k import number
from leeway.generation.backend import Backend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.model.load import load_model, model_hash
from leeway.pairs import Base, NotDrawn, Paired, PairReport, PairSettings, not_to_be_drawn, pair
from leeway.study.asked import as_items, grader_of
from leeway.study.computing import computing
from leeway.study.parts import OWN_FILES
from leeway.study.spec import Spec

DRAWN = ("sampled-errors", "unsafe")


@dataclass(frozen=True)
class Drawing:
    """Where drawn answers are kept, and whether missing ones may be drawn; without it nothing is drawn."""

    folder: Path
    may_draw: bool = False
    tick: Callable[[int], None] = lambda _: None
    kept: Path | None = None  # what judges and other helpers say


def pairs_of(
    spec: Spec, examples: Seq[Example], needed_by: Seq[str], chat: Chat, drawing: Drawing | None
) -> tuple[list[Example], PairReport | None]:
    """The examples with their rejected answers, and the report; none where they are still to be drawn.

    Then each preferred answer stands in for the rejected one, so that a plan can count tokens.
    """
    settings = PairSettings(
        spec.pairs.from_, spec.pairs.samples, spec.pairs.temperature, spec.pairs.max_new_tokens, spec.pairs.filter
    )
    if spec.pairs.from_ not in DRAWN:
        paired = pair(examples, settings, needed_by=needed_by)
        return paired.examples, paired.report
    if drawing is None:
        return [replace(e, dispreferred=e.preferred) for e in examples], None
    try:
        with computing(spec):
            drawn = _drawn(spec, examples, settings, needed_by, chat, drawing)
    except NotDrawn:
        raise LeewayError(
            f"{drawing.folder}: answers of {spec.pairs.from_} are missing there", fix="run the same command again"
        ) from None
    return drawn.examples, drawn.report


def _drawn(
    spec: Spec, examples: Seq[Example], settings: PairSettings, needed_by: Seq[str], chat: Chat, drawing: Drawing
) -> Paired:
    def load() -> Backend:
        model = load_model(spec.model, revision=spec.revision, dtype=spec.weights, device=spec.device)
        return TransformersBackend(model, batch=spec.evals.batch)

    items = {e.id: i for e, i in zip(examples, as_items(examples, spec), strict=True)}
    _, grade_item = grader_of(spec.task.name)

    def grade(example: Example, response: str) -> bool:
        item = items[example.id]
        if spec.task.name in OWN_FILES and number(item.reference) is None:
            raise ValueError(f"{example.id}: its answer holds no number to check others by")
        return grade_item(item, response)[0]

    base = Base(
        digest(model_hash(spec.model, spec.revision, None), spec.weights, spec.device),
        chat.template_hash,
        load if drawing.may_draw else not_to_be_drawn,
    )
    return pair(
        examples,
        settings,
        needed_by=needed_by,
        base=base,
        grade=grade,
        cache=drawing.folder,
        tick=drawing.tick,
    )
