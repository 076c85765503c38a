"""Checkpoints: a folder per budget that peft or transformers loads, with its ledger line, written atomically."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leeway.errors import LeewayError, first_line
from leeway.io import atomic_folder, verify_checksum, with_checksum, write_json
from leeway.model import adapters
from leeway.model.load import Model
from leeway.training.distributed import ALONE, Distributed

OPTIMISER, LEDGER = "optimizer.safetensors", "ledger.json"  # only the latest checkpoint needs the optimiser state


@dataclass(frozen=True)
class WarmStart:
    """A saved adapter (PEFT) or model (transformers) that a trajectory starts from; `hash` is its adapter_hash."""

    folder: Path
    hash: str

    @property
    def ledger_line(self) -> dict[str, Any]:
        """Its ledger line (base, source tokens); empty if there is none, as for an external adapter."""
        return read_ledger(self.folder) if is_complete(self.folder) else {}

    @classmethod
    def of(cls, folder: Path) -> WarmStart:
        """Hash what is saved in `folder`."""
        return cls(folder, _hash(folder, "give the folder of a saved adapter or model"))


def write(
    folder: Path, model: Model, optimiser: torch.optim.Optimizer, ledger: dict[str, Any], ranks: Distributed = ALONE
) -> dict[str, Any]:
    """Save the trained weights, the optimiser state and the ledger line; return the line with its `adapter_hash`.

    Of several ranks the main one writes; the others take part in gathering the shards.
    """
    tensors, state = ranks.whole(model), ranks.optimiser_state(optimiser)
    if ranks.is_main:
        with atomic_folder(folder, is_complete) as scratch:
            adapters.save(model, scratch, tensors)
            save_file(state, scratch / OPTIMISER)
            line = {**ledger, "adapter_hash": adapters.adapter_hash(adapters.saved(scratch))}
            write_json(scratch / LEDGER, with_checksum(line))
    ranks.wait()
    return read_ledger(folder)


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return the ledger line of a checkpoint. Raises LeewayError if it was changed."""
    try:
        return verify_checksum(json.loads((folder / LEDGER).read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        what = f"{folder}: its ledger.json is damaged ({first_line(error)})"
        raise LeewayError(what, fix="delete that folder and run again") from error


def unverified_ledger(folder: Path) -> dict[str, Any]:
    """Return the ledger line without checking it, to show it next to its fault; empty if it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        line = json.loads((folder / LEDGER).read_text("utf-8"))
        return line if isinstance(line, dict) else {}
    return {}


def verified_ledger(folder: Path) -> dict[str, Any]:
    """Return the ledger line of a checkpoint. Raises LeewayError if its adapter is not the one the line names."""
    line = read_ledger(folder)
    found = _hash(folder, "delete that folder and run again")
    if found != line.get("adapter_hash"):
        what = f"{folder}: the adapter is not the one its ledger names (adapter_hash {found}, "
        what += f"ledger {line.get('adapter_hash')})"
        raise LeewayError(what, fix="delete that folder and run again, or start in another --out")
    return line


def _hash(folder: Path, fix: str) -> str:
    try:
        return adapters.adapter_hash(adapters.saved(folder))
    except (SafetensorError, OSError) as error:
        raise LeewayError(f"{folder}: its adapter is damaged or missing ({error})", fix=fix) from error


def restore(folder: Path, model: Model, optimiser: torch.optim.Optimizer | None) -> None:
    """Load the adapter and, if given, the optimiser state of this checkpoint."""
    adapters.restore(model, folder)
    if optimiser is None:
        return
    flat = load_file(folder / OPTIMISER)
    for index, parameter in enumerate(p for g in optimiser.param_groups for p in g["params"]):
        keys = [k for k in flat if k.startswith(f"{index}.")]
        optimiser.state[parameter] = {
            k.split(".", 1)[1]: flat[k] if k.endswith(".step") else flat[k].to(parameter.device) for k in keys
        }


def is_complete(folder: Path) -> bool:
    return (folder / LEDGER).is_file()
