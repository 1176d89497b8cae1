"""Which checkpoints of an output folder belong to the current run, and which to another run.

Each start of training gets an id (see [`RunNoteCallback`]). `trainer_state.json` stores it with the step that training started
from, so a checkpoint has the ids of all starts that led to it. `_run.json` in the output folder has those of the run that started
there last. Names that begin with `_` are not pushed to the Hub.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..records.run_record import RUN_ID, run_notes, write_atomically

logger = logging.getLogger(__name__)

RUN_FILE = "_run.json"
STATE_FILE = "trainer_state.json"  # as Transformers names it, whose import takes seconds

# The starts of a run: pairs of the first step and the id. Checkpoints of the plain Trainer have none.
Starts = list[tuple[int, str]]


def take_folder(output_dir: str | Path, state: dict[str, Any]) -> None:
    """Write the ids of a run that starts into its output folder, and warn of checkpoints of other runs there.

    Args:
        output_dir: The folder.
        state (`dict`): `vars` of its `TrainerState`, in which this start is noted.
    """
    write_atomically(Path(output_dir) / RUN_FILE, json.dumps({"starts": _starts(state)}) + "\n")
    if foreign := foreign_checkpoints(output_dir):
        logger.warning(
            f"{output_dir} has {', '.join(folder.name for folder in foreign)} of another run: "
            "resume_from_checkpoint='last' and save_total_limit ignore them, but this run overwrites those whose step "
            "it reaches. Choose another output_dir, or move them away."
        )


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The folders `checkpoint-<step>` by step, sorted."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.is_dir()]
    numbers = [(folder.name.removeprefix("checkpoint-"), folder) for folder in folders]
    return dict(sorted((int(number), folder) for number, folder in numbers if number.isdecimal()))


def foreign_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder that do not belong to the run that started there last, sorted by step.

    If this run was resumed from an earlier checkpoint, its own later checkpoints count as foreign, too, since it repeats their
    steps. Without `_run.json` no checkpoint is foreign, nor is one whose state cannot be read.
    """
    try:
        text = (Path(output_dir) / RUN_FILE).read_text(encoding="utf-8")
        run: Starts = [(int(step), str(name)) for step, name in json.loads(text)["starts"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [folder for step, folder in list_checkpoints(output_dir).items() if not _led_to(run, folder, step)]


def _led_to(run: Starts, folder: Path, step: int) -> bool:
    """Whether a run with these starts has written a checkpoint or was resumed from it."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        starts = _starts(state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True
    following = run[len(starts) :]
    return starts == run[: len(starts)] and (not following or step <= following[0][0])


def _starts(state: dict[str, Any]) -> Starts:
    return [(note["step"], note[RUN_ID]) for note in run_notes(state) if RUN_ID in note]
