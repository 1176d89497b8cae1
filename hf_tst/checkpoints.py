"""Checkpoints of a run: which of them are whole, and what Trainer leaves out of those of FSDP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint of the most steps that was written to its end, or `None`.

    Trainer writes `trainer_state.json` when weights, optimizer and schedule are there. A process that dies while a
    checkpoint is written leaves a folder without it, or with half of it, which is passed over here.

    Args:
        output_dir: Folder that holds the folders `checkpoint-<step>`.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and folder.is_dir() and _is_complete(folder, int(number[1])):
            found.append((int(number[1]), str(folder)))
    return max(found)[1] if found else None


def _is_complete(folder: Path, step: int) -> bool:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


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


def _without_tied(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
