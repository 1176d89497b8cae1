"""A Trainer whose checkpoints are complete or not there."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainOutput

from ..errors import RunError, TSTError, one_line
from .checkpoint_folders import UNFINISHED, clear_unfinished, finish_checkpoint, rotate_checkpoints
from .checkpoints import check_checkpoint, last_complete_checkpoint
from .preemption import PreemptionCallback
from .publishing import PublishingTrainer

STATE_FILE = "trainer_state.json"
# What asks for the newest complete checkpoint, on a command line, too.
NEWEST = (True, "last", "true", "True")


class CheckpointingTrainer(PublishingTrainer):
    """Trainer that writes a checkpoint aside and renames it when all of it, with a manifest, is on the disk.

    Overrides:
        - `train`: looks whether the output folder can be written to.
        - `_save_checkpoint`: the files of all processes go to `_unfinished`; then the main process writes the manifest,
          renames, pushes and removes checkpoints that are too many.
        - `_get_output_dir`: `_unfinished`, while a checkpoint is written.
        - `_push_from_checkpoint`: waits until the checkpoint has its name.
        - `_run_epoch`: trains nothing in a run that is over.
        - `_finalize_training`: removes no checkpoint.
    """

    _writes_aside = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preemption = PreemptionCallback()
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is JITCheckpointCallback:
                callback.on_train_end(self.args, self.state, self.control)  # it has caught the signal already
                self.remove_callback(callback)
        if self.args.enable_jit_checkpoint:
            self.add_callback(self._preemption)

    @property
    def preempted(self) -> bool:
        """Whether the last training ended early because of SIGTERM, with a checkpoint to go on from."""
        return self._preemption.stopped

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, once it is known that checkpoints can be written.

        Raises:
            TSTError: If no file can be made in the output folder.
            RunError: If a checkpoint cannot be written.
        """
        self._check_output_dir()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._preemption.close()

    def choose_checkpoint(self, requested: str | bool | None) -> str | None:
        """The checkpoint to resume from, the same on all processes; the main process has checked its files.

        Args:
            requested (`str` or `bool`, *optional*): A checkpoint; `True` or `"last"` for the newest that is complete.

        Raises:
            TSTError: If there is none, or it is damaged.
        """
        if not requested:
            return None
        answer: list[str | None] = [None, None]
        if self.is_world_process_zero():
            try:
                answer[0] = self._find_checkpoint(requested)
            except TSTError as error:
                answer[1] = str(error)
        found, problem = broadcast_object_list(answer)
        if problem is not None:
            raise TSTError(problem)
        return found

    def steps_to_keep(self) -> set[int]:
        """Steps whose checkpoints `save_total_limit` does not remove, besides the newest and the best."""
        return set()

    def _check_output_dir(self) -> None:
        if not self.args.should_save:
            return
        probe = Path(self.args.output_dir) / f"{UNFINISHED}.{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise TSTError(f"Cannot write to output_dir={self.args.output_dir}: {error.strerror}.") from error

    def _find_checkpoint(self, requested: str | bool) -> str:
        if requested not in NEWEST:
            check_checkpoint(str(requested))
            return str(requested)
        found = last_complete_checkpoint(self.args.output_dir)
        if found is None:
            raise TSTError(f"There is no checkpoint to resume from in {self.args.output_dir}.")
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        try:
            if self.args.local_process_index == 0:
                clear_unfinished(run_dir)
            self.accelerator.wait_for_everyone()
            self._write_aside(model, trial, run_dir / UNFINISHED / name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                finish_checkpoint(run_dir, name)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0 and (run_dir / UNFINISHED / name).is_dir():
                with suppress(FileNotFoundError):  # a shared disk that has not heard of the renaming yet
                    finish_checkpoint(run_dir, name)  # what was written on this machine's own disk
        except Exception as error:
            clear_unfinished(run_dir)  # what is half written may be what fills the disk
            raise RunError(
                f"Writing {run_dir / name} failed: {one_line(error)} ({shutil.disk_usage(run_dir).free / 1e9:.2f} GB are free "
                "there). Earlier checkpoints are as they were: go on with resume_from_checkpoint='last' when the cause is gone."
            ) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {self.state.global_step, *self.steps_to_keep()}
            if best is not None and (number := Path(best).name.rpartition("-")[2]).isdecimal():
                keep.add(int(number))
            rotate_checkpoints(run_dir, self.args.save_total_limit, keep)

    def _write_aside(self, model: Any, trial: Any, written: Path) -> None:
        """Let Trainer write a checkpoint in `_unfinished`; its state names the best one where that lies, or will lie."""
        named = self.state.best_model_checkpoint
        self._writes_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_aside = False
        found = self.state.best_model_checkpoint  # Trainer looked for it in `_unfinished`
        step = self.state.best_global_step
        best = os.path.join(super()._get_output_dir(trial), f"checkpoint-{step}")
        there = step is not None and (step == self.state.global_step or os.path.isdir(best))
        self.state.best_model_checkpoint = best if there else named
        if self.args.should_save and self.state.best_model_checkpoint != found:
            self.state.save_to_json(str(written / STATE_FILE))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writes_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint, Trainer would see that the run is over after one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of 1, Trainer would keep the best checkpoint alone, also when training stops early and would go on
        # from the newest.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
