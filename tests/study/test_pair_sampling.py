"""Pairs drawn from the base model as a part of a study: kept, reported, drawn once, planned before they are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_study import carry, contents

from leeway.cache import Cache
from leeway.errors import LeewayError
from leeway.plan.plan import plan
from leeway.plan.show import show
from leeway.study.load import parse
from leeway.study.prepare import PairSampling, prepare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

STUDY = """
name: drawn
model: organism
device: cpu
task: {{name: organism, limit: 40}}
pairs: {{from: {strategy}, samples: 2, max_new_tokens: 40}}
objectives: [dpo, sft]
budgets: [500]
optim: {{batch: 4}}
evals: {{capability: [{{name: organism, limit: 4, max_new_tokens: 8}}]}}
"""


@pytest.mark.parametrize("strategy", ["sampled-errors", "unsafe"])
def test_pairs_are_drawn_once_and_their_acceptance_is_in_the_manifest(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = STUDY.format(strategy=strategy)
    out = carry(study, tmp_path / "one")
    report = json.loads((out / "manifest.json").read_text())["data"]["pairs"]
    assert report["strategy"] == strategy
    assert report["examples"] == 40
    assert 0 < report["accepted"] <= 40
    assert report["accepted"] + report["left_out"]["count"] == 40
    assert report["acceptance_rate"] == pytest.approx(report["accepted"] / report["attempted"])
    assert contents(carry(study, tmp_path / "two", workers=2)) == contents(out)
    monkeypatch.setattr("leeway.study.prepare.load_model", lambda *_, **__: pytest.fail("drawn again"))
    assert contents(carry(study, out)) == contents(out)
    again = prepare(parse(study, "x"), PairSampling(Cache.of(out)))
    trained = {i.example.id: i.example for s in again.schedules.values() for step in s.steps for i in step}
    assert not set(report["left_out"]["ids"]) & set(trained)
    assert all(e.dispreferred and e.dispreferred != e.preferred for e in trained.values())


def test_before_they_are_drawn_a_plan_says_so_and_a_worker_does_not_draw(tmp_path: Path) -> None:
    spec = parse(STUDY.format(strategy="unsafe"), "x")
    assert "drawn when the study runs, up to 80 answers" in plan(spec).to_text()
    assert "are drawn when the study runs" in show(spec, 1)
    with pytest.raises(LeewayError, match="responses of unsafe are missing"):
        prepare(spec, PairSampling(Cache(tmp_path / "nowhere")))


def test_errors_are_sampled_only_where_answers_can_be_checked(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "Because."}) + "\n")
    study = STUDY.format(strategy="sampled-errors").replace("organism", str(models["llama"]), 1)
    study = study.replace("{name: organism, limit: 40}", f"{{files: {{train: {tmp_path}/train.jsonl, test: x}}}}")
    with pytest.raises(LeewayError, match=r"train\.jsonl/1"):
        prepare(parse(study, "x"), PairSampling(Cache(tmp_path / "cache"), may_sample=True))
