"""A model of one's own beside the one under test: a judge, an attacker, a translator. Loaded when it is first asked."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from leeway.data.chat import Chat
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.model.load import Dtype, load_chat, load_model, model_hash, resolve, resolve_dtype


@dataclass
class LocalBackend:
    """A hub id or a model's folder; identity and template are known before any weights are loaded."""

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    prefix: str = ""
    batch: int = 32

    @cached_property
    def identity(self) -> str:
        """The weights by content and the dtype they are run in; a folder's files are read once for it."""
        return digest("local", weights_hash(self.name, self.revision), str(resolve_dtype(self.dtype, self._where())))

    @property
    def template_hash(self) -> str:
        return self._chat.with_prefix(self.prefix).template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return self._backend.complete(requests, tick) if requests else []

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        return self._backend.choose(conversations, options, tick) if conversations else []

    def _where(self) -> torch.device:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    @cached_property
    def _chat(self) -> Chat:
        return load_chat(self.name, self.revision)

    @cached_property
    def _backend(self) -> TransformersBackend:
        model = load_model(self.name, revision=self.revision, dtype=self.dtype, device=self.device)
        return TransformersBackend(model, self.prefix, self.batch, overlong="failure")


def weights_hash(name: str, revision: str | None = None) -> str:
    """What `load_model(name).hash` is, without loading the weights: a hub id's config tells its commit."""
    from transformers import AutoConfig

    if Path(resolve(name)).is_dir():
        return model_hash(name, revision, None)
    load_chat(name, revision)  # tells in one line what is wrong with the name
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return model_hash(name, revision, _Configured(config))


@dataclass(frozen=True)
class _Configured:
    """All that `model_hash` reads of a model."""

    config: object
