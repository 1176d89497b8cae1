"""Change the model's input and loss at the start of training and at the phase switch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..models.superposition import fused_next_token_loss, token_superposition
from .arguments import TSTArguments
from .refusals import check_document_attention, check_ids_reach_the_embedding_alone

logger = logging.get_logger(__name__)

Reinitialized = Literal["embeddings", "head", "both"]
REINITIALIZED: tuple[Reinitialized, ...] = get_args(Reinitialized)


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

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.tst_document_boundaries == "respect":
            rows = 2 if args.tst_superposition_rows == "more" else min(2, args.per_device_train_batch_size)
            check_document_attention(kwargs["model"], rows=rows)
        if self._trainer.schedule.phase(state.global_step) == "superposition" and args.tst_mode != "output":
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

    def close(self) -> None:
        """Restore the model's own input and loss."""
        self._context.close()

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
        elif args.tst_replaces_loss:
            context = fused_next_token_loss(model, self._trainer.fused_recovery)
        else:
            return
        self._context.enter_context(context)


class ReinitializeCallback(TrainerCallback):
    """The paper's ablation that destroys the gain of superposition: new random weights for the embedding, the head or both.

    They get new weights when superposition ends, before the checkpoint there. Tied weights are both new. The optimizer's states
    are kept. Nothing happens in a run without superposition.

    Args:
        parts (`str`): `"embeddings"`, `"head"` or `"both"`.
        schedule: Function that returns the run's phases once training has begun.

    Raises:
        TSTError: When training begins, if the weights are sharded.

    Source: arXiv 2605.06546, ablations.
    """

    def __init__(self, parts: Reinitialized, schedule: Callable[[], PhaseSchedule | None]) -> None:
        if parts not in REINITIALIZED:
            raise TSTError(f"reinit_at_switch must be one of {', '.join(REINITIALIZED)}, but is {parts!r}.")
        self._parts = parts
        self._schedule = schedule

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any(hasattr(module.weight, "device_mesh") for module in self._modules(kwargs["model"])):
            raise TSTError("reinit_at_switch does not work with FSDP: shards would get different weights.")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        schedule = self._schedule()
        if schedule is None or state.global_step != schedule.switch_step:
            return
        model = kwargs["model"]
        # All ranks draw the same numbers. Training's own random numbers do not change.
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(args.seed)
            for module in self._modules(model):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                model._init_weights(module)
        logger.info(f"Step {state.global_step}: new random weights ({self._parts}).")

    def _modules(self, model: Any) -> list[nn.Module]:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        return {"embeddings": [embedding], "head": [head], "both": [embedding, head]}[self._parts]
