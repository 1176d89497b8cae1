"""Published figures: accelerators, from their makers, and the paper's runs. Nothing here is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TSTError

if TYPE_CHECKING:
    import torch

SOURCE = "arXiv 2605.06546"


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

    def __post_init__(self) -> None:
        if not (self.tflops > 0 and self.memory_gib > 0):
            raise TSTError(
                f"tst_peak_tflops and gpu_memory_gib must be more than 0, but are {self.tflops} and {self.memory_gib}."
            )

    def gpu_hours(self, flops: float, mfu: float) -> float:
        """Hours for `flops` at the fraction `mfu` of the peak; on several accelerators, the sum of their hours."""
        return flops / (self.tflops * 1e12 * mfu * 3600)


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


@dataclass(frozen=True)
class PublishedRun:
    """A TST run of the paper, and the baselines it is compared with. `None`: the paper gives no figure.

    Where the paper gives no setting, it is the recipe's: row lengths, and the sizes and offset weights of 10B-A1B.

    Args:
        name (`str`): The model, as the paper calls it.
        hidden_size, layers (`int`): What identifies the model.
        row_length (`int`): Latent positions per row, L.
        steps (`int`): Optimizer steps of the TST run, N.
        tokens_per_step (`int`): Latent tokens per step.
        bag_size (`int`), phase_ratio (`float`): s and r.
        loss (`float`): Final loss with TST.
        baseline_loss (`float`, *optional*): Final loss of a baseline of as many steps.
        equal_loss_steps (`int`, *optional*): Steps of a baseline of about the TST run's loss.
        equal_loss (`float`, *optional*): The loss of that baseline.
        gpu_hours, equal_loss_gpu_hours (`float`, *optional*): B200-hours of the TST run and of that baseline.
        offset_weighting (`str`, *optional*, defaults to `"uniform"`): As `tst_offset_weighting`.

    The other fields are the same for all runs.
    """

    name: str
    hidden_size: int
    layers: int
    row_length: int
    steps: int
    tokens_per_step: int
    bag_size: int
    phase_ratio: float
    loss: float
    baseline_loss: float | None = None
    equal_loss_steps: int | None = None
    equal_loss: float | None = None
    gpu_hours: float | None = None
    equal_loss_gpu_hours: float | None = None
    offset_weighting: str = "uniform"
    input_weighting: str = "uniform"
    mode: str = "full"
    superposition_rows: str = "longer"
    document_boundaries: str = "ignore"
    mtp_num_heads: int = 1
    vocab_size: int = 128_256


PUBLISHED = (
    # The baseline reaches 3.142 with 105B instead of 42B tokens, which is 50 000 steps of 2 097 152.
    PublishedRun("270M", 576, 30, 2048, 20_000, 2**21, 6, 0.3, 3.142, 3.212, 50_000, 3.142),
    PublishedRun("270M", 576, 30, 2048, 100_000, 2**21, 6, 0.3, 3.048, 3.092),
    PublishedRun("600M", 960, 32, 2048, 20_000, 2**21, 6, 0.3, 2.943, 3.019),
    PublishedRun("3B", 2048, 36, 4096, 20_000, 2**21, 6, 0.3, 2.676, 2.808, 36_000, 2.677),
    PublishedRun(
        "10B-A1B", 1536, 30, 4096, 49_983, 2**23, 16, 0.24975, 2.236, None, 125_000, 2.252, 4768, 12_311, "power_law"
    ),
)  # fmt: skip


def find_published(**settings: Any) -> PublishedRun | None:
    """The published run with exactly these `settings`, fields of [`PublishedRun`]; `None` if there is none."""
    return next((run for run in PUBLISHED if settings.items() <= vars(run).items()), None)
