"""`leeway push`: what is in the folder, what is not, and what the Hub is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import synthetic
import torch
from huggingface_hub import EvalResult, ModelCard
from markupsafe import escape
from reports import no_figures
from safetensors.torch import load_file, save_file

from leeway import report
from leeway.errors import LeewayError
from leeway.integrations.hub import choose_checkpoint, push
from leeway.io import with_checksum
from leeway.model import adapters
from leeway.report.rebuild import page_alone
from leeway.report.redaction import HARMLESS
from leeway.report.results import Results

MACHINE = "/home/someone/models/base"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints as training leaves them, a path of this machine and files that nobody should push."""
    rows = synthetic.rows(("sft", "cft"), (25_000, 100_000), seeds=(0, 1), capability=30, prompts=20, items=20)
    folder = synthetic.write(tmp_path_factory.mktemp("hub") / "run", rows)
    for line in pd.read_parquet(folder / "ledger.parquet").to_dict("records"):
        own = folder / "checkpoints" / line["objective"] / f"s{line['seed']}" / str(line["budget"])
        own.mkdir(parents=True)
        save_file({"lora_A.weight": torch.full((2, 3), float(line["budget"]))}, own / adapters.WEIGHTS)
        save_file({"m": torch.zeros(2)}, own / "optimizer.safetensors")
        (own / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": MACHINE, "r": 16}))
        sealed = with_checksum({**line, "adapter_hash": adapters.adapter_hash(adapters.saved(own))})
        (own / "ledger.json").write_text(json.dumps(sealed))
        (own / "secrets.env").write_text("HF_TOKEN=hf_x")
    with (folder / "study.yaml").open("a") as study:
        study.write(f"reference: {MACHINE}\njudge: {{endpoint: 'http://me:pw@host/v1'}}\n")
    with no_figures():
        report.build(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "sft"
    assert push(run, None, "sft", "100k", 1, dry_run=out) == str(out)
    return out


def test_folder_holds_the_checkpoint_and_the_study(pushed: Path) -> None:
    names = sorted(str(p.relative_to(pushed)) for p in pushed.rglob("*") if p.is_file())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "citation.bib",
        "ledger.json",
        "study/contrasts.csv",
        "study/ledger.parquet",
        "study/rates.csv",
        "study/report.html",
        "study/study.yaml",
    ]
    assert load_file(pushed / "adapter_model.safetensors")["lora_A.weight"][0, 0] == 100_000
    assert json.loads((pushed / "ledger.json").read_text())["seed"] == 1


def test_card_has_the_hubs_metadata_and_every_checkpoint_with_its_interval(run: Path, pushed: Path) -> None:
    card = ModelCard.load(pushed / "README.md")
    rates = Results.load(run).rates()
    own = rates.query("objective == 'sft' and budget == 100_000 and seed == 1").set_index("measure")
    found = card.data.eval_results
    assert found
    assert all(isinstance(r, EvalResult) for r in found)
    assert {r.metric_type for r in found} == {"accuracy", "asr", "coherence", "trait"}
    assert {r.metric_type: r.metric_value for r in found} == {r.metric_type: own["rate"][r.metric_type] for r in found}
    assert card.data.library_name == "peft"
    table = card.text.split("### The whole study")[1].split("## Limitations")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 1 + 2 * 2 * 2  # base; two objectives at two budgets with two seeds
    assert [line for line in lines if "**" in line] == [
        line for line in lines if line.startswith("| **SFT** | 100k | 1 |")
    ]
    for line in rates[(rates["measure"] == "accuracy") & (rates["objective"] != "base")].to_dict("records"):
        interval = f"{100 * line['rate']:.1f}% [{100 * line['low']:.1f}%, {100 * line['high']:.1f}%]"
        assert interval in table


def test_nothing_private_and_no_forbidden_text_is_pushed(run: Path, pushed: Path) -> None:
    rows = pd.read_parquet(run / "rows.parquet")
    hidden = rows[~rows["eval"].isin(HARMLESS)]
    texts = [t for t in {*hidden["prompt"], *hidden["response"]} if len(t) > 10]
    assert len(texts) > 20
    for path in (p for p in pushed.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert not [t for t in texts if t.encode() in content], path.name
        assert b"/home/" not in content, path.name
        assert b"me:pw" not in content, path.name
        assert b"hf_x" not in content, path.name
    assert json.loads((pushed / "adapter_config.json").read_text()) == {"base_model_name_or_path": "organism", "r": 16}
    study = (pushed / "study" / "study.yaml").read_text()
    assert "# local paths are shortened" in study
    assert "reference: base" in study


def test_the_page_has_no_prompt_and_no_answer_to_a_forbidden_one_unless_asked_for(run: Path, pushed: Path) -> None:
    rows = pd.read_parquet(run / "rows.parquet")
    results = Results.load(run)
    hidden = {*rows["prompt"], *rows.loc[~rows["eval"].isin(HARMLESS), "response"]} - {""}
    page = (pushed / "study" / "report.html").read_text()
    shown = synthetic.embedded(page)
    assert hidden.isdisjoint({*shown["prompt"], *shown["response"]})
    assert not [text for text in hidden if str(escape(text)) in page]
    assert {*rows.loc[rows["eval"] == "capability", "response"]} <= {*shown["response"]}
    assert 'href="figures' not in page
    assert 'href="tables' not in page
    full = synthetic.embedded(page_alone(results, full=True))
    assert hidden <= {*full["prompt"], *full["response"]}


def test_a_checkpoint_is_chosen_by_default_values_or_named(run: Path) -> None:
    results = Results.load(run)
    line = choose_checkpoint(results, "cft")
    assert (line["objective"], line["budget"], line["seed"]) == ("cft", 100_000, 0)
    assert choose_checkpoint(results, "cft", 25_000, 1)["budget"] == 25_000
    for asked, error in {
        (None, None, None): "has several objectives; give --objective: cft, sft",
        ("stf", None, None): "--objective stf: .* no such objective; did you mean 'sft'\\?; one of: cft, sft",
        ("sft", "50k", None): "--budget 50k: .* no such checkpoint; one of: 25000, 100000",
        ("sft", None, 7): "--seed 7: .* no such checkpoint; one of: 0, 1",
    }.items():
        with pytest.raises(LeewayError, match=error):
            choose_checkpoint(results, *asked)


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(LeewayError, match="is not an empty folder; give a new one"):
        push(run, None, "sft", dry_run=tmp_path / "full")
    with pytest.raises(LeewayError, match="push: no repository; give owner/name"):
        push(run, None, "sft")
    with pytest.raises(LeewayError, match="a b: not the name of a repository; give owner/name"):
        push(run, "a b", "sft")


def test_a_changed_or_missing_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    own = copy / "checkpoints/sft/s0/25000"
    save_file({"lora_A.weight": torch.ones(2, 3)}, own / adapters.WEIGHTS)
    with pytest.raises(LeewayError, match="the adapter is not the one its ledger names"):
        push(copy, None, "sft", "25k", 0, dry_run=tmp_path / "a")
    shutil.rmtree(own)
    with pytest.raises(LeewayError, match="25000 is not there; run the study again"):
        push(copy, None, "sft", "25k", 0, dry_run=tmp_path / "b")


class FakeHub:
    """Stands in for HfApi, with its signatures: the tests reach no network."""

    def __init__(self, *, private: bool, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, **_: Any) -> FakeHub:
        return self

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        self.asked.append(("create", (repo, private, exist_ok)))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=repo, __str__=lambda: repo)

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(id=repo, private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        names = sorted(p.name for p in Path(folder_path).iterdir())
        self.asked.append(("upload", (repo_id, names, commit_message)))


def with_hub(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, token: str | None = "hf_x") -> FakeHub:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    return hub


def test_a_repository_is_private_and_gets_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = with_hub(monkeypatch, FakeHub(private=True))
    push(run, "me/sft", "sft")
    (_, created), (_, (repo, names, message)) = hub.asked
    assert created == ("me/sft", True, True)
    assert repo == "me/sft"
    assert {"README.md", "adapter_model.safetensors", "study"} <= set(names)
    assert message == "Leeway: sft at 100k tokens, seed 0"


def test_a_public_repository_is_not_pushed_to_by_mistake(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = with_hub(monkeypatch, FakeHub(private=False))
    with pytest.raises(LeewayError, match="me/sft is a public repository; add --public"):
        push(run, "me/sft", "sft")
    assert [what for what, _ in hub.asked] == ["create"]
    push(run, "me/sft", "sft", public=True)
    assert [what for what, _ in hub.asked] == ["create", "create", "upload"]


def test_no_token_and_no_network_are_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hub(monkeypatch, FakeHub(private=True), token=None)
    with pytest.raises(LeewayError, match="push me/sft: no token of the Hub; set HF_TOKEN"):
        push(run, "me/sft", "sft")
    with_hub(monkeypatch, FakeHub(private=True, error=ConnectionError("no route\nmore")))
    with pytest.raises(LeewayError, match=r"push me/sft: the Hub refused or did not answer \(no route\); check"):
        push(run, "me/sft", "sft")
