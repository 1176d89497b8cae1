"""Whether, and how, accelerate shards the model of a trainer by FSDP."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils import logging

from ..models.sharding import without_tied

logger = logging.get_logger(__name__)


def uses_fsdp1(trainer: Any) -> bool:
    """Whether a trainer shards its model by the first FSDP, which flattens weights."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and getattr(plugin, "fsdp_version", 1) != 2


def weights_to_save(trainer: Any) -> dict[str, Any] | None:
    """All weights of a trainer's model that FSDP has sharded, or `None` if it is not sharded.

    `Trainer.save_model` would write nothing with `SHARDED_STATE_DICT`, and tied weights twice with `FULL_STATE_DICT`.
    Every rank must call it.

    Args:
        trainer (`Trainer`): The trainer whose model is to be saved.
    """
    if not trainer.is_fsdp_enabled:
        return None
    return without_tied(trainer.model, trainer.accelerator.get_state_dict(trainer.model))


def warn_of_missing_fsdp(trainer: Any) -> None:
    """Warn if FSDP is asked for, by the arguments or by `accelerate launch`, and accelerate does something else.

    It does so silently on CPU, where it makes FSDP ordinary DDP.
    """
    asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    accelerator = trainer.accelerator
    if asked and not trainer.is_fsdp_enabled and accelerator.is_main_process:
        logger.warning(
            f"fsdp is asked for, but accelerate runs {accelerator.distributed_type.value} on {accelerator.device.type}: "
            "nothing is sharded, and every process holds the whole model. FSDP needs accelerators, and `accelerate "
            "launch` or `torchrun`."
        )
