"""Accelerators that a run can be planned for: peak speed and memory, as their makers state them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Args:
        name (`str`): As printed.
        tflops (`float`): Peak of dense matrix multiplication in bfloat16, 10¹² operations a second.
        memory_gib (`float`): Memory in GiB.
    """

    name: str
    tflops: float
    memory_gib: float


ACCELERATORS = {
    "a100-40gb": Accelerator("A100 40GB", 312, 40),
    "a100": Accelerator("A100 80GB", 312, 80),
    "h100": Accelerator("H100 SXM", 989, 80),
    "h200": Accelerator("H200 SXM", 989, 140),
    "b200": Accelerator("B200", 2250, 179),
    "l4": Accelerator("L4", 121, 23),
    "l40s": Accelerator("L40S", 362, 45),
    "rtx3090": Accelerator("RTX 3090", 71, 24),
    "rtx4090": Accelerator("RTX 4090", 165, 24),
    "mi300x": Accelerator("MI300X", 1307, 192),
}
