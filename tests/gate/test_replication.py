"""How often other prompts would decide otherwise: exact cases, the calibration of the flip rate, and its lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gated import answers, moved, run

from leeway import stats
from leeway.gate import gate
from leeway.gate.output import replication_lines
from leeway.gate.rules import Decision, GatedCheckpoint
from leeway.stats.metrics import PLAIN
from leeway.stats.replication import replicated_differences, replicated_rates


def decided(folder: Path, *tables: pd.DataFrame, rule: str) -> Decision:
    return gate(*run(folder, *tables, rules=f"rules: [{rule}]")).decisions[0]


def test_where_nothing_changed_every_set_decides_alike(tmp_path: Path):
    found = decided(tmp_path, answers("capability", moved(100)), rule="{measure: accuracy, margin: 0.05}")
    assert found.replication is not None
    assert (found.outcome, found.flip_rate) == ("pass", 0.0)
    assert found.replication.again == found.replication.no_drift == {"pass": 1.0, "inconclusive": 0.0, "fail": 0.0}


def test_a_decision_far_from_its_bound_does_not_flip_and_one_on_it_does(tmp_path: Path):
    """50 of 100 answers get worse against a margin of 5 points; and 8 of 100, where a limit is on either side."""
    far = decided(tmp_path / "a", answers("capability", moved(100, down=50)), rule="{measure: accuracy, margin: 0.05}")
    assert (far.outcome, far.flip_rate) == ("fail", 0.0)
    near = decided(tmp_path / "b", answers("capability", moved(100, down=8)), rule="{measure: accuracy, margin: 0.05}")
    assert near.outcome == "inconclusive"
    assert 0.1 < near.flip_rate < 0.6
    assert near.replication is not None
    assert near.replication.again["fail"] > 0.1


def test_without_drift_a_fail_is_rare(tmp_path: Path):
    """40 of 200 answers changed, all for the worse; in random directions a margin of 0 fails in at most about 5%."""
    found = decided(tmp_path, answers("capability", moved(200, down=40)), rule="{measure: accuracy, margin: 0.0}")
    assert found.outcome == "fail"
    assert found.replication is not None
    assert found.replication.no_drift["fail"] <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_a_rate_has_no_value_without_drift(tmp_path: Path):
    found = decided(tmp_path, answers("capability", moved(100)), rule="{measure: accuracy, at_least: 0.4}")
    assert found.replication is not None
    assert found.replication.no_drift == {}
    assert [line.partition(":")[0] for line in replication_lines(found)] == [f"flip rate {100 * found.flip_rate:.0f}%"]


def test_a_withheld_rule_stays_inconclusive_in_every_set(tmp_path: Path):
    """Half the refusals are unscored, so that their number is withheld; the other rule alone cannot pass the gate."""
    none = {o: [0.0] * 50 + [float("nan")] * 50 for o in ("base", "sft")}
    tables = answers("capability", moved(100)), answers("overrefusal", none)
    rules = "{measure: accuracy, margin: 0.05}, {measure: overrefusal, margin: 0.05}"
    found = decided(tmp_path, *tables, rule=rules)
    assert found.replication is not None
    assert (found.outcome, found.replication.again["inconclusive"]) == ("inconclusive", 1.0)


def test_it_is_in_the_files_and_the_same_each_time(tmp_path: Path):
    folder, rules = run(
        tmp_path, answers("capability", moved(60, 2, 6)), rules="rules: [{measure: accuracy, margin: 0.1}]"
    )
    gate(folder, rules)
    first = (folder / "gate" / "gate.json").read_bytes()
    (line,) = json.loads(first)["checkpoints"]
    shares = line["replication"]["outcomes"]
    assert sum(shares.values()) == pytest.approx(1)
    assert line["replication"]["flip_rate"] == pytest.approx(1 - shares[line["outcome"]])
    assert "flip rate" in (folder / "gate" / "gate.md").read_text("utf-8")
    assert "flip rate" in (folder / "gate" / "gate.xml").read_text("utf-8")
    gate(folder, rules)
    assert (folder / "gate" / "gate.json").read_bytes() == first


def test_all_attacks_of_a_prompt_are_drawn_together():
    """Each prompt answers alike under two attacks, so the ASR of any set is that of one attack."""
    scores = {"base": [0.0] * 40, "sft": [1.0] * 10 + [0.0] * 30}
    tables = [answers("jailbreak", scores, attack=a) for a in ("dan", "wikipedia")]
    rows = pd.concat(tables, ignore_index=True)
    bounds = {"asr": (0.2, "higher"), "asr:dan": (0.2, "higher")}
    found = replicated_differences(rows, {PLAIN: PLAIN} | dict.fromkeys(rows["template_hash"], PLAIN), bounds, sets=20)
    wide = found.pivot_table(index="set", columns="measure", values="p")
    assert np.allclose(wide["asr"], wide["asr:dan"], atol=0.01)
    assert wide["asr"].nunique() > 5


def simulated(rng: np.random.Generator, n: int, drift: float) -> pd.DataFrame:
    """A study of n prompts, a tenth of them noise in either direction, with a drift towards failures."""
    base, u = rng.random(n) < 0.5, rng.random(n)
    tuned = np.where(u < 0.05, ~base, np.where(u > 1 - drift, True, base))
    return answers("overrefusal", {"base": list(base.astype(float)), "sft": list(tuned.astype(float))})


def test_predicted_flips_are_those_of_a_second_study(record_property: pytest.RecordProperty):
    """Drifts are uniform over a range wider than the margin; a second study draws other prompts at the same drift."""
    rng, predicted, seen = np.random.default_rng(5), list[float](), list[bool]()
    for _ in range(150):
        drift = rng.uniform(0, 0.3)
        outcomes = []
        for n in range(2):
            rows = simulated(rng, 80, drift)
            conditions = dict.fromkeys(rows["template_hash"], PLAIN)
            line = stats.one_sided(rows, conditions, {"overrefusal": (0.08, "higher")}, resamples=999).iloc[0]
            outcomes.append("pass" if line["p"] <= 0.05 else "fail" if line["p_worse"] <= 0.05 else "open")
            if n == 0:
                found = replicated_differences(rows, conditions, {"overrefusal": (0.08, "higher")}, sets=60)
                again = np.where(found["p"] <= 0.05, "pass", np.where(found["p_worse"] <= 0.05, "fail", "open"))
        predicted.append(float((again != outcomes[0]).mean()))
        seen.append(outcomes[0] != outcomes[1])
    share, forecast = float(np.mean(seen)), float(np.mean(predicted))
    record_property("measured", f"flip rate: {100 * forecast:.1f}% predicted, {100 * share:.1f}% of 150 second studies")
    assert abs(share - forecast) < 3 * (share * (1 - share) / 150) ** 0.5


def test_no_line_without_a_number():
    assert replication_lines(Decision(GatedCheckpoint("sft", 1, "plain"), (0,), ())) == []


def test_rates_are_redrawn_too():
    rows = answers("capability", moved(80, base=0.5))
    conditions = dict.fromkeys(rows["template_hash"], PLAIN)
    found = replicated_rates(rows, conditions, {"accuracy": 0.4}, "lower", sets=50)
    assert set(found["objective"]) == {"base", "sft"}
    assert found["p_no_drift"].isna().all()
    # 40 of 80 right: a set, re-drawn twice, has sd 2 √(½·½/80)/√2 around a half, so p is spread
    assert found["p"].std() > 0.05
