"""Which methods a subclass or another parent overrides, and what follows from it for the loss."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from ..models.fused import FusedLoss

logger = logging.get_logger(__name__)


def arguments_by_name(*given: Any) -> dict[str, Any]:
    """Trainer's positional arguments by name, without those that are `None`. Another parent may take them in another order."""
    bound = inspect.signature(Trainer.__init__).bind(None, *given).arguments
    return {name: value for name, value in bound.items() if name != "self" and value is not None}


def overrides(trainer: Trainer, base: type, name: str) -> bool:
    """Whether a trainer overrides the method `name` of `base`: in a subclass, on the instance, or by a patch of the class."""
    method = getattr(type(trainer), name)
    return name in vars(trainer) or method is not getattr(base, name) or is_patch(method)


def is_patch(method: Any) -> bool:
    """Whether a method of Trainer or of a class of this package was put there by other code."""
    return method.__module__.partition(".")[0] not in ("transformers", __package__.partition(".")[0])


def other_parent(trainer: Trainer, base: type, name: str) -> str | None:
    """The name of the class whose method `name` runs at `super()` in `base`; `None` if that is Trainer.

    In `class Mine(TSTTrainer, OtherTrainer)` it is `OtherTrainer` if that class overrides the method.
    """
    mro = type(trainer).__mro__
    owner = next(parent for parent in mro[mro.index(base) + 1 :] if name in vars(parent))
    return None if vars(owner)[name] is vars(Trainer)[name] else owner.__name__


def choose_fused_losses(trainer: Trainer, base: type) -> tuple[FusedLoss, FusedLoss]:
    """The values of `tst_fused_loss` for superposition and for recovery.

    `"auto"` becomes `"off"` where the `compute_loss` of a subclass, or of another parent, may read logits.

    Args:
        trainer (`TSTTrainer`): The trainer.
        base: The class `TSTTrainer`, whose own `compute_loss` reads no logits.
    """
    args: Any = trainer.args
    chosen: FusedLoss = args.tst_fused_loss
    name, parent = type(trainer).__name__, other_parent(trainer, base, "compute_loss")
    if args.tst_enabled and parent:
        logger.warning(
            f"{parent}.compute_loss does not run in superposition, where the loss is the model's own: what it adds to the loss or logs "
            "begins with recovery."
        )
    if not args.tst_replaces_loss or chosen != "auto":
        return chosen, chosen
    if not overrides(trainer, base, "compute_loss"):
        return "auto", "off" if parent else "auto"
    logger.warning(
        f"{name} has its own compute_loss, which may read logits, so the loss is not fused and needs more memory: set "
        "tst_fused_loss='on' if it does not read them, or 'off' to silence this warning."
    )
    return "off", "off"
