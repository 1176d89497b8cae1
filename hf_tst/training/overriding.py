"""Who overrides what: TSTTrainer's methods look like Trainer's, and it knows which of them a subclass has replaced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from ..models.fused import FusedLoss

logger = logging.get_logger(__name__)


def signature_of(method: Any) -> Any:
    """Decorator of an override that hands arguments on: it has the signature of Trainer's method, whatever the version."""
    return wraps(method, assigned=())


def overrides(trainer: Trainer, method: Any) -> bool:
    """Whether a trainer overrides `method` of its base class."""
    return getattr(type(trainer), method.__name__) is not method


def choose_fused_loss(trainer: Trainer, method: Any) -> FusedLoss:
    """`tst_fused_loss`, or `"off"` where that is `"auto"` and a subclass has another `compute_loss` than `method`."""
    args: Any = trainer.args
    chosen: FusedLoss = args.tst_fused_loss
    if not args.tst_replaces_loss or chosen != "auto" or not overrides(trainer, method):
        return chosen
    logger.warning(
        f"{type(trainer).__name__} has its own compute_loss, so logits are kept, which takes memory for each position and "
        "token of the vocabulary: set tst_fused_loss='on' if it does not read them, or 'off' to silence this."
    )
    return "off"


def is_superposed(batch: Any) -> bool:
    """Whether a batch is one of bags: its labels have three dimensions."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3
