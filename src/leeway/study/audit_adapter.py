"""A PEFT adapter that was trained elsewhere: read with care, and put on its base whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.load import Model
from leeway.paths import expand

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
