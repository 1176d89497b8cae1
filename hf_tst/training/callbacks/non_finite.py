"""Non-finite losses and gradients: detected without an extra synchronization, and reported with their blocks."""

from __future__ import annotations

import math
from itertools import compress
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...errors import RunError

logger = logging.get_logger(__name__)

# Maximum number of blocks in a message.
_NAMED_BLOCKS = 32
# Maximum number of unchecked losses and norms, if nothing is logged for a long time.
_MOST_NOTES = 1000
# In place of a micro-batch's number, for a gradient: it sorts after all losses of the step.
_GRADIENT = math.inf


class NonFiniteCallback(TrainerCallback):
    """Applies `tst_nonfinite_loss`.

    With `"stop"` it keeps each loss and gradient norm on the device and checks them when training waits for the device anyway:
    when it logs, before it saves, and at the end. With `"skip"` it checks each gradient norm before the optimizer step.

    Args:
        trainer (`TSTTrainer`): The trainer, with its arguments, state, accelerator and data.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._notes: list[tuple[int, float, Tensor]] = []  # step, micro-batch, number
        self.skipped_steps = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._notes, self.skipped_steps = [], 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and ("loss" in logs or "train_runtime" in logs):
            self.check()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if len(self._notes) >= _MOST_NOTES:
            self.check()

    def note_loss(self, loss: Tensor) -> None:
        """Store the loss of the next micro-batch. Does not wait for the device."""
        if self._trainer.args.tst_nonfinite_loss != "stop":
            return
        step = self._trainer.state.global_step
        micro_batch = self._notes[-1][1] + 1 if self._notes and self._notes[-1][0] == step else 0
        # A copy: with CUDA graphs (torch_compile_mode="reduce-overhead") the next forward pass writes over the loss.
        self._notes.append((step, micro_batch, loss.detach().clone()))

    def note_norm(self, model: nn.Module, norm: Any) -> None:
        """Store the gradient norm of a step. With `"skip"`, wait for it and drop a non-finite gradient."""
        choice = self._trainer.args.tst_nonfinite_loss
        # A gradient scaler checks gradients itself; infinite ones are normal with it.
        if not isinstance(norm, Tensor) or getattr(self._trainer.accelerator, "scaler", None) is not None:
            return
        step = self._trainer.state.global_step
        if choice == "stop":
            # For sharded gradients, this rank's part of the norm.
            self._notes.append((step, _GRADIENT, norm.to_local() if hasattr(norm, "to_local") else norm))
        elif choice == "skip":
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if not torch.isfinite(whole):  # all ranks have the same norm, so they agree
                drop_gradient(model)
                self.skipped_steps += 1
                logger.warning(f"{self._describe(step, _GRADIENT, 0, float(whole))}: the step is skipped.")

    def check(self) -> None:
        """Check all stored numbers. Waits for the device. Every rank must take part.

        Raises:
            RunError: On all ranks, if one of them has a non-finite number.
        """
        if self._trainer.args.tst_nonfinite_loss != "stop":
            return
        notes, self._notes = self._notes, []
        are_bad = [~torch.isfinite(number).to(notes[0][2].device) for _, _, number in notes]
        bad = list(compress(notes, torch.stack(are_bad).tolist())) if notes else []
        reader = 0 if self._trainer._data is None else self._trainer._data.rank
        first = [(step, micro_batch, reader, float(number)) for step, micro_batch, number in bad[:1]]
        if found := gather_object(first):
            raise RunError(
                f"{self._describe(*min(found))}. Training stops; all checkpoints are from before this step. Check the data, "
                "continue with resume_from_checkpoint='last' and tst_nonfinite_loss='skip', or start a new run with a lower learning_rate (a "
                "resumed one keeps the checkpoint's)."
            )

    def _describe(self, step: int, micro_batch: float, reader: int, value: float) -> str:
        what, number = ("gradient", None) if micro_batch == _GRADIENT else ("loss", int(micro_batch))
        data = self._trainer._data
        phase = "training" if data is None else self._trainer.schedule.phase(step)
        blocks = None if data is None else data.blocks_of_step(step, reader, number)
        return f"The {what} of optimizer step {step} ({phase}) is {value}{name_blocks(blocks)}"


def drop_gradient(model: nn.Module) -> None:
    """Skip an optimizer step: without gradients, the optimizer changes neither parameters nor moments."""
    for parameter in model.parameters():
        parameter.grad = None


def name_blocks(blocks: list[int] | None) -> str:
    """The blocks that a number was computed on, as the end of a sentence. Empty in plain training and for streams (`None`)."""
    if blocks is None:
        return ""
    named = ", ".join(map(str, blocks[:_NAMED_BLOCKS])) + (", …" if len(blocks) > _NAMED_BLOCKS else "")
    return f"; it was computed on blocks {named} of the training data"
