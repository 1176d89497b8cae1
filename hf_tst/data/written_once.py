"""Arrow files in the cache of `datasets` that are written once and then reused."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError, whole_message

if TYPE_CHECKING:
    import datasets


# The names and sizes of the files of a folder.
SIZES = "sizes.json"


def written_once(name: str, write: Callable[[Path], Any]) -> list[Path]:
    """The files `data-*` that `write` makes, sorted by name.

    They are written to a temporary folder, which is then renamed. So no process opens half-written files, several processes may
    write at the same time, and a failure leaves nothing behind. `datasets` stores mapped and shuffled versions in the same folder.

    Args:
        name (`str`): A name that depends on the content. If all the files exist, nothing is written.
        write: Function that writes files into the given folder.

    Raises:
        RunError: If they cannot be written, for example to a full disk.
    """
    import datasets

    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tst"
    folder = root / name
    if not (datasets.is_caching_enabled() and _is_complete(folder)):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as unfinished:
                made = Path(unfinished, name)
                made.mkdir()
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


def _put(made: Path, folder: Path) -> None:
    """Rename a folder, unless another process has already made it: its files are the same. One that has lost files gets all of them.

    Nothing else is removed there: `datasets` keeps files of its own in it, which running processes may use.
    """
    try:
        made.rename(folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    if _is_complete(folder):
        return
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
