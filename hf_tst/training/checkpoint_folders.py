"""Folders of checkpoints, changed so that a process may die at any moment: written aside, renamed, moved away, removed.

A checkpoint is written to `_unfinished/checkpoint-<step>` in the output folder and renamed when it is complete. What lies
in `_unfinished` is no checkpoint: neither Trainer nor a push to the Hub, which leaves out names with `_`, looks there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from .manifest import flush_to_disk, write_manifest

UNFINISHED = "_unfinished"
# A complete checkpoint that another one of the same step is about to replace.
_REPLACED = "replaced-"


def checkpoint_folders(output_dir: str | Path) -> dict[int, Path]:
    """The folders `checkpoint-<step>` by step, in the order of the steps."""
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and folder.is_dir():
            found[int(number[1])] = folder
    return dict(sorted(found.items()))


def clear_unfinished(output_dir: str | Path) -> None:
    """Remove what a process that died left in `_unfinished`; a checkpoint that it was replacing goes back to its place."""
    restore_replaced(output_dir)
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


def restore_replaced(output_dir: str | Path) -> None:
    """Give a checkpoint its name back, if a process died after moving it away and before putting another in its place."""
    output_dir = Path(output_dir)
    for folder in (output_dir / UNFINISHED).glob(f"{_REPLACED}*"):
        target = output_dir / folder.name.removeprefix(_REPLACED)
        if not target.exists():
            with suppress(FileNotFoundError):  # another process was faster
                folder.rename(target)


def finish_checkpoint(output_dir: str | Path, name: str) -> None:
    """Put `_unfinished/<name>` in its place, with a manifest, when all its files are written.

    Args:
        output_dir: Folder of the checkpoints.
        name (`str`): `checkpoint-<step>`. A folder of this name is replaced.
    """
    output_dir = Path(output_dir)
    unfinished = output_dir / UNFINISHED
    written, target = unfinished / name, output_dir / name
    write_manifest(written)
    if target.exists():
        target.rename(unfinished / f"{_REPLACED}{name}")
    written.rename(target)
    flush_to_disk(output_dir)
    shutil.rmtree(unfinished, ignore_errors=True)


def rotate_checkpoints(output_dir: str | Path, limit: int | None, keep: Collection[int]) -> None:
    """Remove the checkpoints of the fewest steps, as long as there are more than `limit`.

    Unlike Trainer's it goes by steps, not by times of files, which a clock that is set back confuses.

    Args:
        output_dir: Folder of the checkpoints.
        limit (`int`, *optional*): How many to keep; all by default.
        keep: Steps whose checkpoints stay whatever the limit. They count.
    """
    if limit is None or limit < 1:
        return
    folders = checkpoint_folders(output_dir)
    surplus = len(folders) - limit
    for step, folder in folders.items():
        if surplus > 0 and step not in keep:
            _remove(folder)
            surplus -= 1


def _remove(folder: Path) -> None:
    """Remove a checkpoint; moved away first, so that it is never half there."""
    unfinished = folder.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    folder.rename(unfinished / f"removed-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
