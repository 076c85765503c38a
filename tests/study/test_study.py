"""Whole small studies: nested budgets, matched ledgers, stopping and going on, any architecture and workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import killing
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from leeway.data.ledger import MATCHED
from leeway.errors import LeewayError
from leeway.io import with_checksum
from leeway.study.load import parse
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.run_dir import LEDGER_SCHEMA, ROW_SCHEMA

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

STUDY = """
name: small
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft, dpo, cft, ip, orpo, kl]
budgets: {budgets}
optim: {{lr: 3.0e-3, batch: 4, warmup_steps: 2}}
evals:
  batch: 16
  capability: [{{name: files, max_new_tokens: 6}}]
  jailbreak: {{prompts: organism, limit: 4, attacks: [none, dan, zulu], judge: organism, max_new_tokens: 6}}
  persona: {{source: organism, traits: [narcissism], limit: 4}}
"""


def study(model: Path, root: Path, budgets: str = "[400, 800]", **changes: str) -> str:
    text = STUDY.format(model=model, root=root, budgets=budgets)
    for old, new in changes.items():
        text = text.replace(f"{old}: [", f"{old}: {new} #[") if old == "objectives" else text
    return text


def carry(text: str, out: Path, workers: int = 1) -> Path:
    run(parse(text, "test"), out, Reporter(quiet=True), "leeway run test", workers=workers)
    return out


def contents(out: Path) -> dict[str, bytes]:
    """What has to be equal byte for byte: rows, ledger and every adapter."""
    files = [out / "rows.parquet", out / "ledger.parquet", *sorted(out.rglob("adapter_model.safetensors"))]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def losses(out: Path) -> dict[str, list[dict[str, float]]]:
    """The step logs without their timing."""
    return {
        f.name: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in f.read_text().splitlines()]
        for f in sorted((out / "steps").iterdir())
    }


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return carry(study(models["llama"], root), tmp_path_factory.mktemp("runs") / "finished")


def test_rows_and_ledger_are_the_contract(finished: Path) -> None:
    rows, ledger = pd.read_parquet(finished / "rows.parquet"), pd.read_parquet(finished / "ledger.parquet")
    assert list(rows.columns) == ROW_SCHEMA.names
    assert list(ledger.columns) == LEDGER_SCHEMA.names
    assert set(rows.objective) == {"base", "sft", "dpo", "cft", "ip", "orpo", "kl"}
    assert set(rows[rows.objective == "base"].budget) == {0}
    assert set(rows[rows.objective != "base"].budget) == {400, 800}
    manifest = json.loads((finished / "manifest.json").read_text())
    conditions = manifest["conditions"]
    assert manifest["first_conditions"] == dict.fromkeys(("sft", "dpo", "ip", "orpo", "kl"), "plain") | {
        "cft": "<SAFE>"
    }
    plain = rows[(rows.objective != "base") & (rows.template_hash.map(conditions) == "plain")]
    each = plain.groupby(["objective", "budget", "eval"]).size()
    assert set(each.xs("capability", level="eval")) == {4}
    assert set(each.xs("jailbreak", level="eval")) == {12}
    assert set(each.xs("persona", level="eval")) == {4}
    scored = rows.score.notna()
    assert (rows.unscored_reason.isna() == scored).all()
    assert set(rows[(rows["eval"] == "jailbreak") & scored].outcome) <= {
        "refused",
        "harmful",
        "deflected",
        "incoherent",
    }
    for name in ("study.yaml", "manifest.json", "results.json", "report.html"):
        assert (finished / name).is_file()


def test_objectives_are_matched(finished: Path) -> None:
    ledger = pd.read_parquet(finished / "ledger.parquet")
    for _, group in ledger.groupby("budget"):
        assert len(group) == 6
        for column in MATCHED:
            assert group[column].nunique() == 1, column
    assert (ledger.source_tokens >= ledger.budget).all()
    last = ledger[ledger.budget == 800].set_index("objective")
    assert last.loc["sft", "processed_tokens"] == last.loc["sft", "source_tokens"]
    first = ledger[(ledger.budget == 400) & (ledger.epochs <= 1)].set_index("objective")
    assert first.loc["kl", "reference_tokens"] == first.loc["kl", "processed_tokens"]
    assert last.loc["kl", "reference_tokens"] < last.loc["kl", "processed_tokens"]  # one reference pass per sequence
    assert last.loc["ip", "processed_tokens"] > last.loc["sft", "processed_tokens"]
    assert last.loc["cft", "processed_tokens"] == last.loc["dpo", "processed_tokens"] + 2 * last.loc["cft", "examples"]


def test_each_condition_is_a_column_of_its_own_with_a_base_under_the_same_prompt(finished: Path) -> None:
    rows = pd.read_parquet(finished / "rows.parquet")
    conditions = json.loads((finished / "manifest.json").read_text())["conditions"]
    rows["condition"] = rows.template_hash.map(conditions)
    assert rows.condition.notna().all()
    assert set(rows[rows.objective == "cft"].condition) == {"<SAFE>", "plain", "<UNSAFE>"}
    assert set(rows[rows.objective == "ip"].condition) == {"plain", "inoculated"}
    assert set(rows[rows.objective == "sft"].condition) == {"plain"}
    assert set(rows[rows.objective == "base"].condition) == {"plain", "<SAFE>", "<UNSAFE>", "inoculated"}
    per = rows[rows.budget == 800].groupby(["objective", "condition"]).size()
    assert set(per) == {4 + 12 + 4}


def test_a_single_budget_equals_the_same_budget_among_others(
    finished: Path, models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    single = carry(study(models["llama"], root, budgets="[800]"), tmp_path / "single")
    for objective in ("sft", "dpo", "cft", "ip", "orpo", "kl"):
        at = Path("checkpoints") / objective / "s0" / "800" / "adapter_model.safetensors"
        assert (single / at).read_bytes() == (finished / at).read_bytes(), objective


def test_two_workers_leave_the_same_bytes(finished: Path, models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    assert contents(carry(study(models["llama"], root), tmp_path / "two", workers=2)) == contents(finished)


def test_a_finished_study_is_not_repeated(
    finished: Path, models: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(finished)
    monkeypatch.setattr("leeway.study.worker.load_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert contents(carry(study(models["llama"], root), finished)) == before


def the_same(out: Path, finished: Path) -> None:
    assert contents(out) == contents(finished)
    assert losses(out) == losses(finished)
    assert not list(out.rglob(".partial-*"))


def test_killed_at_twenty_random_moments_it_resumes_to_the_same_bytes(
    finished: Path, models: dict[str, Path], root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "killed"
    path.write_text(study(models["llama"], root))
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, killing.__file__, str(path), str(out), str(killing.done_in(finished)), str(seed)]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **one_thread})
    kills, code = map(int, done.stdout.split())
    record_property("measured", f"killed at {kills} random moments (seed {seed}), then the same bytes (at least 20)")
    assert kills >= 20, done.stderr
    assert code == 0, done.stderr
    the_same(out, finished)


def test_killed_with_two_workers_it_resumes_to_the_same_bytes(
    finished: Path, models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "killed"
    path.write_text(study(models["llama"], root))
    command = [sys.executable, "-m", "leeway", "run", str(path), "--out", str(out), "--quiet", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = random.uniform(0.0, 0.8) * killing.done_in(finished)
    while killing.done_in(out) <= until and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert killing.done_in(out) < killing.done_in(finished)
    the_same(carry(path.read_text(), out), finished)


def test_workers_die_with_a_run_that_is_killed_while_they_start(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "killed"
    path.write_text(study(models["llama"], root, budgets="[400]"))
    command = [sys.executable, "-m", "leeway", "run", str(path), "--out", str(out), "--quiet", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(born := killing.children(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(map(killing.alive, born)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(born) == 2
    assert not any(map(killing.alive, born))


def test_a_worker_that_is_killed_ends_the_run_in_one_line(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "killed"
    path.write_text(study(models["llama"], root, budgets="[400]"))
    command = [sys.executable, "-m", "leeway", "run", str(path), "--out", str(out), "--quiet", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while len(born := killing.children(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(born[0], signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("leeway: a worker process was killed")
    assert "Traceback" not in stderr


def test_a_tampered_ledger_stops_the_study_naming_the_column(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    text = study(models["llama"], root, budgets="[400]")
    out = carry(text, tmp_path / "run")
    line_path = out / "checkpoints" / "dpo" / "s0" / "400" / "ledger.json"
    line = json.loads(line_path.read_text())
    del line["seal"]
    for column, value in (("data_hash", "0" * 16), ("init_hash", "1" * 16), ("source_tokens", 1)):
        line_path.write_text(json.dumps({**line, column: value}))
        with pytest.raises(LeewayError, match=r"its ledger.json is damaged \(it was changed after it was written\)"):
            carry(text, out)
        line_path.write_text(json.dumps(with_checksum({**line, column: value})))  # a run that went wrong, not an edit
        with pytest.raises(LeewayError, match=column):
            carry(text, out)


def test_a_changed_adapter_is_noticed(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text = study(models["llama"], root, budgets="[400]")
    out = carry(text, tmp_path / "run")
    weights = out / "checkpoints" / "sft" / "s0" / "400" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + 1}, weights)
    with pytest.raises(LeewayError, match="adapter_hash"):
        carry(text, out)


def test_questions_that_changed_are_not_compared_with_old_answers(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "files"
    shutil.copytree(root, mine)
    text = study(models["llama"], mine, budgets="[400]")
    out = carry(text, tmp_path / "run")
    (mine / "test.jsonl").write_text('{"prompt": "other?", "answer": "3"}\n')
    with pytest.raises(LeewayError, match=r"evals\.capability-files has changed"):
        carry(text, out)


def test_another_study_is_not_written_over(finished: Path, models: dict[str, Path], root: Path) -> None:
    with pytest.raises(LeewayError, match="holds another study"):
        carry(study(models["llama"], root, budgets="[400]"), finished)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2"])
def test_a_whole_study_on_other_architectures(kind: str, models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    out = carry(study(models[kind], root, budgets="[400]"), tmp_path / kind)
    rows = pd.read_parquet(out / "rows.parquet")
    assert len(rows) == (6 + 3 + 4) * (4 + 12 + 4)  # three more conditions than objectives, four of the base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("objective", ["sft", "dpo", "kl"])
def test_an_adapter_loads_in_plain_peft_and_gives_the_same_logits(
    objective: str, finished: Path, models: dict[str, Path]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from leeway.model import adapters
    from leeway.model.adapters import AdapterSettings
    from leeway.model.load import load_model

    folder = finished / "checkpoints" / objective / "s0" / "800"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), folder).eval()
    ours = load_model(str(models["llama"]), device="cpu")
    adapters.attach(ours, AdapterSettings(16, 32, 0.05, "all-linear"), seed=5)
    adapters.restore(ours, folder)
    ours.lm.eval()
    ids = torch.tensor([ours.chat.prompt_ids([{"role": "user", "content": "3 + 4?"}])])
    with torch.no_grad():
        torch.testing.assert_close(ours.lm(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=0)
        base = AutoModelForCausalLM.from_pretrained(models["llama"])(input_ids=ids).logits
    assert not torch.equal(base, theirs(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_cft_adapter_loads_in_plain_peft_on_the_grown_embedding(finished: Path, models: dict[str, Path]) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "checkpoints" / "cft" / "s0" / "800"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(models["llama"])
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tuned = peft.PeftModel.from_pretrained(lm, folder).eval()
    safe, unsafe = tokenizer.convert_tokens_to_ids(["<SAFE>", "<UNSAFE>"])
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = next(v for k, v in tensors.items() if "token_adapter" in k or "trainable_tokens" in k)
    embedded = tuned.get_input_embeddings()(torch.tensor([safe, unsafe]))
    torch.testing.assert_close(embedded, rows)
    assert not torch.equal(rows[0], rows[1])


def test_the_base_is_exactly_itself_after_a_merge(models: dict[str, Path]) -> None:
    from leeway.model import adapters
    from leeway.model.adapters import AdapterSettings
    from leeway.model.load import load_model

    model = load_model(str(models["qwen2"]), device="cpu")
    adapters.attach(model, AdapterSettings(4, 8, 0.0, "all-linear"), seed=0, control_tokens=("<SAFE>",))
    with torch.no_grad():
        for p in adapters.trainable(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before = {k: v.clone() for k, v in model.lm.state_dict().items()}
    ids = torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "hello"}])])
    apart = model.lm(input_ids=ids).logits
    with adapters.merged(model):
        torch.testing.assert_close(model.lm(input_ids=ids).logits, apart, rtol=1e-4, atol=1e-4)
        assert any(not torch.equal(v, before[k]) for k, v in model.lm.state_dict().items())
    for k, v in model.lm.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_in_bfloat16_the_adapter_is_not_merged(models: dict[str, Path]) -> None:
    from leeway.model import adapters
    from leeway.model.adapters import AdapterSettings
    from leeway.model.load import load_model

    model = load_model(str(models["llama"]), device="cpu", dtype="bfloat16")
    adapters.attach(model, AdapterSettings(4, 8, 0.0, "all-linear"), seed=0)
    model.lm.eval()
    with torch.no_grad():
        for p in adapters.trainable(model):
            p.add_(1e-3)
    ids = torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "hello"}])])
    apart = model.lm(input_ids=ids).logits
    with adapters.merged(model):
        assert torch.equal(model.lm(input_ids=ids).logits, apart)


def test_an_adapter_on_the_head_is_refused(models: dict[str, Path]) -> None:
    from leeway.model import adapters
    from leeway.model.adapters import AdapterSettings
    from leeway.model.load import load_model

    with pytest.raises(LeewayError, match="stay frozen"):
        adapters.attach(
            load_model(str(models["llama"]), device="cpu"), AdapterSettings(4, 8, 0.0, "q_proj,lm_head"), seed=0
        )


def test_no_space_is_one_line(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(LeewayError, match="no disk space"):
        carry(study(models["llama"], root), tmp_path / "full")
    assert not (tmp_path / "full" / "manifest.json").exists()
