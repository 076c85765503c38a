"""Trackers: what they are sent, once, whatever stops in between; the real libraries; a run that they cannot disturb."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import synthetic
from command import leeway
from markupsafe import escape
from reports import no_figures

from leeway import plugins, report
from leeway.errors import LeewayError
from leeway.integrations.trackers.follow import Follower, State, follow
from leeway.integrations.trackers.process import TrackerProcess, Trackers
from leeway.integrations.trackers.run_files import RunFiles, StepLog, Target, slug, training_points
from leeway.integrations.trackers.tracker import (
    REDACTED_PAGE,
    STUDY,
    Point,
    TrackerConfig,
    parse_track,
    without_trackers,
)
from leeway.report.results import Results

HOSTILE = '<script>alert(1)</script> "; DROP TABLE runs; --\u202e{{7*7}}'


@dataclass
class Recorder:
    """A tracker that keeps what it gets, and fails while `down`."""

    name: ClassVar[str] = "recorder"
    settings: ClassVar[tuple[str, ...]] = ()
    got: list[tuple[str, Point]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    page: str = ""
    down: bool = False
    ended: str = ""
    study: Any = None

    def check(self) -> None: ...

    def open(self, study: Any) -> None:
        self.study = study

    def log(self, run: str, points: list[Point]) -> None:
        if self.down:
            raise ConnectionError("no route to host\nand more")
        self.got += [(run, p) for p in points]

    def add_files(self, files: list[Path]) -> None:
        self.files += [p.name for p in files]
        self.page = next(p for p in files if p.name == "report.html").read_text("utf-8")

    def close(self, status: str) -> None:
        self.ended = status

    def steps(self, run: str) -> list[int]:
        return [p.step for r, p in self.got if r == run and p.tokens is None]


def write_steps(path: Path, first: int, last: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as log:
        for step in range(first, last + 1):
            line = {"step": step, "loss": 2 / step, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.5}
            counts = {"target_tokens": 10, "processed_tokens": 25, "reference_tokens": 0}
            log.write(json.dumps(line | counts) + "\n")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the parts that a running one has."""
    rows = synthetic.rows(("sft", "cft"), (25_000, 100_000), capability=30, prompts=20, items=20)
    folder = synthetic.write(tmp_path_factory.mktemp("tracked") / "run", rows)
    (folder / "parts").mkdir()
    for (objective, budget, template), part in rows.groupby(["objective", "budget", "template_hash"]):
        part.to_parquet(folder / "parts" / f"{objective}-{budget}-{template}.parquet")
    for objective in ("sft", "cft"):
        write_steps(folder / "steps" / f"{objective}-s0.jsonl", 1, 112)
    with no_figures():  # no tracker gets one
        report.build(folder, redacted_page=folder / REDACTED_PAGE)
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def run_files(folder: Path) -> RunFiles:
    targets = []
    for path in sorted((folder / "parts").iterdir()):
        objective, budget, template = path.stem.split("-")
        condition = synthetic.CONDITIONS[template]
        own_form = condition == ("<SAFE>" if objective == "cft" else "plain")
        run, step = ("base", 0) if objective == "base" else (f"{objective}-s0", int(budget) // 900 + 1)
        targets.append(Target(run, step, objective, 0, int(budget), condition, own_form, (str(path),)))
    logs = tuple(StepLog(f"{o}-s0", str(folder / "steps" / f"{o}-s0.jsonl")) for o in ("sft", "cft"))
    targets.sort(key=lambda target: target.budget)
    files = RunFiles(HOSTILE, str(folder), logs, tuple(targets))
    assert RunFiles.from_json(files.to_json()) == files
    return files


def follower(folder: Path, tracker: Recorder, log: list[str] | None = None) -> Follower:
    return Follower(tracker, TrackerConfig("recorder"), run_files(folder), (log if log is not None else []).append)


# --- what is sent


def test_rates_are_those_of_the_page_with_their_intervals(run: Path) -> None:
    tracker = Recorder()
    assert follower(run, tracker).poll()
    live = [(r, p.tokens, p.values) for r, p in tracker.got if p.tokens is not None]
    rates, compared = Results.load(run).rates(), 0
    for line in rates.to_dict("records"):
        own = line["condition"] == ("<SAFE>" if line["objective"] == "cft" else "plain")
        group = "rates" if own else "rates-under-safe"
        where = "base" if line["objective"] == "base" else f"{line['objective']}-s0"
        values = next(v for r, t, v in live if (r, t) == (where, line["budget"]) and f"{group}-n/asr" in v)
        name = f"{group}/{slug(line['measure'])}"
        assert values[f"{group}-n/{line['measure']}"] == line["n"]
        for suffix, column in (("", "rate"), ("_low", "low"), ("_high", "high")):
            if pd.isna(line[column]):
                assert name + suffix not in values
            else:
                assert values[name + suffix] == line[column]
                compared += 1
    assert compared > 100


def test_what_a_checkpoint_learned_is_that_of_the_results(run: Path) -> None:
    lines = [
        {"objective": "cft", "seed": 0, "budget": 25_000, "condition": condition, "prompts": "task", "item_id": f"i{k}"}
        | {"nll": 1.5 + k / 10, "base_nll": 2.0 + k / 10, "kl": 0.1 * k, "weight_change": 0.02}
        | dict.fromkeys(("rejected_nll", "base_rejected_nll"), 3.0)
        for condition in ("<SAFE>", "plain")
        for k in range(6)
    ]
    path = run / "cft.parquet"
    pd.DataFrame(lines).to_parquet(path)
    tracker = Recorder()
    files = replace(run_files(run), learning=(str(path),))
    Follower(tracker, TrackerConfig("recorder"), files, print).poll()
    (point,) = [p for _, p in tracker.got if "learning/kl" in p.values]  # in its own form: the only target of CFT
    assert (point.tokens, point.step) == (25_000, 28)
    assert point.values["learning/kl"] == pytest.approx(0.25)
    assert point.values["learning/nll"] == pytest.approx(1.75)
    assert point.values["learning/nll_low"] < 1.75 < point.values["learning/nll_high"]
    assert point.values["learning/weight-change"] == 0.02
    sent = len(tracker.got)
    Follower(tracker, TrackerConfig("recorder"), files, print).poll()
    assert len(tracker.got) == sent


def test_a_withheld_rate_is_no_number_but_is_counted(run: Path) -> None:
    path = next((run / "parts").glob("sft-25000-*"))
    rows = pd.read_parquet(path)
    rows.loc[rows["eval"] == "capability", "score"] = float("nan")
    rows.to_parquet(path)
    tracker = Recorder()
    follower(run, tracker).poll()
    values = next(p.values for r, p in tracker.got if (r, p.tokens) == ("sft-s0", 25_000))
    assert "rates/accuracy" not in values
    assert values["rates-unscored/accuracy"] == 30


def test_steps_are_sent_once_across_runs_and_truncated_logs(run: Path) -> None:
    first, second = Recorder(), Recorder()
    log = run / "steps" / "sft-s0.jsonl"
    follower(run, first).poll()
    text = log.read_text()
    log.write_text("".join(text.splitlines(keepends=True)[:50]))  # a resumed run starts from its last checkpoint
    again = follower(run, second)
    again.poll()
    write_steps(log, 51, 120)
    with log.open("a") as half:
        half.write('{"step": 121, "lo')  # still being written
    again.poll()
    assert first.steps("sft-s0") == list(range(1, 113))
    assert second.steps("sft-s0") == list(range(113, 121))
    assert second.steps("cft-s0") == []
    assert not [p for _, p in second.got if p.tokens is not None]


def test_token_counts_are_sums_from_the_first_step(run: Path) -> None:
    points = training_points(run / "steps" / "sft-s0.jsonl", 100)
    assert points[0].step == 101
    assert points[0].values["train/target_tokens"] == 1010
    assert points[0].values["train/tokens_per_second"] == 50
    assert training_points(run / "absent.jsonl", 0) == []


def test_a_non_finite_loss_is_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps" / "x.jsonl", 1, 1)
    path = tmp_path / "steps" / "x.jsonl"
    path.write_text(path.read_text().replace('"loss": 2.0', '"loss": NaN'))
    (point,) = training_points(path, 0)
    assert "train/loss" not in point.values
    assert "train/lr" in point.values


def test_a_finished_run_sends_what_changed_and_its_files(run: Path) -> None:
    tracker = Recorder()
    following = follower(run, tracker)
    following.poll()
    sent = len(tracker.got)
    following.state.points[following._name("rates", ("sft", 0, 25_000, "plain"))] = "measured again since"
    assert following.finish()
    assert [(r, p.tokens) for r, p in tracker.got[sent:]] == [("sft-s0", 25_000)]
    assert tracker.files == ["report.html", "rates.csv", "ledger.csv", "results.json", "study.yaml"]
    assert following.finish()
    assert len(tracker.files) == 5


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "wandb.json"
    path.write_text(json.dumps({"settings": {"project": "a"}, "run": "x", "steps": {"sft-s0": 9}}))
    assert State.read(path, {"project": "a"}).steps == {"sft-s0": 9}
    assert State.read(path, {"project": "b"}).steps == {}
    path.write_text("[")
    assert State.read(path, {"project": "a"}).steps == {}


def test_addresses_lose_their_credentials_on_the_way_to_a_tracker(run: Path) -> None:
    with (run / "study.yaml").open("a") as study:
        study.write('judge: {endpoint: "http://me:secret@host/v1"}\n')
    tracker = Recorder()
    follower(run, tracker).poll()
    assert tracker.study.config["judge"]["endpoint"] == "http://host/v1"
    assert tracker.study.name == HOSTILE


def test_names_of_metrics_are_plain_and_distinct() -> None:
    assert slug("asr:none") == "asr:none"
    assert slug("a<b") != slug("a>b")
    assert set(slug(HOSTILE)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:-")


# --- failures


def test_a_failure_is_one_line_and_is_made_good(run: Path) -> None:
    tracker, lines = Recorder(down=True), list[str]()
    following = follower(run, tracker, lines)
    assert not following.poll()
    assert not following.poll()
    assert len(lines) == 1
    assert "ConnectionError: no route to host" in lines[0]
    tracker.down = False
    assert following.poll()
    assert tracker.steps("sft-s0") == list(range(1, 113))
    following.close("finished")
    assert "2 failed calls" in lines[1]
    assert "\n" not in "".join(lines)


def test_what_failed_at_the_end_is_sent_by_the_next_run(run: Path) -> None:
    import queue

    commands: queue.Queue[str] = queue.Queue()
    commands.put("finish")
    down, up = Recorder(down=True), Recorder()
    follow(follower(run, down), commands, 0.01)
    assert (down.ended, down.files) == ("stopped", [])
    commands.put("finish")
    follow(follower(run, up), commands, 0.01)
    assert up.ended == "finished"
    assert len(up.steps("sft-s0")) == 112
    assert "report.html" in up.files


CRASHING = """
import os, time
class T:
    name, settings = "crashing", ("how",)
    def __init__(self, how="exit"): self.how = how
    def check(self): pass
    def open(self, study): pass
    def log(self, run, points): os._exit(9) if self.how == "exit" else time.sleep(1000)
    def add_files(self, files): pass
    def close(self, status): pass
"""


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, name: str = "crashing") -> None:
    """Install a package with a tracker, also for the processes that are started."""
    (folder / f"{name}_tracker.py").write_text(text)
    info = folder / f"{name}_tracker-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_tracker\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[leeway.trackers]\n{name} = {name}_tracker:T\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.slow
def test_a_tracker_that_dies_or_hangs_does_not_end_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, tmp_path, CRASHING)
    for how, found in (("exit", "its process ended (exit code 9)"), ("hang", "not done after 1 s")):
        lines: list[str] = []
        process = TrackerProcess(parse_track([f"crashing.how={how}"])[0], run, lines.append)
        process.check()
        process.send(run_files(run).to_json())
        deadline = time.monotonic() + 60
        while how == "exit" and not lines and time.monotonic() < deadline:
            time.sleep(0.1)
        started = time.monotonic()
        process.end("finish", 1.0)
        assert time.monotonic() - started < 20
        assert len(lines) == 1
        assert found in lines[0]


# --- choosing


def test_trackers_are_chosen_by_option_or_mapping() -> None:
    pytest.importorskip("tensorboard")
    assert parse_track(["tensorboard", "tensorboard.dir=/x=y"]) == [TrackerConfig("tensorboard", {"dir": "/x=y"})]
    assert parse_track([{"tensorboard": {"dir": Path("/x")}}]) == [TrackerConfig("tensorboard", {"dir": "/x"})]
    assert parse_track([{"tensorboard": None}]) == [TrackerConfig("tensorboard")]
    assert parse_track(["tensorboard.page=full"]) == [TrackerConfig("tensorboard", full_page=True)]
    assert parse_track(["tensorboard.page=redacted"]) == [TrackerConfig("tensorboard")]
    with pytest.raises(LeewayError, match=r"tensorboard.page=ful: no such page; did you mean 'full'\?; redacted"):
        parse_track(["tensorboard.page=ful"])
    assert parse_track([]) == []


@pytest.mark.parametrize(
    ("option", "error"),
    [
        (
            "wandbb",
            "--track wandbb: no such tracker; did you mean 'wandb'?; one of: wandb, mlflow, tensorboard, trackio",
        ),
        ("tensorboard.dri=x", "--track tensorboard.dri: no such setting; did you mean 'dir'?; it has dir"),
        ("tensorboard.dir", "--track tensorboard.dir: no value; write --track tensorboard.dir=value"),
        ("tensorboard.dir=http://me:pw@host/x", "--track tensorboard.dir: the address holds a password or user name; "),
    ],
)
def test_a_mistake_is_one_line(option: str, error: str) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(LeewayError) as caught:
        parse_track([option])
    assert str(caught.value).startswith(error)
    with pytest.raises(LeewayError, match="is given twice"):
        parse_track(["tensorboard.dir=a", "tensorboard.dir=b"])


def test_a_missing_package_ends_the_command_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leeway.integrations.trackers import tracker
    from leeway.study.run import Study

    monkeypatch.setattr(tracker, "find_spec", lambda _: None)
    with pytest.raises(LeewayError) as caught:
        Study.load("demo").run(tmp_path / "out", track=["wandb"])
    assert str(caught.value) == "--track wandb: wandb is not installed; pip install 'leeway[wandb]'"
    assert not (tmp_path / "out").exists()


def test_the_manifest_has_the_command_without_trackers() -> None:
    command = ["run", "x", "--track", "mlflow.uri=http://private", "--out", "y", "--track=wandb", "--quiet"]
    assert without_trackers(command) == ["run", "x", "--out", "y", "--quiet"]
    assert without_trackers(["run", "--track", "--track", "a"]) == ["run", "a"]


def test_an_installed_tracker_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("recorder", f"{__name__}:Recorder", "leeway.trackers")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "leeway.trackers" else [])
    (config,) = parse_track(["recorder"])
    assert isinstance(config.load(), Recorder)
    with pytest.raises(LeewayError, match=r"--track recorder\.x: no such setting"):
        replace(config, settings={"x": "1"}).load()


# --- the real libraries


def send(folder: Path, config: str | dict[str, Any], command: str = "finish") -> list[str]:
    """Send a run by a tracker's own process; return what it printed."""
    lines: list[str] = []
    process = TrackerProcess(parse_track([config])[0], folder, lines.append)
    try:
        process.check()
        process.send(run_files(folder).to_json())
    finally:
        process.end(command, 300.0)
    return lines


def send_twice(folder: Path, config: str | dict[str, Any]) -> None:
    """Send half of a run, then the whole."""
    log = folder / "steps" / "sft-s0.jsonl"
    text = log.read_text()
    log.write_text("".join(text.splitlines(keepends=True)[:60]))
    assert send(folder, config, "stop") == []
    log.write_text(text)
    assert send(folder, config) == []


@pytest.mark.slow
def test_tensorboard_has_every_step_once(run: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send_twice(run, "tensorboard")
    events = EventAccumulator(str(run / "trackers" / "tensorboard" / "sft-s0"), size_guidance={"scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 113))
    rates = [(e.step, e.value) for e in events.Scalars("rates/asr")]
    table = Results.load(run).rates().query("objective == 'sft' and measure == 'asr'")
    assert rates == [(b, pytest.approx(r)) for b, r in zip(table["budget"], table["rate"], strict=True)]
    study = EventAccumulator(str(run / "trackers" / "tensorboard" / STUDY))
    study.Reload()
    assert "report.html/text_summary" in study.Tags()["tensors"]


@pytest.mark.slow
def test_mlflow_has_every_step_once_and_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    send_twice(run, {"mlflow": {"uri": uri, "experiment": HOSTILE}})
    code = f"""
import json
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri={uri!r})
experiment = client.get_experiment_by_name({HOSTILE!r})
found = {{}}
for run in client.search_runs([experiment.experiment_id]):
    id, tags = run.info.run_id, run.data.tags
    name = "study" if "mlflow.parentRunId" not in tags else tags["mlflow.runName"]
    losses = [m.step for m in client.get_metric_history(id, "train/loss")]
    rates = [(m.step, m.value) for m in client.get_metric_history(id, "rates/asr")]
    found[name] = [losses, rates, sorted(a.path for a in client.list_artifacts(id)), run.info.status, run.data.params]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"study", "base", "sft-s0", "cft-s0"}
    losses, rates, _, status, _ = found["sft-s0"]
    assert losses == list(range(1, 113))
    table = Results.load(run).rates().query("objective == 'sft' and measure == 'asr'")
    assert rates == [[b // 900 + 1, r] for b, r in zip(table["budget"], table["rate"], strict=True)]
    assert status == "FINISHED"
    assert found["study"][2] == ["ledger.csv", "rates.csv", "report.html", "results.json", "study.yaml"]
    assert found["study"][4]["adapter.r"] == "16"


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of an offline file: chunks of 32 KiB blocks, each with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_offline_has_every_step_once_and_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_DATA_DIR", str(run / "staging"))
    monkeypatch.setenv("WANDB_API_KEY", "")
    send_twice(run, "wandb.mode=offline")
    steps, tokens, artefacts, ids, names = [], [], [], set(), set()
    for path in sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                names.add(record.run.display_name)
                assert record.run.run_group.startswith(HOSTILE)
            elif kind == "artifact":
                artefacts += [entry.path for entry in record.artifact.manifest.contents]
            elif kind == "history" and path.stem.endswith("sft-s0"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps += [values["step"]] if "step" in values else []
                tokens += [(values["tokens"], values["rates/asr"])] if "tokens" in values else []
    assert names == {"study", "base", "sft-s0", "cft-s0"}
    assert len(ids) == 4  # the second run continued the first one's
    assert steps == list(range(1, 113))
    table = Results.load(run).rates().query("objective == 'sft' and measure == 'asr'")
    assert tokens == list(zip(table["budget"], table["rate"], strict=True))
    assert {"report.html", "ledger.csv", "rates.csv", "study.yaml"} <= set(artefacts)


@pytest.mark.slow
def test_wandb_without_a_key_is_a_mistake(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(LeewayError, match=r"--track wandb: no API key of W&B; run `wandb login`"):
        send(run, "wandb")


@pytest.mark.slow
def test_trackio_has_every_step_once_and_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    send_twice(run, "trackio.project=drift")
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage as S
print(json.dumps({run: S.get_logs("drift", run) for run in S.get_runs("drift")}, default=str))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = {name.rpartition("-")[0]: logs for name, logs in json.loads(done.stdout.splitlines()[-1]).items()}
    assert {"base", "sft-s0", "cft-s0"} <= set(found)
    assert sorted(e["step"] for e in found["sft-s0"] if "train/loss" in e) == list(range(1, 113))
    table = Results.load(run).rates().query("objective == 'sft' and measure == 'asr'")
    rates = sorted((e["tokens"], e["rates/asr"]) for e in found["sft-s0"] if "rates/asr" in e)
    assert rates == list(zip(table["budget"], table["rate"], strict=True))
    assert [p.name for p in (tmp_path / "trackio").rglob("*") if p.is_file()]


# --- a whole study

SMALL = """
name: small
model: MODEL
task: {files: {train: ROOT/train.jsonl, test: ROOT/test.jsonl}}
device: cpu
objectives: [sft, cft]
budgets: [400, 800]
optim: {lr: 3.0e-3, batch: 4, warmup_steps: 2}
controls: {aa: false}
evals:
  capability: [{name: files, max_new_tokens: 6}]
  persona: {source: organism, traits: [narcissism], limit: 4}
"""


@pytest.mark.slow
def test_a_killed_and_resumed_study_continues_its_tracker_and_has_the_same_bytes(
    tmp_path: Path, models: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the first checkpoint, then resumed; compared with an untracked run."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "study.yaml").write_text(SMALL.replace("MODEL", str(models["llama"])).replace("ROOT", str(root)))
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "cache"))
    out, plain = tmp_path / "out", tmp_path / "plain"
    tracked = ["run", str(tmp_path / "study.yaml"), "--out", str(out), "--workers", "1", "--track", "tensorboard"]
    first = subprocess.Popen([sys.executable, "-m", "leeway", *tracked], stderr=subprocess.PIPE, text=True)
    while not list(out.glob("checkpoints/*/*/*/ledger.json")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = leeway(*tracked)
    assert done.returncode == 0, done.stderr
    assert "tensorboard:" not in done.stderr
    assert leeway("run", str(tmp_path / "study.yaml"), "--out", str(plain), "--quiet").returncode == 0
    for name in ("rows.parquet", "ledger.parquet", "study.yaml"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert "--track" not in manifest["command"]
    for objective in ("sft", "cft"):
        events = EventAccumulator(str(out / "trackers" / "tensorboard" / f"{objective}-s0"), {"scalars": 0})
        events.Reload()
        steps = len((out / "steps" / f"{objective}-s0.jsonl").read_text().splitlines())
        assert [e.step for e in events.Scalars("train/loss")] == list(range(1, steps + 1))
        assert [e.step for e in events.Scalars("rates/accuracy")] == [400, 800]


@pytest.mark.parametrize("full", [False, True])
def test_the_page_is_sent_without_forbidden_texts_unless_asked_for(run: Path, full: bool) -> None:
    rows, tracker = pd.read_parquet(run / "rows.parquet"), Recorder()
    assert Follower(tracker, TrackerConfig("recorder", full_page=full), run_files(run), print).finish()
    assert tracker.files.count("report.html") == 1
    page, shown = tracker.page, synthetic.embedded(tracker.page)
    hidden = rows[rows["eval"] == "jailbreak"]
    texts = {*hidden["prompt"], *hidden["response"]} - {""}
    assert len(texts) > 20
    assert (texts <= {*shown["prompt"], *shown["response"]}) == full
    for text in texts:
        assert full or not shown[["prompt", "response", "raw"]].isin([text]).any(axis=None)
        assert full or str(escape(text)) not in page
    assert {*rows.loc[rows["eval"] == "capability", "response"]} <= {*shown["response"]}
    assert ("hashes stand in their place" in page) != full


def test_no_tracker_starts_nothing(tmp_path: Path) -> None:
    with Trackers([], tmp_path / "none", print) as trackers:
        trackers.start(None, [])  # type: ignore[arg-type] - nothing is read
    assert not (tmp_path / "none").exists()
