"""Kernels of the multi-hot loss: which one serves a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .torch_multi_hot import multi_hot_loss_and_gradient


def select_kernel(device: torch.device) -> Callable[..., Tensor]:
    """The fastest `multi_hot_loss_and_gradient` for tensors on `device` (see `torch_multi_hot.py` for what it does)."""
    return multi_hot_loss_and_gradient
