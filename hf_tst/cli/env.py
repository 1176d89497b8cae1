"""`hf-tst env`: versions and devices, for a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ..pretraining.parser import ArgumentParser
from ..records.text_tables import format_bytes, format_columns
from ..version import __version__

DESCRIPTION = "Print versions and devices, for a bug report."
PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "safetensors", "numpy", "triton", "matplotlib",
    "liger-kernel", "trl",
)  # fmt: skip


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Print the table.

    Raises:
        TSTError: For a flag.
    """
    import torch

    ArgumentParser([], "%(prog)s", description=DESCRIPTION, prog=prog).parse_flags(argv)
    rows = [("hf-tst", __version__), ("Python", platform.python_version()), ("system", platform.platform())]
    rows += [(package, _version(package)) for package in PACKAGES]
    rows.append(("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"))
    rows.append(("CUDA of torch", torch.version.cuda or "-"))
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        rows.append((f"GPU {number}", f"{device.name}, {format_bytes(device.total_memory)}"))
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "HF_HUB_OFFLINE")
    rows += [(name, os.environ[name]) for name in names if name in os.environ]
    print(format_columns(rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
