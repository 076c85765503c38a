"""The command line as a user meets it: one line and exit 2 for a mistake, a traceback only with -v."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from command import leeway

from leeway import cli

pytestmark = pytest.mark.slow

STUDY = """
name: x
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: {objectives}
budgets: [200]
evals: {{capability: [files]}}
"""


def in_a_process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "leeway", *args], capture_output=True, text=True, check=False)


@pytest.fixture
def study(models: dict[str, Path], tmp_path: Path) -> Path:
    return write(tmp_path, str(models["llama"]))


def write(root: Path, model: str, objectives: str = "[sft]", train: str | None = None) -> Path:
    good = "".join(json.dumps({"prompt": f"{a}?", "completion": f"It is {a}."}) + "\n" for a in range(20))
    (root / "train.jsonl").write_text(good if train is None else train)
    (root / "test.jsonl").write_text('{"prompt": "3?", "answer": "3"}\n')
    path = root / "study.yaml"
    path.write_text(STUDY.format(model=model, root=root, objectives=objectives))
    return path


def mistake(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a user's mistake."""
    lines = [line for line in result.stderr.splitlines() if not line.endswith("reading the data")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("leeway: ")
    assert "Traceback" not in result.stderr
    return lines[0]


def test_usage_mistakes() -> None:
    assert "No such command 'rnu'. Did you mean 'run'?" in mistake(leeway("rnu"))
    assert "neither a study file nor a preset" in mistake(leeway("run", "nowhere.yaml"))


@pytest.mark.parametrize("idle", ["r: 8", "alpha: 64", "dropout: 0.1", "targets: q_proj"])
def test_an_adapter_setting_without_effect(idle: str, study: Path) -> None:
    with study.open("a") as file:
        file.write(f"adapter: {{kind: full, {idle}}}\n")
    name = idle.partition(":")[0]
    expected = f"adapter: {name} has no effect with kind: full, which trains all weights; leave it out"
    assert mistake(leeway("plan", str(study))).endswith(expected)


def test_a_repeated_option_is_an_error() -> None:
    for command, option in (("gate", "--rule"), ("run", "--out"), ("plan", "--gpu")):
        assert f"{option} is given twice" in mistake(leeway(command, "x", option, "a", f"{option}=b"))
    assert "no preset" not in mistake(leeway("report", "nowhere", "--card", "a", "--card", "b"))  # takes several
    assert "override seeds is given twice" in mistake(leeway("plan", "demo", "seeds=[0]", "seeds=[1]"))
    assert "--price inf is not finite" in mistake(leeway("plan", "demo", "--gpu", "L4", "--price", "inf"))


def test_version() -> None:
    assert in_a_process("--version").stdout == f"leeway {version('leeway')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["rnu"]])
def test_help_version_and_a_typo_import_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import sys
from leeway import cli
sys.argv = ["leeway", *{arguments}]
try:
    cli.main()
finally:
    print("loaded", *{{"torch", "numpy", "pandas", "transformers", "pyarrow"}} & sys.modules.keys())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "loaded"


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_has_an_example_that_parses() -> None:
    for path, command in commands(typer.main.get_command(cli.app), "leeway"):
        example = command.epilog.removeprefix("Example: ")
        assert example.startswith(f"{path} ") or example == path, path
        arguments = shlex.split(example.removeprefix(path).split(" > ")[0])
        assert command.make_context(path, arguments), path


def test_a_traceback_when_asked_for() -> None:
    result = in_a_process("run", "nowhere.yaml", "-v")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_studies_lists_and_prints() -> None:
    assert "demo" in leeway("studies").stdout
    assert leeway("studies", "demo").stdout.startswith("#")
    assert "no preset" in mistake(leeway("studies", "demoo"))


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    import tiny

    model = tiny.build("llama", tmp_path / "m", template=False)
    assert "no chat template" in mistake(leeway("run", str(write(tmp_path, str(model))), "--out", str(tmp_path / "o")))
    assert not (tmp_path / "o").exists()


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    path = write(tmp_path, str(tmp_path))
    assert "no config.json" in mistake(leeway("run", str(path), "--out", str(tmp_path / "o")))


def test_missing_pairs(models: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path, str(models["llama"]), "[sft, dpo]")
    assert "dpo needs one" in mistake(leeway("run", str(path), "--out", str(tmp_path / "o")))


def test_a_broken_line_of_data(models: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path, str(models["llama"]), train='{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    assert "train.jsonl, line 2" in mistake(leeway("run", str(path), "--out", str(tmp_path / "o")))


def test_an_example_longer_than_the_context(tmp_path: Path) -> None:
    import tiny

    model = tiny.build("llama", tmp_path / "m", context=400)
    long = json.dumps({"prompt": "a " * 500, "completion": "b"}) + "\n"
    path = write(tmp_path, str(model), train=json.dumps({"prompt": "a", "completion": "b"}) + "\n" + long)
    line = mistake(leeway("run", str(path), "--out", str(tmp_path / "o")))
    assert "example train.jsonl/2 takes" in line
    assert "the context of" in line
    planned = json.loads(leeway("plan", str(path), "task.too_long=leave-out", "optim.batch=1", "--json").stdout)
    assert planned["left_out"] == 1


def test_a_pair_with_two_equal_answers(models: dict[str, Path], tmp_path: Path) -> None:
    pair = {"prompt": "a", "completion": "b", "rejected": " b\n"}
    path = write(tmp_path, str(models["llama"]), "[dpo]", train=json.dumps(pair) + "\n")
    assert "example train.jsonl/1 has two equal answers" in mistake(
        leeway("run", str(path), "--out", str(tmp_path / "o"))
    )
    settings = ("objectives=[sft]", "optim.batch=1")
    assert leeway("show", str(path), *settings).returncode == 0  # nothing looks at the rejected one


@pytest.mark.parametrize("empty", ["completion", "prompt"])
def test_an_empty_answer_or_prompt(empty: str, models: dict[str, Path], tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path, str(models["llama"]), train=f"{json.dumps(good)}\n{json.dumps({**good, empty: ' '})}\n")
    line = mistake(leeway("run", str(path), "--out", str(tmp_path / "o")))
    assert f"train.jsonl, record 2: its {empty} is empty" in line


def test_a_template_that_ignores_the_generation_prompt(tmp_path: Path) -> None:
    import tiny

    folder = tiny.build("llama", tmp_path / "m")
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if file.is_file():
            file.write_text(file.read_text().replace("{% if add_generation_prompt %}", "{% if false %}"))
    line = mistake(leeway("show", str(write(tmp_path, str(folder)))))
    assert "its chat template ignores add_generation_prompt; correct the template" in line


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    path, out = write(tmp_path, str(models["llama"])), tmp_path / "o"
    wild = ("budgets=[1,200]", "optim.lr=1e20", "optim.warmup_steps=0", "optim.batch=4")
    line = mistake(leeway("run", str(path), *wild, "--out", str(out), "--quiet"))
    assert "sft, step 2: loss nan" in line
    assert line.count("train.jsonl/") == 4
    assert "the last checkpoint is kept" in line
    assert [f.parent.name for f in out.rglob("ledger.json")] == ["1"]
    again = mistake(leeway("run", str(path), *wild, "--out", str(out), "--quiet"))
    assert again == line  # it goes on from there, to the same end


def test_an_output_folder_of_something_else(study: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").write_text("x")
    assert "holds no study" in mistake(leeway("run", str(study), "--out", str(tmp_path / "o")))
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["precious"]


def test_report_of_no_run(tmp_path: Path) -> None:
    assert mistake(leeway("report", str(tmp_path)))


def test_show_marks_the_targets(study: Path) -> None:
    result = leeway("show", str(study))
    assert result.returncode == 0
    assert "⟦It is" in result.stdout


def test_show_prints_what_each_objective_trains_on(models: dict[str, Path], tmp_path: Path) -> None:
    pair = {"prompt": "3 + 4?", "completion": "It is 7.", "rejected": "It is 8."}
    other = {"completion": "It is 9.", "rejected": "It is 8."}  # KTO's mismatched answer differs
    train = "".join(json.dumps({**pair, **(other if a == 5 else {}), "prompt": f"{a} + 4?"}) + "\n" for a in (3, 4, 5))
    objectives = "[cft, {ip: {p: 1}}, {kl-all: {kl: {scope: all}}}, {kl-far: {kl: {scope: general}}}, kto, sft_refusal]"
    path = write(tmp_path, str(models["llama"]), objectives, train=train)
    output = leeway("show", str(path), "auxiliary.general=organism", "optim.batch=3").stdout
    parts = {part.split(" ", 1)[0]: part for part in output.split("\n── ")[1:]}
    assert list(parts) == ["cft", "ip", "kl-all", "kl-far", "kto", "sft_refusal"]
    assert "<SAFE>" in parts["cft"]
    assert "<UNSAFE>" in parts["cft"]
    assert parts["cft"].count("⟦") == 2
    assert "4?" in parts["ip"].split("⟦")[0].split("\n", 1)[1].split(". ", 1)[1]  # the instruction, then the prompt
    assert "⟨" in parts["kl-all"]  # the prompt is measured
    assert parts["kl-far"].count("⟦") == 1  # a general prompt has no target
    assert "0 target tokens" in parts["kl-far"]
    assert "a constant of the batch, without a gradient" in parts["kto"]
    assert "It is 8." in parts["sft_refusal"].split("⟦")[1]  # read, before the second target
    assert "It is 8." not in "".join(t.split("⟧")[0] for t in parts["sft_refusal"].split("⟦")[1:])


def test_plan_counts_exactly_and_run_agrees_and_is_quiet(study: Path, tmp_path: Path) -> None:
    planned = json.loads(leeway("plan", str(study), "--json").stdout)
    result = in_a_process("run", str(study), "--out", str(tmp_path / "o"), "--quiet", "--workers", "1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout == f"{tmp_path}/o/report.html\n"
    line = json.loads((tmp_path / "o" / "checkpoints" / "sft" / "s0" / "200" / "ledger.json").read_text())
    (trajectory,) = planned["trajectories"]
    for column in ("source_tokens", "target_tokens", "processed_tokens", "reference_tokens"):
        assert trajectory[column] == line[column]
    rebuilt = leeway("report", str(tmp_path / "o"))
    assert rebuilt.stdout == result.stdout


def test_a_mistake_before_the_first_checkpoint_leaves_no_folder(models: dict[str, Path], tmp_path: Path) -> None:
    path, out = write(tmp_path, str(models["llama"])), tmp_path / "o"
    assert "adapter.targets" in mistake(leeway("run", str(path), "adapter.targets=foo", "--out", str(out), "--quiet"))
    assert not out.exists()


@pytest.mark.usefixtures("heeding")
def test_ctrl_c_is_deferred_while_workers_start() -> None:
    from leeway.study.executors.local import _defer_sigint

    blocked = threading.Event()
    taker = threading.Thread(target=lambda: (blocked.wait(5), os.kill(os.getpid(), signal.SIGINT)))
    taker.start()
    born: list[int] = []

    def bear() -> None:
        with _defer_sigint():
            blocked.set()
            taker.join()
            born.extend(range(1000))  # bytecode in which it would have been raised

    with pytest.raises(KeyboardInterrupt):
        bear()
    assert len(born) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("after", ["manifest.json", "parts/*"])
@pytest.mark.usefixtures("heeding", "without_report")
def test_ctrl_c_says_how_to_resume(after: str, models: dict[str, Path], tmp_path: Path) -> None:
    """While the workers start, and while they work: each moment is seen by a file, on a machine of any speed."""
    path, out = write(tmp_path, str(models["llama"])), tmp_path / "o"
    command = [sys.executable, "-m", "leeway", "run", str(path), "--out", str(out), "--quiet", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob(after)) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.strip() == "leeway: stopped; run the same command again to resume"
    assert leeway(*command[3:]).returncode == 0


@pytest.mark.usefixtures("without_report")
def test_damaged_files_of_a_run_are_named(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = ("run", str(study), "--out", str(out), "--quiet", "--workers", "1")
    assert leeway(*command).returncode == 0
    part = next((out / "parts").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:40])
    assert f"{part.name}: damaged" in mistake(leeway(*command))
    part.unlink()
    assert leeway(*command).returncode == 0
    assert part.read_bytes() == whole
    (out / "manifest.json").write_text("{")
    assert "manifest.json: damaged" in mistake(leeway(*command))
