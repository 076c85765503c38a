"""Entry points of other packages: each error is one line that names the package; working ones run in the docs tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from leeway import plugins
from leeway.cli import judge_calibrate
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals.eval import Eval, ItemEval, JudgeRef, Prompt, Row, load_eval, user_message
from leeway.evals.tasks import load_task
from leeway.generation.backend import Backend, Request, Tick
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.model.load import load_chat
from leeway.objectives import load_objective
from leeway.objectives.sft import Sft
from leeway.plan.plan import plan
from leeway.study.load import parse
from leeway.study.prepare import check_prompts_fit, prepare
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.sequential_eval import sequential_axes

STUDY = """
name: x
model: organism
task: {name: organism}
objectives: [sft]
budgets: [1k]
evals: {capability: [organism]}
"""


@dataclass(frozen=True)
class Wanting(Sft):
    name: ClassVar[str] = "wanting"
    weight: float


@dataclass(frozen=True)
class Weighted(Sft):
    name: ClassVar[str] = "weighted"
    weight: float = 1.0


@dataclass(frozen=True)
class Axis(Eval):
    n: int = 1
    name: str = "axis"
    key: str = "axis"
    hash: str = "0"

    def prompts(self) -> list[Prompt]:
        return [Prompt("item 0", [{"role": "user", "content": "?"}], 4)] * self.n

    def run(self, backend: Backend, tick: Tick) -> list[Row]:  # noqa: ARG002
        return []


@dataclass(frozen=True)
class Brevity(ItemEval):
    """A whole eval of another package: is a response at most `words` words long, and does a grader model like it?"""

    words: int = 3
    name: str = "brevity"
    items: tuple[CapabilityItem, ...] = tuple(CapabilityItem(f"brevity/{k}", f"What is {k} + 1?", "") for k in range(3))

    @property
    def hash(self) -> str:
        return digest(self.name, self.words, [i.id for i in self.items])

    def prompts(self) -> Iterator[Prompt]:
        yield from (Prompt(f"item {i.id}", user_message(i.prompt), 4) for i in self.items)

    def judged_by(self) -> list[JudgeRef]:
        return [JudgeRef("words", digest(self.words), "Counts words.")]

    def judge_requests(self) -> Iterator[tuple[str, Request]]:
        yield from (("words", Request(user_message(i.prompt), 10)) for i in self.items)

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        replies = backend.complete(self.requests(), tick)
        template = digest(backend.template_hash, self.name)
        return [
            Row(
                eval=self.name,
                attack="",
                item_id=item.id,
                cluster=item.id,
                sample=0,
                prompt=item.prompt,
                response=reply.text,
                outcome=None,
                score=float(len(reply.text.split()) <= self.words),
                unscored_reason=None,
                judge="words",
                judge_raw="",
                template_hash=template,
                new_tokens=reply.new_tokens,
            )
            for item, reply in zip(self.items, replies, strict=True)
        ]


class HalfATask:
    name = "half"

    def held_out_items(self) -> list[CapabilityItem]:
        return []


def bring(monkeypatch: pytest.MonkeyPatch, group: str, *named: tuple[str, str]) -> None:
    found = [EntryPoint(name, f"{__name__}:{value}", group) for name, value in named]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in found if p.group == group])


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("wanting", "Wanting", "test_plugins:Wanting is not a dataclass with a default for every field"),
        ("half", "HalfATask", "no needs_pairs, needs_reference"),
        ("other", "Weighted", "test_plugins:Weighted has another name, 'weighted'"),
        ("gone", "Nowhere", "cannot be loaded .AttributeError"),
        ("dpo", "Weighted", "the name of test_plugins:Weighted is taken"),
    ],
)
def test_a_faulty_objective_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, fault: str) -> None:
    bring(monkeypatch, "leeway.objectives", (name, value))
    with pytest.raises(LeewayError, match=fault) as error:
        load_objective(name if name != "dpo" else "anything")
    assert "\n" not in str(error.value)


def test_settings_of_an_objective_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "leeway.objectives", ("weighted", "Weighted"))
    spec = parse(STUDY, "x", ("objectives=[sft, {weighted: {weight: 0.5}}]",))
    assert spec.objective("weighted").build() == Weighted(0.5)
    with pytest.raises(LeewayError, match="weighted: no setting 'wieght'; did you mean 'weight'"):
        parse(STUDY, "x", ("objectives=[{weighted: {wieght: 1}}]",))
    with pytest.raises(LeewayError, match="no objective 'wieghted'; did you mean 'weighted'"):
        parse(STUDY, "x", ("objectives=[wieghted]",))


def test_a_faulty_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "leeway.tasks", ("half", "HalfATask"))
    with pytest.raises(LeewayError, match=r"does not implement task .no grader, max_new_tokens"):
        load_task("half")
    with pytest.raises(LeewayError, match="no task 'hafl'; did you mean 'half'"):
        parse(STUDY, "x", ("task={name: hafl}",))
    with pytest.raises(LeewayError, match="revision: task half does not use it"):
        parse(STUDY, "x", ("task={name: half, revision: abc}",))


def test_a_faulty_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "leeway.evals", ("axis", "Axis"), ("other", "Axis"), ("plain", "HalfATask"))
    with pytest.raises(LeewayError, match=r"makes a HalfATask, not a leeway\.evals\.eval\.Eval"):
        load_eval("plain")
    assert len(load_eval("axis", {"n": 3})) == 3
    with pytest.raises(LeewayError, match="unexpected keyword argument 'm'"):
        load_eval("axis", {"m": 3})
    with pytest.raises(LeewayError, match="makes an eval named 'axis'"):
        load_eval("other")
    with pytest.raises(LeewayError, match=r"with key 'A b'"):
        load_eval("axis", {"key": "A b"})
    with pytest.raises(LeewayError, match="no eval 'axes'; one of: axis, other, plain"):
        load_eval("axes")
    bring(monkeypatch, "leeway.evals", ("persona", "Axis"))
    with pytest.raises(LeewayError, match=r"eval persona: the name of .* is taken"):
        load_eval("axis")


BREVITY = """
name: brevity
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft]
budgets: [300]
optim: {{lr: 3.0e-3, batch: 4, warmup_steps: 2}}
evals: {{batch: 16, plugins: [{{name: brevity, settings: {{words: 2}}}}]}}
"""


def test_an_eval_of_another_package_is_planned_run_cached_and_recorded(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    """One file and one entry point: nothing else in leeway names this eval."""
    bring(monkeypatch, "leeway.evals", ("brevity", "Brevity"))
    spec = parse(BREVITY.format(model=models["llama"], root=root), "brevity")
    assert spec.evals.plugins[0].settings == {"words": 2}

    planned = plan(spec, measure=False)
    (cost,) = planned.evals
    chat = load_chat(str(models["llama"]), None)
    prompts = [len(chat.prompt_ids(user_message(f"What is {k} + 1?"))) for k in range(3)]
    assert (cost.name, cost.answers, cost.prompt_tokens, cost.max_new_tokens) == ("brevity", 3, sum(prompts), 4)
    assert (cost.judge, cost.judge_calls) == ("words", 3)
    around = sum(len(chat.ids(f"What is {k} + 1?")) for k in range(3))
    assert (cost.judge_tokens_in, cost.judge_tokens_out) == (around + 3 * 2, 3 * 5.0)  # half of 4, half of 10
    assert "3 calls of words" in planned.to_text()

    requests: list[int] = []
    answer = TransformersBackend.complete
    monkeypatch.setattr(TransformersBackend, "complete", lambda *a: requests.append(len(a[1])) or answer(*a))
    run(spec, tmp_path / "run", Reporter(quiet=True), "leeway run brevity.yaml", workers=1)
    assert sum(requests) == 6  # three for the base, three for the checkpoint
    rows = pd.read_parquet(tmp_path / "run" / "rows.parquet")
    assert rows.groupby("objective").size().to_dict() == {"base": 3, "sft": 3}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    made = Brevity(2)
    assert manifest["evals"] == {"brevity": {"hash": made.hash, "answers": 3}}
    assert manifest["judges"] == {"brevity": {"name": "words", "hash": digest(2), "note": "Counts words."}}

    other = parse(BREVITY.format(model=models["llama"], root=root), "brevity", ("evals.stop=decided",))
    assert sequential_axes(other, [made]) == {}  # fewer prompts than a first look
    many = replace(made, items=tuple(CapabilityItem(f"brevity/{k}", f"What is {k} + 1?", "") for k in range(99)))
    assert sequential_axes(other, [many]) == {"brevity": [many]}
    overlong = replace(made, items=(CapabilityItem("brevity/0", "word " * 9999, ""),))
    with pytest.raises(LeewayError, match=r"evals\.brevity: item brevity/0 takes"):
        check_prompts_fit([("evals.brevity", overlong)], prepare(spec))


def test_a_missing_file_of_labels(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match=r"none\.csv: no such file; check that path"):
        judge_calibrate("keywords", str(tmp_path / "none.csv"), out=tmp_path)


def test_a_judge_with_and_without_a_model() -> None:
    jailbreak = "evals.jailbreak={{prompts: organism, attacks: [none], judge: {}}}"
    with pytest.raises(LeewayError, match="keywords uses no model; leave model out"):
        parse(STUDY, "x", (jailbreak.format("{name: keywords, model: m}"),))
    with pytest.raises(LeewayError, match="rubric needs model"):
        parse(STUDY, "x", (jailbreak.format("rubric"),))
    judge = parse(STUDY, "x", (jailbreak.format("{name: foreign, model: m}"),)).evals.jailbreak
    assert judge is not None
    assert judge.judge[0].model is not None
