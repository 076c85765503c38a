"""What other packages bring: each fault is one line that names the package; what works is run from the pages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from leeway import plugins
from leeway.cli import judge_calibrate
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals.eval import load_eval
from leeway.evals.tasks import load_task
from leeway.objectives import load_objective
from leeway.objectives.sft import Sft
from leeway.study.load import parse

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
class Axis:
    n: int = 1
    name: str = "axis"
    key: str = "axis"
    hash: str = "0"

    def __len__(self) -> int:
        return self.n

    def run(self, backend: object, tick: object) -> list[object]:  # noqa: ARG002
        return []


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
        ("wanting", "Wanting", "test_plugins:Wanting is no dataclass whose settings have defaults"),
        ("half", "HalfATask", "no needs_pairs, needs_reference"),
        ("other", "Weighted", "test_plugins:Weighted is no objective of this name"),
        ("gone", "Nowhere", "cannot be loaded .AttributeError"),
        ("dpo", "Weighted", "has the name of another one"),
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
    with pytest.raises(LeewayError, match=r"is no task of this name .no grader, max_new_tokens"):
        load_task("half")
    with pytest.raises(LeewayError, match="no task 'hafl'; did you mean 'half'"):
        parse(STUDY, "x", ("task={name: hafl}",))
    with pytest.raises(LeewayError, match="revision: task half does not use it"):
        parse(STUDY, "x", ("task={name: half, revision: abc}",))


def test_a_faulty_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "leeway.evals", ("axis", "Axis"), ("other", "Axis"))
    assert len(load_eval("axis", {"n": 3})) == 3
    with pytest.raises(LeewayError, match="unexpected keyword argument 'm'"):
        load_eval("axis", {"m": 3})
    with pytest.raises(LeewayError, match="its name is 'axis'"):
        load_eval("other")
    with pytest.raises(LeewayError, match=r"its key 'A b'"):
        load_eval("axis", {"key": "A b"})
    with pytest.raises(LeewayError, match="there is no eval 'axes'; one of: axis, other"):
        load_eval("axes")
    bring(monkeypatch, "leeway.evals", ("persona", "Axis"))
    with pytest.raises(LeewayError, match=r"eval persona: .* has the name of another one"):
        load_eval("axis")


def test_a_missing_file_of_labels_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match=r"none\.csv: no such file; check that path"):
        judge_calibrate("keywords", str(tmp_path / "none.csv"), None, None, "OPENAI_API_KEY", tmp_path)


def test_an_asking_judge_and_one_that_asks_nobody() -> None:
    jailbreak = "evals.jailbreak={{prompts: organism, attacks: [none], judge: {}}}"
    with pytest.raises(LeewayError, match="keywords asks no model; leave model out"):
        parse(STUDY, "x", (jailbreak.format("{name: keywords, model: m}"),))
    with pytest.raises(LeewayError, match="rubric needs model"):
        parse(STUDY, "x", (jailbreak.format("rubric"),))
    judge = parse(STUDY, "x", (jailbreak.format("{name: foreign, model: m}"),)).evals.jailbreak
    assert judge is not None
    assert judge.judge[0].model is not None
