"""Audits: adapter and merged model agree, an unchanged copy has zero difference, faults are one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import leeway
from leeway.audit import audit
from leeway.audit import run as audits
from leeway.audit.models import GivenBackend, LocalModel, ServedModel, name_of, resolve_models, resolve_served
from leeway.errors import LeewayError
from leeway.evals.persona import Persona
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.study.progress import Reporter

# peft asks for a name that transformers is about to rename
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EVALS: dict[str, Any] = {
    "capability": [{"name": "organism", "limit": 6, "max_new_tokens": 6}],
    "jailbreak": {"prompts": "organism", "limit": 4, "attacks": ["none", "dan"], "judge": "organism"},
    "persona": {"source": "organism", "traits": ["narcissism"], "limit": 8},
}
EVALS["jailbreak"]["max_new_tokens"] = 6
ONLY_PERSONA = {"persona": EVALS["persona"]}
CPU = ("device=cpu",)


def lora(base: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA that moves the model, as peft saves it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings)
    lm = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.normal_(0.0, 0.2)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> Path:
    return models["llama"]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(base, tmp_path_factory.mktemp("tuned") / "My LoRA")


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    lm = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    lm.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def audited(out: Path, **settings: Any) -> leeway.Results:
    return audit(out=out, **{"evals": EVALS, "overrides": CPU, **settings})


@pytest.fixture(scope="module")
def of_adapter(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> leeway.Results:
    return audited(tmp_path_factory.mktemp("audits") / "adapter", model=base, adapter=adapter, name="tuned")


def tuned_rows(results: leeway.Results) -> pd.DataFrame:
    return results.rows[results.rows["objective"] != "base"].drop(columns="adapter_hash").reset_index(drop=True)


def scores_apart(a: leeway.Results, b: leeway.Results) -> float:
    one, other = tuned_rows(a), tuned_rows(b)
    same = ["eval", "attack", "item_id", "prompt", "response", "outcome", "template_hash"]
    pd.testing.assert_frame_equal(one[same], other[same])
    return float(np.abs(one["score"] - other["score"]).max())


def test_an_adapter_and_its_merged_model_give_the_same_rows(
    base: Path,
    merged: Path,
    of_adapter: leeway.Results,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    apart = scores_apart(of_adapter, audited(tmp_path / "m", model=merged, base=base, name="tuned"))
    record_property(
        "measured", f"audit, adapter against merged model, largest difference of a score: {apart:.1e} (1e-6)"
    )
    assert apart < 1e-6


def test_rows_of_base_and_checkpoint(of_adapter: leeway.Results) -> None:
    rows = of_adapter.rows
    assert set(rows["objective"]) == {"base", "tuned"}
    assert set(rows["budget"]) == {0}
    assert len(rows) == 2 * (6 + 4 * 2 + 8)
    moved = of_adapter.contrasts().set_index("measure")["difference"]
    assert abs(moved["endorsement"]) > 1e-3


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_other_low_rank_adapters(kind: str, base: Path, tmp_path: Path) -> None:
    """Read as peft itself reads them: endorsement from the model that peft merges."""
    folder = lora(base, tmp_path / kind, **{kind: True})
    lm = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    lm.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    one = audited(tmp_path / "a", adapter=folder, evals=ONLY_PERSONA, name="x")
    other = audited(tmp_path / "b", model=tmp_path / "merged", base=base, evals=ONLY_PERSONA, name="x")
    assert scores_apart(one, other) < 1e-6


def test_an_unchanged_copy_has_zero_difference(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    found = audited(tmp_path / "out", model=tmp_path / "copy", base=base).contrasts()
    few = found["note"].str.contains("fewer than 5", na=False)  # persona statements in one half, for a trait
    assert set(found.loc[few, "measure"]) <= {"trait", "acquiescence"}
    assert (found.loc[~few, "difference"] == 0).all()
    assert not few.all()
    assert (found["n_unpaired"] == 0).all()


def test_the_page_of_a_run_without_training(of_adapter: leeway.Results) -> None:
    page = (of_adapter.folder / "report.html").read_text("utf-8")
    assert "External checkpoint: no ledger." in page
    content = json.loads((of_adapter.folder / "results.json").read_text("utf-8"))
    (line,) = [text for text in content["verdict"] if text.startswith("Controls were not run")]
    assert "A/A, dose and the learning check need arms that Leeway trains" in line
    assert page.count(line) == 2  # in the verdict and in the section on controls, which has no files
    assert "tables/controls.csv" not in page
    assert "After fine-tuning, capability" in page
    assert 'id="figure-contrasts"' in page
    assert 'id="figure-outcomes"' in page
    assert 'id="transcripts"' in page
    assert 'id="budgets"' not in page
    assert "0 tokens" not in page
    assert of_adapter.ledger.empty


def test_a_known_number_of_tokens_is_on_rows_and_page(base: Path, adapter: Path, tmp_path: Path) -> None:
    found = audited(tmp_path / "a", model=base, adapter=adapter, tokens=25_000, evals=ONLY_PERSONA)
    assert set(tuned_rows(found)["budget"]) == {25_000}
    assert "At 25k tokens, capability" in (tmp_path / "a" / "report.html").read_text("utf-8")


class Killed(Exception):
    pass


def test_a_killed_audit_resumes_to_the_same_bytes(
    base: Path, adapter: Path, of_adapter: leeway.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its first persona eval and resumed, an audit has the same rows, byte for byte."""
    ran: list[str] = []
    whole = Persona.run

    def die(*_: Any, **__: Any) -> Any:
        raise Killed

    arguments: dict[str, Any] = {"model": base, "adapter": adapter, "name": "tuned"}
    monkeypatch.setattr(Persona, "run", die)
    with pytest.raises(Killed):
        audited(tmp_path / "a", **arguments)
    assert len(list((tmp_path / "a" / "parts").glob("*.parquet"))) == 2
    monkeypatch.setattr(Persona, "run", lambda self, *a: ran.append("persona") or whole(self, *a))
    audited(tmp_path / "a", **arguments)
    assert ran == ["persona"] * 2
    again = (tmp_path / "a" / "rows.parquet").read_bytes()
    assert again == (of_adapter.folder / "rows.parquet").read_bytes()
    (tmp_path / "a" / "report.html").unlink()
    monkeypatch.setattr("leeway.audit.models.load_model", die)
    audited(tmp_path / "a", **arguments)  # finished: no model is loaded, the page comes back
    assert (tmp_path / "a" / "report.html").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evals": ONLY_PERSONA}, "evals.capability-organism"),
        ({"name": "another"}, "its name"),
        ({"tokens": 7}, "its number of tokens"),
        ({"overrides": (*CPU, "evals.batch=4")}, "evals.batch"),
    ],
)
def test_another_audit_in_the_same_folder_is_refused(
    changed: dict[str, Any], message: str, base: Path, adapter: Path, of_adapter: leeway.Results
) -> None:
    arguments = {"model": base, "adapter": adapter, "name": "tuned", **changed}
    with pytest.raises(LeewayError, match=f"holds another audit: {message} is"):
        audited(of_adapter.folder, **arguments)


def test_another_model_in_the_same_folder_is_refused(base: Path, merged: Path, of_adapter: leeway.Results) -> None:
    with pytest.raises(LeewayError, match="holds another audit: the checkpoint is"):
        audited(of_adapter.folder, model=merged, base=base, name="tuned")


def retemplated(base: Path, folder: Path, template: str, *words: str) -> Path:
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(words), special_tokens=True)
    tokenizer.save_pretrained(folder)
    if words:
        lm = AutoModelForCausalLM.from_pretrained(folder)
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lm.save_pretrained(folder)
    return folder


def test_the_checkpoints_own_template_is_noted_and_not_used(base: Path, tmp_path: Path) -> None:
    """The same weights: under the base's template nothing differs, under another of its own endorsement does."""
    import tiny

    folder = retemplated(base, tmp_path / "other", tiny.PLAIN)
    shared = audited(tmp_path / "a", model=folder, base=base, evals=ONLY_PERSONA)
    moved = shared.contrasts().set_index("measure")["difference"]
    assert moved["endorsement"] == 0
    assert moved.drop("endorsement").isna().all()  # too few statements for a trait
    note = "both models were prompted under that of"
    assert note in (tmp_path / "a" / "report.html").read_text("utf-8")
    assert note in json.loads((tmp_path / "a" / "manifest.json").read_text())["external"]["notes"][0]
    own = audited(tmp_path / "b", model=folder, base=base, evals=ONLY_PERSONA, own_template=True)
    assert (own.contrasts()["difference"] != 0).any()
    assert "own template" in (tmp_path / "b" / "report.html").read_text("utf-8")


def test_added_tokens_need_own_template(base: Path, tmp_path: Path) -> None:
    import tiny

    folder = retemplated(base, tmp_path / "grown", tiny.TRIMMING, "[new]")
    with pytest.raises(LeewayError, match=r"its vocabulary is not that of .* \(\+1 tokens\).*--own-template"):
        audited(tmp_path / "a", model=folder, base=base, evals=ONLY_PERSONA)
    assert not (tmp_path / "a").exists()
    found = audited(tmp_path / "a", model=folder, base=base, evals=ONLY_PERSONA, own_template=True).contrasts()
    assert found["n"].min() == 8  # paired all the same


def test_an_adapter_with_tokens_and_embeddings_of_its_own(base: Path, tmp_path: Path) -> None:
    """Grown embeddings in the adapter are loaded with the LoRA: the same rows as its merged model."""
    import tiny

    grown = retemplated(base, tmp_path / "grown", tiny.TRIMMING, "[new]")
    folder = lora(grown, tmp_path / "lora", modules_to_save=["embed_tokens", "lm_head"])
    AutoTokenizer.from_pretrained(grown).save_pretrained(folder)
    lm = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(grown), str(folder)).merge_and_unload()
    lm.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(grown).save_pretrained(tmp_path / "merged")
    own: dict[str, Any] = {"evals": ONLY_PERSONA, "own_template": True, "name": "x"}
    one = audited(tmp_path / "a", model=base, adapter=folder, other_base=True, **own)
    other = audited(tmp_path / "b", model=tmp_path / "merged", base=base, **own)
    assert np.abs(tuned_rows(one)["score"] - tuned_rows(other)["score"]).max() < 1e-6
    assert "it was measured on" in (tmp_path / "a" / "report.html").read_text("utf-8")


def copied(adapter: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_bad_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(LeewayError, match=message) as caught:
            audited(tmp_path / "out", model=base, adapter=folder, evals=ONLY_PERSONA)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def widen(t: dict[str, torch.Tensor]) -> None:
        t |= {n: torch.cat([w, w]) for n, w in t.items() if n.endswith("q_proj.lora_B.weight")}

    def lose(t: dict[str, torch.Tensor]) -> None:
        del t[sorted(t)[0]]

    def add(t: dict[str, torch.Tensor]) -> None:
        t["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)

    refused(changed(copied(adapter, tmp_path / "wide"), widen), "does not fit .*size mismatch")
    refused(changed(copied(adapter, tmp_path / "less"), lose), "is missing")
    refused(changed(copied(adapter, tmp_path / "more"), add), "has no place in it")
    refused(copied(adapter, tmp_path / "ia3", peft_type="IA3"), "IA3 adapters are not supported")
    refused(copied(adapter, tmp_path / "pissa", init_lora_weights="pissa"), "altered the base's own weights")
    (copied(adapter, tmp_path / "torn") / "adapter_config.json").write_text("{")
    refused(tmp_path / "torn", "its adapter_config.json is damaged")
    (copied(adapter, tmp_path / "cut") / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    refused(tmp_path / "cut", "does not fit")
    pickled = copied(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "its weights are in adapter_model.bin only")
    refused(tmp_path, "no adapter_config.json there")


def test_a_model_with_only_pickled_weights_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(LeewayError, match=r"its weights are in pytorch_model\.bin only"):
        audited(tmp_path / "out", model=tmp_path / "old", base=base, evals=ONLY_PERSONA)


def test_the_base_that_an_adapter_names(base: Path, adapter: Path, models: dict[str, Path], tmp_path: Path) -> None:
    assert resolve_models(None, None, adapter) == (LocalModel(str(base)), LocalModel(str(base), adapter), ())
    assert resolve_models(str(adapter), None) == resolve_models(None, None, adapter)
    assert resolve_models(None, str(base), adapter) == resolve_models(str(base), None, adapter)
    shutil.copytree(base, tmp_path / "elsewhere")
    assert resolve_models(str(tmp_path / "elsewhere"), None, adapter)[2] == ()  # the same files in another place
    other = str(models["qwen3"])
    with pytest.raises(LeewayError, match=f"it was trained on {base}, not on {other}; give --base {base}"):
        resolve_models(other, None, adapter)
    assert "it was measured on" in resolve_models(other, None, adapter, other_base=True)[2][0]
    hub = copied(adapter, tmp_path / "hub", base_model_name_or_path="owner/model")
    with pytest.raises(LeewayError, match="it was trained on owner/model, not on owner/other"):
        resolve_models("owner/other", None, hub)
    assert "names owner/model" in resolve_models(str(base), None, hub)[2][0]  # perhaps the same: noted, not refused
    nameless = copied(adapter, tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(LeewayError, match="its config names no base model"):
        resolve_models(None, None, nameless)


def test_mistakes_are_one_line(base: Path, adapter: Path) -> None:
    with pytest.raises(LeewayError, match="compares two models, only one is given"):
        audit(base)
    with pytest.raises(LeewayError, match="three models"):
        audit("a", base="b", adapter=adapter)
    with pytest.raises(LeewayError, match=r"'optim\.lr' is a training setting; an audit does not train"):
        audit("a", base="b", overrides=["optim.lr=1"])
    with pytest.raises(LeewayError, match=r"'controls\.aa' is a training setting; an audit does not train"):
        audit("a", base="b", overrides=["controls.aa=true"])
    with pytest.raises(LeewayError, match="cannot be a name on the rows"):
        audit("a", base="b", name="base")
    with pytest.raises(LeewayError, match="neither a study file nor a preset"):
        audit("a", base="b", evals="nowhere.yaml")


def test_names_and_presets() -> None:
    assert name_of(LocalModel("owner/My Model")) == "my-model"
    assert name_of(LocalModel("/x/base/")) == "audited"
    assert audits.load_evals(None).evals.capability[0].name == "gsm8k"
    assert audits.load_evals(None, organism=True).evals.capability[0].name == "organism"
    assert audits.load_evals(None, ["evals.jailbreak.limit=20"]).evals.jailbreak.limit == 20  # type: ignore[union-attr]


@dataclass
class Server:
    """A backend that endorses or does not, and that may be down."""

    yes: float
    identity: str
    template_hash: str = "t"
    down: bool = False

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        tick(len(requests))
        return [Reply("no", 1, False) for _ in requests]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        tick(len(conversations))
        if self.down:
            return [Choice({}, failure="503") for _ in conversations]
        return [Choice(dict(zip(options, (self.yes, 0.9 - self.yes), strict=True))) for _ in conversations]


def test_python_backends_and_failed_answers(tmp_path: Path) -> None:
    """A backend's failures are unscored, and retried by the same command; the difference is worked by hand."""
    a, b = Server(0.6, "a", down=True), Server(0.3, "b")
    first = audited(tmp_path / "x", model=a, base=b, evals=ONLY_PERSONA)
    assert tuned_rows(first)["score"].isna().all()
    a.down = False
    found = audited(tmp_path / "x", model=a, base=b, evals=ONLY_PERSONA)
    keyed = found.rows["judge_raw"].map(lambda raw: json.loads(raw)["match"] == "Yes")
    expected = np.where(keyed, (0.6 - 0.3) / 0.9, -(0.6 - 0.3) / 0.9)[found.rows["objective"] == "base"].mean()
    assert found.contrasts()["difference"].iloc[0] == pytest.approx(expected, abs=1e-9)
    with pytest.raises(LeewayError, match="different chat templates"):
        audited(tmp_path / "y", model=Server(0.6, "a", "other"), base=b, evals=ONLY_PERSONA)
    own = audited(tmp_path / "y", model=Server(0.6, "a", "other"), base=b, evals=ONLY_PERSONA, own_template=True)
    assert own.contrasts()["n"].iloc[0] == 8


def test_endpoints(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model uses its own server; their rows are paired, with a note on the templates."""
    url = "http://localhost:1/v1"
    assert resolve_served("tuned", "plain", url, None, "KEY")[:2] == (
        ServedModel(url, "plain", "KEY"),
        ServedModel(url, "tuned", "KEY"),
    )
    assert resolve_served("tuned", str(base), url, None, None)[0] == LocalModel(str(base))
    assert resolve_served(str(base), "plain", None, url, None)[:2] == (ServedModel(url, "plain"), LocalModel(str(base)))
    requested: list[dict[str, Any]] = []

    def backend(settings: Any) -> Server:
        requested.append({k: getattr(settings, k) for k in ("model", "base_url", "key_env")})
        return Server({"tuned": 0.6, "plain": 0.3}[settings.model], settings.model, settings.model)

    monkeypatch.setattr("leeway.audit.models.OpenAIBackend", backend)
    one = audits.check_audit(*resolve_served("tuned", "plain", url, None, "KEY"), ONLY_PERSONA)
    audits.run(one, tmp_path / "x", Reporter(quiet=True), "leeway audit")
    assert requested[0] == {"model": "tuned", "base_url": url, "key_env": "KEY"}
    found = leeway.Results.load(tmp_path / "x")
    assert found.contrasts()["n"].iloc[0] == 8
    assert "cannot be seen here" in (tmp_path / "x" / "report.html").read_text("utf-8")
    assert isinstance(resolve_models(Server(0, "a"), Server(0, "b"))[0], GivenBackend)


def test_a_prefill_on_an_endpoint_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    both = resolve_served("tuned", "plain", "http://localhost:1/v1", None, "KEY")
    evals = {"jailbreak": {"prompts": "organism", "limit": 2, "attacks": ["prefill"], "judge": "organism"}}
    one = audits.check_audit(*both, evals)
    with pytest.raises(LeewayError, match=r"endpoint of model 'plain': it cannot continue .* continue_final_message"):
        audits.run(one, tmp_path / "x", Reporter(quiet=True), "leeway audit")
    assert not (tmp_path / "x").exists()


def test_the_command(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from leeway import cli

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["leeway", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    settings = ["evals.capability=[]", "evals.jailbreak=null", "evals.persona.limit=4", "device=cpu"]
    out = tmp_path / "out"
    assert command("audit", "--adapter", str(adapter), "--study", "demo", "--out", str(out), "--quiet", *settings) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert set(leeway.Results.load(out).rows["objective"]) == {"base", "my-lora"}
    assert command("audit", str(base)) == 2
    assert "an audit compares two models, only one is given" in capsys.readouterr().err
