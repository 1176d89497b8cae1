"""Atomic checkpoints: a checkpoint folder is either complete or does not exist, even if the process is killed.

A checkpoint is written to `_unfinished/checkpoint-<step>` in the output folder and renamed when it is complete. Before it is
removed, it is moved back there. Trainer and pushes to the Hub ignore `_unfinished`. `manifest.json` holds the size and hash
of every file and is written last.

The files reach the disk later, while training continues (see [`SavingTrainer`]). If the machine stops before that, the hashes show
it, and an older checkpoint is still there: none is removed before the newer one is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object, wait_for_everyone
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..errors import RunError, TSTError, one_line
from .manifest import MANIFEST_FILE, flush_folder, flush_to_disk, manifest_problem, write_manifest
from .run_identity import foreign_checkpoints, list_checkpoints

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"
# Values of resume_from_checkpoint that mean the newest complete checkpoint, in Python and on a command line.
NEWEST = (True, "last", "true", "True")
# Name of a complete checkpoint while another one of the same step replaces it.
_REPLACED = "replaced-"


# Writing


def check_output_dir(args: TrainingArguments) -> None:
    """Raise `TSTError` if the output folder is not writable."""
    if not args.should_save:
        return
    probe = Path(args.output_dir) / f"{UNFINISHED}.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise TSTError(
            f"Cannot write to output_dir={args.output_dir} ({error.strerror}): choose another folder, or change its permissions."
        ) from error


def write_checkpoint(checkpoint: Path, args: TrainingArguments, write: Callable[[Path], Any]) -> None:
    """Write a checkpoint into `_unfinished`, and rename it when all ranks have written their files. Every rank must take part.

    Args:
        checkpoint (`Path`): The folder `checkpoint-<step>`. An existing one is replaced.
        args (`TrainingArguments`): The run's arguments; they know the rank.
        write: Function that writes this rank's files into the given folder.

    Raises:
        RunError: On all ranks, if one of them fails.
    """
    run_dir, name = checkpoint.parent, checkpoint.name
    with fail_on_all_ranks(checkpoint, args):
        if args.local_process_index == 0:
            clear_unfinished(run_dir)
    with fail_on_all_ranks(checkpoint, args):
        write(run_dir / UNFINISHED / name)
    # First the main process; then one process on each other machine, in case each machine has its own disk.
    for finishes in (args.process_index == 0, args.local_process_index == 0):
        with fail_on_all_ranks(checkpoint, args):
            if finishes and (run_dir / UNFINISHED / name).is_dir():
                with suppress(FileNotFoundError):  # on a shared disk that does not show the renaming yet
                    finish_checkpoint(run_dir, name)


@contextmanager
def fail_on_all_ranks(checkpoint: Path, args: TrainingArguments) -> Iterator[None]:
    """Context that raises `RunError` on all ranks if its body fails on one of them.

    It does not help where the body itself makes ranks wait for each other, such as when FSDP gathers whole weights.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    problems = [text for text in gather_object([problem and one_line(problem)]) if text]
    if not problems:
        return
    run_dir = checkpoint.parent
    if args.local_process_index == 0:
        clear_unfinished(run_dir)  # the half-written files may fill the disk
    wait_for_everyone()
    earlier = "Earlier checkpoints are intact: continue with resume_from_checkpoint='last'"
    if not list_checkpoints(run_dir):
        earlier = "There is no earlier checkpoint: start again"
    raise RunError(
        f"Writing {checkpoint} failed: {problems[0]} ({shutil.disk_usage(run_dir).free / 1e9:.2f} GB are free "
        f"there). {earlier} after fixing the cause."
    ) from problem


def finish_checkpoint(output_dir: Path, name: str) -> None:
    """Write the manifest of the complete folder `_unfinished/<name>`, and move the folder to its place.

    Args:
        output_dir: Folder of the checkpoints.
        name (`str`): `checkpoint-<step>`. An existing folder of this name is replaced.
    """
    unfinished = output_dir / UNFINISHED
    written, target = unfinished / name, output_dir / name
    if target.is_dir() and not (target / TRAINER_STATE_NAME).exists():
        _take_over(target, written)
    write_manifest(written)
    if target.exists():
        flush_folder(written)
        target.rename(unfinished / f"{_REPLACED}{name}")
    written.rename(target)
    flush_to_disk(output_dir)
    shutil.rmtree(unfinished, ignore_errors=True)


def _take_over(folder: Path, written: Path) -> None:
    """Copy files that a subclass of the trainer wrote into a checkpoint's folder before the checkpoint was written."""
    for path in folder.rglob("*"):
        copy = written / path.relative_to(folder)
        if path.is_file() and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a killed process left in `_unfinished`. A checkpoint that it was replacing is restored."""
    _restore_replaced(output_dir)
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def _restore_replaced(output_dir: Path) -> None:
    """Restore a checkpoint that a killed process had moved away and not yet replaced."""
    for folder in (output_dir / UNFINISHED).glob(f"{_REPLACED}*"):
        target = output_dir / folder.name.removeprefix(_REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another process has done it
                folder.rename(target)


def rotate_checkpoints(output_dir: str | Path, limit: int | None, keep: Collection[str]) -> None:
    """Remove the oldest checkpoints until `limit` of them are left.

    Unlike Trainer's method it compares steps, not file times, which are wrong after a clock is set back.

    Args:
        output_dir: Folder of the checkpoints.
        limit (`int`, *optional*): How many to keep. Defaults to all.
        keep: Names of checkpoints that are never removed, but count. Those of another run are never removed and do not count.
    """
    if limit is None or limit < 1:
        return
    foreign = foreign_checkpoints(output_dir)
    folders = [folder for folder in list_checkpoints(output_dir).values() if folder not in foreign]
    surplus = len(folders) - limit
    for folder in [folder for folder in folders if folder.name not in keep][: max(surplus, 0)]:
        unfinished = folder.parent / UNFINISHED
        unfinished.mkdir(exist_ok=True)
        folder.rename(unfinished / f"removed-{folder.name}")  # never half removed, even if killed
        shutil.rmtree(unfinished, ignore_errors=True)


# Resuming


def choose_checkpoint(requested: str | bool | None, args: TrainingArguments) -> str | None:
    """The checkpoint to resume from, the same on all ranks. The main process checks its files.

    Args:
        requested (`str` or `bool`, *optional*): A checkpoint; `True` or `"last"` for the newest complete one.
        args (`TrainingArguments`): The run's arguments; they know the output folder and the rank.

    Raises:
        TSTError: If it does not exist or is damaged.
    """
    if not requested:
        return None
    answer: list[Any] = [None]
    if args.process_index == 0:
        try:
            answer = [_find_checkpoint(requested, args.output_dir)]
        except TSTError as error:
            answer = [error]
    (found,) = broadcast_object_list(answer)
    if isinstance(found, TSTError):
        raise found
    return found


def check_checkpoint_is_there(requested: str | bool | None, output_dir: str) -> None:
    """Raise `TSTError` if a checkpoint is requested and does not exist. Reads no file."""
    if requested in NEWEST:
        if not any(Path(output_dir).rglob("checkpoint-*")):
            raise _nothing_to_resume(output_dir)
    elif requested and not Path(str(requested)).is_dir():
        raise TSTError(
            f"There is no checkpoint {requested} to resume from: give an existing folder, or 'last'."
        )


def _nothing_to_resume(output_dir: str) -> TSTError:
    return TSTError(
        f"There is no checkpoint to resume from in {output_dir}: leave resume_from_checkpoint out to start a new run."
    )


def _find_checkpoint(requested: str | bool, output_dir: str) -> str:
    check_checkpoint_is_there(requested, output_dir)
    if requested in NEWEST:
        if (newest := last_complete_checkpoint(output_dir)) is None:
            raise _nothing_to_resume(output_dir)
        return newest
    folder = Path(str(requested))
    if (folder / MANIFEST_FILE).exists() and (problem := manifest_problem(folder)):
        raise TSTError(
            f"The checkpoint {requested} is not what was written: {problem}. Resume from another one "
            "(resume_from_checkpoint='last' takes the newest complete one). If you changed it on purpose, remove its "
            f"{MANIFEST_FILE}: then it is not checked."
        )
    if problem := _missing_state(folder):
        raise TSTError(
            f"The checkpoint {requested} cannot be resumed from: {problem}. To train its weights further in a new run, set "
            "model_name_or_path to it, or load the model from it."
        )
    return str(requested)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of the run that started last in a folder; `None` if there is none.

    A checkpoint with a manifest is complete if every file matches it. A checkpoint without a manifest, from the plain Trainer,
    is complete if its `trainer_state.json` is, since Trainer writes this file last. A checkpoint without optimizer and schedule,
    as `save_only_model` writes it, is not complete. A warning names each checkpoint that is skipped.

    Args:
        output_dir: Folder that contains the folders `checkpoint-<step>`.
    """
    _restore_replaced(Path(output_dir))
    foreign = foreign_checkpoints(output_dir)
    for step, folder in reversed(list_checkpoints(output_dir).items()):
        problem = "it belongs to another run" if folder in foreign else _problem(folder, step)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is skipped: {problem}.")
    return None


def _problem(folder: Path, step: int) -> str | None:
    if (folder / MANIFEST_FILE).exists():
        return manifest_problem(folder) or _missing_state(folder)
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its {TRAINER_STATE_NAME} cannot be read"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"its {TRAINER_STATE_NAME} is not that of step {step}"
    return _missing_state(folder)


def _missing_state(folder: Path) -> str | None:
    """What is missing, as the end of a sentence, if Trainer would silently restart optimizer and schedule; `None` if nothing is."""
    # DeepSpeed saves both in one folder. FSDP may save the optimizer as a folder.
    if any(folder.glob("global_step*")) or (
        any(folder.glob("optimizer*")) and any(folder.glob("scheduler.pt"))
    ):
        return None
    return "it has no state of the optimizer and the learning rate schedule, as if saved with save_only_model"
