"""Logs that Inspect and lm-eval write themselves, compared; files that are no logs, in one line each."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from leeway.cli import main
from leeway.errors import LeewayError
from leeway.integrations import lm_eval_logs
from leeway.integrations.logs import are_logs, compare_logs, parse_margins, parse_ranges, read_checkpoints, split

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# --- Inspect

WRONG = {"base": {1, 2}, "tuned": {1, 3, 4, 5, 6, 7, 8}}


def run_inspect(out: Path, name: str, wrong: set[int], **settings: Any) -> Path:
    """Run a task of 12 sums on a mock model: wrong on some, without an answer to 9, failing on 10; 2 epochs."""
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task
    from inspect_ai import eval as run
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import Score, Scorer, accuracy, match, mean, scorer

    @scorer(metrics=[accuracy()], name="letters")
    def letters() -> Scorer:
        async def score(state: Any, target: Any) -> Score:
            text = state.output.completion
            right = text == target.text
            return Score(value="C" if right else "P" if text == "1" else "N" if not text else "I")

        return score

    @scorer(metrics={"*": [mean()]}, name="parts")
    def parts() -> Scorer:
        async def score(state: Any, _: Any) -> Score:
            if state.output.completion == "":
                return Score.unscored(reason="grader_failed")
            return Score(value={"length": len(state.output.completion), "half": 0.5, "word": "B"})

        return score

    def answer(messages: list[Any], *_: Any) -> ModelOutput:
        n = int(messages[-1].text.split()[0])
        if n == 10:
            raise RuntimeError("the endpoint is down")
        text = "" if n == 9 else str(n + 1 if n not in wrong else n)
        made = ModelOutput.from_content("mockllm", text)
        made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return made

    samples = [
        Sample(
            id=n,
            input=[ChatMessageSystem(content="Add."), ChatMessageUser(content=f"{n} + 1 =")],
            target=str(n + 1),
            metadata={"passage": f"p{n // 2}"},
        )
        for n in range(12)
    ]
    (log,) = run(
        Task(dataset=samples, scorer=[match(), letters(), parts()], name="sums", version=settings.pop("version", 0)),
        model=get_model(f"mockllm/{name}", custom_outputs=answer, memoize=False),
        log_dir=str(out),
        display="none",
        fail_on_error=False,
        **{"epochs": 2, **settings},
    )
    return Path(str(log.location).removeprefix("file://"))


@pytest.fixture(scope="module")
def inspect_logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    found = {name: run_inspect(folder / name, name, wrong) for name, wrong in WRONG.items()}
    return found | {"second": run_inspect(folder / "second", "base", WRONG["base"], version=2, epochs=1)}


def test_inspect_logs_give_inspects_own_accuracy(inspect_logs: dict[str, Path]) -> None:
    """The base is wrong on 1 and 2, the other on seven; neither answers 9, and 10 failed in both."""
    from inspect_ai.log import read_eval_log

    own = compare_logs([str(inspect_logs["base"].parent), str(inspect_logs["tuned"])])
    assert own.matched.names == ["mockllm/base", "mockllm/tuned"]
    assert list(own.matched.measures) == ["sums/match", "sums/letters", "sums/parts/half"]
    lines = {r["measure"]: r for r in own.contrasts.to_dict("records")}
    for column, name in (("base", "base"), ("score", "tuned")):
        scores = {s.name: s for s in read_eval_log(str(inspect_logs[name]), header_only=True).results.scores}
        for scorer in ("match", "letters"):
            expected = scores[scorer].metrics["accuracy"].value
            assert lines[f"sums/{scorer}"][column] == pytest.approx(expected)
    assert lines["sums/match"]["difference"] == pytest.approx(-5 / 11)
    assert (lines["sums/match"]["higher"], lines["sums/match"]["lower"], lines["sums/match"]["equal"]) == (1, 6, 4)
    assert lines["sums/letters"]["difference"] == pytest.approx((1 - 6) / 11 + 0.0)
    assert (lines["sums/match"]["n"], lines["sums/match"]["n_unscored"]) == (11, 1)


def test_inspect_failures_are_unscored_with_their_reason(inspect_logs: dict[str, Path]) -> None:
    own = compare_logs([str(inspect_logs["base"]), str(inspect_logs["tuned"])])
    table = own.matched.unscored.set_index(["measure", "checkpoint", "reason"])["answers"].to_dict()
    failed = {k: n for k, n in table.items() if "endpoint is down" in k[2]}
    assert len(failed) == 6
    assert set(failed.values()) == {2}
    assert table["sums/parts/half", "mockllm/base", "unscored: grader_failed"] == 2
    left_out = {d["what"]: d["effect"] for d in own.matched.differences if d["effect"].startswith("left out")}
    assert "text such as 'B'" in left_out["sums/parts/word"]
    assert "values from 1 to 2" in left_out["sums/parts/length"]
    scaled = compare_logs(
        [str(inspect_logs["base"]), str(inspect_logs["tuned"])],
        metrics=["parts/length"],
        ranges={"parts/length": (0, 4)},
    )
    assert list(scaled.matched.measures) == ["sums/parts/length"]


def test_inspect_clusters_by_a_metadata_field(inspect_logs: dict[str, Path]) -> None:
    logs = [f"base={inspect_logs['base']}", f"tuned={inspect_logs['tuned']}"]
    own = compare_logs(logs, metrics=["match"], cluster_by="passage")
    assert own.contrasts["n_clusters"].tolist() == [6]
    with pytest.raises(LeewayError, match=r"no field 'topic' \(it has passage\)"):
        compare_logs(logs, cluster_by="topic")


def test_inspect_version_is_compared_and_epochs_are_listed(inspect_logs: dict[str, Path]) -> None:
    logs = [f"base={inspect_logs['base']}", f"tuned={inspect_logs['second']}"]
    with pytest.raises(LeewayError, match=r"sums: version differs \(base: 0, tuned: 2\)"):
        compare_logs(logs)
    own = compare_logs(logs, allow=True, metrics=["match"])
    assert own.contrasts["difference"].tolist() == [0]
    assert {"what": "sums: config.epochs", "effect": "listed", "base": "2", "tuned": "1"} in own.matched.differences
    assert own.items[["answers_base", "answers"]].to_numpy().tolist() == [[24, 12]]


def test_inspect_files_that_cannot_be_compared(inspect_logs: dict[str, Path], tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log, write_eval_log

    log = read_eval_log(str(inspect_logs["base"]))
    log.samples = None
    write_eval_log(log, str(tmp_path / "header.eval"))
    (tmp_path / "cut.eval").write_bytes(inspect_logs["base"].read_bytes()[:2000])
    (tmp_path / "text.eval").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.eval", "w") as other:
        other.writestr("a.txt", "hello")
    (tmp_path / "other.json").write_text("{}")
    for name, message in (
        ("header.eval", "header.eval: only a header, status success"),
        ("cut.eval", "cut.eval: not a readable Inspect log"),
        ("text.eval", "text.eval: not a readable Inspect log"),
        ("other.eval", "other.eval: not a readable Inspect log"),
        ("other.json", "other.json: not a readable Inspect log"),
    ):
        with pytest.raises(LeewayError, match=message) as error:
            compare_logs([str(inspect_logs["base"]), f"other={tmp_path / name}"])
        assert "\n" not in str(error.value)


def test_inspect_json_logs_are_read_and_a_retry_replaces_its_run(inspect_logs: dict[str, Path], tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log, write_eval_log

    log = read_eval_log(str(inspect_logs["tuned"]))
    write_eval_log(log, str(tmp_path / "b.json"))
    found = compare_logs([str(inspect_logs["base"]), str(tmp_path / "b.json")], metrics=["match"])
    assert found.contrasts["difference"].tolist() == pytest.approx([-5 / 11])
    log.status, log.samples = "error", log.samples[:6]
    for folder in ("one", "two"):
        write_eval_log(log, str(tmp_path / folder / "a.eval"))
    (tmp_path / "one" / "b.eval").write_bytes(inspect_logs["tuned"].read_bytes())
    (made,) = read_checkpoints([str(tmp_path / "one")])
    assert made.tasks["sums"].facts["retry of"] == "a.eval"
    assert not made.tasks["sums"].incomplete
    with pytest.raises(LeewayError, match=r"completeness differs \(base: complete, tuned: status error, 6 samples\)"):
        compare_logs([f"base={inspect_logs['base']}", f"tuned={tmp_path / 'two'}"])
    (tmp_path / "two" / "b.eval").write_bytes((tmp_path / "two" / "a.eval").read_bytes())
    with pytest.raises(LeewayError, match=r"tuned has two logs of task sums \(.*a.eval and .*b.eval\)"):
        compare_logs([f"base={inspect_logs['base']}", f"tuned={tmp_path / 'two'}"])


def test_a_folder_of_two_models_is_refused(inspect_logs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / f"{name}.eval").write_bytes(inspect_logs[name].read_bytes())
    with pytest.raises(LeewayError, match=r"logs of 2 models \(mockllm/base, mockllm/tuned\)"):
        compare_logs([str(tmp_path), str(inspect_logs["base"])])


# --- lm-eval

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: {kind}
test_split: test
fewshot_split: train
doc_to_text: "{{{{q}}}} ="
"""
CHOICE = """
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
SAY = """
doc_to_target: "{{c[a]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: digit, filter: [{function: regex, regex_pattern: "([0-9])"}, {function: take_first}]}
"""
UNEVEN = "aggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
DOCS = [
    {"q": f"{a} + {b}", "c": [str(a + b), str(a + b + 1), "Yes no"], "a": (a + b) % 2, "topic": f"t{a}"}
    for a in range(6)
    for b in (1, 3)
]


def run_lm_eval(out: Path, tasks: Path, model: Path, shots: int, names: Sequence[str]) -> Path:
    """Run tasks on a Hugging Face model, with samples logged as the command line does; return the folder."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from leeway.evals.lm_eval import isolated

    tracker = EvaluationTracker(output_path=str(out))
    with isolated():
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model)},
            device="cpu",
            batch_size=12,
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            evaluation_tracker=tracker,
            num_fewshot=shots,
            bootstrap_iters=0,
        )
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in found["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return next(out.rglob("results_*.json")).parent


@pytest.fixture(scope="module")
def lm_eval_folders(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> dict[str, Path]:
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("lm-eval")
    tasks, data = folder / "tasks", folder / "docs.jsonl"
    tasks.mkdir()
    data.write_text("\n".join(map(json.dumps, DOCS)))
    for name, kind, rest in (("choice", "multiple_choice", CHOICE), ("say", "generate_until", SAY)):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data) + rest)
        (tasks / f"{name}2.yaml").write_text(TASK.format(name=f"{name}2", kind=kind, data=data) + rest)
    (tasks / "both.yaml").write_text("group: both\ntask: [choice2, say2]\n")
    few = folder / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, DOCS[:3])))
    for name, of in (("whole", data), ("part", few)):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, kind="multiple_choice", data=of) + CHOICE)
    (tasks / "uneven.yaml").write_text("group: uneven\ntask: [whole, part]\n" + UNEVEN)
    every = ("choice", "say", "both", "uneven")
    found = {k: run_lm_eval(folder / k, tasks, models[k], 0, every) for k in ("llama", "qwen2")}
    return found | {"shots": run_lm_eval(folder / "shots", tasks, models["llama"], 2, ["choice"])}


def test_lm_eval_logs_give_lm_evals_own_scores(lm_eval_folders: dict[str, Path]) -> None:
    own = compare_logs([f"base={lm_eval_folders['llama']}", f"tuned={lm_eval_folders['qwen2']}"])
    lines = {r["measure"]: r for r in own.contrasts.to_dict("records")}
    names = {"choice/acc": ("choice", "acc,none"), "say/exact_match,strict": ("say", "exact_match,strict")}
    names |= {"say/exact_match,digit": ("say", "exact_match,digit"), "both/acc": ("choice2", "acc,none")}
    names |= {"uneven/acc": ("uneven", "acc,none")}
    assert {m for m in lines if ":" not in m} == {*names, "both/exact_match,strict", "both/exact_match,digit"}
    for column, folder in (("base", "llama"), ("score", "qwen2")):
        results = json.loads(next(lm_eval_folders[folder].glob("results_*.json")).read_text())["results"]
        for measure, (name, metric) in names.items():
            assert lines[measure][column] == pytest.approx(results[name][metric])
    assert lines["choice/acc"]["n"] == len(DOCS)
    pairs = [
        {s["doc_id"]: s["acc"] for s in map(json.loads, next(lm_eval_folders[k].glob("samples_choice_*")).open())}
        for k in ("llama", "qwen2")
    ]
    changes = [pairs[1][n] - pairs[0][n] for n in range(len(DOCS))]
    assert (lines["choice/acc"]["higher"], lines["choice/acc"]["lower"]) == (changes.count(1), changes.count(-1))
    left_out = {d["what"]: d["effect"] for d in own.matched.differences if d["effect"].startswith("left out")}
    assert "a list per document" in left_out["choice/brier_score"]


@pytest.mark.parametrize(("score", "weights"), [(0.5, {"acc": "subtasks"}), (0.75, {"acc": "items"}), (0.6, {})])
def test_the_weights_of_a_group_are_read_off_its_score(score: float, weights: dict[str, str]) -> None:
    results: dict[str, Any] = {"g": {"acc,none": score, "acc_stderr,none": "N/A", "alias": "g"}}
    results |= {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}}
    sizes = {"a": {"effective": 9}, "b": {"effective": 3}}
    subtasks = {"g": ["a", "h"], "h": ["b"]}
    tasks = lm_eval_logs._leaves(subtasks, "g")
    assert tasks == ["a", "b"]
    assert lm_eval_logs._weights({"results": results, "n-samples": sizes}, "g", tasks) == weights
    assert lm_eval_logs._weights({"results": results}, "g", tasks) == {}


def test_lm_eval_few_shot_examples_are_compared(lm_eval_folders: dict[str, Path]) -> None:
    logs = [f"base={lm_eval_folders['llama']}", f"tuned={lm_eval_folders['shots']}"]
    with pytest.raises(LeewayError, match=r"tuned has no task both \(it has choice\)"):
        compare_logs(logs)
    one = f"base={next(lm_eval_folders['llama'].glob('samples_choice_*'))}"
    with pytest.raises(LeewayError, match=r"choice: few-shot examples differs \(base: 0, tuned: 2\), and 1 more"):
        compare_logs([one, logs[1]])
    own = compare_logs(logs, allow=True)
    effects = {d["what"]: d["effect"] for d in own.matched.differences}
    assert effects["choice: few-shot examples"] == effects["choice: rendered prompts"] == "allowed"
    assert effects["task say"] == "left out: not in every log"


def test_lm_eval_items_without_a_partner_and_clusters(lm_eval_folders: dict[str, Path], tmp_path: Path) -> None:
    whole = next(lm_eval_folders["llama"].glob("samples_choice_*"))
    for name in (whole.name, whole.name.replace("samples_choice", "results").replace("jsonl", "json")):
        (tmp_path / name).write_bytes((whole.parent / name).read_bytes())
    part = tmp_path / whole.name
    lines = part.read_text().splitlines()
    part.write_text("\n".join(lines[:9]))
    own = compare_logs([f"base={whole}", f"tuned={part}"], cluster_by="topic")
    line = own.items.to_dict("records")[0]
    assert (line["paired"], line["only_base"], line["only_checkpoint"]) == (9, 3, 0)
    assert own.contrasts["n_clusters"].tolist() == [5]
    changed = json.loads(lines[4])
    changed["doc"]["q"] = "something else"
    part.write_text("\n".join([*lines[:4], json.dumps(changed)]))
    with pytest.raises(LeewayError, match="choice, item 4: base and tuned have different documents under one id"):
        compare_logs([f"base={whole}", f"tuned={part}"], allow=True)


def sample(doc_id: int = 0, **more: Any) -> str:
    made = {"doc_id": doc_id, "doc": {"q": "?"}, "target": "1", "filter": "none", "metrics": ["acc"], "acc": 1.0}
    return json.dumps(made | more)


FILES = {
    "empty.jsonl": ("", "empty.jsonl: no samples; run lm_eval with --log_samples"),
    "cut.jsonl": (sample() + "\n" + sample(1)[:40], "cut.jsonl, line 2: not JSON, as in a truncated file"),
    "list.jsonl": ("[1]", "list.jsonl, line 1: not an object"),
    "other.jsonl": ('{"a": 1}', "other.jsonl, line 1: without doc_id, doc, target"),
    "twice.jsonl": (sample() + "\n" + sample(), "twice.jsonl, line 2: document 0 occurs twice under filter none"),
    "results_2026.json": ("{}", "results_2026.json: lm-eval's results without samples"),
    "log.txt": ("hello", "log.txt: not a log; give .eval files"),
    "missing.eval": (None, "missing.eval: no such file or folder"),
    "folder": (None, "folder: no logs of Inspect or lm-eval in this folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_logs(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    (tmp_path / "good.jsonl").write_text(sample())
    with pytest.raises(LeewayError, match=message) as error:
        compare_logs([f"base={tmp_path / 'good.jsonl'}", f"tuned={tmp_path / name}"])
    assert "\n" not in str(error.value)


def test_lm_eval_scores_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    lines = [sample(0), sample(1, acc=None), sample(2, acc=math.nan), sample(3, acc=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    log = lm_eval_logs.read(tmp_path / "a.jsonl")
    assert [dict(a.scores) for a in log.answers] == [{"acc": 1.0}, {}, {}, {"acc": 1.0}]
    assert [a.reasons.get("acc") for a in log.answers] == [None, "no score", "not a finite number", None]


# --- the command


def test_arguments_are_names_paths_or_run_directories(tmp_path: Path) -> None:
    (tmp_path / "a=b.eval").write_text("")
    assert split(str(tmp_path / "a=b.eval")) == ("", tmp_path / "a=b.eval")
    assert split(f"tuned={tmp_path}") == ("tuned", tmp_path)
    assert are_logs([str(tmp_path), "x"])
    assert are_logs(["a.eval"])
    assert not are_logs(["runs/a", "runs/b"])
    assert parse_margins(["0.05", "gsm8k/acc=0.1"]) == {"*": 0.05, "gsm8k/acc": 0.1}
    assert parse_ranges(["score=0:10"]) == {"score": (0, 10)}
    for parse, text in ((parse_margins, "x"), (parse_ranges, "1:2"), (parse_ranges, "s=2:1"), (parse_ranges, "s=1")):
        with pytest.raises(LeewayError, match="--"):
            parse([text])


def test_the_command_prints_the_table_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in (("a", [1] * 20), ("b", [1] * 8 + [0] * 12)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(sample(n, acc=s) for n, s in enumerate(scores)))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["leeway", "compare", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    code, out, _ = run("base=a.jsonl", "tuned=b.jsonl", "--metric", "acc", "--margin", "0.1", "--out", "out")
    assert code == 0
    assert "−60.0" in out
    assert out.splitlines()[-1] == str((tmp_path / "out" / "compare.html").resolve())
    Path("rule.yaml").write_text("rules: [{measure: samples/acc, margin: 0.1, worse: lower}]")
    code, out, _ = run("base=a.jsonl", "tuned=b.jsonl", "--rule", "rule.yaml", "--out", "out")
    assert code == 1
    assert "compare.html" in out
    assert "fail" in out
    Path("rule.yaml").write_text("rules: []")
    code, out, err = run("base=a.jsonl", "tuned=b.jsonl", "--rule", "rule.yaml", "--out", "other")
    assert (code, out) == (2, "")
    assert not Path("other").exists()
    code, _, err = run("base=a.jsonl", "tuned=b.jsonl", "--pool")
    assert code == 2
    assert "--pool is for run directories" in err
    code, _, err = run("x", "y", "--allow")
    assert code == 2
    assert "these options are for logs" in err
