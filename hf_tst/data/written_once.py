"""Arrow files that are made once of the same data and then found again, in the cache of `datasets`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError, whole_message

if TYPE_CHECKING:
    import datasets


def written_once(name: str, write: Callable[[Path], Any]) -> list[Path]:
    """The files `data-*` that `write` makes, in the order of their names.

    They are written aside, and their folder is then renamed: no process opens half-written files, several may write at
    once, and nothing is left of a failure. Beside them, under other names, `datasets` caches what they are mapped or shuffled to.

    Args:
        name (`str`): Names the files by what they are made of. If they are there, nothing is written.
        write: Writes files into the folder that it is given.

    Raises:
        RunError: If the disk does not take them.
    """
    import datasets

    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_tst"
    folder = root / name
    if not (datasets.is_caching_enabled() and folder.is_dir()):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as unfinished:
                made = Path(unfinished, name)
                made.mkdir()
                write(made)
                _put(made, folder)
        except OSError as error:
            free = f" ({shutil.disk_usage(root).free / 1e9:.2f} GB are free there)" if root.is_dir() else ""
            raise RunError(
                f"Writing to {root} failed: {whole_message(error)}{free}. Make room, or set HF_DATASETS_CACHE to a folder on another "
                "disk."
            ) from error
    return sorted(folder.glob("data-*"))


def _put(made: Path, folder: Path) -> None:
    """Rename a folder, unless another process has been faster: its files are the same."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def open_arrow(files: list[Path]) -> datasets.Dataset:
    """The rows of Arrow files, memory-mapped."""
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
