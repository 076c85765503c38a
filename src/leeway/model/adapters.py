"""What trains of a model: a low-rank adapter by peft, or every parameter.

Each kind has one initialisation for every objective, a format on disk that the field's libraries load (PEFT's for an
adapter, transformers' for whole weights), and a merge that is exactly undone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from leeway.errors import LeewayError
from leeway.hashing import derive_seed
from leeway.model.base_model import bits
from leeway.model.load import Model

Kind = Literal["lora", "rslora", "dora", "full"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FUNCTION = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias")

ALTERING = ("pissa", "olora", "corda", "loftq")  # ways to draw LoRA's matrices that take them out of the base


@dataclass(frozen=True)
class AdapterSettings:
    """What trains, and how.

    `lora`: updates of rank `r` scaled by alpha / r, with dropout on their input (Hu et al. 2021, arXiv 2106.09685).
    `rslora`: the same scaled by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732). `dora`: LoRA for each weight's
    direction, beside a trained magnitude for each output (Liu et al. 2024, arXiv 2402.09353). `full`: every parameter;
    rank, alpha, dropout and targets mean nothing there.
    """

    r: int
    alpha: int
    dropout: float
    targets: str
    kind: Kind = "lora"


LoraSettings = AdapterSettings


def attach(model: Model, settings: AdapterSettings, *, seed: int, control_tokens: tuple[str, ...] = ()) -> None:
    """Let `model.lm` be trained in place, with `control_tokens` as new trained embedding rows.

    Low-rank matrices are drawn from `seed` alone, so every objective starts from the same ones. Whole weights start as
    the model's own, and are not trained in less than float32.
    """
    rows = _add_control_tokens(model, control_tokens) if control_tokens else None
    if settings.kind == "full":
        _train_all(model)
    else:
        _attach_low_rank(model, settings, seed, rows)
    model.lm.eval()  # new layers begin in training mode: their dropout is for the loop alone


def _train_all(model: Model) -> None:
    if any(p.dtype.itemsize < torch.float32.itemsize for p in model.lm.parameters()):
        raise LeewayError(
            "adapter.kind: full trains float32 weights: in bfloat16 a small update is lost in the rounding of the sum",
            fix="set dtype: float32, or kind: lora",
        )
    model.lm.requires_grad_(True)


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
        with warnings.catch_warnings():  # peft asks for a name that transformers is about to rename
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model.lm = peft.get_peft_model(model.lm, config)
    except ValueError as error:
        raise LeewayError(f"adapter.targets: {settings.targets!r} ({error})", fix="use all-linear") from error
    _true_magnitudes(model)
    table, out = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    if any(hasattr(layer, "lora_A") for layer in (table, out)):
        raise LeewayError(
            f"adapter.targets: {settings.targets!r} reaches the embeddings or the output head, which stay frozen",
            fix="use all-linear, or name attention and MLP layers only",
        )


@torch.no_grad()
def _true_magnitudes(model: Model) -> None:
    """Set DoRA's magnitudes to the norms of the weights' rows, in the magnitudes' own float32.

    peft takes them in the weights' dtype: in bfloat16 they are off by up to 0.4%, and a fresh adapter is not the base.
    """
    for layer in model.lm.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = layer.get_base_layer().weight
            magnitude.weight.copy_(torch.linalg.norm(weight.to(magnitude.weight.dtype), dim=1))


def _add_control_tokens(model: Model, tokens: tuple[str, ...]) -> list[int]:
    """Give each token an id after the tokenizer's last and an input row that starts as the mean of all rows.

    The output head keeps its old rows: a control token is read, never predicted. Rows that the model already has to
    spare are used; otherwise the embedding grows.
    """
    model.chat, lm = model.chat.with_control_tokens(tokens), model.lm
    ids = [int(i) for i in model.chat.tokenizer.convert_tokens_to_ids(list(tokens))]
    table, out = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    mean_D = table[: ids[0]].float().mean(0)
    if max(ids) >= table.shape[0]:
        lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table, out = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    else:
        for own in {table, out}:  # rows are written into a copy: the next who borrows the model has its own again
            own.data = own.data.clone()
    with torch.no_grad():
        table[ids] = mean_D.to(table.dtype)
    if out is not table:
        with torch.no_grad():
            out[ids] = 0.0  # grown rows are drawn from the global generator, and a blocked row needs no value
    model.head = replace(model.head, weight_VD=out, blocked=tuple(ids))
    return ids


def trainable(model: Model) -> list[torch.nn.Parameter]:
    return [p for p in model.lm.parameters() if p.requires_grad]


def is_low_rank(model: Model) -> bool:
    """Whether what trains is an adapter beside the weights, and not the weights."""
    return hasattr(model.lm, "peft_config")


def state(model: Model) -> dict[str, Tensor]:
    """What is saved, by name: an adapter's tensors with its control-token rows, or every weight (a tied one once)."""
    if not is_low_rank(model):
        return dict(sorted((name, p.detach()) for name, p in model.lm.named_parameters()))
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
    """Hash of what every objective starts from, whether or not it has control tokens.

    Of an adapter, the low-rank matrices (and magnitudes); of whole weights, all but the embedding rows after the
    tokenizer's own last id, where control tokens go.
    """
    if is_low_rank(model):
        return adapter_hash({k: v for k, v in state(model).items() if "lora_" in k})
    lm, own = model.lm, len(model.chat.tokenizer) - len(model.head.blocked)
    tables = {id(layer.weight) for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    return adapter_hash({name: p[:own] if id(p) in tables else p for name, p in lm.named_parameters()})


def save(model: Model, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write an adapter in PEFT format, or whole weights as a transformers model; safetensors both.

    The tokenizer goes with whole weights, and with an adapter where control tokens were added to it. `tensors` are what
    trains by the names of the model's state, where the model itself holds them in shards.
    """
    if not is_low_rank(model):
        from transformers import GenerationConfig

        model.lm.save_pretrained(folder, state_dict=tensors)
        GenerationConfig(eos_token_id=list(model.stop_ids) or None).save_pretrained(folder)
        model.chat.tokenizer.save_pretrained(folder)
        return
    model.lm.save_pretrained(folder, state_dict=tensors, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model-card template
    if model.lm.peft_config["default"].trainable_token_indices:
        model.chat.tokenizer.save_pretrained(folder)


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter or of a saved model, by name. Raises OSError where there are none."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"neither {WEIGHTS} nor model.safetensors is there")
    return {name: tensor for f in files for name, tensor in load_file(f).items()}


def restore(model: Model, folder: Path) -> None:
    """Read saved values back into what trains. Raises LeewayError where they are those of another kind or shape."""
    tensors = saved(folder)
    if fault := _misfit(model, folder, tensors):
        raise LeewayError(
            f"{folder}: what is saved there does not fit what this study trains ({fault})",
            fix="use the same model, adapter (kind, r, alpha, targets) and control tokens as it was trained with",
        )
    if is_low_rank(model):
        import peft

        peft.set_peft_model_state_dict(model.lm, tensors)
        return
    with torch.no_grad():
        for name, p in model.lm.named_parameters():
            p.copy_(tensors[name])


def _misfit(model: Model, folder: Path, tensors: dict[str, Tensor]) -> str:
    """What does not fit, or nothing: whole weights or an adapter, how the adapter is applied, names and shapes."""
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
    """What makes the same tensors another function, or nothing."""
    ours = model.lm.peft_config["default"].to_dict()
    try:
        theirs = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError:
        return f"its {CONFIG} is damaged"
    for key in FUNCTION:
        if (theirs.get(key) or None) != (ours[key] or None):
            return f"{key} is {theirs.get(key)} there and {ours[key]} here"
    if str(drawn := theirs.get("init_lora_weights")).startswith(ALTERING):
        return f"init_lora_weights: {drawn} has altered the base's own weights"
    return ""


@contextmanager
def merged(model: Model) -> Iterator[None]:
    """An adapter merged into the weights for as long as the context lasts; the base's own tensors come back after.

    It is merged into copies, and the tensors that come back are seen to have the bits that they had (`base.bits`).
    Only in float32: in bfloat16 a small update is lost in the rounding of the sum, and a checkpoint at a small budget
    would be measured as the base. There the adapter stays beside the weights, as it was trained. Whole weights have
    nothing to merge.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not is_low_rank(model) or model.head.weight_VD.dtype != torch.float32:
        yield
        return
    layers = [m for m in model.lm.modules() if isinstance(m, BaseTunerLayer)]
    kept = {w: w.data for m in layers for w in m.get_base_layer().parameters(recurse=False)}
    before = bits(kept.values())
    for weight, data in kept.items():
        weight.data = data.clone()
    model.lm.merge_adapter()
    try:
        yield
    finally:
        model.lm.unmerge_adapter()
        for weight, data in kept.items():
            weight.data = data
    if bits(kept) != before:
        raise LeewayError(
            f"model {model.name}: its weights are not what they were before the adapter was merged",
            fix="run the same command again: the model is loaded afresh, and finished work is kept",
        )
