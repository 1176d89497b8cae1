"""Models sharded by FSDP: their weights in one piece, and a word when they are not sharded after all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def uses_fsdp1(trainer: Any) -> bool:
    """Whether a trainer shards its model by the first FSDP, which flattens weights."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and getattr(plugin, "fsdp_version", 1) != 2


def full_state_dict(model: Any) -> dict[str, Any]:
    """All weights of a model that `fully_shard` has sharded, as `save_pretrained` takes them.

    Every rank must call it; the weights come back on the CPU of the first rank, and nothing on the others. A weight
    that is tied to another appears once, as in an ordinary checkpoint, although its gathered copies are two tensors.

    Args:
        model (`PreTrainedModel`): The sharded model, not wrapped in anything else.

    Example:
        >>> weights = full_state_dict(model)
        >>> if torch.distributed.get_rank() == 0:
        ...     model.save_pretrained("final", state_dict=weights)
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return _without_tied(model, get_model_state_dict(model, options=options))


def load_full_state_dict(module: Any, weights: dict[str, Any]) -> None:
    """Load weights in one piece, as [`full_state_dict`] gathered them, into a module that may be sharded.

    Every rank must call it, with all weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))


@contextmanager
def left_out_of_optimizer(optimizer: Any, parameters: Iterable[Any]) -> Iterator[None]:
    """Context in which an optimizer does not know some of its parameters, for loading a state that has nothing of them.

    Where an optimizer's state is in shards, PyTorch insists on finding that of every parameter, also of those that had
    no gradient yet.
    """
    unknown = {id(parameter) for parameter in parameters}
    whole = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in unknown]
    try:
        yield
    finally:
        for group, known in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = known


def weights_to_save(trainer: Any) -> dict[str, Any] | None:
    """All weights of a trainer's model that FSDP has sharded, or `None` if it is not sharded.

    `Trainer.save_model` would write nothing with `SHARDED_STATE_DICT`, and tied weights twice with `FULL_STATE_DICT`.
    Every rank must call it.

    Args:
        trainer (`Trainer`): The trainer whose model is to be saved.
    """
    if not getattr(trainer, "is_fsdp_enabled", False):
        return None
    return _without_tied(trainer.model, trainer.accelerator.get_state_dict(trainer.model))


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


def _without_tied(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
