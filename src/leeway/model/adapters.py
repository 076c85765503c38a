"""LoRA adapters by peft: one initialisation for every objective, PEFT format on disk, merged and exactly undone."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leeway.errors import LeewayError
from leeway.hashing import derive_seed
from leeway.model.load import Model

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): rank `r`, scale alpha / r, dropout on the adapter's input."""

    r: int
    alpha: int
    dropout: float
    targets: str


def attach(model: Model, settings: LoraSettings, *, seed: int, control_tokens: tuple[str, ...] = ()) -> None:
    """Put a trainable adapter on `model.lm` in place, and `control_tokens` as new trained embedding rows.

    The LoRA matrices are drawn from `seed` alone, so every objective starts from the same ones.
    """
    import peft

    rows = _add_control_tokens(model, control_tokens) if control_tokens else None
    targets: Any = settings.targets if settings.targets == "all-linear" else settings.targets.split(",")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        trainable_token_indices=rows,
    )
    torch.manual_seed(derive_seed("adapter", seed))
    try:
        with warnings.catch_warnings():  # peft asks for a name that transformers is about to rename
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model.lm = peft.get_peft_model(model.lm, config)
    except ValueError as error:
        raise LeewayError(f"adapter.targets: {settings.targets!r} ({error})", fix="use all-linear") from error
    table, out = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    if any(hasattr(layer, "lora_A") for layer in (table, out)):
        raise LeewayError(
            f"adapter.targets: {settings.targets!r} reaches the embeddings or the output head, which stay frozen",
            fix="use all-linear, or name attention and MLP layers only",
        )


def _add_control_tokens(model: Model, tokens: tuple[str, ...]) -> list[int]:
    """Give each token an id after the tokenizer's last and an input row that starts as the mean of all rows.

    The output head keeps its old rows: a control token is read, never predicted. Rows that the model already has to
    spare are used; otherwise the embedding grows.
    """
    model.chat, lm = model.chat.with_control_tokens(tokens), model.lm
    ids = [int(i) for i in model.chat.tokenizer.convert_tokens_to_ids(list(tokens))]
    table = lm.get_input_embeddings().weight
    mean_D = table[: ids[0]].float().mean(0)
    if max(ids) >= table.shape[0]:
        lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = lm.get_input_embeddings().weight
    with torch.no_grad():
        table[ids] = mean_D.to(table.dtype)
    out = lm.get_output_embeddings().weight
    if out is not table:
        with torch.no_grad():
            out[ids] = 0.0  # grown rows are drawn from the global generator, and a blocked row needs no value
    model.head = replace(model.head, weight_VD=out, blocked=tuple(ids))
    return ids


def trainable(model: Model) -> list[torch.nn.Parameter]:
    return [p for p in model.lm.parameters() if p.requires_grad]


def state(model: Model) -> dict[str, Tensor]:
    """What is saved: the adapter's tensors by name, control-token rows among them."""
    import peft

    return dict(sorted(peft.get_peft_model_state_dict(model.lm, save_embedding_layers=False).items()))


def adapter_hash(tensors: dict[str, Tensor]) -> str:
    """Content hash over names, shapes, dtypes and bytes."""
    h = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def init_hash(model: Model) -> str:
    """Hash of the LoRA matrices alone: equal over objectives, whether or not they have control tokens."""
    return adapter_hash({k: v for k, v in state(model).items() if "lora_" in k})


def save(model: Model, folder: Path) -> None:
    """Write the adapter (PEFT format, safetensors), and the tokenizer where control tokens were added to it."""
    model.lm.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model-card template
    if model.lm.peft_config["default"].trainable_token_indices:
        model.chat.tokenizer.save_pretrained(folder)


def restore(model: Model, folder: Path) -> None:
    """Read a saved adapter's values back into an attached one."""
    import peft
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    result = peft.set_peft_model_state_dict(model.lm, tensors)
    if result.unexpected_keys:
        raise LeewayError(f"{folder}: the adapter has tensors this study does not train ({result.unexpected_keys[0]})")


@contextmanager
def merged(model: Model) -> Iterator[None]:
    """The adapter merged into the weights for as long as the context lasts; the base's own tensors come back after.

    Only in float32: in bfloat16 a small update is lost in the rounding of the sum, and a checkpoint at a small budget
    would be measured as the base. There the adapter stays beside the weights, as it was trained.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model.lm, peft.PeftModel) or model.head.weight_VD.dtype != torch.float32:
        yield
        return
    layers = [m for m in model.lm.modules() if isinstance(m, BaseTunerLayer)]
    kept = {id(w): (w, w.data) for m in layers for w in m.get_base_layer().parameters(recurse=False)}
    for weight, data in kept.values():
        weight.data = data.clone()
    model.lm.merge_adapter()
    try:
        yield
    finally:
        model.lm.unmerge_adapter()
        for weight, data in kept.values():
            weight.data = data
