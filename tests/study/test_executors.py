"""How many workers a study has: one where somebody is asked under a budget, since each would have it to itself."""

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


def test_without_a_budget_workers_are_as_asked() -> None:
    spec = parse(STUDY, "x")
    assert workers_for(spec, 8, 3) == 3
    assert workers_for(spec, 1) == 1


@pytest.mark.parametrize("budget", ["{max_calls: 5}", "{max_dollars: 1, price_in: 1, price_out: 1}"])
def test_a_budget_takes_one_worker_and_refuses_more(budget: str, tmp_path: Path) -> None:
    told = ", " + budget.strip("{}")
    spec = parse(STUDY.replace('/v1"', f'/v1"{told}'), "x")
    assert workers_for(spec, 8) == 1
    assert workers_for(spec, 8, 1) == 1
    with pytest.raises(LeewayError, match=r"--workers 2: the budget of m \(max_calls, max_dollars\) would be each"):
        run(spec, tmp_path / "run", Reporter(quiet=True), "leeway run", workers=2)
    assert not (tmp_path / "run").exists()
