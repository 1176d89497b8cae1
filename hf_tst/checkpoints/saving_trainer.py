"""A Trainer whose checkpoints are complete or absent, and flushed to disk (fsync) while training continues.

It knows nothing of superposition.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from ..errors import TSTError, whole_message
from ..models.sharding import without_tied
from ..models.temporary import replaced
from ..records.hub import check_repo_holds_no_other_model, explained_hub_errors
from .folders import (
    check_output_dir,
    choose_checkpoint,
    fail_on_all_ranks,
    rotate_checkpoints,
    write_checkpoint,
)
from .manifest import flush_folder
from .renamed_weights import load_renamed_weights
from .run_identity import foreign_checkpoints


def signature_of(method: Any) -> Any:
    """Decorator that gives an override the signature of Trainer's `method`, in any version of Transformers."""
    return wraps(method, assigned=())


class SavingTrainer(Trainer):
    """Trainer that writes each checkpoint whole, checks it before it resumes from it, and explains errors of the Hub.

    A subclass adds its files by `_add_to_checkpoint`, and keeps checkpoints beyond `save_total_limit` by `_kept_checkpoints`.

    Args:
        given, kwargs: The arguments of [`~transformers.Trainer`].
    """

    def __init__(self, *given: Any, **kwargs: Any) -> None:
        self._checkpoint: str | None = None  # to resume from, during training
        self._unfinished: Path | None = None  # the folder of the checkpoint that is being written
        # The checkpoint written last, and the thread that flushes it to disk: on one process per machine, which may have its own disk.
        self._flushed: tuple[Path, list[Future[None]]] | None = None
        super().__init__(*given, **kwargs)

    @signature_of(Trainer.train)
    def train(
        self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train. Arguments and result are those of [`~transformers.Trainer.train`].

        Raises:
            TSTError: If the output folder is not writable, the checkpoint is damaged, or no checkpoint could be saved.
            RunError: If a checkpoint cannot be written.
        """
        args = self.args
        check_output_dir(args)
        self._checkpoint = choose_checkpoint(resume_from_checkpoint, args)
        try:
            # `log` changes it at the end.
            with replaced(args.__dict__, save_total_limit=args.save_total_limit):
                result = super().train(self._checkpoint, *positional, **kwargs)
            self._wait_for_disk()
            return result
        finally:
            if self._flushed is not None:
                wait(self._flushed[1])
            self._checkpoint = self._flushed = None
            self.is_in_train = False  # Trainer does not reset it when training fails

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """The steps and epochs of a run."""
        # By now `train` has given the model the special tokens of the tokenizer, which a checkpoint holds.
        if args.should_save:
            check_saving(self.model, self.processing_class, args)
        return super().set_initial_training_values(args, dataloader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`."""
        if self.is_in_train and "train_runtime" in logs:
            # At the end, with a limit of 1, Trainer would remove all checkpoints but the best.
            self.args.save_total_limit = None
        super().log(logs, start_time)

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:
            load_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed_weights(self.model, self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._wait_for_disk()
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        write = partial(super()._save_checkpoint, model, trial)
        write_checkpoint(checkpoint, self.args, lambda folder: self._write_into(folder, run_dir, write))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        thread = ThreadPoolExecutor(1)
        flushes = [thread.submit(flush_folder, checkpoint)] if self.args.local_process_index == 0 else []
        thread.shutdown(wait=False)
        self._flushed = checkpoint, flushes

    def _write_into(self, folder: Path, run_dir: Path, write: Callable[[], Any]) -> None:
        """Write this rank's files into `folder`, whose name is that of the checkpoint, by Trainer's own method."""
        state = self.state
        # Otherwise Trainer would look for the best checkpoint in `_unfinished`, and wait for other ranks, which may have failed.
        best_step, state.best_global_step = state.best_global_step, None
        self._unfinished = folder.parent
        try:
            write()
        finally:
            self._unfinished, state.best_global_step = None, best_step
        self._add_to_checkpoint(folder)
        best = run_dir / f"checkpoint-{best_step}"
        if best_step and (
            best_step == state.global_step or (best.is_dir() and best not in foreign_checkpoints(run_dir))
        ):
            state.best_model_checkpoint = str(best)
        if self.args.should_save:
            state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _wait_for_disk(self) -> None:
        """Wait until the checkpoint written last is on the disk; only then remove those beyond the limit. Every rank must take part.

        Raises:
            RunError: On all ranks, if it failed on one of them.
        """
        if self._flushed is None:
            return
        (checkpoint, flushes), self._flushed = self._flushed, None
        with fail_on_all_ranks(checkpoint, self.args):
            for flush in flushes:
                flush.result()
        if self.args.should_save:
            keep = {checkpoint.name, Path(self.state.best_model_checkpoint or "").name}
            keep |= self._kept_checkpoints()
            rotate_checkpoints(checkpoint.parent, self.args.save_total_limit, keep)

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Write what this rank adds to Trainer's files."""

    def _kept_checkpoints(self) -> set[str]:
        """Names of the checkpoints that `save_total_limit` does not remove, besides the best and the last."""
        return set()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # While it is not None, Trainer calls this too early: before the checkpoint is complete.
        if self._unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary checkpoint, also if FSDP shards its weights."""
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # Trainer would save nothing with SHARDED_STATE_DICT, and tied weights twice with FULL_STATE_DICT.
        weights = without_tied(self.model, self.accelerator.get_state_dict(self.model))
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository to push to, unless it exists. Refuses a repository with another model.

        Raises:
            HubError: If the Hub refuses or does not answer.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained_hub_errors(f"Making the repository {name}", "Nothing was changed."):
            # In older versions of Transformers it has no argument `private`.
            super().init_hf_repo(token, *([] if private is None else [private]))
            if self.is_world_process_zero():
                config, token = self.accelerator.unwrap_model(self.model).config, token or self.args.hub_token
                check_repo_holds_no_other_model(self.hub_model_id, config, token, self.args.hub_revision)

    @signature_of(Trainer.push_to_hub)
    def push_to_hub(self, *positional: Any, **kwargs: Any) -> Any:
        """Upload the model, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            HubError: If the Hub refuses or does not answer. The model is still saved in `output_dir`.
        """
        kept = f"The model is saved in {self.args.output_dir}."
        with explained_hub_errors(f"Pushing {self.args.output_dir}", kept):
            return super().push_to_hub(*positional, **kwargs)


def check_saving(model: Any, tokenizer: Any, args: Any) -> None:
    """Raise `TSTError` if a checkpoint could not hold the configurations, tokenizer or arguments: they are saved once, and removed."""
    parts = {"the tokenizer": tokenizer}
    if isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False):
        parts["the model's configuration"] = model.config
        if model.can_generate():
            parts["the model's generation configuration"] = model.generation_config
    saves = {name: part.save_pretrained for name, part in parts.items() if hasattr(part, "save_pretrained")}
    saves["the class of the training arguments"] = lambda folder: torch.save(
        args, Path(folder) / TRAINING_ARGS_NAME
    )
    for name, save in saves.items():
        try:
            with TemporaryDirectory() as folder:
                save(folder)
        except OSError:  # there is no place for temporary files
            continue
        except Exception as error:
            raise TSTError(
                f"The first checkpoint would fail, because {name} cannot be saved: {whole_message(error)}."
            ) from error
