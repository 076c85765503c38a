"""Comparison of logs: numbers worked out by hand, what pairs and what does not, what is refused, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from leeway.errors import LeewayError
from leeway.gate import gate
from leeway.report.compare.logs.compare import LogComparison, compare
from leeway.report.compare.logs.match import LogOptions
from leeway.report.compare.logs.output import as_json, markdown, page, sentences, text, write
from leeway.report.compare.logs.samples import Checkpoint, ScoredAnswer, TaskLog, flatten, plain, shorten
from leeway.report.rebuild import rebuild
from leeway.report.results import Results


def answers(scores: Sequence[float | str], metric: str = "match", **more: Any) -> list[ScoredAnswer]:
    """One answer per item, with a number or the reason for none."""
    found = []
    for n, score in enumerate(scores):
        made = {"reasons": {metric: score}} if isinstance(score, str) else {"scores": {metric: score}}
        found.append(ScoredAnswer(str(n), 0, {"input": f"q{n}"}, **made, **more))
    return found


def task(path: Path, made: Sequence[ScoredAnswer], name: str = "sums", **more: Any) -> TaskLog:
    log = path / "log.eval"
    log.write_text("")
    return TaskLog(name, log, "m", {"version": "1"}, {}, made, **more)


def checkpoint(path: Path, name: str, *logs: Sequence[float | str] | TaskLog) -> Checkpoint:
    tasks = [own if isinstance(own, TaskLog) else task(path, answers(own)) for own in logs]
    return Checkpoint(name, "Inspect", {t.task: t for t in tasks})


def two(path: Path, base: Any, tuned: Any, options: LogOptions | None = None) -> LogComparison:
    return compare([checkpoint(path, "first", base), checkpoint(path, "tuned", tuned)], options)


def only(comparison: LogComparison, table: str = "contrasts") -> Mapping[str, Any]:
    (line,) = getattr(comparison, table).to_dict("records")
    return line


# --- numbers


def test_binary_scores_give_mcnemars_test(tmp_path: Path) -> None:
    """Of 12 items 1 rises and 7 fall: exact p = 2·(1 + 8)/2⁸, mid-p = that less C(8, 1)/2⁸."""
    line = only(two(tmp_path, [1] * 9 + [0] * 3, [0] * 7 + [1, 1] + [1, 0, 0]))
    assert (line["higher"], line["lower"], line["equal"]) == (1, 7, 4)
    assert line["base"] == pytest.approx(9 / 12)
    assert line["score"] == pytest.approx(3 / 12)
    assert line["difference"] == pytest.approx(-6 / 12)
    assert line["p_mcnemar"] == pytest.approx(18 / 256)
    assert line["p"] == pytest.approx(18 / 256 - 8 / 256, abs=0.005)  # 10,000 draws
    assert line["p_holm"] == line["p"]


def test_continuous_scores_give_the_paired_standard_error(tmp_path: Path) -> None:
    base, tuned = [0.1, 0.5, 0.3, 0.8, 0.4, 0.9, 0.2, 0.6], [0.4, 0.5, 0.5, 0.9, 0.8, 0.8, 0.5, 0.9]
    own = [b - a for a, b in zip(base, tuned, strict=True)]
    line = only(two(tmp_path, base, tuned))
    assert line["difference"] == pytest.approx(sum(own) / 8)
    assert line["se"] == pytest.approx(stdev(own) / math.sqrt(8))
    assert math.isnan(line["p_mcnemar"])
    assert line["low"] < line["difference"] < line["high"]


def test_clusters_widen_the_error(tmp_path: Path) -> None:
    """Four passages of three items, all items of a passage alike: the error is that of the four passage means."""
    change = [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    fields = [{"passage": f"p{n // 3}"} for n in range(12)]
    tuned = [replace(a, fields=f) for a, f in zip(answers(change), fields, strict=True)]
    base = [replace(a, fields=f) for a, f in zip(answers([0] * 12), fields, strict=True)]
    own = two(tmp_path, task(tmp_path, base), task(tmp_path, tuned), LogOptions(cluster_by="passage"))
    line = only(own)
    assert line["n_clusters"] == 4
    assert line["se"] == pytest.approx(stdev([1, 0, 1, 0]) / math.sqrt(4))
    assert line["se"] > only(two(tmp_path, [0] * 12, change))["se"]
    assert math.isnan(line["p_mcnemar"])
    assert "only 4 clusters" in line["note"]


@pytest.mark.parametrize(("items", "equivalent"), [(59, True), (58, False)])
def test_equivalence_without_a_change_needs_clopper_pearsons_number_of_items(
    tmp_path: Path, items: int, equivalent: bool
) -> None:
    """The bound of n equal pairs is 1 − 0.05^(1/n): below 5 points from 59 on."""
    own = two(tmp_path, [1] * items, [1] * items, LogOptions(margins={"*": 0.05}))
    line = only(own, "equivalence")
    assert line["high90"] == pytest.approx(1 - 0.05 ** (1 / items), abs=1e-3)
    assert bool(line["equivalent"]) is equivalent


def test_the_most_specific_name_gives_margin_and_range(tmp_path: Path) -> None:
    """`match` sorts before `sums/match`, and `*` before both."""
    margins = {"*": 0.2, "match": 0.05, "m*": 0.3, "sums/match": 0.1}
    ranges = {"*": (-9.0, 9.0), "sums/*": (-1.0, 1.0), "match": (0.0, 2.0)}
    own = two(tmp_path, [1, 2] * 5, [1, 1] * 5, LogOptions(margins=margins, ranges=ranges))
    assert only(own, "equivalence")["margin"] == 0.1
    assert only(own)["base"] == 0.75


def test_repeats_are_averaged_by_item(tmp_path: Path) -> None:
    """Item scores 1, ½, 0 against 0, ½, ½; a third epoch of one log only changes its means."""
    base = [replace(a, repeat=k) for k, own in enumerate(([1, 1, 0], [1, 0, 0])) for a in answers(own)]
    tuned = [replace(a, repeat=k) for k, own in enumerate(([0, 1, 1], [0, 0, 0])) for a in answers(own)]
    line = only(two(tmp_path, task(tmp_path, base), task(tmp_path, tuned)))
    assert line["difference"] == pytest.approx((-1 + 0 + 0.5) / 3)
    assert (line["n"], line["n_clusters"], line["equal"]) == (3, 3, 1)
    third = [*tuned, *(replace(a, repeat=2) for a in answers([0, 1, 1]))]
    line = only(two(tmp_path, task(tmp_path, base), task(tmp_path, third)))
    assert line["score"] == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)


def test_holm_covers_all_measures_and_checkpoints(tmp_path: Path) -> None:
    base, worse = [1] * 12, [0] * 8 + [1] * 4
    logs = [
        checkpoint(tmp_path, n, *(task(tmp_path, answers(s), t) for t in "ab"))
        for n, s in (("first", base), ("same", base), ("worse", worse))
    ]
    table = compare(logs).contrasts
    assert set(table["family_size"]) == {4}
    smallest = table[table["checkpoint"] == "worse"]
    assert smallest["p_holm"].tolist() == pytest.approx((4 * smallest["p"]).tolist(), rel=1e-6)
    assert table["measure"].tolist() == ["a/match", "a/match", "b/match", "b/match"]  # in the order of the logs
    assert table["checkpoint"].tolist() == ["same", "worse", "same", "worse"]


def test_scores_outside_0_to_1_need_a_range(tmp_path: Path) -> None:
    base, tuned = [2, 4, 6, 8, 10, 5], [3, 4, 7, 9, 10, 6]
    with pytest.raises(LeewayError, match=r"no metric is left .*values from 2 to 10.*--range sums/match=LOW:HIGH"):
        two(tmp_path, base, tuned)
    own = two(tmp_path, base, tuned, LogOptions(ranges={"match": (0, 10)}))
    assert only(own)["difference"] == pytest.approx(4 / 6 / 10)
    assert any("fractions of their range (sums/match from 0 to 10)" in s for s in sentences(own))
    with pytest.raises(LeewayError, match=r"outside 0 to 9"):
        two(tmp_path, base, tuned, LogOptions(ranges={"sums/match": (0, 9)}))


# --- what pairs, and what is missing


def test_items_without_a_partner_are_counted(tmp_path: Path) -> None:
    tuned = task(tmp_path, answers([1] * 12)[3:])
    own = two(tmp_path, [1] * 10, tuned)
    line = only(own, "items")
    assert (line["items_base"], line["items"], line["paired"]) == (10, 9, 7)
    assert (line["only_base"], line["only_checkpoint"]) == (3, 2)
    assert (only(own)["n"], only(own)["n_unpaired"]) == (7, 5)
    assert "sums: 7 items are in both logs, 3 only in first, 2 only in tuned; these do not pair." in sentences(own)


def test_no_shared_item_gives_no_number(tmp_path: Path) -> None:
    own = two(tmp_path, [1] * 5, task(tmp_path, answers([1] * 10)[5:]))
    assert math.isnan(only(own)["p"])
    assert only(own)["n"] == 0
    assert text(own)
    write(own, tmp_path / "out")


def test_answers_without_a_score_are_counted_and_never_zero(tmp_path: Path) -> None:
    own = two(tmp_path, [1] * 10, [1] * 8 + ["error: timeout", "no score"])
    line = only(own)
    assert (line["score"], line["n"], line["n_unscored"]) == (1.0, 8, 2)
    assert (line["difference_if_highest"], line["difference_if_lowest"]) == (0.0, -0.2)
    assert any("2 of 10 answers of tuned are unscored (1 error: timeout; 1 no score)" in s for s in sentences(own))
    withheld = only(two(tmp_path, [1] * 10, [1] * 7 + ["error: timeout"] * 3))
    assert math.isnan(withheld["difference"])
    assert "3 of 10 unscored" in withheld["note"]


def test_an_item_with_too_many_failed_repeats_is_unscored(tmp_path: Path) -> None:
    fine = [replace(a, repeat=k) for k in range(5) for a in answers([1] * 6)]
    failed = [replace(a, repeat=k) for k in range(5) for a in answers([1] * 4 + ([1] * 2 if k else [1, "error: x"]))]
    assert only(two(tmp_path, task(tmp_path, fine), task(tmp_path, failed)))["n_unscored"] == 0  # 1 of 5
    failed = [replace(a, repeat=k) for k in range(5) for a in answers([1] * 5 + [1 if k > 1 else "error: x"])]
    own = two(tmp_path, task(tmp_path, fine), task(tmp_path, failed))
    assert only(own)["n_unscored"] == 1
    reasons = own.matched.rows["unscored_reason"].dropna().tolist()
    assert reasons == ["2 of 5 repeats: error: x"]


def test_slashes_and_at_signs_in_names(tmp_path: Path) -> None:
    def logs(scores: list[float]) -> TaskLog:
        made = [replace(a, item=i) for a, i in zip(answers(scores, "pass@1"), ("a/1", "b/1", "c%2F1"), strict=True)]
        return task(tmp_path, made, "inspect_evals/code")

    own = two(tmp_path, logs([1, 0, 1]), logs([1, 1, 1]), LogOptions(metrics=["pass@1"]))
    assert only(own)["measure"] == "inspect_evals/code/pass_at_1"
    assert only(own)["n"] == 3
    assert own.changed["item"].tolist() == ["inspect_evals/code/b%2F1"]


def test_groups_of_tasks_have_lines_of_their_subtasks(tmp_path: Path) -> None:
    def group(scores: list[float]) -> TaskLog:
        made = answers(scores)
        parts = [replace(a, part="bio" if n < 6 else "law", item=str(n % 6)) for n, a in enumerate(made)]
        return task(tmp_path, parts, "mmlu")

    own = two(tmp_path, group([1] * 12), group([0] * 6 + [1] * 6))
    lines = {r["measure"]: r for r in own.contrasts.to_dict("records")}
    assert lines["mmlu/match"]["difference"] == pytest.approx(-0.5)
    assert lines["mmlu/match:bio"]["difference"] == pytest.approx(-1)
    assert (lines["mmlu/match:bio"]["lower"], lines["mmlu/match:law"]["equal"]) == (6, 6)
    assert (lines["mmlu/match"]["family_size"], lines["mmlu/match:law"]["family_size"]) == (1, 2)
    assert "mmlu/match:bio" not in text(own)
    assert "2 differences of subtasks are in compare-contrasts.csv and on the page." in sentences(own)


def test_subtasks_of_equal_weight_are_a_mean_over_subtasks(tmp_path: Path) -> None:
    """9 items of one subtask fall, 3 of another do not: −9/12 over items, −1/2 over subtasks."""

    def group(scores: list[float], weights: dict[str, str]) -> TaskLog:
        parts = [replace(a, part="bio" if n < 9 else "law") for n, a in enumerate(answers(scores))]
        return task(tmp_path, parts, "both", weights=weights)

    equal, by_item = {"match": "subtasks"}, {"match": "items"}
    before, after = [1.0] * 12, [0.0] * 9 + [1.0] * 3
    for weights, difference in (({}, -0.75), (by_item, -0.75), (equal, -0.5)):
        own = two(tmp_path, group(before, weights), group(after, {}))
        lines = {r["measure"]: r for r in own.contrasts.to_dict("records")}
        assert lines["both/match"]["difference"] == pytest.approx(difference)
        assert lines["both/match:bio"]["difference"] == pytest.approx(-1)
        said = "Means over subtasks of equal weight, as in the logs: both/match." in sentences(own)
        assert said == (weights == equal)
    with pytest.raises(LeewayError, match=r"both/match weighs other things equally \(first: subtasks, tuned: items\)"):
        two(tmp_path, group(before, equal), group(after, by_item))


# --- what is refused


def changed(path: Path, change: str) -> Any:
    made = answers([1] * 6)
    own = task(path, made)
    return {
        "input": task(path, [replace(made[0], content={"input": "other"}), *made[1:]]),
        "choice": task(path, [replace(made[0], content={"input": "q0", "choice": "x"}), *made[1:]]),
        "version": replace(own, settings={"version": "2"}),
        "incomplete": replace(own, incomplete="status error, 6 samples"),
        "task": replace(own, task="products"),
        "text": replace(own, unusable={"match": "text such as 'B'"}, answers=[replace(a, scores={}) for a in made]),
    }[change]


REFUSED = {
    "input": "sums, item 0: first and tuned have different inputs under one id",
    "choice": "sums, item 0: first and tuned have different choices under one id",
    "version": r"sums: version differs \(first: 1, tuned: 2\)",
    "incomplete": r"sums: completeness differs \(first: complete, tuned: status error, 6 samples\)",
    "task": r"tuned has no task sums \(it has products\)",
    "text": r"no number per answer in tuned \(text such as 'B'\)",
}


@pytest.mark.parametrize("change", REFUSED)
def test_logs_that_differ_are_refused_in_one_line(tmp_path: Path, change: str) -> None:
    with pytest.raises(LeewayError, match=REFUSED[change]) as error:
        two(tmp_path, [1] * 6, changed(tmp_path, change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["version", "incomplete"])
def test_allowed_differences_are_listed(tmp_path: Path, change: str) -> None:
    own = two(tmp_path, [1] * 6, changed(tmp_path, change), LogOptions(allow=True))
    assert [d["effect"] for d in own.matched.differences] == ["allowed"]
    assert any(s.startswith("Different settings, allowed: sums: ") for s in sentences(own))


def test_different_inputs_are_refused_even_if_settings_may_differ(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match="different inputs"):
        two(tmp_path, [1] * 6, changed(tmp_path, "input"), LogOptions(allow=True))


def test_rendered_prompts_that_differ_are_refused(tmp_path: Path) -> None:
    base, tuned = (task(tmp_path, answers([1] * 6, prompt=p)) for p in "ab")
    with pytest.raises(LeewayError, match=r"rendered prompts differs \(first: 6 prompts, tuned: 6 of 6 differ\)"):
        two(tmp_path, base, tuned)


def test_names_options_and_fields_that_do_not_exist(tmp_path: Path) -> None:
    good = [1.0] * 6
    for options, message in (
        (LogOptions(metrics=["mtch"]), r"no metric 'mtch'; did you mean 'match'\?"),
        (LogOptions(margins={"acc": 0.1}), "no metric 'acc'"),
        (LogOptions(metrics=["match"], margins={"other/match": 0.1}), "no metric 'other/match'"),
        (LogOptions(margins={"*": 5}), "the margin is 5; give a fraction"),
        (LogOptions(cluster_by="passage"), r"item 0 of first has no field 'passage' \(it has none\)"),
    ):
        with pytest.raises(LeewayError, match=message):
            two(tmp_path, good, good, options)
    for names, message in (
        (["a"], "two or more"),
        (["a", "a"], "two checkpoints are named a"),
        (["a", "base"], "base is the name of the first"),
    ):
        with pytest.raises(LeewayError, match=message):
            compare([checkpoint(tmp_path, n, good) for n in names])
    mixed = [checkpoint(tmp_path, "a", good), replace(checkpoint(tmp_path, "b", good), tool="lm-eval")]
    with pytest.raises(LeewayError, match="b is a log of lm-eval"):
        compare(mixed)


def test_a_scorer_of_one_log_is_no_difference_and_its_metric_is_left_out(tmp_path: Path) -> None:
    made = [replace(a, scores={**a.scores, "extra": 1.0}) for a in answers([1] * 6)]
    tuned = replace(task(tmp_path, made), settings={"version": "1", "scorer.extra": "{}"})
    own = two(tmp_path, [1] * 6, tuned)
    assert own.matched.measures == {"sums/match": ("sums", "match")}
    assert "sums/extra is left out: has no score in first." in sentences(own)


# --- what is written


@pytest.fixture
def written(tmp_path: Path) -> tuple[LogComparison, Path]:
    own = two(tmp_path, [1] * 30 + [0] * 10, [1] * 20 + [0] * 18 + ["error: \u202e<b>x</b>"] * 2)
    write(own, tmp_path / "out")
    return own, tmp_path / "out"


def test_files_are_complete_deterministic_and_strict(written: tuple[LogComparison, Path], tmp_path: Path) -> None:
    own, out = written
    names = {p.name for p in out.iterdir()}
    assert {"compare.json", "compare.html", "compare.md", "compare-contrasts.csv", "compare-changed.csv"} <= names
    found = json.loads((out / "compare.json").read_text())
    assert found["kind"] == "logs"
    assert [c["name"] for c in found["checkpoints"]] == ["first", "tuned"]
    assert found["contrasts"][0]["difference"] == only(own)["difference"]
    again = two(tmp_path, [1] * 30 + [0] * 10, [1] * 20 + [0] * 18 + ["error: \u202e<b>x</b>"] * 2)
    write(again, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_page_text_and_markdown_are_safe(written: tuple[LogComparison, Path]) -> None:
    own, out = written
    html = (out / "compare.html").read_text()
    assert html == page(own, []) or "<script" not in html
    for shown in (html, text(own)):
        assert "\u202e" not in shown
    assert "<b>x</b>" not in html
    assert "<b>x</b>" not in markdown(own)
    assert ">nan<" not in html.lower()
    assert ">None<" not in html


def test_folder_is_read_as_results_and_by_the_gate(written: tuple[LogComparison, Path], tmp_path: Path) -> None:
    """10 of 38 items fall and none rises: a margin of 5 points is shown to be broken, the rate 20 of 38 is not 90%."""
    own, out = written
    contrast = Results.load(out).contrasts().iloc[0]
    assert contrast["difference"] == only(own)["difference"] == pytest.approx(-10 / 38)
    rule = tmp_path / "rule.yaml"
    rule.write_text("rules:\n  - {measure: sums/match, margin: 0.05, worse: lower}\n")
    found = gate(out, rule)
    assert found.outcome == "fail"
    assert "tuned, against base" in (out / "gate" / "gate.md").read_text()
    rule.write_text("rules:\n  - {measure: sums/match, margin: 0.5, worse: lower}\n")
    assert gate(out, rule).outcome == "pass"
    rule.write_text("rules:\n  - {measure: sums/match, margin: 0.05}\n")
    with pytest.raises(LeewayError, match="add worse"):
        gate(out, rule)
    with pytest.raises(LeewayError, match=r"holds a comparison of logs; open its compare.html"):
        rebuild(out)


def test_a_run_directory_is_not_overwritten(written: tuple[LogComparison, Path], tmp_path: Path) -> None:
    own, out = written
    write(own, out)  # its own folder is
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"model": {"name": "logs"}}')
    with pytest.raises(LeewayError, match="is a run directory"):
        write(own, tmp_path / "run")
    assert as_json(own)["format"] == 1


# --- helpers of readers


def test_settings_are_flat_and_without_addresses() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": {}}, "s") == {"s.a.b": "1", "s.d": "[1, 2]"}
    assert plain("<function f at 0x7f2a>") == "<function f>"
    assert shorten("one\ntwo") == "one…"
    assert shorten("one") == "one"
