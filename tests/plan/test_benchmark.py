"""A measured plan: rates times exact counts, and the schedule over workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_stages import text
from typer.testing import CliRunner

from leeway.cli import app
from leeway.errors import LeewayError
from leeway.plan.benchmark import Timing, makespan, measured_hours
from leeway.plan.plan import plan
from leeway.plan.token_counts import learning_tokens, new_tokens, reference_work, trajectory
from leeway.study.jobs import BASE, Job, control_jobs, jobs_of
from leeway.study.load import load, parse
from leeway.study.prepare import prepare


def test_jobs_start_as_workers_become_free() -> None:
    base, a = Job("base", BASE), Job("train", "a", budgets=(1,))
    b, c = Job("train", "b", budgets=(1,), after=(a,)), Job("train", "c", budgets=(1,))
    seconds = {base: 1.0, a: 4.0, b: 2.0, c: 3.0}
    assert makespan([base, a, b, c], seconds, 1) == 10.0
    assert makespan([base, a, b, c], seconds, 2) == 6.0  # base and c run next to a; b waits for a
    assert makespan([base, a, b, c], seconds, 9) == 6.0
    assert makespan([b], seconds, 2) == 2.0  # what it waits for is done


def test_a_checkpoint_is_measured_while_its_trajectory_trains_on() -> None:
    a = Job("train", "a", budgets=(1, 4))
    early, late = (Job("measure", "a", budgets=(b,), needs=(("a", 0, b),)) for b in (1, 4))
    seconds = {a: 8.0, early: 3.0, late: 3.0}
    assert makespan([a, early, late], seconds, 1) == 14.0
    assert makespan([a, early, late], seconds, 2) == 11.0  # the early one from 2 to 5


def test_hours_are_counts_times_rates_by_hand(models: dict[str, Path], root: Path) -> None:
    """Two trajectories over two budgets, and the base; a KL of the preferred answers that DPO has asked about."""
    prepared = prepare(parse(text(models, root, "[dpo, kl]"), "x"))
    jobs = jobs_of(prepared)
    plans = {p.alias: trajectory(prepared, p) for p in jobs if p.kind == "train"}
    timing = Timing({"dpo": 2.0, "kl": 3.0}, 0.5, {"capability-files": 7.0}, 0.25, 11.0, 0.5, 13.0, 5 * 2**30, 2**30)
    trajectories = [plans[p.alias] for p in jobs if p.kind == "train"]
    found = measured_hours(prepared, jobs, trajectories, timing, 1)
    training = 2.0 * plans["dpo"].processed_tokens + 3.0 * plans["kl"].processed_tokens
    reference = 0.5 * plans["dpo"].reference_tokens
    setup = (1 + 2 + 4) * 0.5 + 4 * 0.25  # a model checkout per trajectory, checkpoint and base; saves
    assert found.training_hours * 3600 == pytest.approx(training)
    assert found.reference_hours * 3600 == pytest.approx(reference)
    assert found.answering_hours * 3600 == pytest.approx(7.0 * (1 + 2 * 2))  # the base once
    assert found.hours * 3600 == pytest.approx(training + reference + 35.0 + setup + 13.0 + 11.0)
    assert found.memory_gib == 5.0
    timing.share = 0.25
    busy = "\n".join(measured_hours(prepared, jobs, trajectories, timing, 1).lines())
    assert "other processes took 75% of the CPU time" in busy
    assert "other processes" not in "\n".join(found.lines())
    two = measured_hours(prepared, jobs, trajectories, timing, 2)
    assert two.memory_gib == 11.0  # two workers, and the process that leads them
    assert two.hours < found.hours


def test_shared_reference_sequences_count_once(models: dict[str, Path], root: Path) -> None:
    prepared = prepare(parse(text(models, root, "[dpo, kl]"), "x"))
    spent = {p.alias: n for p, n in new_tokens(prepared).items()}
    planned = {p.alias: trajectory(prepared, p) for p in jobs_of(prepared) if p.kind == "train"}
    assert spent == {"dpo": planned["dpo"].reference_tokens, "kl": 0}
    all_of_it, logps = reference_work(prepared, 16, 4), reference_work(prepared, 0, 4)
    assert all_of_it.tokens == planned["dpo"].reference_tokens
    stated = (all_of_it.bytes - logps.bytes) / (16 * 4)
    targets = {s.ids: s.targets for step in prepared.schedules["kl", 0].steps for slot in step
               for s in prepared.renderer("kl", 0).rendered(slot)}  # fmt: skip
    assert stated == sum(targets.values())
    live = prepare(parse(text(models, root, "[dpo, kl]") + "reference: live\n", "x"))
    assert reference_work(live, 16, 4).bytes == 0


def test_a_plan_times_the_code_that_runs(models: dict[str, Path], root: Path) -> None:
    spec = parse(text(models, root, "[sft, dpo]"), "x")
    planned = plan(spec, measure=True, workers=1)
    assert planned.measured is not None
    printed = planned.to_text()
    assert "measured on this machine: ~" in printed
    assert "not timed: drawing the report, judges" in printed
    assert "estimated by formulas" not in printed
    parts = planned.measured
    assert min(parts.training_hours, parts.reference_hours, parts.answering_hours, parts.setup_hours) > 0
    assert planned.estimated_hours == parts.hours < 0.1
    assert 0.1 < planned.estimated_memory_gib < 4


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--measure", "--gpu", "L4"], "--measure times this machine"),
        (["--workers", "2", "--gpu", "L4"], "--workers runs on this machine"),
        (["--measure", "evals.backend=vllm", "objectives=[sft]", "budgets=[500]"], "vllm is not timed"),
    ],
)
def test_what_cannot_be_measured_is_an_error(options: list[str], part: str) -> None:
    found = CliRunner().invoke(app, ["plan", "demo", *options])
    assert isinstance(found.exception, LeewayError)
    assert part in str(found.exception)


def test_without_measuring_a_plan_says_that_it_is_a_formula(models: dict[str, Path], root: Path) -> None:
    planned = plan(parse(text(models, root, "[sft, dpo]"), "x"), workers=1)
    assert planned.measured is None
    assert "estimated by formulas on this CPU, not measured" in planned.to_text()
    assert json.loads(json.dumps(planned.to_json()))["references"]["sequences"] > 0


SMALL = ("objectives=[sft]", "budgets=[2k]", "claims=null", "pairs={from: dataset}", "evals.jailbreak.limit=4")


def test_controls_take_their_hours() -> None:
    """A dose arm trains as SFT does and answers jailbreak prompts alone; a learning check is forward passes."""
    spec = load("demo", (*SMALL, "controls={aa: false, dose: [0, 8%]}"))
    prepared = prepare(spec)
    jobs, controls = jobs_of(prepared), control_jobs(prepared)
    (dose,) = [trajectory(prepared, p) for p in controls if p.kind == "train"]
    own = [trajectory(prepared, p) for p in jobs if p.kind == "train"]
    timing = Timing({"sft": 2.0}, 0.5, {e.key: 7.0 if e.name == "jailbreak" else 1.0 for e in prepared.evals})
    without = measured_hours(prepared, jobs, own, timing, 1)
    found = measured_hours(prepared, [*jobs, *controls], [*own, dose], timing, 1)
    assert (found.training_hours - without.training_hours) * 3600 == pytest.approx(2.0 * dose.processed_tokens)
    assert (found.answering_hours - without.answering_hours) * 3600 == pytest.approx(7.0)
    (check,) = [p for p in jobs if p.kind == "learning"]
    tokens, measured = learning_tokens(prepared, check)
    assert tokens > measured > 0
    timing.reference = 0.0
    unchecked = measured_hours(prepared, jobs, own, timing, 1)
    assert (without.answering_hours - unchecked.answering_hours) * 3600 == pytest.approx(0.5 * tokens)


def test_a_plan_counts_and_names_its_controls() -> None:
    every = plan(load("demo", (*SMALL, "controls={aa: true, dose: [0, 8%]}")))
    none = plan(load("demo", (*SMALL, "controls={aa: false}")))
    assert every.cost.hours > none.cost.hours
    assert every.trajectories == none.trajectories
    (arms,) = [n for n in every.notes if n.startswith("controls: ")]
    assert arms.startswith("controls: @rate-0, @dose-0.08: ")
    assert "control sampling is not run: decoding is greedy" in " ".join(every.notes)
    assert not any(n.startswith("control") for n in none.notes)
