"""What an audit compares: two models that answer, each a folder, a hub id, an adapter, an endpoint or a backend.

A PEFT adapter that was trained elsewhere: read with care, and put on its base whole or not at all.
"""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.backend import Backend
from leeway.generation.openai_api import OpenAIBackend
from leeway.generation.openai_client import ApiSettings
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest, file_digest
from leeway.io import expand
from leeway.model import adapters
from leeway.model.load import Model, load_model, model_hash, resolve
from leeway.study.jobs import BASE
from leeway.study.spec import ALIAS, Spec

PICKLED = ("*.bin", "*.pt", "*.pth")


def is_adapter(name: object) -> bool:
    """Whether this is the folder of a PEFT adapter and of no model."""
    if not isinstance(name, str):
        return False
    folder = expand(name)
    return (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, once its folder is seen to hold a LoRA in safetensors; raises LeewayError."""
    path = folder / adapters.CONFIG
    if not path.is_file():
        raise LeewayError(f"adapter {folder}: no {adapters.CONFIG} there", fix="give the folder that peft saved")
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise LeewayError(f"adapter {folder}: its {adapters.CONFIG} is damaged", fix="save it again") from error
    if kind != "LORA":
        raise LeewayError(f"adapter {folder}: it is a {kind} adapter", fix="LoRA, rsLoRA and DoRA are read")
    if str(drawn := config.get("init_lora_weights")).startswith(adapters.ALTERING):
        raise LeewayError(
            f"adapter {folder}: init_lora_weights: {drawn} has altered the base's own weights",
            fix="merge it where it was trained, and give the merged model with --base",
        )
    check_safe(f"adapter {folder}", folder)
    if not (folder / adapters.WEIGHTS).is_file():
        raise LeewayError(f"adapter {folder}: no {adapters.WEIGHTS} there", fix="give the folder that peft saved")
    return config


def put_on(model: Model, folder: Path) -> None:
    """Put a saved adapter on `model`, every tensor of it; raises LeewayError where one does not fit."""
    import peft
    from safetensors.torch import load_file

    adapter_config(folder)
    rows, table = len(model.chat.tokenizer), model.lm.get_input_embeddings().weight
    if rows > table.shape[0]:  # tokens that the fine-tune added
        model.lm.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():  # what it warns of (tensors without a place) is checked below
            warnings.simplefilter("ignore")
            model.lm = peft.PeftModel.from_pretrained(model.lm, str(folder)).eval()
        tensors = load_file(folder / adapters.WEIGHTS)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise LeewayError(
            f"adapter {folder}: it does not fit {model.name} ({said_in(error)})",
            fix="give the base it was trained on",
        ) from error
    model.lm.requires_grad_(False)
    if fault := _misfit(model, tensors):
        raise LeewayError(f"adapter {folder}: it does not fit {model.name} ({fault})", fix="give its own base")


def _misfit(model: Model, tensors: dict[str, torch.Tensor]) -> str:
    """A tensor that is in the file and not in the model, or the other way round; or nothing."""
    placed = adapters.state(model)
    everywhere = model.lm.state_dict()
    for name in sorted(placed.keys() - tensors.keys()):
        return f"{name} is missing"
    for name, tensor in sorted(tensors.items()):
        found = placed.get(name, everywhere.get(name))
        if found is None:
            return f"{name} has no place in it"
        if found.shape != tensor.shape or not torch.equal(found.cpu(), tensor.to(found.dtype)):
            return f"{name} was not read as it was saved"
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        return "it holds values that are not finite"
    return ""


def check_safe(who: str, folder: Path) -> None:
    pickled = sorted(f.name for kind in PICKLED for f in folder.glob(kind) if f.stem != "training_args")
    if pickled and not any(folder.glob("*.safetensors")):
        raise LeewayError(
            f"{who}: its weights are in {pickled[0]} only, and reading that kind of file can run code",
            fix="load it where you trust it and save it again: save_pretrained writes safetensors",
        )


def said_in(error: BaseException) -> str:
    """The first line that says something; torch begins with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__


class AuditedModel(Protocol):
    """One of the two models of an audit."""

    @property
    def told(self) -> str:
        """Its name for a reader."""
        ...

    @property
    def identity(self) -> str:
        """A hash over what answers, without loading it: files, adapter and hub commit, or address and name."""
        ...

    def answering(self, chat: Chat | None, spec: Spec) -> AbstractContextManager[Backend]:
        """It, ready to answer under `chat` (its own where none is given) for as long as the context lasts."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A model of a folder or a hub id, with a PEFT adapter on it or without."""

    model: str
    adapter: Path | None = None

    @property
    def told(self) -> str:
        return f"{self.model} with the adapter {self.adapter}" if self.adapter else self.model

    @cached_property
    def model_hash(self) -> str:
        """As the model's own hash is once it is loaded."""
        if Path(resolve(self.model)).is_dir():
            check_safe(f"model {self.model}", Path(resolve(self.model)))
            return model_hash(self.model, None, None)
        return model_hash(self.model, None, SimpleNamespace(config=_config(self.model)))

    @cached_property
    def identity(self) -> str:
        if self.adapter is None:
            return self.model_hash
        adapter_config(self.adapter)
        return digest("adapter", self.model_hash, [file_digest(self.adapter / f) for f in _files(self.adapter)])

    @contextmanager
    def answering(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:
        model = load_model(self.model, dtype=spec.weights, device=spec.device, chat=chat)
        if self.adapter is not None:
            put_on(model, self.adapter)
            model.hash = self.identity
        try:
            with adapters.merged(model):
                yield TransformersBackend(model, "", spec.evals.batch, "failure")
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible server; `key_env` names the environment variable that holds the key."""

    url: str
    model: str
    key_env: str | None = None

    @property
    def told(self) -> str:
        return f"{self.model} at {self.url}"

    @property
    def identity(self) -> str:
        return digest("endpoint", self.url, self.model)

    @contextmanager
    def answering(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:  # noqa: ARG002 - the server renders
        yield endpoint(self.url, self.model, self.key_env)


@dataclass(frozen=True)
class GivenBackend:
    """Any backend, from Python."""

    backend: Backend

    @property
    def told(self) -> str:
        return f"{type(self.backend).__name__} {self.backend.identity}"

    @property
    def identity(self) -> str:
        return digest("backend", self.backend.identity, self.backend.template_hash)

    @contextmanager
    def answering(self, chat: Chat | None, spec: Spec) -> Iterator[Backend]:  # noqa: ARG002 - it has its own
        yield self.backend


def subjects(
    model: str | Backend | None,
    base: str | Backend | None,
    adapter: str | Path | None = None,
    *,
    other_base: bool = False,
) -> tuple[AuditedModel, AuditedModel, tuple[str, ...]]:
    """(base, audited, notes) from what a caller names; raises LeewayError where that is not two models."""
    if adapter is None and isinstance(model, str) and is_adapter(model):
        model, adapter = None, model
    if adapter is None:
        if model is None or base is None:
            raise LeewayError(
                "an audit compares two models, and one is named", fix="give a model with --base, or --adapter"
            )
        return _subject(base), _subject(model), ()
    if model is not None and base is not None:
        raise LeewayError("a model, --base and --adapter are three things", fix="give --adapter and its base alone")
    given = model if model is not None else base
    if given is not None and not isinstance(given, str):
        raise LeewayError("an adapter goes on a model's folder or hub id", fix="give that as its base")
    folder = expand(adapter)
    found, note = base_of(folder, given, other_base=other_base)
    return LocalModel(found), LocalModel(found, folder), (note,) if note else ()


def served(
    model: str | None, base: str | None, endpoint: str | None, base_endpoint: str | None, key_env: str | None
) -> tuple[AuditedModel, AuditedModel, tuple[str, ...]]:
    """The same where an OpenAI-compatible server answers for one of them or both.

    `endpoint` serves the model, and the base too unless that is a folder here or has a `base_endpoint`.
    """
    if model is None or base is None:
        raise LeewayError("an audit compares two models, and one is named", fix="give a model and --base")
    at = base_endpoint or (endpoint if not Path(resolve(base)).is_dir() else None)
    return (
        ServedModel(at, base, key_env) if at else LocalModel(base),
        ServedModel(endpoint, model, key_env) if endpoint else LocalModel(model),
        (),
    )


def name_of(subject: AuditedModel) -> str:
    """The last part of a path or hub id, as a name on the rows."""
    if isinstance(subject, LocalModel):
        raw = str(subject.adapter or subject.model).rstrip("/").rsplit("/", 1)[-1]
    else:
        raw = subject.model.rsplit("/", 1)[-1] if isinstance(subject, ServedModel) else "audited"
    return as_alias(raw) or "audited"


def as_alias(raw: str) -> str:
    """A text as a name on the rows; nothing where none is left of it, or it is the base's."""
    bare = re.sub(r"[^a-z0-9._-]+", "-", raw.lower()).strip("-._")
    return bare if ALIAS.fullmatch(bare) and bare != BASE else ""


def _subject(named: str | Backend) -> AuditedModel:
    return LocalModel(named) if isinstance(named, str) else GivenBackend(named)


def endpoint(url: str, model: str, key_env: str | None) -> Backend:
    """A backend that asks an OpenAI-compatible server; without `key_env` it needs no key."""
    return OpenAIBackend(ApiSettings(model=model, base_url=url, key_env=key_env or ""))


def base_of(folder: Path, given: str | None, *, other_base: bool) -> tuple[str, str]:
    """(the model that an adapter goes on, what a reader has to be told about it).

    Raises LeewayError where the adapter's config names another one than is given: by content where both are folders,
    by name where both are hub ids.
    """
    named = adapter_config(folder).get("base_model_name_or_path") or ""
    if given is None:
        if not named:
            raise LeewayError(f"adapter {folder}: its config names no base model", fix="give --base")
        return str(named), ""
    if not named or named == given or resolve(named) == resolve(given):
        return given, ""
    here, there = Path(resolve(given)).is_dir(), Path(resolve(named)).is_dir()
    if here and there and LocalModel(given).model_hash == LocalModel(named).model_hash:
        return given, ""
    if here == there and not other_base:
        raise LeewayError(
            f"adapter {folder}: it was trained on {named}, not on {given}",
            fix=f"give --base {named}, or --other-base to measure it on {given} all the same",
        )
    return given, f"The adapter names {named} as its base; it was measured on {given}."


def own_tokenizer(subject: LocalModel) -> tuple[str, Any]:
    """(the folder or hub id that it is in, the tokenizer); none where an adapter brings none."""
    from transformers import AutoTokenizer

    where = subject.model if subject.adapter is None else str(subject.adapter)
    if subject.adapter is not None and not (subject.adapter / "tokenizer_config.json").is_file():
        return where, None
    try:
        return where, AutoTokenizer.from_pretrained(resolve(where), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LeewayError(
            f"{where}: its tokenizer cannot be loaded ({said_in(error)})",
            fix="copy its base's tokenizer files there",
        ) from error


def _files(folder: Path) -> list[str]:
    """What makes an adapter: its weights, its settings, and a tokenizer where it brings one."""
    wanted = (adapters.CONFIG, adapters.WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [name for name in wanted if (folder / name).is_file()]


def _config(name: str) -> Any:
    """A hub model's config, for the commit it was resolved to."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LeewayError(
            f"model {name}: neither a folder nor to be had from the hub ({said_in(error)})",
            fix="check the name and the network",
        ) from error
