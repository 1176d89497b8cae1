"""A Trainer whose evaluation has no logits where it reports the loss alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..models.superposition import fused_evaluation_loss
from .arguments import TSTTrainingArguments


class LeanEvaluationTrainer(Trainer):
    """Trainer whose evaluation fuses loss and head, as training does, unless metrics or predictions need the logits.

    Overrides:
        - `evaluation_loop`: with the fused loss, where training has it and nothing but the loss is asked for.
    """

    args: TSTTrainingArguments

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Evaluate or predict. Arguments and result are those of [`~transformers.Trainer.evaluation_loop`]."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        fuses = prediction_loss_only and self.args.tst_replaces_loss
        with fused_evaluation_loss(self.model, self.args.tst_fused_loss) if fuses else nullcontext():
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
