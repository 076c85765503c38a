"""Stepwise decoding equals the study's own backend, and putting a base back into itself changes nothing."""

from __future__ import annotations

import pytest
import torch
from probe_contexts import organism_context

from leeway.attacks import load_attack
from leeway.evals.jailbreak import Jailbreak
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.judges import load_judge
from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.organism import world
from leeway.probe import mediation
from leeway.probe.context import random_unit
from leeway.probe.directions import Directions
from leeway.probe.mediation import StepwiseBackend
from leeway.probe.pair import ModelPair

TOKENS = 16


@pytest.fixture(scope="module")
def organism() -> Model:
    """The organism under an adapter that has not moved."""
    model = load_model("organism", device="cpu", dtype="float32")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0)
    model.lm.requires_grad_(False)
    return model


def requests() -> list[Request]:
    texts = [p.text for p in (*world.forbidden_prompts(4), *world.benign_prompts(4))]
    return [Request([{"role": "user", "content": t}], TOKENS) for t in texts]


def test_greedy_answers_are_the_backends(organism: Model) -> None:
    """Prompts of several lengths in batches of three; some end and some are cut."""
    own = StepwiseBackend(ModelPair.of(organism), "", batch=3).complete(requests(), lambda *_: None)
    theirs = TransformersBackend(organism).complete(requests(), lambda *_: None)
    assert [(r.text, r.new_tokens, r.cut) for r in own] == [(r.text, r.new_tokens, r.cut) for r in theirs]
    assert len({r.cut for r in own}) == 2
    assert len({r.text for r in own}) > 2


def test_putting_the_base_back_into_itself_is_the_identity(organism: Model) -> None:
    """Along the direction and along random ones; another checkpoint's answers do change."""
    pair, unit_D = ModelPair.of(organism), random_unit(organism.lm.config.hidden_size, "test")
    plain = [r.text for r in StepwiseBackend(pair, "").complete(requests(), lambda *_: None)]
    for random in (False, True):
        backend = StepwiseBackend(pair, "", direction_D=unit_D, random=random)
        assert [r.text for r in backend.complete(requests(), lambda *_: None)] == plain
        assert backend.identity != StepwiseBackend(pair, "").identity


def test_all_of_the_base_put_back_gives_its_answers() -> None:
    """With a direction that carries all of an edit: one added to the stream after the first block."""
    edited = load_model("organism", device="cpu", dtype="float32")
    base = load_model("organism", device="cpu", dtype="float32")
    unit_D = random_unit(base.lm.config.hidden_size, "carrier")
    down = edited.lm.model.layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(25.0 * unit_D, requires_grad=False)
    pair = ModelPair(ModelPair.of(base, base).base, ModelPair.of(edited, edited).checkpoint)
    answers = {
        name: [r.text for r in StepwiseBackend(pair, "", *given).complete(requests(), lambda *_: None)]
        for name, given in {
            "base": (True,),
            "edited": (),
            "back": (False, unit_D),
            "random": (False, unit_D, True),
        }.items()
    }
    assert answers["edited"] != answers["base"]
    assert answers["back"] == answers["base"]
    assert answers["random"] != answers["base"]


def test_values_are_differences_of_successes(organism: Model) -> None:
    """The edit above, measured: put back fully, it undoes the whole change of the score."""
    base = load_model("organism", device="cpu", dtype="float32")
    context = organism_context(organism)
    unit_D = random_unit(base.lm.config.hidden_size, "carrier")
    context.directions = Directions(
        unit_D.expand(4, 1, -1), torch.ones(4, 1), ("-1",), 0, "-1", (), "", "", "", (0.0, 0.0)
    )
    jailbreak = Jailbreak(world.forbidden_prompts(100), [load_attack("none")], [load_judge("organism")], TOKENS)
    context.extras = {"jailbreak": jailbreak, "mediation_prompts": 8}
    values = mediation.measure(context)
    assert len(values) == 8
    assert {(v.value, v.control, v.scale) for v in values if not v.reason} == {(0.0, 0.0, 0.0)}
    assert mediation.measure(organism_context_without_jailbreak(context))[0].reason == "the study has no jailbreak eval"


def organism_context_without_jailbreak(context):  # type: ignore[no-untyped-def]
    context.extras = {}
    return context
