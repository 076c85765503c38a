"""A sharded model: each process holds a part of every layer and gathers a layer while computing it.

Layers are sharded by torch's FSDP2 (`fully_shard`), prepared through accelerate. Embedding and output layer stay
replicated: the head is applied outside the forward pass, in chunks, and is often tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from leeway.errors import LeewayError
from leeway.model.adapters import unwrapped
from leeway.model.load import Model, decoder


def shard(model: Model, processes: int, device: torch.device) -> dict[Parameter, Parameter]:
    """Shard the layers of `model` in place over all processes; return which parameter replaced which.

    Every process calls it with the same whole model. Replicated tensors move to `device`. Gradients are summed over
    processes, not averaged: every loss is already normalised by the whole optimiser batch.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    body = decoder(unwrapped(model.lm))
    if not getattr(body, "_no_split_modules", None):
        what = f"processes: {model.name} does not name its layer classes (_no_split_modules), so it cannot be sharded"
        raise LeewayError(what, fix="leave processes out")
    before = dict(body.named_parameters())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        ignored_modules=[body.get_input_embeddings()],
    )
    # The attributes that the preparation reads of an Accelerator, which refuses FSDP on a CPU: one path for gloo, NCCL.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shard",)),
        mixed_precision="no",
        device=device,
        is_main_process=False,
    )
    fsdp2_prepare_model(accelerator, body)
    for module in _units(body):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for tensor in (*model.lm.parameters(), *model.lm.buffers()):
        if not is_shard(tensor):
            tensor.data = tensor.data.to(device)
    after = dict(body.named_parameters())
    return {p: after[name] for name, p in before.items() if after[name] is not p}


def is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, sharing its memory; an unsharded tensor unchanged."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor in every process; an unsharded tensor unchanged."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, parameter: Parameter) -> Tensor:
    """Shard a tensor that every process holds, as `parameter` is sharded; no communication."""
    from torch.distributed.tensor import distribute_tensor

    if not is_shard(parameter):
        return tensor.to(parameter.device)
    sharded: Any = parameter
    mesh, placements = sharded.device_mesh, sharded.placements
    return distribute_tensor(tensor.detach().to(parameter.device), mesh, placements, src_data_rank=None)


@contextmanager
def exchanged(lm: Any, values: dict[Parameter, Tensor]) -> Iterator[None]:
    """Replace parameter values within the context, shard by shard.

    Sharded layers are gathered from their shards' memory, so contents are swapped in place, not tensors.
    """
    _exchange(lm, values)
    try:
        yield
    finally:
        _exchange(lm, values)


@torch.no_grad()
def _exchange(lm: Any, values: dict[Parameter, Tensor]) -> None:
    for module in _units(lm):
        module.reshard()
    for p, value in values.items():
        ours, theirs = local(p.data), local(value)
        copy = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(copy)


def _units(lm: Any) -> list[Any]:
    """Return the modules whose parameters are gathered together."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in lm.modules() if isinstance(m, FSDPModule)]
