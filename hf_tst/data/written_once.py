"""Arrow files in the cache of `datasets` that are written once and then reused."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import RunError, whole_message
from ..file_lock import lock_file

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

# The names and sizes of the files of a folder.
SIZES = "sizes.json"
# What a writer has in the folder: the file that it locks, and a folder for unfinished files.
LOCK = "lock"
UNFINISHED = "unfinished"


def written_once(name: str, write: Callable[[Path], Any]) -> list[Path]:
    """The files `data-*` that `write` makes, sorted by name.

    They are written to a temporary folder, and then moved. So no process opens half-written files, and a failure leaves none behind.
    One process writes while the others wait for it. `datasets` stores mapped and shuffled versions in the same folder.

    Args:
        name (`str`): A name that depends on the content. If all the files exist, nothing is written.
        write: Function that writes files into the given folder.

    Raises:
        RunError: If they cannot be written, for example to a full disk.
    """
    import datasets

    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tst"
    folder = root / name
    if not _is_complete(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_writer(folder) as made:
                if not _is_complete(folder):  # another process may have written them
                    write(made)
                    (made / SIZES).write_text(json.dumps(_sizes(made)), encoding="utf-8")
                    _put(made, folder)
        except OSError as error:
            free = f" ({shutil.disk_usage(root).free / 1e9:.2f} GB are free there)" if root.is_dir() else ""
            raise RunError(
                f"Writing to {root} failed: {whole_message(error)}{free}. Make room, or set HF_DATASETS_CACHE to a folder on another "
                "disk."
            ) from error
    return sorted(folder.glob("data-*"))


@contextmanager
def _only_writer(folder: Path) -> Iterator[Path]:
    """Wait until no other process writes into a folder. Makes an empty temporary folder in it, and removes it at the end.

    What a process that was killed has left there is removed, too. Where files cannot be locked, each process has its own.
    """
    made = folder / UNFINISHED
    with (folder / LOCK).open("a") as file:
        held = lock_file(file)
        if held is False:
            logger.warning(f"Another process prepares the same data in {folder}: waiting for it.")
            held = lock_file(file, wait=True)
        if held:
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        else:
            made = Path(tempfile.mkdtemp(dir=folder))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _put(made: Path, folder: Path) -> None:
    """Move the files to their folder, the list of their sizes last. `datasets` keeps files of its own there, which stay."""
    names = [*_sizes(made), SIZES]
    for name in names:
        (made / name).replace(folder / name)
    for file in folder.glob("data-*"):
        if file.name not in names:
            file.unlink(missing_ok=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("data-*"))}


def _is_complete(folder: Path) -> bool:
    """Whether a folder has all files that were written: caches on disks of many users lose old files, one by one."""
    try:
        return bool(json.loads((folder / SIZES).read_text(encoding="utf-8")) == _sizes(folder))
    except (OSError, ValueError):
        return False


def open_arrow(files: list[Path]) -> datasets.Dataset:
    """The rows of Arrow files, memory-mapped."""
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
