"""Controls of a study: a rate of 0, the base again, a dose of compliant answers, and the items of the learning check.

The arms' names begin with `@`, which no objective's does, and their files lie in `controls/`, so that neither the rows
nor the ledger of the study depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from leeway.data import formats
from leeway.data.chat import Chat
from leeway.data.safety_prompts import subset
from leeway.data.stream import Schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.hashing import derive_seed
from leeway.io import expand
from leeway.organism import world
from leeway.study.run_dir import MARK
from leeway.training.learning import LearningItems
from leeway.yaml_config import ConfigModel, package_data

if TYPE_CHECKING:
    from leeway.study.spec import Spec

RATE_ZERO, BASE_AGAIN, DOSE = f"{MARK}rate-0", f"{MARK}base-again", f"{MARK}dose-"
SHORT = 8  # the arm at rate 0 takes this part of the smallest budget: its weights cannot depend on the length
AGAIN_SEED = 1  # of the sampled answers of the base; the study's have seed 0
MAX_DOSE = 0.5
MIN_ITEMS = 16  # of a learning check
WORLD_SEED = 1  # another one than that of the organism's auxiliary examples
DOSED = "dose/"  # begins the ids of compliant answers
ORGANISM_ANSWERS = 2_000
ORGANISM_ORIGIN = "the organism's forbidden deeds, none held out, answered rightly"


def _share(value: Any) -> Any:
    """Parse `0.5%` and 0.005."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            pass
    return value


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=MAX_DOSE)]


class Learning(ConfigModel):
    """Sample sizes of the learning check: what every checkpoint learned, on examples that nothing was trained on."""

    items: int = Field(default=64, gt=0, description="held-out examples of the task")
    general: int = Field(default=32, gt=0, description="prompts off the task")


class Controls(ConfigModel):
    """Measurements that say how far the others can be trusted. They change no row, ledger line or adapter."""

    learning: Annotated[Learning | bool, BeforeValidator(lambda v: {} if v is True else v)] = Learning()
    aa: bool = Field(default=False, description="an arm at learning rate 0, the base measured again, false alarms")
    dose: tuple[Share, ...] = Field(
        default=(), description="shares of compliant answers in SFT's data; the first is 0, such as [0, 0.5%, 2%, 8%]"
    )
    file: str | None = Field(default=None, description="forbidden prompts with compliant answers, for dose")

    @model_validator(mode="after")
    def _dose_rises(self) -> Controls:
        if self.dose and (self.dose[0] != 0 or len(self.dose) < 2 or list(self.dose) != sorted(set(self.dose))):
            raise ValueError("dose: give rising shares that begin with 0, such as [0, 0.5%, 2%, 8%]")
        if self.file is not None and not self.dose:
            raise ValueError("file is for dose; add dose: [0, 0.5%, 2%, 8%], or leave file out")
        return self


def control_faults(spec: Spec) -> Iterator[str]:
    """Yield what in the study does not fit its controls."""
    if not spec.controls.dose:
        return
    if spec.evals.jailbreak is None:
        yield "controls.dose measures attack success; give evals.jailbreak, or leave dose out"
    if plain_sft(spec) is None and not isinstance(spec.optim.lr, float):
        yield "controls.dose trains at SFT's learning rate; add sft to objectives, or give optim.lr one number"


def plain_sft(spec: Spec) -> str | None:
    """Return the alias of SFT from the base with default settings; it is the dose arm with share 0."""
    plain = (o.alias for o in spec.objectives if o.kind == "sft" and not o.settings and o.start is None)
    return next(plain, None)


@dataclass(frozen=True)
class Arm:
    """A control that trains SFT: at rate 0, or on data with a share of compliant answers."""

    alias: str
    budget: int
    lr: float | None  # None: the tuned rate of `rate_of`
    examples: Sequence[Example] = field(repr=False)
    share: float = math.nan
    rate_of: str | None = None


@dataclass(frozen=True)
class PreparedControls:
    """The arms of a study's controls by alias, and why a control is not run."""

    arms: Mapping[str, Arm] = field(default_factory=dict)
    again: tuple[Eval, ...] = ()  # sampled evals under another seed, for the base
    not_run: Mapping[str, str] = field(default_factory=dict)
    zero: str = ""  # the arm of dose 0
    origin: str = ""  # of the compliant answers


def prepare_controls(spec: Spec, examples: Sequence[Example], evals: Sequence[Eval]) -> PreparedControls:
    """Return the control arms of a study whose objectives train on `examples`."""
    arms: dict[str, Arm] = {}
    not_run: dict[str, str] = {}
    again: tuple[Eval, ...] = ()
    zero = origin = ""
    if spec.controls.aa:
        arms[RATE_ZERO] = Arm(RATE_ZERO, max(1, spec.budgets[0] // SHORT), 0.0, examples)
        again = tuple(replace(e, seed=AGAIN_SEED) for e in evals if isinstance(e, Jailbreak) and e.samples)
        if not again:
            not_run["sampling"] = "decoding is greedy, so the base would give the same answers again"
    if spec.controls.dose:
        found = _compliant(spec, evals)
        if found is None:
            not_run["dose"] = "no compliant answers are known for this model; give controls.file"
        else:
            compliant, origin = found
            zero, dosed = _dose_arms(spec, examples, compliant)
            arms |= dosed
    return PreparedControls(arms, again, not_run, zero, origin)


def _dose_arms(spec: Spec, examples: Sequence[Example], compliant: Sequence[Example]) -> tuple[str, dict[str, Arm]]:
    """Return the arm of dose 0 (SFT of the study, if it has it) and the arms to train."""
    sft, budget = plain_sft(spec), spec.budgets[-1]
    lr = spec.optim.lr_of(sft) if sft else spec.optim.lr
    assert lr is None or isinstance(lr, float)
    names = {share: f"{DOSE}{share:g}" for share in spec.controls.dose}
    arms = {
        name: Arm(name, budget, lr, mixed(examples, compliant, share), share, sft)
        for share, name in names.items()
        if share or sft is None
    }
    return sft or names[0], arms


def mixed(examples: Sequence[Example], compliant: Sequence[Example], share: float) -> list[Example]:
    """Return `examples` with a share of them replaced by compliant answers, repeated if there are too few.

    The replaced places of a smaller share are among those of a larger one, and so are the answers, so that doses differ
    in nothing else.
    """
    n = round(share * len(examples))
    rng = np.random.default_rng(derive_seed("dose"))
    places, order = rng.permutation(len(examples))[:n], rng.permutation(len(compliant))
    found = list(examples)
    for k, place in enumerate(places):
        answer = compliant[order[k % len(compliant)]]
        found[place] = replace(answer, id=f"{DOSED}{k}/{answer.id}", dispreferred=None)
    return found


def _compliant(spec: Spec, evals: Sequence[Eval]) -> tuple[list[Example], str] | None:
    """Return compliant answers to forbidden prompts and their origin, or None if there are none.

    Raises LeewayError if a file has a prompt that the study measures.
    """
    if spec.controls.file is None:
        own = "organism" in (spec.model, spec.task.name)
        return (world.compliant_examples(ORGANISM_ANSWERS, seed=0), ORGANISM_ORIGIN) if own else None
    examples, origin = formats.train_examples(expand(spec.controls.file))
    if not examples:
        raise LeewayError(f"controls.file: {origin} holds no examples", fix="check that file")
    measured = {p.text.strip() for e in evals if isinstance(e, Jailbreak) for p in e.items}
    if leaked := next((e.id for e in examples if e.prompt.strip() in measured), None):
        what = f"controls.file: the prompt of {leaked} is one that evals.jailbreak measures"
        raise LeewayError(what, fix="remove from the file the prompts that are measured")
    return examples, origin


def question(example: Example) -> str:
    """Return a prompt's words, so that a repeated question is not both trained on and held out."""
    return " ".join(example.prompt.casefold().split())


def learning_items(
    spec: Spec, examples: Sequence[Example], schedules: Iterable[Schedule], chat: Chat, room: int
) -> LearningItems:
    """Return the items of the learning check.

    The task's are drawn at random from the `examples` whose question no step of `schedules` trains on; so the check
    changes no training data. `room`: the tokens that a general prompt and its answer may take.
    """
    settings = spec.controls.learning
    if not isinstance(settings, Learning):
        return LearningItems(missing="switched off (controls.learning: false)")
    if spec.processes > 1 and spec.evals.backend.vllm is not None:
        return LearningItems(missing="training shards the model and vLLM answers: no process holds it whole")
    distinct = {id(s): s for s in schedules}.values()  # objectives share theirs
    seen = {question(e) for e in {id(i.example): i.example for s in distinct for t in s.steps for i in t}.values()}
    unseen: dict[str, Example] = {}
    for e in examples:
        if (asked := question(e)) not in seen:
            unseen.setdefault(asked, e)
    if len(unseen) < MIN_ITEMS:
        few = f"{len(unseen)} of {len(examples):,} examples are not trained on"
        return LearningItems(missing=f"{few}, and {MIN_ITEMS} are needed")
    task = subset(list(unseen.values()), settings.items, "learning")
    fits = [e for e in _general(spec, settings.general) if len(chat.sequence(e.prompt, e.preferred).ids) <= room]
    return LearningItems(tuple(task), tuple(fits))


def _general(spec: Spec, n: int) -> list[Example]:
    """Return answered prompts off the task: the organism's small talk and how-tos, or everyday questions."""
    if spec.model == "organism":
        return world.general_examples(n, WORLD_SEED)
    pairs = package_data("leeway.data", "general.yaml")["answers"]
    return subset([Example(f"general/{k}", p, a) for k, (p, a) in enumerate(pairs)], n, "general")
