"""A Trainer that does not train on, nor save, what a loss that is not finite has left of the weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..errors import RunError
from .arguments import TSTTrainingArguments
from .bad_loss import BadNumber, FirstNotFinite
from .checkpointing import CheckpointingTrainer

logger = logging.get_logger(__name__)


class GuardedTrainer(CheckpointingTrainer):
    """Trainer that does with a loss or gradient that is not finite what `tst_bad_loss` says.

    `"stop"` notes each loss and gradient norm on the device, which waits for nothing, and looks at the notes where training
    waits for the device anyway: when it logs, and before it saves, so that every checkpoint is from before. `"skip"` has
    to know before the optimizer's step, and so waits for the device once a step.

    Overrides:
        - `train`: forgets what an earlier training noted.
        - `training_step`, `_get_grad_norm`: note the loss and the norm; `"skip"` drops the gradients.
        - `log`, `_save_checkpoint`, `_finalize_training`: look at what was noted.
    """

    args: TSTTrainingArguments

    _losses: FirstNotFinite
    _norms: FirstNotFinite
    _micro_batch = (0, -1)  # of the micro-batch trained on last: its step, and its number there
    skipped_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train. Arguments and result are those of [`~transformers.Trainer.train`].

        Raises:
            RunError: At a loss that is not finite, and if a checkpoint cannot be written.
        """
        self._losses, self._norms = FirstNotFinite(), FirstNotFinite()
        self._micro_batch = (0, -1)
        self.skipped_steps = 0
        return super().train(*args, **kwargs)

    def phase_and_blocks(self, found: BadNumber, rank: int) -> tuple[str, list[int] | None]:
        """The phase of the step, and the blocks that it was computed on, if they are known."""
        return "training", None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; notes a loss that is not finite."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        step, last = self.state.global_step, self._micro_batch
        self._micro_batch = (step, last[1] + 1 if last[0] == step else 0)
        if self.args.tst_bad_loss == "stop":
            self._losses.note(loss, self._time(*self._micro_batch))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, and stop at a loss that is not finite."""
        if self.is_in_train and self.skipped_steps:
            logs["tst_skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)
        if self.is_in_train and "loss" in logs:
            self._stop_at_bad_loss()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler looks for itself, and finds infinities as a matter of course.
        if not isinstance(norm, Tensor) or getattr(self.accelerator, "scaler", None) is not None:
            return norm
        step = self.state.global_step
        if self.args.tst_bad_loss == "stop":
            local = (
                norm.to_local() if hasattr(norm, "to_local") else norm
            )  # of sharded gradients, this rank's share
            self._norms.note(local, self._time(step, self.args.gradient_accumulation_steps - 1))
        elif self.args.tst_bad_loss == "skip":
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if not torch.isfinite(whole):  # the norm is that of all ranks, so they agree
                self._skip(model, BadNumber(step, None, float(whole)))
        return norm

    def _skip(self, model: nn.Module, found: BadNumber) -> None:
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer leaves parameters without gradient, and their moments, alone
        self.skipped_steps += 1
        logger.warning(
            f"{found.describe(*self.phase_and_blocks(found, self.args.process_index))}: it is skipped."
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._stop_at_bad_loss()
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_at_bad_loss()
        return super()._finalize_training(*args, **kwargs)

    def _stop_at_bad_loss(self) -> None:
        """Raise `RunError` if a number that was noted, on any process, is not finite."""
        if self.args.tst_bad_loss != "stop":
            return
        mine = [
            (*noted, kind)
            for kind, notes in enumerate((self._losses, self._norms))
            if (noted := notes.found()) is not None
        ]
        if self.args.world_size == 1:
            everybody = [(*entry, 0) for entry in mine]
        else:
            everybody = gather_object([(*entry, self.args.process_index) for entry in mine])
        if not everybody:
            return
        time, value, kind, rank = min(everybody, key=lambda entry: (entry[0], entry[2], entry[3]))
        step, micro_batch = divmod(time, self.args.gradient_accumulation_steps)
        found = BadNumber(step, None if kind else micro_batch, value)
        raise RunError(
            f"{found.describe(*self.phase_and_blocks(found, rank))}. Training stops, and checkpoints are from before it: look "
            "at the data, lower learning_rate, or go on with resume_from_checkpoint='last' and tst_bad_loss='skip'."
        )

    def _time(self, step: int, micro_batch: int) -> int:
        return step * self.args.gradient_accumulation_steps + micro_batch
