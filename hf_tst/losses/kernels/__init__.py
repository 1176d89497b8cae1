"""Kernels of the multi-hot loss, and the choice between them by device."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .torch_multi_hot import multi_hot_loss_and_gradient


def select_kernel(device: torch.device) -> Callable[..., Tensor]:
    """The kernel for tensors on `device`, all with the contract of `torch_multi_hot.multi_hot_loss_and_gradient`.

    Triton's on CUDA, and anywhere under `TRITON_INTERPRET=1`; PyTorch's otherwise, and with `HF_TST_KERNEL=torch`.
    """
    wants_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if wants_triton and os.environ.get("HF_TST_KERNEL") != "torch" and find_spec("triton"):
        from . import triton_multi_hot

        return triton_multi_hot.multi_hot_loss_and_gradient
    return multi_hot_loss_and_gradient
