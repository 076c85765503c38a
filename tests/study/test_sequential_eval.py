"""`stop: decided` in a study: what is asked, what a stop in between leaves, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from leeway.cache import Cache
from leeway.errors import LeewayError
from leeway.evals.capability import Capability
from leeway.generation.transformers import TransformersBackend
from leeway.plan.plan import plan
from leeway.report.results import Results
from leeway.stats import sequential
from leeway.stats.anytime import cluster_order
from leeway.study.load import parse
from leeway.study.progress import Reporter
from leeway.study.run import run

pytestmark = pytest.mark.slow

STUDY = """
name: stopping
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft, cft]
budgets: [400]
optim: {{lr: 3.0e-3, batch: 4, warmup_steps: 2}}
evals:
  batch: 4
  stop: decided
  conditions: first
  capability: [{{name: files, max_new_tokens: 3}}]
  jailbreak: {{prompts: organism, limit: 6, attacks: [none, dan], judge: [organism, keywords], max_new_tokens: 3}}
  persona: {{source: organism, traits: [narcissism], limit: 6, order_swap: true}}
"""


def study(models: dict[str, Path], root: Path, **more: str) -> str:
    text = STUDY.format(model=models["llama"], root=root)
    return text + "".join(f"{key}: {value}\n" for key, value in more.items())


def carry(text: str, out: Path) -> Path:
    run(parse(text, "test"), out, Reporter(quiet=True), "leeway run test", workers=1)
    return out


@pytest.fixture(autouse=True)
def small_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks of 2, 3, 4, 6 prompts; the jailbreak axis is decided at its second one."""
    monkeypatch.setattr(sequential, "FIRST", 2)
    whole = sequential.StoppingRule.undecided

    def undecided(rule: sequential.StoppingRule, base: pd.DataFrame, own: pd.DataFrame, axis: str) -> list[str]:
        left = whole(rule, base, own, axis)
        return [] if axis == "jailbreak" and own["cluster"].nunique() >= 3 else left

    monkeypatch.setattr(sequential.StoppingRule, "undecided", undecided)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers the model itself was asked for, call by call."""
    calls: list[int] = []
    for name in ("complete", "choose"):
        plain = getattr(TransformersBackend, name)

        def asked(self: Any, what: Any, *rest: Any, plain: Any = plain) -> Any:
            calls.append(len(what))
            return plain(self, what, *rest)

        monkeypatch.setattr(TransformersBackend, name, asked)
    return calls


def test_a_prefix_is_asked_and_said_to_be(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = study(models, root)
    calls = counted(monkeypatch)
    out = carry(text, tmp_path / "whole")
    asked = sum(calls)
    rows = pd.read_parquet(out / "rows.parquet")
    jailbreak = rows[rows["eval"] == "jailbreak"]
    order = cluster_order(jailbreak["cluster"])
    assert len(order) == 6
    assert jailbreak[jailbreak["objective"] == "base"]["cluster"].nunique() == 6
    for _, own in jailbreak[jailbreak["objective"] != "base"].groupby(["objective", "template_hash"]):
        assert set(own["cluster"]) == set(order[:3])
    whole = rows[(rows["eval"] == "capability") & (rows["objective"] == "sft")]
    assert whole["cluster"].nunique() == rows[rows["eval"] == "capability"]["cluster"].nunique()
    told = json.loads((out / "manifest.json").read_text())["sequential"]
    assert told["axes"] == ["capability", "jailbreak", "persona"]
    assert told["sample_sizes"]["jailbreak"]["answers"] == 2 * 3 * 2  # checkpoints, prompts, attacks
    assert told["sample_sizes"]["jailbreak"]["of_answers"] == 2 * 6 * 2
    assert told["sample_sizes"]["jailbreak"]["tokens_saved"] == told["sample_sizes"]["jailbreak"]["new_tokens"]
    results = Results.load(out)
    assert set(results.contrasts()["design"]) == {"sequential"}
    assert "until each contrast with the base is decided" in (out / "report.html").read_text()
    assert (out / "tables" / "sequential.csv").is_file()
    assert not (out / "cache" / "answers").exists()
    assert Cache.of(out).unfinished() == []

    stopped = tmp_path / "stopped"
    plain, seen = Capability.run, []

    def dies(self: Capability, *rest: Any) -> Any:
        seen.append(len(self.items))
        if len(seen) == 4:  # the second checkpoint's second look
            raise KeyboardInterrupt
        return plain(self, *rest)

    calls.clear()
    monkeypatch.setattr("leeway.report.build", lambda folder, **_: folder)  # takes seconds, and is of the rows
    monkeypatch.setattr(Capability, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        carry(text, stopped)
    with pytest.raises(LeewayError, match=f"not cleared, needed to resume {stopped}"):
        Cache.of(stopped).clear()
    monkeypatch.setattr(Capability, "run", plain)
    carry(text, stopped)
    assert (stopped / "rows.parquet").read_bytes() == (out / "rows.parquet").read_bytes()
    assert sum(calls) == asked  # nothing twice


def test_runs_share_answers_where_they_are_told_to(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr("leeway.report.build", lambda folder, **_: folder)
    calls = counted(monkeypatch)
    text = study(models, root).replace("objectives: [sft, cft]", "objectives: [sft]")
    first = carry(text, tmp_path / "first")
    assert calls
    calls.clear()
    again = carry(text, tmp_path / "again")
    assert not calls
    assert (again / "rows.parquet").read_bytes() == (first / "rows.parquet").read_bytes()


def test_mistakes_are_one_line(models: dict[str, Path], root: Path) -> None:
    text = study(models, root)
    with pytest.raises(LeewayError, match="margin is for stop: decided"):
        parse(text.replace("stop: decided", "margin: 0.1"), "test")
    claim = "{id: c, statement: slopes differ, kind: diverges, measure: asr, objectives: [sft, cft], margin: 0.02}"
    claims = f"{{name: mine, claims: [{claim}]}}"
    with pytest.raises(LeewayError, match="diverges resamples prompts"):
        parse(study(models, root, claims=claims), "test")


def test_a_plan_says_that_it_is_an_upper_bound(models: dict[str, Path], root: Path) -> None:
    assert any("upper bounds" in note for note in plan(parse(study(models, root), "test")).notes)
