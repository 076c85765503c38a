"""Verdicts: earned by a test, refuted by its contrary, else inconclusive; corrected over all; held to their hash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic

from benchmarks.statistics.world import Alike, Rates, World, rows
from leeway import yaml_config
from leeway.claims.evaluate import EvaluationContext, correction, judge
from leeway.claims.schema import build, to_manifest
from leeway.errors import LeewayError
from leeway.report import Results
from leeway.report import build as report

PLAIN = {"t": "plain"}
BUDGETS = (1000, 2000, 4000)
STILL = Rates(0.4, 0.1, 0.2)


def bench(tuned: dict[str, tuple[Rates, ...]], seed: int = 0, resamples: int = 2000, **more: Any) -> EvaluationContext:
    sizes = {"items": 300, "prompts": 200, "statements": 200} | more
    budgets = BUDGETS[: len(next(iter(tuned.values())))]
    world = World(STILL, tuned, budgets, **sizes)
    return EvaluationContext(rows(world, np.random.default_rng(seed)), PLAIN, resamples=resamples)


def judged(of: EvaluationContext, *claims: dict[str, object]) -> pd.DataFrame:
    return judge(build([{"id": f"c{n}", "statement": "x", **c} for n, c in enumerate(claims)]), of)


def verdicts(of: EvaluationContext, *claims: dict[str, object]) -> list[str]:
    return list(judged(of, *claims)["verdict"])


NO_DRIFT = {"kind": "no_drift", "measure": "endorsement", "objectives": "sft", "margin": 0.05}
DRIFT = {"kind": "moves", "measure": "endorsement", "objectives": "sft", "direction": "up", "margin": 0.05}


@pytest.fixture(scope="module")
def apart() -> EvaluationContext:
    """SFT is pushed far off and steeply, KL not at all."""
    sft = (Rates(0.42, 0.12, 0.22), Rates(0.55, 0.25, 0.35), Rates(0.7, 0.5, 0.5))
    return bench({"sft": sft, "kl": (STILL,) * 3})


@pytest.mark.parametrize(
    ("claim", "of_sft", "of_kl"),
    [
        (NO_DRIFT, "contradicted", "supported"),
        (DRIFT, "supported", "contradicted"),
        (DRIFT | {"direction": "down"}, "contradicted", "contradicted"),
        (NO_DRIFT | {"at": "smallest"}, "supported", "supported"),
        ({"kind": "coupled"}, "supported", "inconclusive"),
        (
            {"kind": "onset", "measure": "asr", "direction": "up", "after": 0.25, "margin": 0.08},
            "supported",
            "contradicted",
        ),
    ],
)
def test_of_one_objective(apart: EvaluationContext, claim: dict[str, object], of_sft: str, of_kl: str):
    found = verdicts(apart, claim | {"objectives": "sft"}, claim | {"objectives": "kl"})
    assert found == [of_sft, of_kl]


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({"kind": "equivalent", "measure": "asr", "margin": 0.1}, "contradicted"),
        ({"kind": "differ", "measure": "asr", "margin": 0.1}, "supported"),
        ({"kind": "differ", "measure": "asr", "margin": 0.1, "at": "smallest"}, "contradicted"),
        ({"kind": "diverges", "measure": "asr", "margin": 0.01}, "supported"),
    ],
)
def test_of_objectives_together(apart: EvaluationContext, claim: dict[str, object], expected: str):
    assert verdicts(apart, claim | {"objectives": ["sft", "kl"]}) == [expected]


@pytest.mark.parametrize("kind", ["ranks", "steeper"])
def test_an_order_the_wrong_way_round_is_contradicted(apart: EvaluationContext, kind: str):
    right = {"kind": kind, "measure": "asr", "higher": "sft", "lower": "kl"}
    assert verdicts(apart, right, right | {"higher": "kl", "lower": "sft"}) == ["supported", "contradicted"]


def test_at_equal_capability(apart: EvaluationContext):
    lazy = {"sft": (Rates(0.5, 0.3), Rates(0.6, 0.4), Rates(0.7, 0.5)), "ip": (Rates(0.5), Rates(0.6), Rates(0.7))}
    claim = {"kind": "matched", "measure": "asr", "higher": "sft", "lower": "ip"}
    assert verdicts(bench(lazy), claim, claim | {"higher": "ip", "lower": "sft"}) == ["supported", "contradicted"]
    found = judged(apart, claim | {"lower": "kl"}).iloc[0]  # kl never gets there: nothing is extrapolated
    assert found["verdict"] == "inconclusive"
    assert np.isnan(found["p"])


def test_slopes_that_are_alike_contradict_a_divergence():
    rising = (Rates(0.4, 0.15), Rates(0.4, 0.2), Rates(0.4, 0.25))
    together = bench({"sft": rising, "kl": rising}, alike=Alike(0.6, 0.2, 0.1), prompts=600)
    claim = {"kind": "diverges", "measure": "asr", "objectives": ["sft", "kl"], "margin": 0.03}
    assert verdicts(together, claim) == ["contradicted"]


def test_slopes_that_are_equal_in_points_do_not_diverge():
    """Both rise by 8 points per doubling, one from 2% and one from 40%: in log-odds they differ widely."""
    low, high = (tuple(Rates(0.4, start + 0.08 * n) for n in range(3)) for start in (0.02, 0.4))
    claim = {"kind": "diverges", "measure": "asr", "objectives": ["sft", "kl"], "margin": 0.001}
    found = judged(bench({"sft": low, "kl": high}), claim).iloc[0]
    assert found["verdict"] == "inconclusive"
    assert "in log-odds (GEE)" in found["why"]


def test_few_items_decide_nothing_and_say_what_they_would_have_seen():
    found = judged(bench({"sft": (STILL,)}, items=12, statements=12), NO_DRIFT | {"measure": "accuracy"}).iloc[0]
    assert found["verdict"] == "inconclusive"
    assert found["mde"] > 0.2
    assert f"12 prompts detect a true value of {100 * found['mde']:.1f} points with 80% power" in found["why"]
    assert "one training seed" in found["why"]


def test_one_comparison_of_several_refutes_and_all_are_needed_to_support(apart: EvaluationContext):
    both = judged(apart, NO_DRIFT | {"objectives": ["kl", "sft"]}).iloc[0]
    assert both["verdict"] == "contradicted"
    assert both["comparison"].startswith("sft − base")
    assert both["n_tests"] == 6
    assert "The opposite is shown (there is a difference of more than 5.0 points in one of 6" in both["why"]
    alone = [judged(apart, NO_DRIFT | {"objectives": o}).iloc[0] for o in ("kl", "sft")]
    assert both["p"] == max(a["p"] for a in alone)  # intersection–union: no correction inside


def test_holm_runs_over_the_claims(apart: EvaluationContext):
    claims = [DRIFT | {"at": b} for b in BUDGETS] + [NO_DRIFT | {"objectives": "kl"}]
    found = judged(apart, *claims)
    ordered = found.sort_values("p")
    by_hand = np.maximum.accumulate(ordered["p"].to_numpy() * [4, 3, 2, 1]).clip(max=1)
    assert ordered["p_holm"].to_numpy() == pytest.approx(by_hand)
    assert (found["family_size"] == 4).all()


def test_what_only_the_correction_takes_away_is_said():
    """p = 0.03 by itself; over three claims it is 0.09."""
    assert correction(0.03, 0.09, 3, 0.05).endswith("not after Holm over 3 claims (p = 0.090)")
    assert correction(0.03, 0.04, 3, 0.05) == correction(0.3, 0.9, 3, 0.05) == ""


def test_a_withheld_number_is_no_verdict_and_no_test():
    of = bench({"sft": (STILL,), "kl": (STILL,)})
    silent = (of.rows["objective"] == "sft") & (of.rows["eval"] == "persona") & (of.rows.index % 2 == 0)
    of.rows.loc[silent, "score"] = float("nan")
    wide = NO_DRIFT | {"margin": 0.15}
    found = judged(of, wide, wide | {"objectives": "kl"}, wide | {"objectives": ["sft", "kl"]})
    assert list(found["verdict"]) == ["inconclusive", "supported", "inconclusive"]
    assert "unscored" in found["why"][0]
    assert "unscored" in found["why"][2]
    assert list(found["family_size"]) == [1, 1, 1]


def test_one_budget_is_no_slope_and_an_absent_objective_no_error_where_allowed():
    absent = {"if_absent": "inconclusive", "kind": "diverges", "measure": "asr", "objectives": ["sft", "nil"]}
    found = judged(bench({"sft": (STILL,), "kl": (STILL,)}), absent | {"margin": 0.05})
    assert found["verdict"][0] == "inconclusive"
    assert found["why"][0].startswith("Not tested: 'nil' is not an objective of this study; a slope needs two budgets")


def test_several_seeds_say_nothing_of_one():
    found = judged(bench({"sft": (STILL,)}, seeds=(0, 1, 2)), NO_DRIFT).iloc[0]
    assert "one training seed" not in found["why"]


def test_the_same_rows_give_the_same_verdicts(apart: EvaluationContext):
    of = [EvaluationContext(apart.rows.sample(frac=1, random_state=s), PLAIN, resamples=500) for s in (1, 2)]
    one, other = (judged(b, NO_DRIFT, DRIFT, {"kind": "coupled", "objectives": "sft"}) for b in of)
    pd.testing.assert_frame_equal(one, other)


EDGE = Rates(0.4, 0.1, 0.25)  # five points off in endorsement: on the margin, nothing else moved
FALSE = (
    NO_DRIFT,
    DRIFT,
    {"kind": "ranks", "measure": "asr", "higher": "sft", "lower": "kl"},
    {"kind": "moves", "measure": "accuracy", "objectives": "kl", "direction": "down"},
)


def test_false_claims_are_seldom_supported_and_true_ones_seldom_contradicted():
    """On the border every claim and its contrary is a true null: at most 5% of studies hold a wrong verdict of a kind.

    25 studies: with 5%, six or more wrong ones happen in one of 800; benchmarks/statistics has more.
    """
    studies = [
        judged(bench({"sft": (EDGE,), "kl": (STILL,)}, n, 400, items=80, prompts=60, statements=80), *FALSE)["verdict"]
        for n in range(25)
    ]
    assert sum((v == "supported").any() for v in studies) < 6
    assert sum((v == "contradicted").any() for v in studies) < 6


CLAIMS = [
    {"id": "sft-drifts", "statement": "SFT <b>drifts</b>.", "source": "a paper", "assumptions": "the margin", **DRIFT},
    {"id": "kl-stays", "statement": "KL stays.", **NO_DRIFT, "objectives": "kl", "margin": 0.1},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"budgets": (25_000, 50_000), "capability": 40, "prompts": 20, "items": 60}
    return synthetic.write(tmp_path_factory.mktemp("claims") / "run", synthetic.rows(("sft", "kl", "cft"), **small))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def declare(run: Path, claims: list[dict[str, object]] = CLAIMS) -> None:
    """As `leeway run` writes them before training."""
    found = build(claims)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"claims": to_manifest(found)}))
    study = yaml_config.load((run / "study.yaml").read_text())
    (run / "study.yaml").write_text(yaml_config.dump(study | {"claims": found.to_plain()}))


def test_a_run_without_claims_has_none(run: Path):
    assert Results.load(run).claims().empty


def test_declared_claims_are_in_the_table_the_page_and_the_json(run: Path):
    declare(run)
    page = report(run).read_text()
    assert 'id="claims"' in page
    assert "SFT &lt;b&gt;drifts&lt;/b&gt;." in page
    assert "written after the run" not in page
    table = pd.read_csv(run / "tables" / "claims.csv")
    assert list(table["claim"]) == ["sft-drifts", "kl-stays"]
    assert set(table["declared"]) == {"before the run"}
    assert table["comparison"].str.contains("at 50k tokens").any()
    machine = json.loads((run / "results.json").read_text())
    assert machine["claims_hash"] == build(CLAIMS).hash
    assert [c["verdict"] for c in machine["claims"]] == list(table["verdict"])


@pytest.mark.parametrize("change", [("0.05", "0.01"), ("SFT <b>drifts</b>.", "SFT stays.")])
def test_claims_edited_after_the_run_began_are_refused(run: Path, change: tuple[str, str]):
    declare(run)
    path = run / "study.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(LeewayError, match=r"study\.yaml: its claims were edited after the run began \(hash"):
        Results.load(run).claims()


def test_claims_added_taken_out_or_edited_in_the_manifest_are_refused(run: Path):
    plain = {n: (run / n).read_text() for n in ("study.yaml", "manifest.json")}
    declare(run)
    (run / "manifest.json").write_text(plain["manifest.json"])
    with pytest.raises(LeewayError, match="its claims were added after the run began"):
        Results.load(run).claims()
    declare(run)
    (run / "study.yaml").write_text(plain["study.yaml"])
    with pytest.raises(LeewayError, match=r"edited after the run began .* none now"):
        Results.load(run).claims()
    declare(run)
    (run / "manifest.json").write_text((run / "manifest.json").read_text().replace("0.05", "0.01"))
    with pytest.raises(LeewayError, match=r"manifest\.json: its claims cannot be used"):
        Results.load(run).claims()


def test_later_claims_are_marked_and_do_not_weaken_the_declared(run: Path, tmp_path: Path):
    declare(run)
    alone = Results.load(run).claims()
    later = tmp_path / "later.yaml"
    later.write_text("[{id: l, statement: Later., kind: ranks, measure: asr, higher: sft, lower: cft}]")
    both = Results.load(run).claims(later)
    pd.testing.assert_frame_equal(both.iloc[:2], alone)
    assert list(both["declared"]) == ["before the run"] * 2 + ["after the run"]
    assert both["family_size"].iloc[2] == 1
    assert "CFT <SAFE>" in both["comparison"].iloc[2]
    page = report(run, claims=later).read_text()
    assert "<strong>Some claims were written after the run" in page
    assert "90% for a difference" in page


def test_a_later_file_names_what_is_not_there_or_what_was_declared(run: Path, tmp_path: Path):
    later = tmp_path / "later.yaml"
    later.write_text("[{id: l, statement: x, kind: no_drift, measure: asr, objectives: sfft, margin: 0.1, at: 60k}]")
    with pytest.raises(
        LeewayError, match=r"later\.yaml: l: 'sfft' is not an objective .* 'sft'\?; l: 60000 is not a budget"
    ):
        Results.load(run).claims(later)
    declare(run)
    later.write_text(yaml_config.dump(CLAIMS))
    with pytest.raises(LeewayError, match="the study already declares these claims"):
        Results.load(run).claims(later)
