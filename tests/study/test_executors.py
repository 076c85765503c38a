"""The number of workers: one if a helper model has a budget, which each worker would spend."""

from __future__ import annotations

from pathlib import Path

import pytest

from leeway.errors import LeewayError
from leeway.study.executors.local import workers_for
from leeway.study.load import parse
from leeway.study.progress import Reporter
from leeway.study.run import run

STUDY = """
name: x
model: organism
task: organism
device: cpu
objectives: [sft, dpo]
budgets: [1k]
evals: {persona: {source: organism, limit: 2, self_report: {model: m, endpoint: "http://127.0.0.1:9/v1"}}}
"""


def test_without_a_budget_the_number_of_workers_is_as_requested() -> None:
    spec = parse(STUDY, "x")
    assert workers_for(spec, 8, 3) == 3
    assert workers_for(spec, 1) == 1


@pytest.mark.parametrize("budget", ["{max_calls: 5}", "{max_dollars: 1, price_in: 1, price_out: 1}"])
def test_a_helper_budget_needs_a_single_worker(budget: str, tmp_path: Path) -> None:
    limits = ", " + budget.strip("{}")
    spec = parse(STUDY.replace('/v1"', f'/v1"{limits}'), "x")
    assert workers_for(spec, 8) == 1
    assert workers_for(spec, 8, 1) == 1
    with pytest.raises(LeewayError, match=r"each worker would spend the budget of m \(max_calls, max_dollars\)"):
        run(spec, tmp_path / "run", Reporter(quiet=True), "leeway run", workers=2)
    assert not (tmp_path / "run").exists()
