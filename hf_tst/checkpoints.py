"""Checkpoints of a run: which of them are whole, and weights in them that have other names than in the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def last_complete_checkpoint(output_dir: str | Path, before: int | None = None) -> str | None:
    """The checkpoint of the most steps that was written to its end, or `None`.

    Trainer writes `trainer_state.json` when weights, optimizer and schedule are there. A process that dies while a
    checkpoint is written leaves a folder without it, or with half of it, which is passed over here.

    Args:
        output_dir: Folder that holds the folders `checkpoint-<step>`.
        before (`int`, *optional*): Pass over checkpoints of so many steps, or more.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number is None or (before is not None and int(number[1]) >= before):
            continue
        if folder.is_dir() and _is_complete(folder, int(number[1])):
            found.append((int(number[1]), str(folder)))
    return max(found)[1] if found else None


def _is_complete(folder: Path, step: int) -> bool:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step


def load_renamed_weights(model: Any, folder: str | Path) -> bool:
    """Load weights whose names in an ordinary checkpoint differ from the model's, as those of experts do.

    `save_pretrained` writes experts one by one, though Transformers computes them as one tensor a layer. `Trainer` does
    not know of it: when it resumes, and when it loads the best model, it leaves experts as they are, with a warning.

    Args:
        model (`PreTrainedModel`): The model, not sharded.
        folder: A folder with `model.safetensors`, or its parts and their index.

    Returns:
        `bool`: Whether there were any.
    """
    names = _weight_names(Path(folder))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if not names or not set(model.state_dict()) - names - set(tied):
        return False
    loaded = type(model).from_pretrained(folder, config=model.config)
    model.load_state_dict(loaded.state_dict())
    return True


def _weight_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    return set()
