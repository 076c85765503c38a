"""A study on a Ray cluster of two nodes on this machine, one of them killed half-way: the bytes are a local run's."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_study import carry, contents, losses, study

from leeway.errors import LeewayError, NotFiniteError
from leeway.study.executors import ray as ray_worker
from leeway.study.executors.ray import RayWorker, installed_versions
from leeway.study.jobs import Job
from leeway.study.load import parse
from leeway.study.manifest import fingerprint
from leeway.study.prepare import prepare
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and one more node, each with room for one worker."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'leeway[ray]'")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR", namespace="leeway")
    yield found
    ray.shutdown()
    found.shutdown()


class LogReporter(Reporter):
    """Keeps the log lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def test_a_node_that_is_killed_half_way_changes_no_byte(
    cluster: Any, models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leeway.study.executors.ray import RayExecutor

    text = study(models["llama"], root, budgets="[200, 20_000]", objectives="[sft, cft]")
    local, out, reporter = carry(text, tmp_path / "local"), tmp_path / "far", LogReporter()
    crews: list[RayExecutor] = []
    manifest = RayExecutor.manifest

    def with_two(self: RayExecutor, *given: Any) -> dict[str, Any]:
        crews.append(self)
        found = manifest(self, *given)
        while sum(h.is_set_up for h in self._workers) < 2:
            self._scale_up(given[0], 2)  # the second node may have come after the first count of its room
            self._wait(lambda _: None)
        return found

    monkeypatch.setattr(RayExecutor, "manifest", with_two)
    node, run_is_over = cluster.add_node(**NODE), threading.Event()
    cluster.wait_for_nodes()

    def kill() -> None:
        while [h.job.kind for crew in crews for h in crew._workers if h.job is not None] != ["train", "train"]:
            if run_is_over.is_set():
                return
            time.sleep(0.005)  # until both are at what takes seconds: losing a node takes one
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    run(parse(text, "test"), out, reporter, "leeway run test", None, "ray")
    run_is_over.set()
    killer.join()
    assert contents(out) == contents(local)
    assert losses(out) == losses(local)
    assert not list(out.rglob(".partial-*"))
    assert [line for line in reporter.lines if line.endswith("has lost its worker; it runs again")]


@pytest.mark.usefixtures("cluster")
def test_a_users_mistake_and_a_folder_in_use_are_one_line(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leeway.study.executors import ray as on_ray

    text = study(models["llama"], root, budgets="[200]", objectives="[sft]").replace("lr: 3.0e-3", "lr: 1.0e+30")
    spec, out = parse(text, "test"), tmp_path / "run"
    held = on_ray._reserve(out)
    monkeypatch.setattr(on_ray, "RESERVE_S", 0.0)
    with pytest.raises(LeewayError, match="is in use by another leeway of this cluster"):
        run(spec, out, Reporter(quiet=True), "leeway run test", None, "ray")
    on_ray.ray.kill(held)
    greedy = parse(text.replace("device: cpu", "device: cpu\nthreads: 1000"), "test")
    with pytest.raises(LeewayError, match=r"has the resources of a worker \(1000 num_cpus, 0\.\d GiB"):
        run(greedy, tmp_path / "x", Reporter(quiet=True), "leeway run test", None, "ray")
    with pytest.raises(LeewayError, match="Ray gives each worker one GPU; set device: cuda"):
        on_ray.RayExecutor(None, print).workers(prepare(parse(text.replace("device: cpu", "device: cuda:1"), "x")), 1)
    monkeypatch.setattr(on_ray, "RESERVE_S", 20.0)
    with pytest.raises(NotFiniteError, match="sft, step 2") as error:
        run(spec, out, Reporter(quiet=True), "leeway run test", None, "ray")
    assert "\n" not in str(error.value)


def test_without_ray_the_error_names_the_extra(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "leeway.study.executors.ray", raising=False)
    with pytest.raises(LeewayError, match=r"Ray is not installed; pip install 'leeway\[ray\]'"):
        run(parse(study(models["llama"], root), "test"), tmp_path / "x", Reporter(quiet=True), "", None, "ray")
    assert not (tmp_path / "x").exists()


def test_a_worker_checks_versions_folder_and_inputs(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_worker, "PATIENCE_S", 0.0)
    spec = parse(study(models["llama"], root), "test")
    raw, own = spec.model_dump(mode="json", by_alias=True), fingerprint(prepare(spec))
    other = RayWorker().setup(raw, tmp_path, "token", installed_versions() | {"torch": "1.0"}, {}, own)
    assert "the driver has 1.0; install the same versions on every node" in str(other)
    assert "not found on" in str(RayWorker().setup(raw, tmp_path, "token", installed_versions(), {}, own))
    (tmp_path / ".workers").write_text("another run's")
    assert "does not see this run's token" in str(
        RayWorker().setup(raw, tmp_path, "token", installed_versions(), {}, own)
    )
    (tmp_path / ".workers").write_text("token")
    worker = RayWorker()
    assert worker.setup(raw, tmp_path, "token", installed_versions(), {}, own) is None
    assert "the data have changed while the study runs" in str(
        RayWorker().setup(raw, tmp_path, "token", installed_versions(), {}, "another")
    )
    waiting = worker.run_job(Job("measure", "sft", 0, (400,), needs=(("sft", 0, 400),)))
    assert "does not see the inputs of measure sft s0" in str(waiting)
    worker.close()


def test_a_step_log_from_scratch_is_published_whole_and_never_shorter(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    store = RunDir(tmp_path)
    first = store.truncate_steps("sft-s0", 0, tmp_path / "own")
    first.write_text("1\n2\n")
    assert store.steps("sft-s0").exists() is False
    store.publish_steps(first)
    again = store.truncate_steps("sft-s0", 1, tmp_path / "own")
    assert again.read_text() == "1\n"
    store.publish_steps(again)
    assert store.steps("sft-s0").read_text() == "1\n2\n"
    assert store.truncate_steps("sft-s0", 1) == store.steps("sft-s0")
    assert store.steps("sft-s0").read_text() == "1\n"


def test_workers_per_node_is_limited_by_the_scarcest_resource() -> None:
    on_ray = pytest.importorskip("leeway.study.executors.ray", exc_type=LeewayError)
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 10e9, "object_store_memory": 1e9}
    assert on_ray._workers_per_node(node, {"num_cpus": 4, "memory": 3e9}) == 3
    assert on_ray._workers_per_node(node, {"num_cpus": 1, "num_gpus": 1}) == 2
    assert on_ray._workers_per_node({"CPU": 4.0}, {"num_cpus": 1, "num_gpus": 1}) == 0
