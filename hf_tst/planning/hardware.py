"""Accelerators that a run is planned for or runs on: peak speed and memory, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Args:
        name (`str`): As printed.
        tflops (`float`): Peak of dense matrix multiplication in bfloat16, 10¹² FLOP/s.
        memory_gib (`float`): Memory in GiB.
        device_names (`tuple[str, ...]`): What `torch.cuda.get_device_name` calls it. Variants with another peak, such as
            cards for PCIe or laptops and parts of a card (MIG), have other names.
    """

    name: str
    tflops: float
    memory_gib: float
    device_names: tuple[str, ...]


ACCELERATORS = {
    "a100-40gb": Accelerator("A100 40GB", 312, 40, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "a100": Accelerator("A100 80GB", 312, 80, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "h100": Accelerator("H100 SXM", 989, 80, ("NVIDIA H100 80GB HBM3",)),
    "h200": Accelerator("H200 SXM", 989, 140, ("NVIDIA H200",)),
    "b200": Accelerator("B200", 2250, 179, ("NVIDIA B200",)),
    "l4": Accelerator("L4", 121, 23, ("NVIDIA L4",)),
    "l40s": Accelerator("L40S", 362, 45, ("NVIDIA L40S",)),
    "rtx3090": Accelerator("RTX 3090", 71, 24, ("NVIDIA GeForce RTX 3090",)),
    "rtx4090": Accelerator("RTX 4090", 165, 24, ("NVIDIA GeForce RTX 4090",)),
    "mi300x": Accelerator("MI300X", 1307, 192, ("AMD Instinct MI300X",)),
}


def peak_tflops(device: torch.device) -> float | None:
    """Peak of a device in TFLOP/s, dense and in bfloat16; `None` if it is not known."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((known.tflops for known in ACCELERATORS.values() if name in known.device_names), None)
