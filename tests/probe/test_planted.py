"""A probe names the one place that was edited, and nothing where nothing of that size was done."""

from __future__ import annotations

import pytest

from benchmarks import probe as planted
from leeway.probe.context import ProbeContext


@pytest.fixture(scope="module")
def context() -> ProbeContext:
    return planted.context_of(planted.organism(), planted.organism())


@pytest.mark.parametrize("place", [(2, "mlp"), (3, "attn")])
def test_an_edited_layer_is_named_and_no_other(context: ProbeContext, place: planted.Place) -> None:
    """The refusal direction ablated in one matrix, as often as the models need to differ; and a random edit."""
    found = list(planted.planted(context, [place]))
    named = {f.edit: (f.is_named, f.names_another) for f in found}
    assert named.pop("random edit of that norm") == (False, False)
    shown = [f for f in found if abs(f.gap) > 1.5]
    assert any(f.edit.startswith("direction ablated") for f in shown)
    assert all(f.is_largest and f.is_named and not f.names_another for f in shown)
    assert not any(f.is_named for f in found if abs(f.gap) < 0.9)
