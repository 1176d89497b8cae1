"""Save the checkpoints of a trainer: complete or absent, and flushed to disk (fsync) while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import TSTError, whole_message
from .folders import fail_on_all_ranks, rotate_checkpoints, write_checkpoint
from .manifest import flush_folder
from .run_identity import foreign_checkpoints


class CheckpointSaver:
    """Saves the checkpoints of a trainer, one after the other.

    Args:
        trainer ([`SavingTrainer`]): The trainer.

    Attributes:
        unfinished (`Path`, *optional*): While a checkpoint is written, the folder that it is in until it is complete.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.unfinished: Path | None = None
        # The checkpoint written last, and the thread that flushes it to disk: on one process per machine, which may have its own disk.
        self._flushed: tuple[Path, list[Future[None]]] | None = None

    def save(self, run_dir: Path, write: Callable[[], Any], add: Callable[[Path], Any]) -> None:
        """Write the checkpoint of this step. Every rank must take part.

        Args:
            run_dir (`Path`): Folder of the checkpoints.
            write: Trainer's own method. While it runs, `unfinished` is the folder to write `checkpoint-<step>` into.
            add: Function that adds this rank's further files to the given checkpoint.

        Raises:
            RunError: On all ranks, if this checkpoint fails on one of them, or the one before did not reach the disk.
        """
        self.finish()
        trainer = self._trainer
        checkpoint = run_dir / f"checkpoint-{trainer.state.global_step}"
        write_checkpoint(checkpoint, trainer.args, lambda folder: self._write(folder, run_dir, write, add))
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(checkpoint))
        thread = ThreadPoolExecutor(1)
        flushes = [thread.submit(flush_folder, checkpoint)] if trainer.args.local_process_index == 0 else []
        thread.shutdown(wait=False)
        self._flushed = checkpoint, flushes

    def _write(
        self, folder: Path, run_dir: Path, write: Callable[[], Any], add: Callable[[Path], Any]
    ) -> None:
        state = self._trainer.state
        # Otherwise Trainer would look for the best checkpoint in `unfinished`, and wait for other ranks, which may have failed.
        best_step, state.best_global_step = state.best_global_step, None
        self.unfinished = folder.parent
        try:
            write()
        finally:
            self.unfinished, state.best_global_step = None, best_step
        add(folder)
        best = run_dir / f"checkpoint-{best_step}"
        if best_step and (
            best_step == state.global_step or (best.is_dir() and best not in foreign_checkpoints(run_dir))
        ):
            state.best_model_checkpoint = str(best)
        if self._trainer.args.should_save:
            state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def finish(self) -> None:
        """Wait until the checkpoint written last is on the disk; only then remove those beyond the limit. Every rank must take part.

        Raises:
            RunError: On all ranks, if it failed on one of them.
        """
        if self._flushed is None:
            return
        args, state = self._trainer.args, self._trainer.state
        (checkpoint, flushes), self._flushed = self._flushed, None
        with fail_on_all_ranks(checkpoint, args):
            for flush in flushes:
                flush.result()
        if args.should_save:
            keep = {checkpoint.name, Path(state.best_model_checkpoint or "").name}
            keep |= self._trainer._kept_checkpoints()
            rotate_checkpoints(checkpoint.parent, args.save_total_limit, keep)

    def close(self) -> None:
        """Wait until the thread of this process ends, whether it failed or not."""
        if self._flushed is not None:
            wait(self._flushed[1])
            self._flushed = None


def check_saving(model: Any, tokenizer: Any) -> None:
    """Raise `TSTError` if a checkpoint could not hold the model's configurations or the tokenizer: they are saved once, and removed."""
    parts = {"the tokenizer": tokenizer}
    if isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False):
        parts["the model's configuration"] = model.config
        if model.can_generate():
            parts["the model's generation configuration"] = model.generation_config
    for name, part in parts.items():
        if not hasattr(part, "save_pretrained"):
            continue
        try:
            with TemporaryDirectory() as folder:
                part.save_pretrained(folder)
        except OSError:  # there is no place for temporary files
            continue
        except Exception as error:
            raise TSTError(
                f"The first checkpoint would fail, because {name} cannot be saved: {whole_message(error)}."
            ) from error
