"""A model in shards: each of several processes holds a part of every layer, and has a layer whole while it computes it.

The layers are sharded by torch's FSDP2 (`fully_shard`) as accelerate prepares a model for it. The embedding and the
output layer stay whole in every process: the head is read outside a forward pass, in chunks, and is often the same
tensor as the embedding. What stays whole is called replicated here.
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
from leeway.model.load import Model, decoder


def shard(model: Model, processes: int, device: torch.device) -> dict[Parameter, Parameter]:
    """Shard the layers of `model` in place over all processes; says which parameter took which one's place.

    Every process calls it with the same whole model. What is replicated goes to `device`. Gradients are summed over
    the processes, not averaged: every loss is normalised by the whole optimiser batch already.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    body = decoder(model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm)
    if not getattr(body, "_no_split_modules", None):
        raise LeewayError(
            f"processes: {model.name} does not say which of its modules are layers, so it cannot be sharded",
            fix="leave processes out",
        )
    before = dict(body.named_parameters())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        ignored_modules=[body.get_input_embeddings()],
    )
    # What the preparation reads of an Accelerator, which itself takes no FSDP on a CPU: one path for gloo and NCCL.
    told = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shard",)),
        mixed_precision="no",
        device=device,
        is_main_process=False,
    )
    fsdp2_prepare_model(told, body)
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
    """This process's part of a sharded tensor, sharing its memory; anything else as it is."""
    part: Tensor = tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together again, in every process at once; anything else as it is."""
    full: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return full


def like(tensor: Tensor, parameter: Parameter) -> Tensor:
    """A whole tensor, the same in every process, sharded as `parameter` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    if not is_shard(parameter):
        return tensor.to(parameter.device)
    kept: Any = parameter
    mesh, placements = kept.device_mesh, kept.placements
    return distribute_tensor(tensor.detach().to(parameter.device), mesh, placements, src_data_rank=None)


@contextmanager
def exchanged(lm: Any, values: dict[Parameter, Tensor]) -> Iterator[None]:
    """Parameters with other values for as long as the context lasts, shard by shard, in their own memory.

    A sharded parameter's layers are gathered from where its shard lies, so that the contents change places and not the
    tensors; what an earlier pass has gathered is let go.
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
        kept = ours.clone()
        ours.copy_(theirs)
        theirs.copy_(kept)


def _units(lm: Any) -> list[Any]:
    """The modules whose parameters are gathered at once."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in lm.modules() if isinstance(m, FSDPModule)]
