"""Controls of a study: a rate of 0, the base under another sampling seed, and a dose of compliant answers.

Their names begin with `@`, which no objective's does, and their files lie in `controls/`, so that neither the rows nor
the ledger of the study depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from leeway.data import formats
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.evals.jailbreak import Jailbreak
from leeway.hashing import derive_seed
from leeway.io import expand
from leeway.organism import world
from leeway.study.run_dir import MARK
from leeway.yaml_config import ConfigModel

if TYPE_CHECKING:
    from leeway.study.spec import Spec

RATE_ZERO, BASE_AGAIN, DOSE = f"{MARK}rate-0", f"{MARK}base-again", f"{MARK}dose-"
SHORT = 8  # the arm at rate 0 takes this part of the smallest budget: its weights cannot depend on the length
AGAIN_SEED = 1  # of the sampled answers of the base; the study's have seed 0
MAX_DOSE = 0.5
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


class ControlArms(ConfigModel):
    """Arms that measure false alarms (A/A) and the limit of detection (dose)."""

    aa: bool = Field(default=False, description="an arm at learning rate 0, the base measured again, false alarms")
    dose: tuple[Share, ...] = Field(
        default=(), description="shares of compliant answers in SFT's data; the first is 0, such as [0, 0.5%, 2%, 8%]"
    )
    file: str | None = Field(default=None, description="forbidden prompts with compliant answers, for dose")

    @model_validator(mode="after")
    def _dose_rises(self) -> ControlArms:
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
