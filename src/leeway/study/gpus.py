"""What a study may be run on: data-sheet numbers of GPUs, and this machine's CPU as it is measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from leeway.errors import LeewayError
from leeway.part import nearest

CPU_EFFICIENCY = 0.15  # of the measured matrix-product rate that small, dispatch-bound models were seen to reach
MFU, MBU = 0.35, 0.3  # of a data sheet's peak rate and bandwidth: assumptions, printed with every estimate


@dataclass(frozen=True)
class Gpu:
    """As its vendor's data sheet has it: bfloat16 without sparsity in TFLOP/s, GB of 10^9 bytes, GB/s."""

    name: str
    tflops: float
    memory_gb: float
    bandwidth_gb_s: float
    source: str


GPUS = {
    g.name: g
    for g in (
        Gpu("A100-40", 312, 40, 1555, "NVIDIA A100 data sheet, 40 GB"),
        Gpu("A100-80", 312, 80, 2039, "NVIDIA A100 data sheet, 80 GB SXM"),
        Gpu("H100-80", 989.4, 80, 3350, "NVIDIA H100 data sheet, SXM; half of its figure with sparsity"),
        Gpu("H200", 989.4, 141, 4800, "NVIDIA H200 data sheet, SXM; half of its figure with sparsity"),
        Gpu("L40S", 362, 48, 864, "NVIDIA L40S data sheet"),
        Gpu("L4", 121, 24, 300, "NVIDIA L4 data sheet; half of its figure with sparsity"),
        Gpu("A10G", 70, 24, 600, "NVIDIA A10G data sheet"),
        Gpu("RTX-4090", 165.2, 24, 1008, "NVIDIA Ada architecture white paper, accumulating in float32"),
    )
}


@dataclass(frozen=True)
class Machine:
    """What is computed on, in rates that are reached: FLOP/s, bytes/s (none: not what bounds it), bytes of memory."""

    name: str
    flops: float
    bandwidth: float | None
    memory: float | None
    assumed: str


def gpu(name: str) -> Gpu:
    """By its name, however it is cased and joined; raises LeewayError for an unknown one."""
    plain = {_plain(n): g for n, g in GPUS.items()} | {"h100": GPUS["H100-80"]}
    if (found := plain.get(_plain(name))) is None:
        raise LeewayError(f"--gpu {name}: not known{nearest(name.upper(), GPUS)}", fix=f"one of: {', '.join(GPUS)}")
    return found


def on_gpu(name: str, mfu: float = MFU, mbu: float = MBU) -> Machine:
    """A GPU that reaches the shares `mfu` of its peak rate and `mbu` of its bandwidth."""
    for option, share in (("--mfu", mfu), ("--mbu", mbu)):
        if not 0 < share <= 1:
            raise LeewayError(f"{option} {share:g} is no share", fix="give a number above 0 and at most 1")
    g = gpu(name)
    assumed = (
        f"{g.tflops:g} TFLOP/s and {g.bandwidth_gb_s:g} GB/s by the {g.source}, of which {mfu:.0%} (--mfu) and "
        f"{mbu:.0%} (--mbu) are assumed to be reached"
    )
    return Machine(g.name, g.tflops * 1e12 * mfu, g.bandwidth_gb_s * 1e9 * mbu, g.memory_gb * 1e9, assumed)


def this_cpu(size: int = 768) -> Machine:
    """This machine's CPU: its matrix-product rate in float32, the best of five, at the share that was seen."""
    a = torch.randn(size, size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    reached = CPU_EFFICIENCY * 2 * size**3 / min(times)
    return Machine("this CPU", reached, None, None, f"{reached / 1e9:.3g} GFLOP/s, from its matrix-product rate")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
