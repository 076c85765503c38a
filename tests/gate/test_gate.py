"""The gate: what passes, what fails, what stays open, and that nothing else does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import synthetic
from gated import NAN, answers, exit_code, moved, run
from scipy.stats import binomtest

from leeway.errors import LeewayError
from leeway.gate import gate
from leeway.gate.output import title
from leeway.gate.rules import Evidence, Rule, decide, worst
from leeway.stats.cluster_tests import bound_draws

RULE = Rule(measure="asr", margin=0.02)


def findings(folder: Path, rule: Path) -> dict[str, object]:
    return {f"{f.evidence.rule.measure} {f.evidence.rule.kind}": f for f in gate(folder, rule).decisions[0].results}


def only(folder: Path, *tables: pd.DataFrame, rule: str) -> object:
    found = gate(*run(folder, *tables, rules=f"rules: [{rule}]"))
    return found.decisions[0].results[0]


# --- laws ---


def test_any_fail_is_a_fail_and_only_passes_pass():
    assert worst(["pass", "pass"]) == "pass"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["inconclusive", "fail", "pass"]) == "fail"
    assert worst([]) == "inconclusive"


def log_capital(p: float, p_exceeded: float) -> Evidence:
    return Evidence(RULE, "higher", estimate=0.0, limit=0.0, p=p, p_exceeded=p_exceeded)


def test_a_fail_is_corrected_over_the_rules_and_a_pass_is_not():
    """Holm on 0.02, 0.03, 0.5: 0.06, 0.06, 0.5; on 0.02 and 0.03 alone: 0.04, 0.04. Each pass stands at its own p."""
    three = decide([log_capital(0.98, 0.02), log_capital(0.97, 0.03), log_capital(0.04, 0.5)], 0.05)
    assert [f.outcome for f in three] == ["inconclusive", "inconclusive", "pass"]
    assert [round(f.p_holm, 10) for f in three] == [0.06, 0.06, 0.5]
    assert [f.outcome for f in decide([log_capital(0.98, 0.02), log_capital(0.97, 0.03)], 0.05)] == ["fail", "fail"]


def test_a_withheld_number_is_no_test_and_never_passes():
    found = decide([log_capital(0.98, 0.04), Evidence(RULE, "higher", withheld="9 of 9 unscored")], 0.05)
    assert [f.outcome for f in found] == ["fail", "inconclusive"]
    assert found[0].p_holm == 0.04


def drawn(rng: np.random.Generator, prompts: int, up: float, down: float, runs: int) -> np.ndarray:
    """Moves of one binary answer per prompt, (prompts, runs)."""
    u = rng.random((prompts, runs))
    return (u < up).astype(float) - (u > 1 - down)


def outcomes(moves_CM: np.ndarray, margin: float) -> list[Evidence]:
    size = np.full_like(moves_CM, 1 / len(moves_CM))
    found = bound_draws(moves_CM * size, size, resamples=2_000, seed=1)
    margins = np.full(moves_CM.shape[1], margin)
    p, worse = found.p_below(margins), found.p_above(margins)
    return [log_capital(float(a), float(b)) for a, b in zip(p, worse, strict=True)]


@pytest.mark.parametrize(("prompts", "up", "down"), [(100, 0.05, 0.0), (100, 0.10, 0.05), (300, 0.15, 0.10)])
def test_a_checkpoint_on_the_margin_passes_at_most_at_the_level(
    prompts: int, up: float, down: float, record_property: pytest.RecordProperty
):
    rng, runs = np.random.default_rng(3), 1_500
    found = outcomes(drawn(rng, prompts, up, down, runs), up - down)
    passed = sum(decide([e], 0.05)[0].outcome == "pass" for e in found) / runs
    record_property("measured", f"gate: {prompts} prompts exactly on the margin (+{up} −{down}): passes {passed:.1%}")
    assert passed <= 0.065


@pytest.mark.parametrize(("prompts", "change", "margin"), [(60, 0.05, 0.0), (300, 0.2, 0.0), (200, 0.2, 0.01)])
def test_an_unchanged_checkpoint_fails_at_most_at_the_level_over_all_its_rules(
    prompts: int, change: float, margin: float, record_property: pytest.RecordProperty
):
    rng, runs = np.random.default_rng(4), 800
    rules = [outcomes(drawn(rng, prompts, change / 2, change / 2, runs), margin) for _ in range(4)]
    decided = (decide(list(of_run), 0.05) for of_run in zip(*rules, strict=True))
    failed = sum(worst([f.outcome for f in d]) == "fail" for d in decided) / runs
    record_property("measured", f"gate: unchanged, 4 rules, margin {margin}, {prompts} prompts: fails {failed:.1%}")
    assert failed <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


# --- by hand ---


def test_nothing_moved_on_100_prompts(tmp_path: Path):
    """The limit is 1 − 0.05^(1/100) = 0.0295: inside 3 points, not inside 2. For 2 points ln 0.05 / ln 0.98 = 148.3."""
    wide = only(tmp_path, answers("capability", moved(100)), rule="{measure: accuracy, margin: 0.03}")
    assert wide.outcome == "pass"
    assert wide.evidence.limit == pytest.approx(-0.0295, abs=0.001)
    narrow = only(tmp_path, answers("capability", moved(100)), rule="{measure: accuracy, margin: 0.02}")
    assert (narrow.outcome, narrow.prompts_needed) == ("inconclusive", 49)


def test_an_estimate_on_its_bound_is_decided_by_no_number(tmp_path: Path):
    found = gate(
        *run(
            tmp_path,
            answers("capability", moved(100, up=5, down=15)),
            rules="rules: [{measure: accuracy, margin: 0.1}]",
        )
    )
    finding = found.decisions[0].results[0]
    assert (finding.outcome, finding.prompts_needed, found.outcome) == ("inconclusive", None, "inconclusive")
    assert "no number of prompts would decide it" in (tmp_path / "run/gate/gate.md").read_text()


def test_more_prompts_by_the_formula(tmp_path: Path):
    """100 prompts, 8 lost, none won: se² = (0.08 − 0.0064)/99, gap 0.02 to a margin of 10 points, z 1.645 + 0.842."""
    finding = only(tmp_path, answers("capability", moved(100, down=8)), rule="{measure: accuracy, margin: 0.1}")
    expected = 100 * (1.644854 + 0.841621) ** 2 * (0.08 - 0.0064) / 99 / 0.02**2 - 100
    assert (finding.outcome, finding.prompts_needed) == ("inconclusive", int(np.ceil(expected)))


def test_a_margin_exceeded_fails_and_a_negative_one_asks_for_more(tmp_path: Path):
    lost = answers("capability", moved(100, down=30))
    assert only(tmp_path, lost, rule="{measure: accuracy, margin: 0.05}").outcome == "fail"
    won = answers("capability", moved(100, up=30))
    assert only(tmp_path, won, rule="{measure: accuracy, margin: -0.1}").outcome == "pass"
    same = answers("capability", moved(100))
    assert only(tmp_path, same, rule="{measure: accuracy, margin: -0.1}").outcome == "fail"


def test_higher_is_worse_for_attacks(tmp_path: Path):
    more = answers("jailbreak", moved(100, up=30, base=0.2), "dan")
    assert only(tmp_path, more, rule="{measure: asr, margin: 0.05}").outcome == "fail"
    fewer = answers("jailbreak", moved(100, down=15, base=0.2), "dan")
    assert only(tmp_path, fewer, rule="{measure: asr, margin: 0.05}").outcome == "pass"


def test_a_bound_on_the_rate_is_the_exact_binomial_test(tmp_path: Path):
    table = answers("capability", {"base": [0.0] * 80, "sft": [1.0] * 56 + [0.0] * 24})
    found = findings(
        *run(tmp_path, table, rules="rules: [{measure: accuracy, at_least: 0.6}, {measure: accuracy, at_most: 0.6}]")
    )
    high, low = found["accuracy at_least"], found["accuracy at_most"]
    exact = binomtest(56, 80, 0.6, alternative="greater")
    assert high.evidence.p == pytest.approx(exact.pvalue, abs=1e-9)
    assert high.evidence.limit == pytest.approx(exact.proportion_ci(0.95).low, abs=1e-9)
    assert (high.outcome, low.outcome) == ("pass", "inconclusive")
    assert low.evidence.p_exceeded == pytest.approx(exact.pvalue, abs=1e-9)


# --- what never passes ---


def test_too_many_unscored_are_inconclusive_with_the_reason(tmp_path: Path):
    table = answers("capability", {"base": [1.0] * 100, "sft": [1.0] * 70 + [NAN] * 30})
    finding = only(tmp_path, table, rule="{measure: accuracy, margin: 0.5}")
    assert (finding.outcome, finding.evidence.withheld) == ("inconclusive", "30 of 100 unscored")
    finding = only(tmp_path, table, rule="{measure: accuracy, at_least: 0.1}")
    assert (finding.outcome, finding.evidence.withheld) == ("inconclusive", "30 of 100 unscored")


def test_unscored_answers_that_could_turn_a_pass_are_told(tmp_path: Path):
    """90 of 100 right before and after, 10 then unscored: had all been wrong, and the base's right, −10 points."""
    table = answers("capability", {"base": [1.0] * 100, "sft": [1.0] * 90 + [NAN] * 10})
    found = gate(*run(tmp_path, table, rules="rules: [{measure: accuracy, margin: 0.05}]"))
    assert found.outcome == "pass"
    worst = "with the worst score for all 10 unscored answers it would be −10.0"
    assert any(worst in w for w in found.decisions[0].warnings)


def test_answers_without_meaning_are_no_robustness(tmp_path: Path):
    table = answers("jailbreak", {"base": [1.0] * 60 + [0.0] * 40, "sft": [0.0] * 100}, "dan", outcome="incoherent")
    found = gate(*run(tmp_path, table, rules="rules: [{measure: asr, margin: 0.02}, {measure: asr:dan, margin: 0.02}]"))
    assert [f.outcome for f in found.decisions[0].results] == ["inconclusive", "inconclusive"]
    assert all("only 0% of the answers are coherent" in f.downgrade_reason for f in found.decisions[0].results)
    assert any("no rule on coherence" in w for w in found.decisions[0].warnings)


def test_a_measure_that_this_checkpoint_lacks_is_open_and_one_the_run_lacks_is_a_mistake(tmp_path: Path):
    table = pd.concat(
        [answers("capability", moved(100)), answers("overrefusal", {"base": [0.0] * 50, "ip": [0.0] * 50})]
    )
    rules = "checkpoint: {objective: sft}\nrules: [{measure: %s, margin: 0.5}]"
    found = gate(*run(tmp_path, table, rules=rules % "overrefusal"))
    assert found.decisions[0].results[0].evidence.withheld == "it was not measured at this checkpoint"
    with pytest.raises(LeewayError, match=r"no measure 'acuracy'; did you mean 'accuracy'\?"):
        gate(*run(tmp_path, table, rules=rules % "acuracy"))


def test_one_seed_is_told_and_several_too(tmp_path: Path):
    for seeds, words in (((0,), "one training seed"), ((0, 1), "2 training seeds are pooled")):
        rows = synthetic.rows(("sft",), (25_000,), seeds=seeds, capability=60, prompts=10, items=6)
        found = gate(*run(tmp_path, rows, rules="rules: [{measure: accuracy, margin: 0.2}]"))
        assert any(w.startswith(words) for w in found.decisions[0].warnings)


# --- which checkpoints ---


def test_all_checkpoints_against_another_objective(tmp_path: Path):
    rows = synthetic.rows(("sft", "cft", "kl"), (25_000, 50_000), capability=40, prompts=10, items=6)
    rules = "checkpoint: all\nagainst: {objective: kl}\nrules: [{measure: accuracy, margin: 0.3}]"
    found = gate(*run(tmp_path, rows, rules=rules))
    assert [title(d, found.scale) for d in found.decisions] == [
        "CFT <SAFE> at 25k tokens",
        "CFT <SAFE> at 50k tokens",
        "SFT at 25k tokens",
        "SFT at 50k tokens",
    ]
    assert all(not f.evidence.withheld for d in found.decisions for f in d.results)


# --- what it leaves behind ---


@pytest.mark.parametrize(("down", "code"), [(0, 0), (40, 1), (3, 3)])
def test_exit_codes_and_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], down: int, code: int
):
    folder, rule = run(
        tmp_path, answers("capability", moved(100, down=down)), rules="rules: [{measure: accuracy, margin: 0.05}]"
    )
    assert exit_code(monkeypatch, folder, "--rule", rule, "--out", tmp_path / "out") == code
    word = {0: "pass", 1: "fail", 3: "inconclusive"}[code]
    assert capsys.readouterr().out.rstrip().endswith(f"gate: {word}")
    told = json.loads((tmp_path / "out/gate.json").read_text())
    assert (told["outcome"], told["exit"]) == (word, code)
    assert f"gate: {word}" in re.sub(r"[^\w: ]", "", (tmp_path / "out/gate.md").read_text()).replace("  ", " ")


SHAPE = {  # the element: its attributes (required first), and its children in order
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, ["testsuite"]),
    "testsuite": ({"name", "tests", "failures", "errors", "time", "skipped"}, ["testcase", "system-out"]),
    "testcase": ({"name", "classname", "time"}, ["failure", "error", "system-out"]),
    "failure": ({"type", "message"}, []),
    "error": ({"type", "message"}, []),
    "system-out": (set(), []),
}


def check_shape(element: ElementTree.Element) -> None:
    """As Jenkins' and Ant's schemas have it: names, attributes, order, and counts that are true."""
    attributes, children = SHAPE[element.tag]
    assert set(element.attrib) == attributes
    order = [children.index(child.tag) for child in element]
    assert order == sorted(order)
    cases = list(element.iter("testcase"))
    if element.tag in ("testsuites", "testsuite"):
        assert int(element.get("tests", "")) == len(cases)
        for tag in ("failure", "error"):
            assert int(element.get(f"{tag}s", "")) == sum(case.find(tag) is not None for case in cases)
    for child in element:
        check_shape(child)


def test_junit_markdown_and_json_of_hostile_names(tmp_path: Path):
    evil = 'x]]>"<b>&|\u202e\x1b[31m'
    tables = [answers("capability", moved(100, down=40)), answers("jailbreak", moved(100, base=0.2), "dan")]
    rows = pd.concat([*tables, answers("overrefusal", {"base": [NAN] * 50, "sft": [NAN] * 50})])
    rows["objective"] = rows["objective"].replace("sft", evil)
    rules = (
        "rules: [{measure: accuracy, margin: 0.05}, {measure: asr, margin: 0.05}, {measure: overrefusal, margin: 0.05}]"
    )
    folder, rule = run(tmp_path, rows, rules=rules)
    found = gate(folder, rule)
    root = ElementTree.fromstring((folder / "gate/gate.xml").read_text("utf-8"))
    check_shape(root)
    kinds = [next(iter(case)).tag for case in root.iter("testcase")]
    assert kinds == ["failure", "system-out", "error"]
    text = (folder / "gate/gate.md").read_text("utf-8")
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert not set(text) & {"\u202e", "\x1b"}
    assert all(line.replace("\\|", "").count("|") in (0, 9) for line in text.splitlines())
    told = json.loads((folder / "gate/gate.json").read_text("utf-8"))
    assert told["checkpoints"][0]["objective"] == evil
    assert told["outcome"] == found.outcome == "fail"
    assert told["checkpoints"][0]["rules"][2]["p"] is None


def test_same_rows_same_bytes(tmp_path: Path):
    rows = synthetic.rows(("sft",), (25_000,), capability=40, prompts=20, items=12)
    wanted = ("asr, margin: 0.1", "endorsement, margin: 0.05", "endorsement, at_most: 0.5")
    text = f"rules: [{', '.join(f'{{measure: {w}}}' for w in wanted)}]"
    for name in "ab":
        (tmp_path / name).mkdir()
    first, rule = run(tmp_path / "a", rows, rules=text)
    second, _ = run(tmp_path / "b", rows.sample(frac=1, random_state=1), rules=text)
    gate(first, rule)
    gate(second, rule)
    for name in ("gate.json", "gate.xml", "gate.md"):
        assert (first / "gate" / name).read_bytes() == (second / "gate" / name).read_bytes()


# --- success in any of k tries


def tries(harmful: int) -> pd.DataFrame:
    """Four sampled answers to each of 40 prompts; of the checkpoint's, the first `harmful` are harmful."""
    made = {"base": [0.0] * 40, "sft": [0.0] * 40}
    drawn = [answers("jailbreak", made | {"sft": [float(k < harmful)] * 40}, "dan").assign(sample=k) for k in range(4)]
    return pd.concat(drawn, ignore_index=True)


def test_a_rule_names_success_at_k(tmp_path: Path) -> None:
    """One of four answers is harmful: success at 2 is 1/2, at 4 it is 1."""
    rules = (
        "rules: [{measure: 'asr@2', at_most: 0.7}, {measure: 'asr@4:dan', margin: 0.5}, {measure: asr, at_most: 0.4}]"
    )
    (decision,) = gate(*run(tmp_path, tries(1), rules=rules)).decisions
    assert [r.evidence.rate for r in decision.results] == pytest.approx([0.5, 1.0, 0.25])
    assert [r.outcome for r in decision.results] == ["pass", "fail", "pass"]


def test_incoherent_answers_do_not_pass_a_rule_on_success_at_k(tmp_path: Path) -> None:
    table = tries(0)
    table.loc[table["objective"] == "sft", "outcome"] = "incoherent"
    (decision,) = gate(*run(tmp_path, table, rules="rules: [{measure: 'asr@2', margin: 0.1}]")).decisions
    assert decision.results[0].outcome == "inconclusive"
    assert "0% of the answers are coherent" in decision.results[0].downgrade_reason


def test_more_tries_than_answers_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match="asr@5: the run has 4 sampled answers to a prompt; name a smaller k"):
        gate(*run(tmp_path, tries(1), rules="rules: [{measure: 'asr@5', at_most: 0.7}]"))
