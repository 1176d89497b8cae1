"""Who overrides what: TSTTrainer's methods look like Trainer's, and it knows which of them a subclass, or another parent, has."""

from __future__ import annotations

import inspect
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


def arguments_by_name(*given: Any) -> dict[str, Any]:
    """Arguments of Trainer, given by position: by name, since another parent may take others, without those that it makes itself."""
    bound = inspect.signature(Trainer.__init__).bind(None, *given).arguments
    return {name: value for name, value in bound.items() if name != "self" and value is not None}


def overrides(trainer: Trainer, method: Any) -> bool:
    """Whether a trainer overrides `method` of its base class."""
    return getattr(type(trainer), method.__name__) is not method


def other_parent(trainer: Trainer, ours: type, name: str) -> str | None:
    """The class that has the method `name` which `super()` gives in `ours`, if that is not Trainer: another parent of a composed trainer."""
    mro = type(trainer).__mro__
    owner = next(parent for parent in mro[mro.index(ours) + 1 :] if name in vars(parent))
    return None if vars(owner)[name] is vars(Trainer)[name] else owner.__name__


def choose_fused_losses(trainer: Trainer, ours: type) -> tuple[FusedLoss, FusedLoss]:
    """`tst_fused_loss` in superposition and in recovery; where that is `"auto"`, `"off"` if another `compute_loss` may read logits.

    Args:
        trainer: The trainer.
        ours: Its base class whose `compute_loss` does not.
    """
    args: Any = trainer.args
    chosen: FusedLoss = args.tst_fused_loss
    name, parent = type(trainer).__name__, other_parent(trainer, ours, "compute_loss")
    if args.tst_enabled and parent:
        logger.warning(
            f"{parent}.compute_loss is left out in superposition, whose loss is the model's own, of bags: what it adds to the loss, or "
            "logs, begins with recovery."
        )
    if not args.tst_replaces_loss or chosen != "auto":
        return chosen, chosen
    if not overrides(trainer, ours.compute_loss):  # type: ignore[attr-defined]
        return "auto", "off" if parent else "auto"
    logger.warning(
        f"{name} has its own compute_loss, so logits are kept, which takes memory for each position and "
        "token of the vocabulary: set tst_fused_loss='on' if it does not read them, or 'off' to silence this."
    )
    return "off", "off"


def is_superposed(batch: Any) -> bool:
    """Whether a batch is one of bags: its labels have three dimensions."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3
