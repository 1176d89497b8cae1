"""Spikes: losses and gradient norms far above their running level. All ranks skip the step or stop."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...errors import RunError
from .non_finite import drop_gradient, name_blocks

logger = logging.get_logger(__name__)

# Where `trainer_state.json` holds the running levels and the spikes found, among `stateful_callbacks`.
SPIKES = "TSTSpikes"


class SpikeCallback(TrainerCallback):
    """Applies `tst_spikes`.

    A spike is a loss or gradient norm of one optimizer step that is more than `tst_spike_threshold` standard deviations above the
    mean of the last `tst_spike_window` steps of its phase. No step counts as a spike before half of these steps are done. In the
    mean, a spike is clipped to the limit, so the mean follows a lasting change. Loss and norm are those of all ranks. With
    `"ignore"` nothing is computed; otherwise training waits for the device once per step.

    Args:
        trainer (`TSTTrainer`): The trainer, with its arguments, state, schedule, accelerator and data.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loss: Tensor | None = None  # sum over the micro-batches of this step, on this rank
        self.skipped_steps = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss, self.skipped_steps = None, 0
        if args.tst_spikes != "ignore" and state.global_step == 0:
            state.stateful_callbacks.pop(SPIKES, None)

    def note_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to that of the step. Does not wait for the device."""
        if self._trainer.args.tst_spikes != "ignore":
            self._loss = loss.detach().clone() if self._loss is None else self._loss + loss

    def note_norm(self, model: nn.Module, norm: Any) -> None:
        """Check the loss and gradient norm of a step, before the optimizer step. Every rank must take part.

        Raises:
            RunError: On all ranks, at a spike with `tst_spikes="stop"`.
        """
        args, loss, self._loss = self._trainer.args, self._loss, None
        if args.tst_spikes == "ignore" or loss is None or not isinstance(norm, Tensor):
            return
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        numbers = {
            "loss": float(self._trainer.accelerator.reduce(loss.float(), "mean")),
            "gradient norm": float(whole),
        }
        if not all(map(math.isfinite, numbers.values())):
            return  # for `tst_nonfinite_loss`
        if spikes := self._find(numbers):
            self._handle(model, spikes)

    def _find(self, numbers: dict[str, float]) -> dict[str, dict[str, float]]:
        """The numbers of a step that are spikes, each with its `value` and `limit`. Adds all numbers to the running levels."""
        args, state = self._trainer.args, self._trainer.state
        phase = self._trainer.schedule.phase(state.global_step)
        kept = state.stateful_callbacks.setdefault(SPIKES, {"phase": phase, "levels": {}, "found": []})
        if kept["phase"] != phase:  # each phase has another loss
            kept |= {"phase": phase, "levels": {}}
        found = {}
        for name, number in numbers.items():
            level = kept["levels"].setdefault(name, [])
            limit = math.inf
            if len(level) >= max(2, args.tst_spike_window // 2):
                limit = fmean(level) + args.tst_spike_threshold * pstdev(level)
            if number > limit:
                found[name] = {"value": number, "limit": limit}
            level.append(min(number, limit))
            del level[: -args.tst_spike_window]
        return found

    def _handle(self, model: nn.Module, spikes: dict[str, dict[str, float]]) -> None:
        state, data = self._trainer.state, self._trainer._data
        step, kept = state.global_step, state.stateful_callbacks[SPIKES]
        blocks = None if data is None else data.blocks_of_step(step, data.rank, None)
        numbers = " and ".join(
            f"{name} {spike['value']:.4g} (limit {spike['limit']:.4g})" for name, spike in spikes.items()
        )
        text = f"Optimizer step {step} ({kept['phase']}) has a spike: {numbers}{name_blocks(blocks)}"
        if self._trainer.args.tst_spikes == "stop":
            raise RunError(
                f"{text}. Training stops: check the data, resume with tst_spikes='skip', or start a new run with a lower learning_rate (a "
                "resumed one keeps the checkpoint's)."
            )
        drop_gradient(model)
        self.skipped_steps += 1
        kept["found"].append({"step": step, "blocks": blocks, **spikes})
        logger.warning(f"{text}. The step is skipped.")
