"""The charts from Python are those of the page."""

import json
import re
from pathlib import Path

import pytest
import synthetic

from leeway import report
from leeway.errors import LeewayError
from leeway.report.results import Results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(("sft", "kl"), (25_000, 100_000), capability=24, prompts=12, items=12)
    folder = synthetic.write(tmp_path_factory.mktemp("run"), rows)
    report.build(folder)
    return folder


def test_a_chart_is_the_one_of_the_page(run: Path):
    results, page = Results.load(run), (run / "report.html").read_text("utf-8")
    drawn = {
        "tradeoff": results.plot.tradeoff(),
        "by-budget-capability": results.plot.budgets("capability"),
        "by-attack": results.plot.attacks(),
        "by-attack-change": results.plot.attacks(change=True),
        "contrasts": results.plot.forest(),
    }
    for name, chart in drawn.items():
        found = re.search(rf'<script type="application/json" id="spec-{name}">(.*?)</script>', page)
        assert found is not None
        assert json.loads(found[1]) == chart.spec
        assert chart._repr_mimebundle_()["application/vnd.vegalite.v5+json"] == chart.spec


def test_what_was_not_measured_says_so(run: Path):
    plot = Results.load(run).plot
    with pytest.raises(LeewayError, match=r"an axis 'overrefusal' \(this run has: capability, jailbreak, persona\)"):
        plot.budgets("overrefusal")
    with pytest.raises(LeewayError, match="a log of training steps"):
        plot.training()
