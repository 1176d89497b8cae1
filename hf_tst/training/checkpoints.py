"""Checkpoints of a run: which of them are whole, and weights in them that have other names than in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors import TSTError
from .checkpoint_folders import checkpoint_folders, restore_replaced
from .manifest import MANIFEST_FILE, manifest_problem

logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint of the most steps that is complete, or `None`.

    A checkpoint with a manifest is complete if every file is what was written. Others, of the plain Trainer or of an older
    hf_tst, are complete if their `trainer_state.json` is: Trainer writes it when weights, optimizer and schedule are
    there. Those that are passed over are named in a warning.

    Args:
        output_dir: Folder that holds the folders `checkpoint-<step>`.
    """
    restore_replaced(output_dir)
    for step, folder in reversed(checkpoint_folders(output_dir).items()):
        problem = _problem(folder, step)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {problem}.")
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Check a checkpoint that is asked for by name.

    Raises:
        TSTError: If it is not there, or its manifest says that it is damaged.
    """
    if not Path(folder).is_dir():
        raise TSTError(f"There is no checkpoint {folder} to resume from.")
    if (Path(folder) / MANIFEST_FILE).exists() and (problem := manifest_problem(folder)):
        raise TSTError(
            f"The checkpoint {folder} is damaged: {problem}; resume from another one, with "
            f"resume_from_checkpoint='last' for the newest that is complete (without {MANIFEST_FILE} it is not checked)."
        )


def _problem(folder: Path, step: int) -> str | None:
    if (folder / MANIFEST_FILE).exists():
        return manifest_problem(folder)
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError):
        return "trainer_state.json is damaged"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"trainer_state.json is not that of step {step}"
    return None


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
    renamed = set(model.state_dict()) - names - set(tied)
    if not names or not renamed:
        return False
    # The configuration may say another type than the model's parameters have; float32 holds the shorter ones exactly.
    is_full = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    dtype = torch.float32 if is_full else model.dtype
    loaded = type(model).from_pretrained(folder, config=model.config, dtype=dtype).state_dict()
    model.load_state_dict({name: loaded[name] for name in renamed}, strict=False)
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
