"""Load a chat model and its tokenizer: safetensors only, no remote code, identity by content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from leeway.data.chat import Chat
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import expand
from leeway.model.token_stats import Head

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass
class Model:
    """A causal language model with its chat, its output head and what identifies it."""

    lm: Any
    chat: Chat
    head: Head
    name: str
    hash: str
    context: int
    stop_ids: tuple[int, ...]  # that the model's own generation settings name

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device  # type: ignore[no-any-return]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.lm.parameters())


def resolve(name: str) -> str:
    """`organism` to the folder that ships with the package; anything else stays."""
    if name != "organism":
        return str(expand(name)) if name.startswith("~") else name
    from leeway import organism

    return str(organism.path())


def load_chat(name: str, revision: str | None = None) -> Chat:
    """The tokenizer and its chat template alone."""
    from transformers import AutoTokenizer

    with _told(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), revision=revision, trust_remote_code=False)
    return Chat(tokenizer)


def load_context(name: str, revision: str | None = None) -> int:
    """How many tokens the model can hold, from its config."""
    from transformers import AutoConfig

    with _told(name):
        config = AutoConfig.from_pretrained(resolve(name), revision=revision, trust_remote_code=False)
    return _context(config)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    chat: Chat | None = None,
) -> Model:
    """The model in evaluation mode, its parameters frozen; under `chat` where it is given, else under its own."""
    from transformers import AutoModelForCausalLM

    quiet_loaders()
    chat = chat or load_chat(name, revision)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise LeewayError(f"device: {device} is not there", fix="use device: cpu, or auto")
    kind = resolve_dtype(dtype, where)
    with _told(name):
        lm = AutoModelForCausalLM.from_pretrained(
            resolve(name), revision=revision, dtype=kind, use_safetensors=True, trust_remote_code=False
        )
    lm.to(where).eval().requires_grad_(False)
    head = Head(lm.get_output_embeddings().weight, getattr(lm.config, "final_logit_softcapping", None))
    model = Model(lm, chat, head, name, model_hash(name, revision, lm), _context(lm.config), _bare(lm))
    _check_head(model)
    return model


def _bare(lm: Any) -> tuple[int, ...]:
    """Strip the generation settings that came with the model (a repetition penalty, say), but for its stop tokens."""
    from transformers import GenerationConfig

    eos = lm.generation_config.eos_token_id
    lm.generation_config = GenerationConfig()
    return tuple(eos if isinstance(eos, list) else [eos] if eos is not None else [])


def quiet_loaders() -> None:
    """The loaders' bars and notices would stand between our own lines."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU; the manifest records which."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def decoder(lm: Any) -> Any:
    """The part below the output head: its last hidden state, after the final norm, is what the head reads."""
    return getattr(lm, lm.base_model_prefix)


def model_hash(name: str, revision: str | None, lm: Any) -> str:
    """Identity by content: the weight files of a folder, the resolved commit of a hub id."""
    folder = Path(resolve(name))
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
        return digest("files", [[f.name, file_digest(f)] for f in files])
    return digest("hub", name, revision, getattr(getattr(lm, "config", None), "_commit_hash", None))


def _context(config: Any) -> int:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "max_position_embeddings", 0) or 2**31)


@torch.no_grad()
def _check_head(model: Model) -> None:
    """Hold our head to the model's own logits: an architecture with another output rule is refused, not wrong."""
    ids = torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "hello"}])], device=model.device)
    ours = model.head.logits(decoder(model.lm)(input_ids=ids).last_hidden_state[0])
    theirs = model.lm(input_ids=ids).logits[0].float()
    if getattr(model.lm.get_output_embeddings(), "bias", None) is not None:
        raise LeewayError(
            f"model {model.name}: its output layer has a bias",
            fix="Llama, Qwen and Gemma 2 architectures are supported",
        )
    slack = 1e-4 if theirs.dtype == torch.float32 and model.head.weight_VD.dtype == torch.float32 else 0.25
    if not torch.allclose(ours, theirs, atol=slack, rtol=slack):
        raise LeewayError(
            f"model {model.name}: its logits are not its output layer times its last hidden state "
            f"(they differ by {(ours - theirs).abs().max():.3g})",
            fix="Llama, Qwen and Gemma 2 architectures are supported",
        )


class _told:  # noqa: N801 - reads as a verb at its use
    """Turn the loaders' many exceptions into one line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        folder = Path(resolve(self.name))
        quiet_loaders()
        looks_local = self.name.startswith((".", "/", "~")) or folder.exists()
        if not looks_local and self.name.count("/") != 1:
            raise LeewayError(
                f"model {self.name}: no such folder, and no hub id",
                fix="give a model's folder, owner/name, or organism",
            )
        if looks_local and not (folder / "config.json").is_file():
            raise LeewayError(
                f"model {self.name}: no config.json there",
                fix="give a Hugging Face model directory or a hub id",
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if isinstance(error, (OSError, ValueError, ImportError, KeyError, SafetensorError)) and not isinstance(
            error, LeewayError
        ):
            raise LeewayError(
                f"model {self.name}: cannot be loaded ({first_line(error)})",
                fix="check the name, the files (safetensors, tokenizer, config) and the network",
            ) from error
