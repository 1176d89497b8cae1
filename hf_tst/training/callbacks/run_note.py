"""The note of each start of training in `trainer_state.json`: the run's id, arguments, hardware and versions."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...checkpoints.run_identity import take_folder
from ...records.run_record import RUN_ID, RUN_NOTE, restored_arguments, run_note, run_notes
from .token_meter import device_peak

logger = logging.get_logger(__name__)


class RunNoteCallback(TrainerCallback):
    """Notes each start of training, and gives it an id, by which checkpoints of other runs are known.

    Args:
        trainer (`TSTTrainer`): The trainer; it has its `schedule` when training begins.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = run_note(self._trainer)
        groups = getattr(kwargs.get("optimizer"), "param_groups", None) or []
        if restored := restored_arguments(vars(state), run["arguments"], groups):
            asked = " and ".join(f"{name}={run['arguments'][name]:g}" for name in restored)
            kept = " and ".join(f"{name}={value:g}" for name, value in restored.items())
            logger.warning(
                f"The resumed optimizer keeps the checkpoint's {kept}, not {asked} of the arguments: to train with other values, start a new "
                "run from the model's weights."
            )
            run["arguments"] |= restored
        entry = {RUN_ID: uuid4().hex[:12], RUN_NOTE: run | {"peak_tflops": device_peak(args)}}
        run_notes(vars(state)).append({"step": state.global_step, **entry})
        if args.should_save:
            take_folder(args.output_dir, vars(state))
