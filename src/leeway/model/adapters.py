"""Trainable parameters: a low-rank adapter by peft, or every weight; one initialisation shared by every objective."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from leeway.errors import LeewayError
from leeway.hashing import derive_seed
from leeway.io import write_json
from leeway.model.load import Model, bits

Kind = Literal["lora", "rslora", "dora", "full"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FUNCTION = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias")

ALTERING = ("pissa", "olora", "corda", "loftq")  # LoRA initialisations that modify the base weights


@dataclass(frozen=True)
class AdapterSettings:
    """Kind of trainable parameters and their hyperparameters.

    `lora`: updates of rank `r` scaled by alpha / r, with dropout on their input (Hu et al. 2021, arXiv 2106.09685).
    `rslora`: scaled by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732). `dora`: LoRA on each weight's direction
    plus a trained magnitude per output (Liu et al. 2024, arXiv 2402.09353). `full`: every parameter; rank, alpha,
    dropout and targets do not apply.
    """

    r: int
    alpha: int
    dropout: float
    targets: str
    kind: Kind = "lora"


def attach(model: Model, settings: AdapterSettings, *, seed: int, control_tokens: tuple[str, ...] = ()) -> None:
    """Make `model.lm` trainable in place, with `control_tokens` as new trained embedding rows.

    Low-rank matrices are initialised from `seed` alone, so every objective starts from the same ones. Whole weights are
    trained in float32 only.
    """
    rows = _add_control_tokens(model, control_tokens) if control_tokens else None
    if settings.kind != "full":
        _attach_low_rank(model, settings, seed, rows)
    elif any(p.dtype.itemsize < torch.float32.itemsize for p in model.lm.parameters()):
        what = "adapter.kind: full needs float32 weights (bfloat16 rounds small updates away)"
        raise LeewayError(what, fix="set dtype: float32, or kind: lora")
    else:
        model.lm.requires_grad_(True)
    model.lm.eval()  # new layers start in training mode


def _attach_low_rank(model: Model, settings: AdapterSettings, seed: int, rows: list[int] | None) -> None:
    import peft

    targets: Any = settings.targets if settings.targets == "all-linear" else settings.targets.split(",")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        trainable_token_indices=rows,
        use_rslora=settings.kind == "rslora",
        use_dora=settings.kind == "dora",
    )
    torch.manual_seed(derive_seed("adapter", seed))
    try:
        with warnings.catch_warnings():  # peft uses a name that transformers deprecates
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model.lm = peft.get_peft_model(model.lm, config)
    except ValueError as error:
        raise LeewayError(f"adapter.targets: {settings.targets!r} ({error})", fix="use all-linear") from error
    _true_magnitudes(model)
    if any(hasattr(m, "lora_A") for m in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())):
        what = f"adapter.targets: {settings.targets!r} includes the embeddings or the output head, which stay frozen"
        raise LeewayError(what, fix="use all-linear, or name attention and MLP layers only")


@torch.no_grad()
def _true_magnitudes(model: Model) -> None:
    """Set DoRA's magnitudes to the row norms of the weights, in float32.

    peft computes them in the weights' dtype: in bfloat16 they are off by up to 0.4%, so a fresh adapter would differ
    from the base.
    """
    for layer in model.lm.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight
            magnitude.weight.copy_(torch.linalg.norm(weight.to(magnitude.weight.dtype), dim=1))


@torch.no_grad()
def _add_control_tokens(model: Model, tokens: tuple[str, ...]) -> list[int]:
    """Give each token a new id and an input row, the mean of the rows of the word in its name; return the ids.

    `<UNSAFE>` starts from "unsafe". Equal rows would be a symmetric start, on which CFT learns no condition.
    The output head is unchanged: a control token is read, never predicted. Spare embedding rows are used first;
    otherwise the embedding grows.
    """
    words = [model.chat.ids(" " + token.strip("<|>").lower()) for token in tokens]
    model.chat, lm = model.chat.with_control_tokens(tokens), model.lm
    ids = [int(i) for i in model.chat.tokenizer.convert_tokens_to_ids(list(tokens))]
    table, out = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    rows_ND = torch.stack([table[list(word)].float().mean(0) for word in words])
    if max(ids) >= table.shape[0]:
        lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table, out = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    else:
        for own in {table, out}:  # write into a copy, so the shared base model keeps its rows
            own.data = own.data.clone()
    table[ids] = rows_ND.to(table.dtype)
    if out is not table:
        out[ids] = 0.0  # new rows come from the global RNG; blocked rows need no value
    model.head = replace(model.head, weight_VD=out, blocked=tuple(ids))
    return ids


def trainable(model: Model) -> list[torch.nn.Parameter]:
    return [p for p in model.lm.parameters() if p.requires_grad]


def unwrapped(lm: Any) -> Any:
    """Return the model under a peft adapter; a model without one unchanged."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def parameter_groups(model: Model, lr: float, token_lr: float) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups. `lr_scale` multiplies the scheduled rate: `token_lr` for new rows."""
    rows = [p for n, p in model.lm.named_parameters() if p.requires_grad and "trainable_tokens_delta" in n]
    others = [p for p in trainable(model) if not any(p is row for row in rows)]
    scales = [(others, 1.0), (rows, token_lr)] if rows else [(others, 1.0)]
    return [{"params": params, "lr": lr * scale, "lr_scale": scale} for params, scale in scales]


def is_low_rank(model: Model) -> bool:
    """Return whether an adapter is trained, rather than the weights."""
    return hasattr(model.lm, "peft_config")


def state(model: Model) -> dict[str, Tensor]:
    """Return the saved tensors by name: adapter and control-token rows, or every weight (a tied one once)."""
    if not is_low_rank(model):
        return dict(sorted((name, p.detach()) for name, p in model.lm.named_parameters()))
    import peft

    return dict(sorted(peft.get_peft_model_state_dict(model.lm, save_embedding_layers=False).items()))


def adapter_hash(tensors: dict[str, Tensor]) -> str:
    """Return the content hash over names, shapes, dtypes and bytes."""
    h = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def init_hash(model: Model) -> str:
    """Return the hash of the initial trainable state shared by every objective.

    For an adapter: its low-rank matrices and magnitudes. For whole weights: all but the embedding rows after the
    tokenizer's last id, which control tokens use.
    """
    if is_low_rank(model):
        return adapter_hash({k: v for k, v in state(model).items() if "lora_" in k})
    lm, own = model.lm, len(model.chat.tokenizer) - len(model.head.blocked)
    tables = {id(layer.weight) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return adapter_hash({name: p[:own] if id(p) in tables else p for name, p in lm.named_parameters()})


def save(model: Model, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write an adapter in PEFT format, or whole weights as a transformers model, both as safetensors.

    The tokenizer is saved if it has control tokens or the weights are whole. `tensors`: the state of a sharded model.
    """
    if not is_low_rank(model):
        from transformers import GenerationConfig

        model.lm.save_pretrained(folder, state_dict=tensors)
        GenerationConfig(eos_token_id=list(model.stop_ids) or None).save_pretrained(folder)
        model.chat.tokenizer.save_pretrained(folder)
        return
    model.lm.save_pretrained(folder, state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model-card template
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    if isinstance(config.get("target_modules"), list):  # peft writes a set, whose order differs between processes
        write_json(folder / CONFIG, config | {"target_modules": sorted(config["target_modules"])})
    if model.lm.peft_config["default"].trainable_token_indices:
        model.chat.tokenizer.save_pretrained(folder)


def saved(folder: Path) -> dict[str, Tensor]:
    """Load the tensors of a saved adapter or model by name. Raises OSError if there are none."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"neither {WEIGHTS} nor model.safetensors found")
    return {name: tensor for f in files for name, tensor in load_file(f).items()}


def restore(model: Model, folder: Path) -> None:
    """Load saved values into the trainable parameters. Raises LeewayError on another kind or shape."""
    tensors = saved(folder)
    if fault := _misfit(model, folder, tensors):
        fix = "use the model, adapter (kind, r, alpha, targets) and control tokens it was trained with"
        raise LeewayError(f"{folder}: the saved state does not match this study ({fault})", fix=fix)
    require_finite(str(folder), tensors.items())
    if is_low_rank(model):
        import peft

        peft.set_peft_model_state_dict(model.lm, tensors)
        return
    with torch.no_grad():
        for name, p in model.lm.named_parameters():
            p.copy_(tensors[name])


def require_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise LeewayError, naming the tensor, if a weight is NaN or infinite: every answer would be meaningless."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LeewayError(f"{what}: {name} holds NaN or infinity", fix="train it, or fetch it, again")


def _misfit(model: Model, folder: Path, tensors: dict[str, Tensor]) -> str:
    """Return how the saved tensors differ from the model in kind, configuration, names or shapes; empty if they fit."""
    ours = state(model)
    if is_low_rank(model) != (folder / CONFIG).is_file():
        return "one is an adapter, the other whole weights"
    if is_low_rank(model) and (fault := _config_misfit(model, folder)):
        return fault
    for name in sorted(ours.keys() ^ tensors.keys()):
        return f"tensor {name} is only {'here' if name in ours else 'there'}"
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != ours[name].shape:
            return f"tensor {name} is {list(tensor.shape)} there and {list(ours[name].shape)} here"
    return ""


def _config_misfit(model: Model, folder: Path) -> str:
    """Return the configuration difference that changes what the tensors compute; empty if none."""
    ours = model.lm.peft_config["default"].to_dict()
    try:
        theirs = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict):
        return f"its {CONFIG} is damaged"
    for key in FUNCTION:
        if (theirs.get(key) or None) != (ours[key] or None):
            return f"{key} is {theirs.get(key)} in the checkpoint, {ours[key]} in this study"
    if str(drawn := theirs.get("init_lora_weights")).startswith(ALTERING):
        return f"init_lora_weights: {drawn} has altered the base's own weights"
    return ""


@torch.no_grad()
def relative_change(model: Model, originals: Mapping[str, Tensor]) -> float:
    """Return ||W' - W|| / ||W||, Frobenius norms over all trained matrices, W' with a low-rank adapter merged.

    `originals` holds the base's tensors by name, for whole weights; rows that control tokens added do not count.
    """
    moved = total = 0.0
    for weight, change in _changes(model, originals):
        moved, total = moved + float(change.norm()) ** 2, total + float(weight.norm()) ** 2
    return math.sqrt(moved / total)


def _changes(model: Model, originals: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (base matrix, its change), in float32."""
    if not is_low_rank(model):
        for name, p in model.lm.named_parameters():
            if p.dim() == 2:
                weight = originals[name].to(p.device)
                yield weight, p[: len(weight)] - weight
        return
    for layer in model.lm.modules():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        weight = layer.get_base_layer().weight.float()
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        change = layer.scaling["default"] * (b @ a)
        if magnitudes := getattr(layer, "lora_magnitude_vector", {}):
            turned = weight + change
            length = magnitudes["default"].weight.float() / torch.linalg.norm(turned, dim=1)
            change = length[:, None] * turned - weight
        yield weight, change


@contextmanager
def merged(model: Model) -> Iterator[None]:
    """Merge the adapter into the weights within the context, and restore the base's tensors after it.

    The restored tensors are verified bit for bit (`load.bits`). Only in float32: in bfloat16 a small update is lost to
    rounding, so there the adapter stays separate, as it was trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not is_low_rank(model) or model.head.weight_VD.dtype != torch.float32:
        yield
        return
    layers = [m for m in model.lm.modules() if isinstance(m, BaseTunerLayer)]
    originals = {w: w.data for m in layers for w in m.get_base_layer().parameters(recurse=False)}
    before = bits(originals.values())
    for weight, data in originals.items():
        weight.data = data.clone()
    model.lm.merge_adapter()
    try:
        yield
    finally:
        model.lm.unmerge_adapter()
        for weight, data in originals.items():
            weight.data = data
    if bits(originals) != before:
        what = f"model {model.name}: its weights changed while an adapter was merged"
        raise LeewayError(what, fix="run the same command again: the model is reloaded, finished work is kept")
