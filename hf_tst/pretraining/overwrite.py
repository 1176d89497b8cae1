"""A run never overwrites another silently: the check, the lock of its folder, and `--overwrite_output_dir`.

With that flag, the old run is moved to `_replaced` in its folder when training starts, and removed at the
first checkpoint or the end of the new run. If the new run fails earlier, the old one is restored.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from shlex import quote

from ..checkpoints.manifest import flush_folder
from ..checkpoints.run_identity import list_checkpoints
from ..errors import TSTError, bad_input
from ..file_lock import lock_file

logger = logging.getLogger(__name__)

REPLACED = "_replaced"
LOCK_FILE = "_lock"  # names that begin with _ are not pushed to the Hub
# Files of a run in its folder, by name or by pattern; other files are the user's, and all folders but checkpoints.
RUN_FILES = (
    "trainer_state.json", "training_args.bin", "config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors",
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "all_results.json", "train_results.json", "eval_results.json", "loss_curve.png", "_run.json",
)  # fmt: skip


def check_no_run_in(output_dir: str, command: str) -> None:
    """Raise `TSTError` if a folder holds a run.

    Args:
        output_dir (`str`): The folder.
        command (`str`): The command line that would train into it, for the message.
    """
    folder = Path(output_dir)
    if any((folder / name).exists() for name in ("trainer_state.json", "config.json", "adapter_config.json")):
        elsewhere = command.replace(f" --output_dir {quote(output_dir)}", "")
        raise TSTError(
            f"{output_dir} holds a finished run: `{command} --overwrite_output_dir` replaces it, and "
            f"`{elsewhere} --output_dir {quote(output_dir.rstrip('/') + '-2')}` keeps it."
        )
    if list_checkpoints(folder) or is_set_aside(folder):
        raise TSTError(
            f"{output_dir} holds a run that is not finished: `{command} --resume_from_checkpoint last` continues it, and "
            f"`{command} --overwrite_output_dir` replaces it."
        )


@contextmanager
def holding_folder(output_dir: str, is_first_process: bool = True) -> Iterator[None]:
    """Context that makes a folder, in which nobody else starts a run meanwhile, and removes it if it fails while that is empty.

    Args:
        output_dir (`str`): The folder.
        is_first_process (`bool`, *optional*, defaults to `True`): Whether this is the process of the run that locks it.

    Raises:
        TSTError: If it cannot be made, or another process holds it.
    """
    folder = Path(output_dir)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with bad_input(f"Cannot make output_dir={output_dir}: ", OSError):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) if is_first_process else nullcontext():
            yield
    except BaseException:
        for path in new:
            with suppress(OSError):  # not made, or not empty
                path.rmdir()
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context that locks a folder. The system unlocks it if the process dies."""
    path = folder / LOCK_FILE
    with bad_input(f"Cannot write into output_dir={folder}: ", OSError):
        file = open(path, "ab")  # noqa: SIM115
    with file:
        if (held := lock_file(file)) is False:
            raise TSTError(
                f"Another process works in {folder}: wait for it, terminate it, or name another output_dir."
            )
        if held is None:
            logger.warning(f"{folder} cannot be locked on this system, so start no other run in it.")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def set_aside(folder: Path) -> None:
    """Move the files of a run in `folder` into `_replaced`; an older complete run there is kept."""
    aside = folder / REPLACED
    keeps = aside.is_dir()
    aside.mkdir(exist_ok=True)
    try:
        files = [path for name in RUN_FILES for path in folder.glob(name) if path.is_file()]
        for path in [*list_checkpoints(folder).values(), *files]:
            if not keeps:
                path.rename(aside / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except BaseException:
        if not keeps:
            put_back(folder)
        raise


def is_set_aside(folder: Path) -> bool:
    """Whether `folder` holds what [`set_aside`] moved."""
    return (folder / REPLACED).is_dir()


def put_back(folder: Path) -> None:
    """Undo [`set_aside`], if the moved files still exist."""
    aside = folder / REPLACED
    for path in aside.glob("*"):
        path.rename(folder / path.name)
    if aside.is_dir():
        aside.rmdir()


def remove_set_aside(folder: Path) -> None:
    """Remove what [`set_aside`] moved, once the checkpoints of the new run are on the disk; keep it if they do not get there."""
    if not is_set_aside(folder):
        return
    with suppress(OSError):
        for checkpoint in list_checkpoints(folder).values():
            flush_folder(checkpoint)
        shutil.rmtree(folder / REPLACED, ignore_errors=True)
