"""What a run will need is checked before the first step: all faults at once, and by `plan` as warnings."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from api_server import serving

from leeway.audit import run as audits
from leeway.audit.models import LocalModel
from leeway.audit.run import check_audit
from leeway.errors import LeewayError
from leeway.plan.plan import model_shape, plan
from leeway.study import preflight
from leeway.study.load import parse
from leeway.study.preflight import resource_faults, service_faults
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.spec import Spec

STUDY = """
name: x
model: organism
device: cpu
task: {task}
objectives: [sft]
budgets: [200]
controls: {{aa: false, learning: false}}
evals:
  jailbreak:
    {prompts}
    attacks: [none]
    judge: {{name: rubric, model: {{model: m, endpoint: "{endpoint}", key_env: LEEWAY_TEST_KEY}}}}
    max_new_tokens: 4
"""
NOWHERE = "http://127.0.0.1:9/v1"


def study(endpoint: str = NOWHERE, task: str = "organism", prompts: str = "{prompts: organism, limit: 2}") -> Spec:
    return parse(STUDY.format(endpoint=endpoint, task=task, prompts=prompts.strip("{}").replace(", ", "\n    ")), "x")


def test_a_missing_key_stops_a_run_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_TEST_KEY", raising=False)
    with pytest.raises(LeewayError, match="variable LEEWAY_TEST_KEY is not set; export LEEWAY_TEST_KEY=") as found:
        run(study(), tmp_path / "run", Reporter(quiet=True), "leeway run x", workers=1)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()  # nothing was trained, nothing is left


def test_all_faults_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_TEST_KEY", raising=False)
    task, prompts = "{files: {train: no-train.jsonl, test: no-test.jsonl}}", "{prompts: file, file: no-prompts.jsonl}"
    with pytest.raises(LeewayError) as found:
        run(study(task=task, prompts=prompts), tmp_path / "run", Reporter(quiet=True), "leeway run x", workers=1)
    head, *faults = str(found.value).split("\n")
    assert head == "x: 3 faults"
    for part, fault in zip(("LEEWAY_TEST_KEY", "no-train.jsonl", "no-prompts.jsonl"), faults, strict=True):
        assert part in fault


def test_plan_warns_of_the_same_and_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_TEST_KEY", raising=False)
    planned = plan(study(), workers=1)
    (warning,) = planned.warnings
    assert "LEEWAY_TEST_KEY is not set" in warning
    assert f"warning: a run would stop: {warning}" in planned.to_text()


def test_an_endpoint_that_refuses_the_key_or_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEEWAY_TEST_KEY", "k")
    (down,) = service_faults(study())
    assert down == f"endpoint of model 'm': {NOWHERE} cannot be reached; start the server, or correct endpoint"
    with serving() as server:  # it lists no models (HTTP 501), as some servers do
        assert service_faults(study(server.url)) == []
        assert server.total == 0  # no completion was requested
        monkeypatch.setattr(server.RequestHandlerClass, "do_GET", refuse, raising=False)
        (refused,) = service_faults(study(server.url))
    assert refused == f"{server.url}: the key was refused (HTTP 401); check the value of LEEWAY_TEST_KEY"


def refuse(handler: object) -> None:
    handler.error(401, {})  # type: ignore[attr-defined]


def test_workers_elsewhere_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_TEST_KEY", raising=False)
    assert service_faults(study(), local=False) == []


def test_missing_packages_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.importlib.util.find_spec
    absent = ("openai", "lm_eval")
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a)
    )
    assert service_faults(study()) == ["an endpoint needs the openai client; pip install 'leeway[api]'"]
    text = "name: x\nmodel: organism\ntask: organism\nobjectives: [sft]\nbudgets: [9]\n"
    harness = parse(text + "evals: {capability: [{name: 'lm-eval:arc_easy'}]}", "x")
    assert service_faults(harness) == [
        "evals.capability: lm-eval:arc_easy needs the package lm_eval; pip install 'leeway[lm-eval]'"
    ]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    (program,) = service_faults(parse(text + "evals: {capability: [organism], backend: vllm}", "x"))
    assert program.startswith("vllm: program not found; install vllm")


def test_an_audit_is_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_TEST_KEY", raising=False)
    judge = {"name": "rubric", "model": {"model": "m", "endpoint": NOWHERE, "key_env": "LEEWAY_TEST_KEY"}}
    evals = {"jailbreak": {"prompts": "organism", "limit": 2, "attacks": ["none"], "judge": judge}}
    spec = check_audit(LocalModel("organism"), LocalModel("organism"), (), evals, name="x")
    with pytest.raises(LeewayError, match="LEEWAY_TEST_KEY is not set"):
        audits.run(spec, tmp_path / "audit", Reporter(quiet=True), "leeway audit")
    assert not (tmp_path / "audit").exists()


def test_a_helper_model_that_is_not_there(tmp_path: Path) -> None:
    text = "name: x\nmodel: organism\ntask: organism\nobjectives: [sft]\nbudgets: [9]\n"
    spec = parse(f"{text}evals: {{persona: {{source: organism, self_report: {{model: {tmp_path}/grader}}}}}}", "x")
    (fault,) = service_faults(spec)
    assert fault.startswith("evals: ")
    assert "grader" in fault


def test_a_plan_looks_up_no_helper_model_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "name: x\nmodel: organism\ntask: organism\nobjectives: [sft]\nbudgets: [9]\n"
    spec = parse(f"{text}evals: {{persona: {{source: organism, self_report: {{model: someone/grader}}}}}}", "x")
    asked: list[str] = []
    monkeypatch.setattr(preflight, "load_config", lambda name, _: asked.append(name))
    assert service_faults(spec, hub=False) == []
    assert asked == []
    assert service_faults(spec) == []
    assert asked == ["someone/grader"]


def test_checkpoints_that_do_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = study()
    size = model_shape(spec, cpu=True)
    assert resource_faults(spec, size, tmp_path / "a" / "b", 4) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=preflight.SPARE_DISK + size.trained))
    (fault,) = resource_faults(spec, size, tmp_path / "a" / "b", 4)
    assert "no disk space (64 MiB left, " in fault
    assert "4 checkpoints" in fault


def test_weights_that_do_not_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = study()
    size = model_shape(spec, cpu=True)
    monkeypatch.setattr(preflight, "_memory", lambda **_: ("memory", 3 * size.weight_bytes))
    assert resource_faults(spec, size, tmp_path, 1, workers=3) == []
    (fault,) = resource_faults(spec, size, tmp_path, 1, workers=4)
    assert fault.startswith("organism: no room in memory (")
    assert fault.endswith("; lower --workers (4)")
