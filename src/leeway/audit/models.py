"""The two models of an audit: each a folder, a hub id, a PEFT adapter on one, an endpoint, or a Python backend."""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from leeway.data.chat import Chat, cpu_limit
from leeway.errors import LeewayError
from leeway.generation.backend import Backend
from leeway.generation.openai_api import ApiSettings, OpenAIBackend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest, file_digest
from leeway.io import expand
from leeway.model import adapters
from leeway.model.load import Model, load_model, resolve, weights_hash
from leeway.study.jobs import BASE
from leeway.study.objective_spec import ALIAS
from leeway.study.spec import Spec

PICKLED = ("*.bin", "*.pt", "*.pth")
MATCHING_S = 5.0  # of CPU time for an adapter's patterns on the names of a model's modules
ADAPTER_FILES = (adapters.CONFIG, adapters.WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class LocalModel:
    """A model of a folder or hub id, with or without a PEFT adapter."""

    model: str
    adapter: Path | None = None

    @property
    def description(self) -> str:
        return f"{self.model} with the adapter {self.adapter}" if self.adapter else self.model

    @cached_property
    def model_hash(self) -> str:
        """The hash that the loaded model has."""
        if (folder := Path(resolve(self.model))).is_dir():
            refuse_pickled(f"model {self.model}", folder)
        return weights_hash(self.model)

    @cached_property
    def identity(self) -> str:
        """The hash of the files, the adapter's, and the hub commit."""
        if self.adapter is None:
            return self.model_hash
        adapter_config(self.adapter)
        files = [self.adapter / name for name in ADAPTER_FILES if (self.adapter / name).is_file()]
        return digest("adapter", self.model_hash, [file_digest(f) for f in files])

    def load(self, chat: Chat | None, spec: Spec) -> Model:
        """Return the model, under its adapter if it has one."""
        model = load_model(self.model, dtype=spec.weight_dtype, device=spec.device, chat=chat)
        if self.adapter is not None:
            apply_adapter(model, self.adapter)
            model.hash = self.identity
        return model

    @contextmanager
    def open(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:
        model = self.load(chat, spec)
        try:
            with adapters.merged(model):
                yield TransformersBackend(model, "", spec.evals.batch, "failure", spec.evals.thinking)
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible server; `key_env` names the environment variable with the key."""

    url: str
    model: str
    key_env: str | None = None
    concurrency: int = ApiSettings.concurrency

    def __post_init__(self) -> None:
        _ = self.settings  # raises LeewayError before anything is written

    @property
    def description(self) -> str:
        return f"{self.model} at {self.url}"

    @property
    def identity(self) -> str:
        return digest("endpoint", self.url, self.model)

    @contextmanager
    def open(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:  # noqa: ARG002 - the server renders
        yield OpenAIBackend(self.settings)

    @property
    def settings(self) -> ApiSettings:
        return ApiSettings(
            model=self.model, base_url=self.url, key_env=self.key_env or "", concurrency=self.concurrency
        )


@dataclass(frozen=True)
class GivenBackend:
    """Any backend, from Python."""

    backend: Backend

    @property
    def description(self) -> str:
        return f"{type(self.backend).__name__} {self.backend.identity}"

    @property
    def identity(self) -> str:
        return digest("backend", self.backend.identity, self.backend.template_hash)

    @contextmanager
    def open(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:  # noqa: ARG002 - it has its own
        yield self.backend


AuditedModel = LocalModel | ServedModel | GivenBackend  # `identity` needs no loading; `open` renders with `chat`
Comparison = tuple[AuditedModel, AuditedModel, tuple[str, ...]]  # base, checkpoint, notes


def resolve_models(
    model: str | Backend | None,
    base: str | Backend | None,
    adapter: str | Path | None = None,
    *,
    other_base: bool = False,
) -> Comparison:
    """Return (base, checkpoint, notes) of a caller's arguments; raises LeewayError unless they name two models."""
    if adapter is None and isinstance(model, str) and is_adapter(model):
        model, adapter = None, model
    if adapter is None:
        if model is None or base is None:
            raise LeewayError("an audit compares two models, only one is given", fix="add --base or --adapter")
        return _model(base), _model(model), ()
    if model is not None and base is not None:
        raise LeewayError("a model, --base and --adapter are three models", fix="give only --adapter and its base")
    given = model if model is not None else base
    if given is not None and not isinstance(given, str):
        raise LeewayError("an adapter needs a model's folder or hub id", fix="give that as its base")
    folder = expand(adapter)
    name, note = base_of(folder, given, other_base=other_base)
    return LocalModel(name), LocalModel(name, folder), (note,) if note else ()


def _model(given: str | Backend) -> AuditedModel:
    return LocalModel(given) if isinstance(given, str) else GivenBackend(given)


def resolve_served(
    model: str | None,
    base: str | None,
    endpoint: str | None,
    base_endpoint: str | None,
    key_env: str | None,
    concurrency: int = ApiSettings.concurrency,
) -> Comparison:
    """Return (base, checkpoint, notes) if an OpenAI-compatible server has one or both.

    `endpoint` serves the model, and also the base unless that is a local folder or has a `base_endpoint`.
    """
    if model is None or base is None:
        raise LeewayError("an audit compares two models, only one is given", fix="give a model and --base")
    base_url = base_endpoint or (endpoint if not Path(resolve(base)).is_dir() else None)
    return (
        ServedModel(base_url, base, key_env, concurrency) if base_url else LocalModel(base),
        ServedModel(endpoint, model, key_env, concurrency) if endpoint else LocalModel(model),
        (),
    )


def base_of(folder: Path, given: str | None, *, other_base: bool) -> tuple[str, str]:
    """Return (an adapter's base model, a note for the reader).

    Raises LeewayError if the adapter's config names another base than `given`: by content if both are folders, by name
    if both are hub ids.
    """
    named = adapter_config(folder).get("base_model_name_or_path") or ""
    if given is None:
        if not named:
            raise LeewayError(f"adapter {folder}: its config names no base model", fix="give --base")
        return str(named), ""
    if not named or named == given or resolve(named) == resolve(given):
        return given, ""
    given_is_local, named_is_local = Path(resolve(given)).is_dir(), Path(resolve(named)).is_dir()
    if given_is_local and named_is_local and LocalModel(given).model_hash == LocalModel(named).model_hash:
        return given, ""
    if given_is_local == named_is_local and not other_base:
        what = f"adapter {folder}: it was trained on {named}, not on {given}"
        raise LeewayError(what, fix=f"give --base {named}, or --other-base to measure it on {given}")
    return given, f"The adapter names {named} as its base; it was measured on {given}."


def name_of(model: AuditedModel) -> str:
    """Return a checkpoint's name on the rows: the last part of its path or hub id."""
    if isinstance(model, LocalModel):
        raw = str(model.adapter or model.model).rstrip("/").rsplit("/", 1)[-1]
    else:
        raw = model.model.rsplit("/", 1)[-1] if isinstance(model, ServedModel) else "audited"
    return to_alias(raw) or "audited"


def to_alias(raw: str) -> str:
    """Return a text as a name on the rows; empty if nothing is left of it or it is the base's."""
    bare = re.sub(r"[^a-z0-9._-]+", "-", raw.lower()).strip("-._")
    return bare if ALIAS.fullmatch(bare) and bare != BASE else ""


def own_tokenizer(model: LocalModel) -> tuple[str, Any]:
    """Return (its folder or hub id, the tokenizer); None for an adapter without a tokenizer."""
    from transformers import AutoTokenizer

    where = model.model if model.adapter is None else str(model.adapter)
    if model.adapter is not None and not (model.adapter / "tokenizer_config.json").is_file():
        return where, None
    try:
        return where, AutoTokenizer.from_pretrained(resolve(where), trust_remote_code=False)
    except Exception as error:  # on damaged files it raises any type
        what = f"{where}: its tokenizer cannot be loaded ({_message(error)})"
        raise LeewayError(what, fix="copy its base's tokenizer files there") from error


def is_adapter(name: object) -> bool:
    """Return whether a name is a folder with a PEFT adapter and no model."""
    if not isinstance(name, str):
        return False
    folder = expand(name)
    return (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's settings; raises LeewayError unless the folder has a LoRA in safetensors."""
    path = folder / adapters.CONFIG
    if not path.is_file():
        raise LeewayError(f"adapter {folder}: no {adapters.CONFIG} there", fix="give the folder that peft saved")
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        kind = config["peft_type"]
        if not isinstance(config.get("base_model_name_or_path") or "", str):
            raise ValueError("base_model_name_or_path is no name")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LeewayError(f"adapter {folder}: its {adapters.CONFIG} is damaged", fix="save it again") from error
    if kind != "LORA":
        raise LeewayError(f"adapter {folder}: {kind} adapters are not supported", fix="use LoRA, rsLoRA or DoRA")
    if str(init := config.get("init_lora_weights")).startswith(adapters.ALTERING):
        what = f"adapter {folder}: init_lora_weights: {init} has altered the base's own weights"
        raise LeewayError(what, fix="merge it where it was trained, and give the merged model with --base")
    refuse_pickled(f"adapter {folder}", folder)
    if not (folder / adapters.WEIGHTS).is_file():
        raise LeewayError(f"adapter {folder}: no {adapters.WEIGHTS} there", fix="give the folder that peft saved")
    return config


def apply_adapter(model: Model, folder: Path) -> None:
    """Load every tensor of a saved adapter onto `model`; raises LeewayError if one does not fit."""
    import peft
    from safetensors.torch import load_file

    config = adapter_config(folder)
    rows, table = len(model.chat.tokenizer), model.lm.get_input_embeddings().weight
    if rows > table.shape[0]:  # tokens that the fine-tune added
        model.lm.resize_token_embeddings(rows, mean_resizing=False)
    try:
        _refuse_absurd(config, folder, [name for name, _ in model.lm.named_modules()])
        with warnings.catch_warnings():  # tensors without a place are checked below
            warnings.simplefilter("ignore")
            model.lm = peft.PeftModel.from_pretrained(model.lm, str(folder)).eval()
        tensors = load_file(folder / adapters.WEIGHTS)
    except Exception as error:  # on damaged or hostile files peft and safetensors raise any type
        what = f"adapter {folder}: it does not fit {model.name} ({_message(error)[:300]})"
        raise LeewayError(what, fix="give the base it was trained on") from error
    adapters.require_finite(f"adapter {folder}", tensors.items())
    model.lm.requires_grad_(False)
    if fault := _mismatch(model, tensors):
        raise LeewayError(f"adapter {folder}: it does not fit {model.name} ({fault})", fix="give its own base")


def _refuse_absurd(config: dict[str, Any], folder: Path, modules: list[str]) -> None:
    """Raise ValueError for settings that would take peft hours or all memory before it reads a tensor.

    These are ranks above any size of a tensor in the file, patterns that backtrack without end on the model's own
    module names, and layers that are to be copied.
    """
    from safetensors import safe_open

    if config.get("layer_replication"):
        raise ValueError("layer_replication is not supported")
    with safe_open(folder / adapters.WEIGHTS, "pt") as file:
        sizes = [n for key in file.keys() for n in file.get_slice(key).get_shape()]  # noqa: SIM118 - not a mapping
    own = config.get("rank_pattern")
    ranks = [config.get("r"), *(own.values() if isinstance(own, dict) else [])]
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= max(sizes, default=0):
            raise ValueError(f"its rank {str(rank)[:40]} is not that of its tensors")
    keys = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
    listed = [value if isinstance(value := config.get(key), list | dict) else [value] for key in keys]
    with cpu_limit(MATCHING_S):
        for pattern in (p for patterns in listed for p in patterns if isinstance(p, str)):
            for module in modules:
                re.fullmatch(rf"(.*\.)?({pattern})", module)


def _mismatch(model: Model, tensors: dict[str, torch.Tensor]) -> str:
    """Return the first difference between the file's tensors and the model's, or an empty text."""
    loaded, full = adapters.state(model), model.lm.state_dict()
    if missing := loaded.keys() - tensors.keys():
        return f"{min(missing)} is missing"
    for name, tensor in sorted(tensors.items()):
        own = loaded.get(name, full.get(name))
        if own is None:
            return f"{name} has no place in it"
        if own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype)):
            return f"{name} was not read as it was saved"
    return ""


def refuse_pickled(what: str, folder: Path) -> None:
    """Raise LeewayError if a folder's weights are only in files that can run code."""
    pickled = sorted(f.name for kind in PICKLED for f in folder.glob(kind) if f.stem != "training_args")
    if pickled and not any(folder.glob("*.safetensors")):
        what = f"{what}: its weights are in {pickled[0]} only, and loading that kind of file can run code"
        raise LeewayError(what, fix="load it where you trust it and save it again: save_pretrained writes safetensors")


def _message(error: BaseException) -> str:
    """Return the first informative line of an error; torch begins with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
