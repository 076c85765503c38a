"""What a person sees of a run: rows on a terminal, plain lines in a log, never a word broken at 80 columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from leeway.study.progress import Clock, EvalProgress, Lines, Row, TrainingStep, choose_view
from leeway.study.screen import TerminalView, row_name


def step(name: str, k: int, loss: float = 1.25) -> TrainingStep:
    return TrainingStep(name, k, 40, 80, 8_000, loss, 12_345.6)


def screen(rows: list[Row], width: int = 80, height: int = 24, **options: bool) -> list[str]:
    """Return the lines of the rows after a step and an answer."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, **options)
    view, clock = TerminalView(console), Clock()
    clock.left |= {"generate": 100.0}
    view.start(rows)
    view.update(("generate", 0.0, 1.0, EvalProgress("sft s0 at 4,000 tokens", "jailbreak", 120, 600)), clock, 2)
    view.stop()
    with console.capture() as found:
        console.print(view.render())
    return found.get().splitlines()


def test_a_row_a_trajectory_and_one_for_measuring() -> None:
    rows = [Row("sft s0", 80, 64_000), Row("@rate-0 s0", 4, 500), Row("dpo s0", 80, 64_000, step=80)]
    rows[0].train(step("sft s0", 20), 10.0)
    lines = screen(rows, no_color=True, color_system=None)
    head, sft, control, dpo, measuring, whole = lines
    assert head.split() == ["objective", "budget", "loss", "tokens/s", "ETA"]
    assert sft.split()[:2] == ["SFT", "s0"]
    assert sft.split()[-6:] == ["8k", "of", "64k", "1.2500", "12,346", "10:00"]
    assert control.startswith("control rate-0 s0")
    assert control.endswith("waiting")
    assert dpo.endswith("trained")
    assert measuring.startswith("measuring sft s0 at 4,000 tokens jailbreak 120/600 | 100 answers left")
    assert whole.startswith("total ")


def test_the_eta_of_a_row_is_that_of_its_own_steps() -> None:
    row = Row("sft s0", 80, 64_000, step=40)  # resumed
    assert row.eta() is None
    row.train(step("sft s0", 41), 2.0)
    row.train(step("sft s0", 42), 4.0)
    assert row.eta() == 3.0 * 38
    assert not row.done
    row.train(step("sft s0", 80), 1.0)
    assert row.done
    assert row.eta() == 0.0


def test_a_sweep_before_training_does_not_count_as_progress() -> None:
    row = Row("sft s0", 80, 64_000)
    row.train(TrainingStep("sft s0", 5, 5, 5, 1_000, 1.0, 10.0), 50.0)  # the last step of a trial
    row.train(step("sft s0", 1), 2.0)
    assert row.eta() == 2.0 * 79


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    rows = [Row(f"a-long-alias-of-an-objective-{n} s0", 80, 64_000) for n in range(4)]
    for row in rows:
        row.train(step(row.name, 3), 1.0)
    lines = screen(rows, width, no_color=True, color_system=None)
    assert len(lines) == 1 + 4 + 2
    assert max(map(len, lines)) <= width


def test_more_trajectories_than_lines_are_summed_up() -> None:
    rows = [Row(f"sft s{n}", 80, 64_000, step=80 * (n < 5)) for n in range(30)]
    rows[7].train(step("sft s7", 3), 1.0)
    lines = screen(rows, height=20, no_color=True, color_system=None)
    assert next(line for line in lines if line.startswith("SFT")).startswith("SFT s7")
    assert "and 5 trained, 24 waiting" in lines
    assert len(lines) < 20


def test_colour_is_left_out_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> set[str]:
        text = "\n".join(screen([Row("sft s0", 80, 64_000, step=40)], color_system="standard"))  # type: ignore[arg-type]
        return set(re.findall(r"\x1b\[[^m]*[39]\dm", text))

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert codes()
    monkeypatch.setenv("NO_COLOR", "1")
    assert codes() == set()


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    view, clock = choose_view(), Clock()
    assert isinstance(view, Lines)  # stderr is no terminal here
    clock.spend("train", 1.0, 1.0)
    view.update(("train", 1.0, 1.0, step("sft s0", 3)), clock, 1)
    view.update(("generate", 1.0, 1.0, EvalProgress("base", "persona", 4, 8)), clock, 1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sft s0 step 3/40 to 8,000 tokens | loss 1.2500 | 12,346 tok/s | 100% | ETA 0:00"
    assert second == "base | persona 4/8 | 100% | ETA 0:00"


def test_names_of_rows() -> None:
    assert row_name("sft s0") == "SFT s0"
    assert row_name("my-kl s3") == "my-kl s3"
    assert row_name("@dose-0.05 s0") == "control dose-0.05 s0"
