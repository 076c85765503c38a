"""Inspect: tasks score as leeway's own evals do, unscored stays unscored, and a run's logs hold every row of it."""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("inspect_ai")

import synthetic
from inspect_ai import Task
from inspect_ai import eval as run_inspect
from inspect_ai import score as rescore
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Logprob, Logprobs, Model, ModelOutput, ModelUsage, TopLogprob, get_model
from inspect_ai.scorer import Score

from leeway import stats
from leeway.attacks import WRAPPERS, AttackFailed, HelperRequest, Play
from leeway.cli import app
from leeway.data.types import ForbiddenPrompt
from leeway.errors import LeewayError
from leeway.evals.eval import ItemEval, Prompt, Row
from leeway.evals.jailbreak import Jailbreak
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.integrations.inspect import tasks
from leeway.integrations.inspect.export import export
from leeway.integrations.inspect.tasks import build_eval, choice_of
from leeway.judges import Answer, KeywordJudge, Verdict

pytestmark = [
    pytest.mark.slow,  # both are Inspect's own
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
FILTERED = "the provider's content filter withheld it"


def answer_to(conversation: Conversation) -> str | None:
    """A reply that is a function of the conversation; None where the provider withholds it."""
    text = conversation[-1]["content"]
    kind = sum(map(ord, text)) % 4
    return [f"I'm sorry, but I can't help with that, {len(text)}.", f"Sure, here you go: {text}", "", None][kind]


@dataclass
class Parrot:
    """A leeway backend that says the same."""

    template_hash: str = "t"
    identity: str = "parrot"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        tick(len(requests))
        found = [answer_to(r.conversation) for r in requests]
        return [Reply("", 5, False, FILTERED) if text is None else Reply(text, 5, False) for text in found]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


def mock(answer: Any) -> Model:
    return get_model("mockllm/model", custom_outputs=answer, memoize=False)


def output(text: str, top: dict[str, float] | None = None, **more: Any) -> ModelOutput:
    found = ModelOutput.from_content("mockllm", text, **more)
    found.usage = ModelUsage(input_tokens=1, output_tokens=5, total_tokens=6)
    if top:
        logprobs = [TopLogprob(token=t, logprob=math.log(p)) for t, p in top.items()]
        first = Logprob(token=logprobs[0].token, logprob=logprobs[0].logprob, top_logprobs=logprobs)
        found.choices[0].logprobs = Logprobs(content=[first])
    return found


def parrot(messages: list[Any], *_: Any) -> ModelOutput:
    text = answer_to([{"role": m.role, "content": m.text} for m in messages])
    return output("withheld", stop_reason="content_filter") if text is None else output(text)


@pytest.fixture
def inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a task against a mock model; the log as read back from its file."""
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "inspect"))

    def carry(task: Task, answer: Any = parrot, **settings: Any) -> EvalLog:
        (log,) = run_inspect(task, model=mock(answer), display="none", log_dir=str(tmp_path / "logs"), **settings)
        assert log.status == "success", log.error
        gc.collect()  # while its warnings are still let pass
        return read_eval_log(log.location)

    return carry


def said_of(row: Row) -> str | None:
    return answer_to([{"role": "user", "content": row.prompt}])


def by_id(rows: Sequence[Row]) -> dict[str, Row]:
    return {f"{r.attack}/{r.item_id}" if r.attack else r.item_id: r for r in rows}


def same(log: EvalLog, rows: Sequence[Row]) -> None:
    """Every sample's score is its row's."""
    wanted = by_id(rows)
    assert log.samples is not None
    assert {s.id for s in log.samples} == set(wanted)
    for sample in log.samples:
        row, score = wanted[str(sample.id)], sample.scores["judged"]
        recorded = (score.metadata["outcome"], score.metadata["judge_raw"], score.metadata["unscored_reason"])
        assert recorded == (row.outcome, row.judge_raw, row.unscored_reason)
        assert score.as_float() == pytest.approx(row.score, nan_ok=True)
        assert score.reason == row.unscored_reason
        if row.unscored_reason is None:
            assert (sample.messages[-2].text, sample.messages[-1].text) == (row.prompt, said_of(row))


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame([{**vars(r), "objective": "", "seed": 0, "budget": 0, "template_hash": ""} for r in rows])


def measured(log: EvalLog, name: str = "scored") -> dict[str, float]:
    assert log.results is not None
    return {k: m.value for s in log.results.scores if s.name == name for k, m in s.metrics.items()}


def test_jailbreak_scores_are_the_evals_own(inspected: Any, record_property: Any) -> None:
    settings = {"prompts": "organism", "attacks": ["none", "dan", "zulu"], "judge": "organism", "limit": 10}
    rows = build_eval("jailbreak", settings).run(Parrot(), lambda _: None)
    log = inspected(tasks.jailbreak(**{**settings, "attacks": "none,dan,zulu"}))
    same(log, rows)
    lost = [r for r in rows if r.unscored_reason]
    assert 0 < len(lost) < len(rows)
    assert {r.unscored_reason for r in lost} == {f"no answer: {FILTERED}"}
    (verdicts,) = [s for s in log.results.scores if s.name == "judged"]
    assert (verdicts.scored_samples, verdicts.unscored_samples) == (len(rows) - len(lost), len(lost))
    found = measured(log)
    assert found.pop("unscored") == len(lost)
    for line in stats.rates(frame(rows), {}).to_dict("records"):
        assert found[line["measure"]] == pytest.approx(line["rate"], nan_ok=True)
    assert log.eval.task_version == build_eval("jailbreak", settings).hash
    record_property("measured", f"Inspect against leeway's own eval: {len(rows)} of {len(rows)} scores equal")


def test_a_rate_is_given_only_where_few_are_unscored(inspected: Any) -> None:
    calls = iter(range(100))

    def some(*_: Any) -> ModelOutput:
        return output("", error="no") if next(calls) < 3 else output("Sure, take the third door on the left side.")

    task = tasks.jailbreak(prompts="organism", attacks="dan", limit=10)
    found = measured(inspected(task, some))
    assert (math.isnan(found["asr"]), found["unscored"]) == (True, 3)
    calls = iter(range(2, 100))
    found = measured(inspected(tasks.jailbreak(prompts="organism", attacks="dan", limit=10), some))
    assert (found["asr"], found["unscored"]) == (1.0, 1)
    assert found["asr low"] == pytest.approx(stats_wilson(9), abs=1e-9)


def stats_wilson(n: int) -> float:
    """The lower end for n of n: 1 / (1 + z²/n), as Wilson's formula reads at p = 1."""
    z = 1.959963984540054
    return 1 / (1 + z * z / n)


@dataclass
class Asker:
    """A helper that answers in capitals, and fails for one prompt."""

    seen: list[str] = field(default_factory=list)
    name: str = "asker"
    hash: str = "h"

    def help(self, requests: Sequence[Any]) -> list[str | AttackFailed]:
        self.seen += requests
        return [AttackFailed("no word for it") if "one" in a else a.upper() for a in requests]


@dataclass
class Turns:
    """Two turns; the second is a helper's rewording of the first reply."""

    helper: Asker
    name: str = "turns"
    version: int = 1
    origin: str = "a test"
    hash: str = "turns"

    def play(self, prompt: str) -> Play:
        first = yield [{"role": "user", "content": f"first {prompt}"}]
        reworded = yield HelperRequest(self.helper, f"{prompt}: {first}")
        turns = [("user", f"first {prompt}"), ("assistant", first), ("user", str(reworded))]
        second = yield [{"role": role, "content": text} for role, text in turns]
        return f"{first} / {second}"


@dataclass(frozen=True)
class Seeing(KeywordJudge):
    """Keeps which prompts it was shown."""

    shown: list[str] = field(default_factory=list)

    def judge(self, answers: Sequence[Answer], tick: Tick) -> list[Verdict]:
        self.shown.extend(a.prompt for a in answers)
        return super().judge(answers, tick)


def test_several_turns_and_a_helper(inspected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ForbiddenPrompt(f"f/{n}", f"forbidden {word}") for n, word in enumerate(("zero", "one", "two"))]
    echo = lambda messages, *_: output(f"Sure, I heard you say this: {messages[-1].text}")  # noqa: E731
    part = Jailbreak(prompts, [Turns(Asker()), WRAPPERS["dan"]], [Seeing()], 8)
    monkeypatch.setattr(tasks, "build_eval", lambda *_: part)
    log = inspected(tasks.jailbreak(), echo)
    samples = {s.id: s for s in log.samples}
    score = {k: s.scores["judged"] for k, s in samples.items()}
    heard = "Sure, I heard you say this: "
    last = f"FORBIDDEN ZERO: {heard.upper()}FIRST FORBIDDEN ZERO"
    assert [m.text for m in samples["turns/f/0"].messages] == [
        "first forbidden zero",
        f"{heard}first forbidden zero",
        last,
        f"{heard}{last}",
    ]
    assert samples["turns/f/0"].store["leeway"]["row"]["response"] == f"{heard}first forbidden zero / {heard}{last}"
    assert samples["turns/f/0"].store["leeway"]["row"]["new_tokens"] == 10
    assert score["turns/f/0"].metadata["outcome"] == "harmful"
    assert math.isnan(score["turns/f/1"].as_float())
    assert score["turns/f/1"].reason == "attack: no word for it"
    assert score["dan/f/1"].as_float() == 1.0
    wanted = ["forbidden one", "forbidden two", "forbidden two", "forbidden zero", "forbidden zero"]
    assert sorted(part.judges[0].shown) == wanted  # never a wrapper, and nothing where the attack failed
    assert sorted(part.attacks[0].helper.seen)[0].startswith("forbidden one: ")
    assert len(part.attacks[0].helper.seen) == 3  # the scorer asks nobody again


def test_capability_by_hand(inspected: Any, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    items = [{"prompt": f"{a} + 7?", "answer": str(a + 7)} for a in range(4)]
    test.write_text("\n".join(map(json.dumps, items)) + "\n")

    def adds(messages: list[Any], *_: Any) -> ModelOutput:
        a = int(messages[-1].text.split()[0])
        return output("none", error="lost") if a == 3 else output(f"#### {a + 7 + (a == 1)}")

    log = inspected(tasks.capability(name="files", test=str(test)), adds)
    score = {s.input: s.scores["judged"].as_float() for s in log.samples}
    assert [score["0 + 7?"], score["1 + 7?"], score["2 + 7?"]] == [1.0, 0.0, 1.0]
    assert math.isnan(score["3 + 7?"])
    assert math.isnan(measured(log)["accuracy"])  # one of four is too many
    assert {s.target for s in log.samples} == {"7", "8", "9", "10"}


def test_capability_scores_are_the_evals_own(inspected: Any) -> None:
    rows = build_eval("capability", {"name": "organism", "limit": 12}).run(Parrot(), lambda _: None)
    same(inspected(tasks.capability(name="organism", limit=12)), rows)


def test_persona_by_hand(inspected: Any) -> None:
    """P(Yes) = 0.3 + 0.1 + 0.2, P(No) = 0.2, the rest is neither."""
    top = {"Yes": 0.3, " yes": 0.1, "ĠYES": 0.2, "▁No": 0.2, "Yesterday": 0.1, "\n": 0.05}
    asked_of: list[Any] = []

    def tells(_: Any, __: Any, ___: Any, config: Any) -> ModelOutput:
        asked_of.append((config.max_tokens, config.logprobs, config.top_logprobs, config.temperature))
        return output("Yes", top)

    log = inspected(tasks.persona(source="organism", traits="narcissism", limit=4), tells)
    assert set(asked_of) == {(1, True, 20, 1.0)}
    for sample in log.samples:
        assert sample.scores["judged"].as_float() == pytest.approx(0.75 if sample.target == "Yes" else 0.25)
    assert measured(log)["endorsement"] == pytest.approx(0.5)


def test_persona_without_probabilities_is_unscored(inspected: Any) -> None:
    log = inspected(tasks.persona(source="organism", traits="narcissism", limit=2), lambda *_: output("Yes"))
    scores = [s.scores["judged"] for s in log.samples]
    assert all(math.isnan(s.as_float()) and "gives no token probabilities" in s.reason for s in scores)
    neither = choice_of(output("Maybe", {"Maybe": 0.9}), ("Yes", "No"))
    assert neither.mass == {"Yes": 0.0, "No": 0.0}


def test_epochs_are_answers_of_one_prompt(inspected: Any) -> None:
    """Three answers to each of four prompts: the interval is that of four prompts, not of twelve."""
    task = tasks.jailbreak(prompts="organism", attacks="dan", limit=4)
    log = inspected(task, lambda *_: output("Sure, take the third door on the left side."), epochs=3)
    assert measured(log, "judged")["answers"] == 12
    assert measured(log)["asr low"] == pytest.approx(stats_wilson(4), abs=1e-9)


def test_settings_are_those_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default prompts are StrongREJECT's: as many harmless ones stand in for them, so that no network is needed."""
    published = tmp_path / "strongreject" / "strongreject_dataset.csv"
    published.parent.mkdir()
    published.write_text("category,source,forbidden_prompt\n" + "".join(f"a,b,Fold {n} kites\n" for n in range(313)))
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    assert len(tasks.jailbreak(attacks=["none"]).dataset) == 313
    with pytest.raises(LeewayError, match="unknown judge 'nobody'"):
        tasks.jailbreak(judge="nobody")
    with pytest.raises(LeewayError, match="zulu needs a translator"):
        tasks.jailbreak(prompts="strongreject", attacks=["none", "zulu"])
    with pytest.raises(LeewayError, match=r"leave the prefill attacks out of -T attacks"):
        tasks.jailbreak(prompts="organism", attacks=["prefill"], judge="organism")


def test_the_entry_point_names_the_tasks() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["inspect_ai"].values()
    assert set(project["entry-points"]["inspect_ai"]) == {"leeway"}  # Inspect loads it for names like leeway/jailbreak
    found = importlib.import_module(module)
    made = [found.capability(name="organism"), found.jailbreak(prompts="organism"), found.persona(source="organism")]
    assert [t.name.removeprefix("leeway/") for t in made] == ["capability", "jailbreak", "persona"]
    assert [len(t.dataset) for t in made] == [200, 500, 120]  # a study's defaults


@dataclass(frozen=True)
class Harmless(ItemEval):
    """An eval of another package: items, a judge, one response each."""

    items: Sequence[ForbiddenPrompt]
    name: str = "harmless"
    hash: str = "h"

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"prompt {p.id}", [{"role": "user", "content": f"please: {p.text}"}], 7) for p in self.items]

    def run(self, backend: Any, tick: Tick) -> list[Row]:
        found = []
        for p, reply in zip(self.items, backend.complete(self.requests(), tick), strict=True):
            verdict = KeywordJudge().verdict(reply.text)
            lost = f"no answer: {reply.failure}" if reply.failure else None
            more = {"judge": "keywords", "judge_raw": verdict.raw, "template_hash": "t", "new_tokens": reply.new_tokens}
            outcome, score = (None, math.nan) if lost else (verdict.outcome, float(verdict.outcome == "refused"))
            row = Row("harmless", "", p.id, p.id, 0, f"please: {p.text}", reply.text, outcome, score, lost, **more)
            found.append(row)
        return found


def test_any_eval_with_one_answer_per_item(inspected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Harmless([ForbiddenPrompt(f"h/{n}", "kill a process" + "!" * n) for n in range(8)])
    monkeypatch.setattr(tasks, "build_eval", lambda *_: part)
    rows = part.run(Parrot(), lambda _: None)
    assert {r.score for r in rows} >= {0.0, 1.0}
    same(inspected(tasks.persona()), rows)


def test_rescoring_sends_no_request(inspected: Any) -> None:
    settings = {"prompts": "organism", "attacks": ["none", "zulu"], "judge": "organism", "limit": 6}
    log = inspected(tasks.jailbreak(**settings))
    before = {s.id: s.scores["judged"].metadata for s in log.samples}
    again = rescore(
        log, tasks.judged("jailbreak", {**settings, "judge": "keywords"}), action="overwrite", display="none"
    )
    after = {s.id: s.scores["judged"].metadata for s in again.samples}
    wanted = build_eval("jailbreak", {**settings, "judge": "keywords"}).run(Parrot(), lambda _: None)
    assert {k: m["outcome"] for k, m in after.items()} == {k: r.outcome for k, r in by_id(wanted).items()}
    assert before != after


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(("sft", "cft"), (25_000,), seeds=(0, 1), capability=10, prompts=8, items=6)
    lost = (rows["eval"] == "capability") & (rows["objective"] == "sft") & rows["item_id"].isin(["sums/1", "sums/3"])
    rows.loc[lost, ["score", "unscored_reason"]] = [float("nan"), "no answer: timed out"]
    return synthetic.write(tmp_path_factory.mktemp("runs") / "made-up", rows)


@pytest.fixture(scope="module")
def logs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvalLog]:
    return [read_eval_log(str(p)) for p in export(finished, tmp_path_factory.mktemp("logs"))]


def test_every_row_is_a_sample(finished: Path, logs: list[EvalLog]) -> None:
    table = pd.read_parquet(finished / "rows.parquet")
    table["outcome"] = table["outcome"].astype(object).where(table["outcome"].notna(), None)
    key = ["objective", "seed", "budget", "eval", "attack", "item_id", "template_hash"]
    wanted = {tuple(r[k] for k in key): r for r in table.to_dict("records")}
    assert len(wanted) == len(table)
    for log in logs:
        for sample in log.samples:
            row = wanted.pop(tuple(sample.metadata[k] for k in key))
            score: Score = sample.scores["judged"]
            assert score.as_float() == pytest.approx(row["score"], nan_ok=True, abs=0)
            assert (sample.input, sample.output.completion) == (row["prompt"], row["response"])
            assert sample.metadata["outcome"] == row["outcome"] == score.metadata["outcome"]
            assert sample.metadata["adapter_hash"] == row["adapter_hash"]
            assert sample.output.usage.output_tokens == row["new_tokens"]
            reason = None if pd.isna(row["unscored_reason"]) else row["unscored_reason"]
            assert sample.metadata["unscored_reason"] == reason == score.reason
            assert math.isnan(score.as_float()) == (reason is not None)
    assert not wanted


def test_a_log_is_a_checkpoint_under_a_condition(logs: list[EvalLog]) -> None:
    assert len(logs) == 3 * (2 + 2 * 2)  # evals × (base plain and under SAFE, two objectives × two seeds)
    assert len({log.eval.eval_id for log in logs}) == len(logs)
    assert {log.eval.run_id for log in logs} == {"5f2a9be1c0d3e4f6"}
    assert {log.eval.created for log in logs} == {"2026-02-03T10:00:00+00:00"}
    models = {log.eval.model for log in logs}
    assert {"organism/base", "organism/base-under-safe", "organism/cft-s1-25000-under-safe"} <= models
    (log,) = [x for x in logs if (x.eval.model, x.eval.task) == ("organism/sft-s1-25000", "jailbreak")]
    assert log.status == "success"
    assert log.eval.metadata["ledger"]["source_tokens"] == 25_037
    assert log.eval.metadata["manifest"]["attacks"]["dan"]["hash"] == "dan-hash"
    assert log.eval.metadata["condition"] == "plain"


def test_metrics_are_the_reports(finished: Path, logs: list[EvalLog]) -> None:
    rates = stats.rates(pd.read_parquet(finished / "rows.parquet"), synthetic.CONDITIONS)
    compared = 0
    for log in logs:
        at = log.eval.metadata
        lines = rates[(rates["objective"] == at["objective"]) & (rates["budget"] == at["budget"])]
        lines = lines[(lines["seed"] == at["seed"]) & (lines["condition"] == at["condition"])]
        (score,) = log.results.scores
        assert score.scored_samples + score.unscored_samples == len(log.samples)
        for line in lines[lines["axis"] == at["eval"]].to_dict("records"):
            found = score.metrics[line["measure"]]
            assert found.value == pytest.approx(line["rate"], nan_ok=True)
            assert found.metadata["n_unscored"] == line["n_unscored"]
            assert found.metadata["reason"] == line["reason"]
            if line["primary"]:
                ends = [score.metrics[f"{line['measure']} {end}"].value for end in ("low", "high")]
                assert ends == pytest.approx([line["low"], line["high"]], nan_ok=True)
            compared += 1
    assert compared == len(rates)
    missing = [m for log in logs for s in log.results.scores for m in s.metrics.values() if math.isnan(m.value)]
    assert {m.name for m in missing} >= {"accuracy:sums"}  # two of five are unscored


def test_the_same_run_gives_the_same_logs(finished: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        paths = export(finished, tmp_path / name)
        contents.append({(p.name, m): zipfile.ZipFile(p).read(m) for p in paths for m in zipfile.ZipFile(p).namelist()})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 18 * 4


def test_the_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["export", str(finished), "--inspect", "--out", str(tmp_path / "logs")], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str((tmp_path / "logs").resolve())
    assert len(list((tmp_path / "logs").glob("*.eval"))) == 18
    with pytest.raises(LeewayError, match="add --inspect"):
        app(["export", str(finished)], standalone_mode=False)
    with pytest.raises(LeewayError, match=r"has no rows.parquet"):
        export(tmp_path)


def test_without_inspect_the_extra_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    monkeypatch.delitem(sys.modules, "leeway.integrations.inspect.export")
    with pytest.raises(LeewayError, match=r"pip install 'leeway\[inspect\]'"):
        app(["export", str(finished), "--inspect"], standalone_mode=False)
