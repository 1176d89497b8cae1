"""Checkpoints of a run: which of them are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path


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
