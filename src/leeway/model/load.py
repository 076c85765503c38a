"""Load a chat model and its tokenizer: safetensors only, no remote code, identity by content hash.

`SharedBaseModel` shares one loaded base: every checkout has its original weights, verified bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import expand
from leeway.model import packaged
from leeway.model.packaged import quiet_loaders
from leeway.model.token_stats import Head

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass
class Model:
    """A causal language model with its chat template, output head and content hash."""

    lm: Any
    chat: Chat
    head: Head
    name: str
    hash: str
    context: int
    stop_ids: tuple[int, ...]  # from the model's own generation settings

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device  # type: ignore[no-any-return]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.lm.parameters())


def resolve(name: str) -> str:
    """Return the folder of a packaged model or a GGUF file (converted on first use); any other name unchanged."""
    if name in packaged.NAMES:
        return str(packaged.folder(name))
    if name.endswith(".gguf"):
        return str(packaged.dequantised(expand(name)))
    return str(path) if (path := expand(name)) and name.startswith("~") else name


def load_chat(name: str, revision: str | None = None) -> Chat:
    """Load the tokenizer and its chat template only."""
    from transformers import AutoTokenizer

    with _load_errors(name):
        return Chat(AutoTokenizer.from_pretrained(resolve(name), revision=revision, trust_remote_code=False))


def load_config(name: str, revision: str | None = None) -> Any:
    """Return the model's config, which holds the commit of a hub id."""
    from transformers import AutoConfig

    with _load_errors(name):
        _refuse_many_layers(Path(resolve(name)) / "config.json")
        return AutoConfig.from_pretrained(resolve(name), revision=revision, trust_remote_code=False)


def load_context(name: str, revision: str | None = None) -> int:
    """Return the model's context length in tokens, from its config."""
    config = load_config(name, revision)
    with _load_errors(name):
        return context_of(config)


def load_stop_ids(name: str, revision: str | None = None) -> tuple[int, ...]:
    """Return `load_model(name).stop_ids` without loading the weights."""
    from transformers import GenerationConfig

    with _load_errors(name):
        try:
            own = GenerationConfig.from_pretrained(resolve(name), revision=revision)
        except OSError:  # it has no generation_config.json
            own = GenerationConfig.from_model_config(load_config(name, revision))
        return eos_ids(own)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    chat: Chat | None = None,
) -> Model:
    """Load the model in evaluation mode with frozen parameters, under `chat` if given, else under its own template."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    quiet_loaders()
    chat = chat or load_chat(name, revision)
    where = resolve_device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise LeewayError(f"device: {device} is not available", fix="use device: cpu, or auto")
    kind = resolve_dtype(dtype, where)
    with _load_errors(name):
        _refuse_many_layers(Path(resolve(name)) / "config.json")
        lm = AutoModelForCausalLM.from_pretrained(
            resolve(name), revision=revision, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
        for label, weight in lm.named_parameters():
            if not torch.isfinite(weight).all():
                raise LeewayError(f"model {name}: {label} holds NaN or infinity", fix="fetch or save the model again")
        lm.to(where).eval().requires_grad_(False)
        head = Head(lm.get_output_embeddings().weight, getattr(lm.config, "final_logit_softcapping", None))
        own, lm.generation_config = lm.generation_config, GenerationConfig()  # without a repetition penalty
        hash_ = model_hash(name, revision, lm.config)
        model = Model(lm, chat, head, name, hash_, context_of(lm.config), eos_ids(own))
        _check_head(model)
    return model


def _refuse_many_layers(path: Path) -> None:
    """Raise ValueError if a config names more than MAX_LAYERS layers, which would be built before any is missed."""
    if not path.is_file():
        return  # a hub id
    left: list[Any] = [json.loads(path.read_text("utf-8"))]
    while left:
        value = left.pop()
        for key, inner in value.items() if isinstance(value, dict) else ():
            number = isinstance(inner, int | float) and ("layer" in str(key) or "block" in str(key))
            if number and not inner <= MAX_LAYERS:
                raise ValueError(f"its config.json has {key} {inner}, and {MAX_LAYERS:,} is the limit")
            left.append(inner)


def eos_ids(generation_config: Any) -> tuple[int, ...]:
    """Return the stop tokens of a model's generation settings; raise ValueError for what is no token id."""
    eos = generation_config.eos_token_id
    ids = tuple(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id is {str(eos)[:100]}, not a token's number")
    return ids


def resolve_device(device: str) -> torch.device:
    """Resolve `auto`: a GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def decoder(lm: Any) -> Any:
    """Return the decoder below the output head, including the final norm."""
    return getattr(lm, lm.base_model_prefix)


def model_hash(name: str, revision: str | None = None, config: Any = None) -> str:
    """Return the content hash: of a folder's weight files, or of a hub id and the commit in its `config`, if given."""
    folder = Path(resolve(name))
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
        return digest("files", [[f.name, file_digest(f)] for f in files])
    return digest("hub", name, revision, getattr(config, "_commit_hash", None))


def weights_hash(name: str, revision: str | None = None) -> str:
    """Return `load_model(name).hash` without loading the weights."""
    return model_hash(name, revision, None if Path(resolve(name)).is_dir() else load_config(name, revision))


def context_of(config: Any) -> int:
    """Return a model's context length in tokens."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "max_position_embeddings", 0) or 2**31)


@torch.no_grad()
def _check_head(model: Model) -> None:
    """Raise LeewayError unless our output head reproduces the model's own logits."""
    ids = torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "hello"}])], device=model.device)
    ours = model.head.logits(decoder(model.lm)(input_ids=ids).last_hidden_state[0])
    theirs = model.lm(input_ids=ids).logits[0].float()
    if getattr(model.lm.get_output_embeddings(), "bias", None) is not None:
        what = f"model {model.name}: its output layer has a bias"
        raise LeewayError(what, fix="Llama, Qwen and Gemma 2 architectures are supported")
    if not torch.isfinite(theirs).all():
        raise LeewayError(f"model {model.name}: its logits are NaN or infinite", fix="fetch or save the model again")
    slack = 1e-4 if theirs.dtype == torch.float32 and model.head.weight_VD.dtype == torch.float32 else 0.25
    if not torch.allclose(ours, theirs, atol=slack, rtol=slack):
        what = f"model {model.name}: its logits differ from output layer times last hidden state "
        what += f"(by {(ours - theirs).abs().max():.3g})"
        raise LeewayError(what, fix="Llama, Qwen and Gemma 2 architectures are supported")


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn the exceptions of loaders into one-line LeewayErrors."""
    folder = Path(resolve(name))
    quiet_loaders()
    looks_local = name.startswith((".", "/", "~")) or folder.exists()
    if not looks_local and name.count("/") != 1:
        fix = f"give a model's folder, owner/name, a .gguf file, or one of {', '.join(packaged.NAMES)}"
        raise LeewayError(f"model {name}: not a folder, and not a hub id", fix=fix)
    if looks_local and not (folder / "config.json").is_file():
        fix = "give a Hugging Face model directory or a hub id"
        raise LeewayError(f"model {name}: no config.json in the folder", fix=fix)
    if odd := next((p for p in sorted(folder.glob("*")) if p.exists() and not p.is_file() and not p.is_dir()), None):
        raise LeewayError(f"model {name}: {odd.name} is a device or a pipe", fix="remove it, or save the model again")
    try:
        yield
    except (LeewayError, MemoryError):
        raise
    except Exception as error:  # on files that are damaged or hostile, the loaders raise any type
        fix = "check the name, the files (safetensors, tokenizer, config) and the network"
        raise LeewayError(f"model {name}: cannot be loaded ({first_line(error)[:300]})", fix=fix) from error


MAX_LAYERS = 10_000  # more than any model has
CHUNK = 1 << 20  # values per step: 8 MiB, 16 MiB with their weights
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bits(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return one checksum per tensor, computed on the tensor's device, that changes if its bits change.

    With the values read as integers x_0, x_1, …: sum((2 i + 1) x_i) modulo 2^64. A single changed value always changes
    it, since an odd number times a non-zero difference below 2^64 is not zero; several changes go unnoticed with
    probability about 2^-64. It guards against mistakes, not against tampering.
    """
    return tuple(_bits(t) for t in tensors)


def _bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    odd = torch.arange(1, 2 * min(CHUNK, len(flat)), 2, dtype=torch.int64, device=flat.device)
    found = 0
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK].to(torch.int64)
        found += int((part * odd[: len(part)]).sum()) + 2 * start * int(part.sum())
    return found % 2**64


class SharedBaseModel:
    """A loaded base model that is restored to its original state at every checkout.

    An adapter changes a model in one of two ways. Low-rank layers, grown embeddings and copied tables replace modules,
    parameters and settings but leave the original tensors alone: the originals are recorded here and put back. Full
    fine-tuning (`trained`) changes the weights themselves: a copy in main memory is written back. After either, `bits`
    of every parameter and buffer is compared with the loaded ones.
    """

    def __init__(self, model: Model, *, trained: bool = False) -> None:
        self._model = model
        self._places = [(place, _record(place)) for place in _places(model.lm)]
        self._tensors = {**dict(model.lm.named_parameters()), **dict(model.lm.named_buffers())}
        self._data = {name: t.data for name, t in self._tensors.items()}
        self._wanted = {name: t.requires_grad for name, t in self._tensors.items()}
        self._copy = {name: t.to("cpu", copy=True) for name, t in self._data.items()} if trained else {}
        self._bits = self._checksums()

    def checkout(self) -> Model:
        """Return the model as it was loaded; it invalidates earlier ones. Raises LeewayError if a tensor changed."""
        self._reset()
        for (name, was), now in zip(zip(self._tensors, self._bits, strict=True), self._checksums(), strict=True):
            if was != now:
                what = f"model {self._model.name}: {name} changed after an adapter was removed"
                raise LeewayError(what, fix="run the same command again: the model is reloaded, finished work is kept")
        return replace(self._model)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The original tensors by name, in main memory; empty unless `trained`."""
        return self._copy

    def _checksums(self) -> tuple[int, ...]:
        return bits(self._tensors.values())

    @torch.no_grad()
    def _reset(self) -> None:
        for place, noted in self._places:
            _restore(place, noted)
        for name, tensor in self._tensors.items():
            tensor.data = self._data[name]
            tensor.grad = None
            tensor.requires_grad_(self._wanted[name])
            if name in self._copy:
                tensor.data.copy_(self._copy[name])


def _places(lm: Any) -> list[Any]:
    """Return every object whose attributes an adapter may replace: modules and size settings."""
    settings = (lm.config, lm.config.get_text_config())
    return [*lm.modules(), *{id(s): s for s in settings}.values()]


def _record(place: Any) -> dict[str, Any]:
    """Record an object's attributes; dictionaries (parameters, submodules, hooks) are copied."""
    return {k: type(v)(v) if isinstance(v, dict) else v for k, v in vars(place).items()}


def _restore(place: Any, noted: dict[str, Any]) -> None:
    own = vars(place)
    for name in own.keys() - noted.keys():
        del own[name]
    for name, value in noted.items():
        if isinstance(value, dict) and isinstance(own.get(name), dict):
            own[name].clear()
            own[name].update(value)
        else:
            own[name] = type(value)(value) if isinstance(value, dict) else value
