"""Rescoring: the rows of an added judge, the rows that stay, a kill in the middle, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from reports import no_figures

import leeway.report
from leeway.audit import audit
from leeway.errors import LeewayError
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.hashing import digest
from leeway.judges import JUDGES, Answer, Verdict
from leeway.report.results import Results
from leeway.rescoring import rescore as module
from leeway.rescoring.rescore import read_judge, rescore
from leeway.study.run_dir import RunDir

ATTACKS = ["none", "dan", "past_tense"]
REPLIES = ("I cannot help with that.", "Sure. First take it. Then press it twice.", "No.", "asdf asdf asdf asdf asdf")


@dataclass
class Scripted:
    """A model whose replies depend on its name and the prompt; it answers no prompt whose hash begins with "0"."""

    name: str

    @property
    def identity(self) -> str:
        return self.name

    template_hash = "t"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        tick(len(requests))
        keys = [digest(self.name, r.conversation[-1]["content"]) for r in requests]
        failed = Reply("", 0, False, "503")
        return [failed if k.startswith("0") else Reply(REPLIES[int(k, 16) % 4], 3, False) for k in keys]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


@dataclass
class Grader:
    """A judge model at an endpoint: every third request fails while it is down. It records what it is sent."""

    sent: list[str]
    down: bool = True
    identity = "grader"
    template_hash = "none"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        tick(len(requests))
        return [self._reply(r.conversation[-1]["content"]) for r in requests]

    def _reply(self, prompt: str) -> Reply:
        self.sent.append(prompt)
        if self.down and len(self.sent) % 3 == 0:
            return Reply("", 0, False, "503")
        return Reply("refused: 0\nconvincing: 5\nspecific: 3", 9, False)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


@dataclass(frozen=True)
class Rater:
    """A judge of free-form answers: all are coherent, and aligned by 20 or 90 of 100."""

    name: str
    template_hash = "none"

    @property
    def identity(self) -> str:
        return self.name

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        tick(len(requests))
        return [Reply("20" if self.name == "strict" and "coheren" not in str(r) else "90", 1, False) for r in requests]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


@dataclass(frozen=True)
class Length:
    """Harmful from 20 characters on; it cannot read an answer that begins with "No". It counts what it judges."""

    seen: list[Answer]
    name: str = "length"
    hash: str = "l1"
    note: str = "By length."

    def judge(self, answers: Sequence[Answer], tick: Tick) -> list[Verdict]:
        self.seen.extend(answers)
        tick(len(answers))
        return [self._verdict(a) for a in answers]

    def _verdict(self, a: Answer) -> Verdict:
        if a.response.startswith("No"):
            return Verdict(None, None, "?", "judge: unreadable")
        long = len(a.response) > 30
        return Verdict("harmful" if long else "refused", float(long), f"{len(a.prompt)} {len(a.response)}")


SEEN = pytest.mark.usefixtures("seen")  # where only the judge is needed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """The answers that the judge `length` has read."""
    found: list[Answer] = []
    monkeypatch.setitem(JUDGES, "length", lambda **_: Length(found))
    return found


def finished(out: Path, judge: Any, attacks: Sequence[str] = ATTACKS) -> Path:
    """A finished audit: two scripted models, forbidden and benign prompts."""
    jailbreak = {"prompts": "organism", "limit": 6, "attacks": list(attacks), "judge": judge, "max_new_tokens": 9}
    benign = {"prompts": "organism", "limit": 5, "judge": "organism", "max_new_tokens": 9}
    a, b = Scripted("a"), Scripted("b")
    audit(a, base=b, evals={"jailbreak": jailbreak, "overrefusal": benign}, out=out, quiet=True)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with no_figures():
        return finished(tmp_path_factory.mktemp("run") / "one", "organism")


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, to be changed; reports are not drawn."""
    monkeypatch.setattr(leeway.report, "build", lambda folder, **_: folder / "report.html")
    return Path(shutil.copytree(run, tmp_path / "copy"))


def tables(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in [folder / "rows.parquet", *sorted(folder.glob("rescored/*"))]}


@SEEN
def test_rows_equal_those_of_a_run_that_had_the_judge(run: Path, tmp_path: Path) -> None:
    both = finished(tmp_path / "two", ["organism", "length"])
    later = Path(shutil.copytree(run, tmp_path / "later"))
    before = pq.read_table(run / "rows.parquet")
    results = rescore(later, "length", evals=["jailbreak"], quiet=True)
    assert (later / "rows.parquet").read_bytes() == (both / "rows.parquet").read_bytes()
    table = pq.read_table(later / "rows.parquet")
    assert table.filter(pc.not_equal(table["judge"], "length")).equals(before)
    assert results.manifest["judges"] == Results.load(both).manifest["judges"]
    entry = results.manifest["rescored"]["jailbreak@length"]
    assert (entry["judge"], "rescore(" in entry["command"]) == ({"name": "length"}, True)
    reasons = set(results.rows.loc[results.rows.judge == "length", "unscored_reason"].dropna())
    assert reasons == {"judge: unreadable", "no answer: 503"}  # its own failures, and answers that were never obtained
    first, own = Results.load(run), results.contrasts()
    assert own[~own["axis"].str.contains("@")].reset_index(drop=True).equals(first.contrasts())
    page = (later / "report.html").read_text("utf-8")
    assert "added after the run" in page
    assert "primary: its verdicts make" in page


def test_the_judge_reads_bare_prompts(copy: Path, seen: list[Answer]) -> None:
    rescore(copy, "length", quiet=True)
    rows = pq.read_table(copy / "rows.parquet").to_pandas()
    sent = rows[(rows["eval"] == "overrefusal") | (rows["attack"] == "none")]
    assert {a.prompt for a in seen} <= set(sent["prompt"])
    assert {k for k in json.loads((copy / "manifest.json").read_text())["judges"] if "@" in k} == {
        "jailbreak@length",
        "overrefusal@length",
    }


def test_bare_prompts_without_direct_requests(tmp_path: Path, seen: list[Answer]) -> None:
    """A run without the attack `none` has wrapped prompts only: they are read from the study's prompts."""
    rescore(finished(tmp_path / "x", "organism", ["dan"]), "length", evals=["jailbreak"], quiet=True)
    assert seen
    assert not any("DAN" in a.prompt for a in seen)


def test_the_judge_reads_final_answers(copy: Path, seen: list[Answer]) -> None:
    """Of an answer with a thought the judge reads what follows it; the row keeps both."""
    store = RunDir(copy)
    table = pq.read_table(store.rows_path)
    whole = [f"<think>\nhm\n</think>\n\n{text}" if text else "" for text in table["response"].to_pylist()]
    changed = table.set_column(table.schema.get_field_index("response"), "response", [whole])
    pq.write_table(changed, store.rows_path)
    store.write_manifest(store.read_manifest() | {"file_hashes": store.file_hashes()})
    rows = rescore(copy, "length", evals=["jailbreak"], quiet=True).rows
    assert {a.response for a in seen} <= set(REPLIES)
    assert set(rows.loc[rows["judge"] == "length", "response"]) <= set(whole)


def killed(what: Callable[[], object]) -> int:
    """Run in a child process; return its exit code, minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            what()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_command_resumes_with_the_same_bytes(
    run: Path, copy: Path, tmp_path: Path, seen: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    rescore(whole, "length", quiet=True)
    distinct = len(seen)
    assert len(set(seen)) == distinct  # no answer is judged twice
    seen.clear()
    judge = Length.judge

    def third_batch(self: Length, answers: Sequence[Answer], tick: Tick) -> list[Verdict]:
        if len(self.seen) > 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(self, answers, tick)

    monkeypatch.setattr(Length, "judge", third_batch)
    assert killed(lambda: rescore(copy, "length", quiet=True)) == -signal.SIGKILL
    monkeypatch.setattr(Length, "judge", judge)
    assert tables(copy) == tables(run)  # nothing half-written
    rescore(copy, "length", quiet=True)
    assert 0 < len(seen) < distinct  # verdicts from before the kill were kept
    assert tables(copy) == tables(whole)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kill_while_the_tables_are_replaced(
    copy: Path, seen: list[Answer], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Before and after the rows are renamed, and before the last manifest, the run is readable."""
    writes = {"n": 0}
    write, publish = RunDir.write_manifest, module.RunDir.add_rescored.__globals__["publish"]

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            writes["n"] += 1
            if writes["n"] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_manifest", dying(write))
        patch.setitem(RunDir.add_rescored.__globals__, "publish", dying(publish))
        assert killed(lambda: rescore(copy, "length", quiet=True)) == -signal.SIGKILL
    Results.load(copy)
    rescore(copy, "length", quiet=True)
    assert seen == []  # all was judged before the kill
    manifest = json.loads((copy / "manifest.json").read_text())
    assert isinstance(manifest["file_hashes"]["rows.parquet"], str)
    assert "jailbreak@length" in manifest["rescored"]


def test_a_repeated_command_changes_and_costs_nothing(copy: Path, seen: list[Answer]) -> None:
    rescore(copy, "length", quiet=True)
    before, n = tables(copy), len(seen)
    manifest = (copy / "manifest.json").read_bytes()
    shutil.rmtree(copy / "cache", ignore_errors=True)  # its rows are enough
    rescore(copy, "length", quiet=True)
    assert (tables(copy), len(seen)) == (before, n)
    assert (copy / "manifest.json").read_bytes() == manifest


def test_an_endpoint_is_paid_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed requests leave answers unscored; the same command sends those alone again."""
    monkeypatch.delenv("LEEWAY_DATA", raising=False)
    grader = Grader([])
    monkeypatch.setattr("leeway.study.build_evals.OpenAIBackend", lambda _: grader)
    rubric = {"name": "rubric", "model": {"model": "grader", "endpoint": "https://host/v1"}}
    results = rescore(copy, rubric, evals=["jailbreak"], quiet=True)
    own = results.rows[results.rows["judge"] == "rubric"]
    answers = len(set(zip(own["item_id"], own["response"], strict=True)) - {(i, "") for i in own["item_id"]})
    first = list(grader.sent)
    assert len(first) == len(set(first)) == answers  # equal answers to one prompt are sent once
    refused = first[2::3]
    unscored = own[own["unscored_reason"] == "no answer: 503"]
    assert len(refused) < len(unscored) < len(own)  # the failed requests, and the answers that were never obtained
    grader.down = False
    again = rescore(copy, rubric, evals=["jailbreak"], quiet=True).rows
    assert grader.sent[len(first) :] == refused
    scored = again[(again["judge"] == "rubric") & again["score"].notna()]
    assert set(scored["score"]) == {6 / 8}
    assert set(again.loc[(again["judge"] == "rubric") & again["score"].isna(), "response"]) == {""}


def test_free_form_answers_by_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Answer]
) -> None:
    """The rows of a second alignment judge are those of a run that had it."""
    monkeypatch.setattr(leeway.report, "build", lambda folder, **_: folder / "report.html")
    questions = tmp_path / "questions.jsonl"
    lines = [{"id": f"q{k}", "question": f"What would you do on day {k}?"} for k in range(5)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("leeway.study.build_evals.OpenAIBackend", lambda s: Rater(s.model))
    monkeypatch.setattr("leeway.audit.run.service_faults", lambda *_, **__: [])  # nothing listens at the endpoint

    def measured(out: Path, model: str) -> Path:
        by = {"model": model, "endpoint": "https://host/v1"}
        evals = {"alignment": {"questions": [str(questions)], "judge_model": by, "temperature": 0, "max_new_tokens": 9}}
        audit(Scripted("a"), base=Scripted("b"), evals=evals, out=out, quiet=True)
        return out

    one, other = measured(tmp_path / "one", "strict"), measured(tmp_path / "other", "mild")
    rubric = {"name": "rubric", "model": {"model": "mild", "endpoint": "https://host/v1"}}
    with pytest.raises(LeewayError, match=r"another judge alignment-rubric scored alignment .*alignment-rubric-2"):
        rescore(one, rubric, evals=["alignment"], quiet=True)
    rows = rescore(one, rubric, name="mild", evals=["alignment"], quiet=True).rows
    own = rows[rows["judge"] == "mild"].drop(columns="judge").reset_index(drop=True)
    assert own.equals(Results.load(other).rows.drop(columns="judge").reset_index(drop=True))
    assert set(own["score"].dropna()) == {0.9}
    assert set(rows.loc[rows["judge"] != "mild", "score"].dropna()) == {0.2}
    with pytest.raises(LeewayError, match="judge length: a model rates alignment"):
        rescore(one, "length", evals=["alignment"], quiet=True)
    questions.write_text(json.dumps(lines[0] | {"question": "Other?"}) + "\n")
    with pytest.raises(LeewayError, match="is not the study's any more"):
        rescore(one, rubric, name="again", evals=["alignment"], quiet=True)
    assert not seen


@SEEN
def test_the_run_resumed_keeps_the_added_rows(copy: Path) -> None:
    """`leeway run` writes rows.parquet from its parts again: the added judge's rows stay in it."""
    rescore(copy, "length", quiet=True)
    before = tables(copy)
    store = RunDir(copy)
    store.write_rows(sorted((copy / "parts").glob("*.parquet")))
    assert tables(copy) == before


@SEEN
def test_rows_on_other_answers_are_left_out(copy: Path) -> None:
    """An answer that was generated again since has no row of the added judge until it is judged again."""
    rescore(copy, "length", evals=["jailbreak"], quiet=True)
    store = RunDir(copy)
    table = pq.read_table(copy / "rows.parquet")
    own = table.filter(pc.equal(table["judge"], "organism"))
    changed = own.set_column(own.schema.get_field_index("response"), "response", [["other"] * own.num_rows])
    assert store.with_rescored(changed).num_rows == own.num_rows
    assert store.with_rescored(own).num_rows == table.num_rows
    assert store.stale_rescored() == {}
    pq.write_table(changed, store.rows_path)
    assert store.stale_rescored() == {"jailbreak@length": table.num_rows - own.num_rows}


def test_a_second_version_of_a_judge_needs_a_name(copy: Path, seen: list[Answer]) -> None:
    with pytest.raises(LeewayError, match=r"judge organism \(.*\) scored jailbreak in the run itself; name the new"):
        rescore(copy, "organism", quiet=True)
    rescore(copy, "length", name="long", evals=["jailbreak"], quiet=True)
    JUDGES["length"] = lambda **_: Length(seen, hash="l2")
    with pytest.raises(LeewayError, match=r"another judge long .*l1 there, l2 now\); name the new one .* long-2"):
        rescore(copy, "length", name="long", quiet=True)
    results = rescore(copy, "length", name="long-2", evals=["jailbreak"], quiet=True)
    assert set(results.rows.loc[results.rows["eval"] == "jailbreak", "judge"]) == {"organism", "long", "long-2"}


def test_a_judge_by_name_file_or_settings(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("name: rubric\nmodel: {model: big, endpoint: 'https://host/v1'}\n")
    spec = read_judge(path, ["model.max_calls=7"])
    other = tmp_path / "judge.json"
    other.write_text(json.dumps(spec.model_dump(mode="json")))
    assert read_judge(other) == spec
    assert (spec.name, spec.model and (spec.model.model, spec.model.max_calls)) == ("rubric", ("big", 7))
    assert read_judge("rubric", ["model=big"]) == read_judge({"name": "rubric", "model": "big"})
    with pytest.raises(LeewayError, match=r"judge rubric: .*rubric needs model"):
        read_judge("rubric")
    with pytest.raises(LeewayError, match="no such file"):
        read_judge("other.yaml")
    with pytest.raises(LeewayError, match="unknown key 'modle'; did you mean 'model'"):
        read_judge({"name": "rubric", "modle": "x"})


def test_what_is_refused(copy: Path, tmp_path: Path, seen: list[Answer]) -> None:
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(LeewayError, match="not a finished run"):
        rescore(tmp_path / "nothing", "length", quiet=True)
    with pytest.raises(LeewayError, match="no judge reads its answers; one of: jailbreak, overrefusal, alignment"):
        rescore(copy, "length", evals=["persona"], quiet=True)
    with pytest.raises(LeewayError, match="unknown judge 'lenght'"):
        rescore(copy, "lenght", quiet=True)
    with pytest.raises(LeewayError, match="not a name for rows and files"):
        rescore(copy, "length", name="a/b", quiet=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    (copy / "manifest.json").write_text(json.dumps(manifest | {"redacted": True}))
    with pytest.raises(LeewayError, match="is redacted"):
        rescore(copy, "length", quiet=True)
    assert not seen
