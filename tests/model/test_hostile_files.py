"""Hostile model folders and adapters: one line each, quickly, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from leeway.audit import models as audited
from leeway.audit.models import LocalModel, apply_adapter
from leeway.data import chat as chats
from leeway.errors import LeewayError
from leeway.model.adapters import AdapterSettings, attach, save
from leeway.model.load import load_chat, load_context, load_model, load_stop_ids, model_hash

END = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["llama"], tmp_path / "model"))


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LoRA of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(str(models["llama"]), device="cpu")
    attach(model, AdapterSettings(2, 4, 0.0, "q_proj"), seed=0)
    save(model, folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(call: Any) -> str:
    with pytest.raises(LeewayError) as found:
        call()
    assert "\n" not in str(found.value)
    assert "\x1b" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP, "its chat template fails (TimeoutError: it takes over 0.2 s)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "its chat template fails (RecursionError"),
        ("{{ raise_exception('\x1b[2J' ~ 'no') }}", "its chat template fails (TemplateError: ⟨U+001B⟩[2Jno)"),
        ("{{ ''.__class__.__mro__ }}", "its chat template fails (SecurityError"),
        ("{{ messages[9].content }}", "its chat template fails (UndefinedError"),
        ("{{ 1 / 0 }}", "its chat template fails (ZeroDivisionError"),
        ("{% include '/etc/passwd' %}", "its chat template fails (TypeError"),
        ("{% for", "its chat template fails (TemplateSyntaxError"),
        (END * 2 + "{% if add_generation_prompt %}[assistant]{% endif %}", "renders an answered prompt differently"),
    ],
)
def test_templates(template: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "RENDER_S", 0.2 if template == LOOP else 60.0)
    (folder / "chat_template.jinja").write_text(template)
    assert words in refused(lambda: load_chat(str(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000, and 10,000 is the limit"),
        ({"text_config": {"num_hidden_layers": 1e9}}, "num_hidden_layers 1000000000.0"),
        ({"max_position_embeddings": "many"}, ""),
        ({"model_type": ["llama"]}, ""),
        ({"model_type": "bert"}, ""),
        ({"hidden_size": 0}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_act": "nosuch"}, ""),
        ({"quantization_config": 3}, ""),
    ],
)
def test_settings(changes: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    line = refused(lambda: (load_context(str(folder)), load_model(str(folder), device="cpu")))
    assert line.startswith(f"model {folder}: ")
    assert words in line


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, '{"a": ' + "9" * 5_000 + "}"])
def test_settings_of_another_shape(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    assert "cannot be loaded (" in refused(lambda: load_context(str(folder)))


@pytest.mark.parametrize("eos", ["x", [1, "x"], -7, {"a": 1}])
def test_stop_tokens(eos: Any, folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=eos)
    assert "cannot be loaded (" in refused(lambda: load_stop_ids(str(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**6}, "its rank 1000000 is not that of its tensors"),
        ({"r": "2"}, "its rank 2 is not that of its tensors"),
        ({"rank_pattern": {"q_proj": 10**9}}, "its rank 1000000000 is not that of its tensors"),
        ({"target_modules": r"([a-z0-9_.]+)+!"}, "it takes over 0.2 s"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication is not supported"),
        ({"base_model_name_or_path": ["x"]}, "is damaged"),
        ({"peft_type": ["LORA"]}, "are not supported"),
        ({"lora_alpha": "\x1b[31m"}, ""),
        ({"target_modules": 3}, ""),
    ],
)
def test_adapters(
    changes: dict[str, Any], words: str, saved: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(audited, "MATCHING_S", 0.2 if "0.2 s" in words else 60.0)
    folder = Path(shutil.copytree(saved, tmp_path / "a"))
    edit(folder / "adapter_config.json", **changes)
    line = refused(lambda: apply_adapter(load_model(str(models["llama"]), device="cpu"), folder))
    assert line.startswith(f"adapter {folder}: ")
    assert words in line


def test_weights_of_another_shape_or_kind(saved: Path, models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "a"))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    for odd in (tensors[name].t().contiguous(), tensors[name] * float("nan")):
        save_file({**tensors, name: odd}, path)
        assert "adapter" in refused(lambda: apply_adapter(load_model(str(models["llama"]), device="cpu"), folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json", "x.safetensors"])
def test_a_device_or_a_pipe_in_a_model_folder(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero") if name[0] in "mg" else os.mkfifo(folder / name)
    for call in (load_chat, load_context, load_stop_ids, lambda f: load_model(f, device="cpu")):
        assert f"{name} is a device or a pipe" in refused(lambda call=call: call(str(folder)))
    if name.endswith(".safetensors"):
        assert f"{name}: not a regular file" in refused(lambda: model_hash(str(folder)))


def test_an_adapters_file_that_cannot_be_read(saved: Path, models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "a"))
    (folder / "tokenizer.json").symlink_to("/proc/self/mem")
    line = refused(lambda: LocalModel(str(models["llama"]), folder).identity)
    assert "tokenizer.json: cannot be read (" in line


class Unpickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("safe", [True, False])
def test_no_pickle_and_no_code_of_a_folder_is_run(safe: bool, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Unpickled(marker)))
    (folder / "owned.py").write_text(f"open({str(marker)!r}, 'w')\nclass Owned: pass\n")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "owned.Owned", "AutoConfig": "owned.Owned"})
    if safe:
        load_model(str(folder), device="cpu")
    else:
        (folder / "model.safetensors").unlink()
        assert "loading that kind of file can run code" in refused(lambda: LocalModel(str(folder)).identity)
        refused(lambda: load_model(str(folder), device="cpu"))
    assert not marker.exists()
