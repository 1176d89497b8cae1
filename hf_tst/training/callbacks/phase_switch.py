"""Change the model's input and loss at the start of training and at the phase switch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...errors import TSTError
from ...models.fused import TSTLoss
from ...models.probes import check_document_attention, check_ids_reach_the_embedding_alone
from ...models.superposition import find_language_model, fused_next_token_loss, token_superposition
from ..arguments import TSTArguments
from ..refusals import check_loss, warn_of_early_stopping

logger = logging.get_logger(__name__)


class PhaseSwitchCallback(TrainerCallback):
    """Turns token superposition, or the fused next-token loss, on and off by the phase of training.

    [`TSTTrainer`] calls [`close`] when training ends or fails.

    Args:
        trainer (`TSTTrainer`): The trainer; it has its `schedule` when training begins.

    Raises:
        TSTError: When training begins, if the model reads ids outside of its input embedding or, with
            `tst_document_boundaries="respect"`, if its attention crosses documents.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._context = ExitStack()
        self._superposed_model: Any = None  # `None` outside of superposition

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()  # auto_find_batch_size begins training again after out-of-memory
        check_loss(self._trainer)  # again, since it may have been set after the trainer was made
        if args.tst_document_boundaries == "respect":
            rows = 2 if args.tst_superposition_rows == "more" else min(2, args.per_device_train_batch_size)
            check_document_attention(kwargs["model"], rows=rows)
        if self._trainer.schedule.phase(state.global_step) == "superposition":
            warn_of_early_stopping(self._trainer)
            if args.tst_mode != "output":
                check_ids_reach_the_embedding_alone(kwargs["model"])
        self._enter(args, state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step != self._trainer.schedule.switch_step:
            return
        self._enter(args, state.global_step, kwargs["model"])
        control.should_log = True
        if args.tst_save_at_switch:
            control.should_save = True
        logger.info(f"Step {state.global_step}: superposition ends, next-token training begins.")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        schedule, step = self._trainer.schedule, state.global_step
        if self._trainer.preempted or step >= schedule.max_steps:
            return
        if schedule.phase(max(0, step - 1)) == "superposition":
            logger.warning(
                f"Training ended after {step} steps, in superposition, which lasts for {schedule.switch_step}: the model has not been trained on "
                "next tokens."
            )

    def superposed_loss(self) -> TSTLoss:
        """The loss function that the model has in superposition.

        Raises:
            TSTError: If it has another one.
        """
        loss = getattr(self._superposed_model, "loss_function", None)
        if not isinstance(loss, TSTLoss):
            raise TSTError(
                "There is no superposition: the model's loss_function was set during training, or PhaseSwitchCallback was removed from the "
                "trainer's callbacks. Leave both as the trainer has set them."
            )
        return loss

    def close(self) -> None:
        """Restore the model's own input and loss."""
        self._context.close()
        self._superposed_model = None

    def _enter(self, args: TSTArguments, step: int, model: Any) -> None:
        """Leave the current phase and enter that of `step`."""
        self.close()
        if self._trainer.schedule.phase(step) == "superposition":
            context = token_superposition(
                model,
                args.tst_bag_size,
                offset_weighting=args.tst_offset_weighting,
                input_weighting=args.tst_input_weighting,
                mode=args.tst_mode,
                fused_loss=self._trainer.fused_loss,
                document_boundaries=args.tst_document_boundaries,
            )
            self._superposed_model = find_language_model(model)[1]
        elif args.tst_replaces_loss:
            context = fused_next_token_loss(model, self._trainer.fused_recovery)
        else:
            return
        self._context.enter_context(context)
