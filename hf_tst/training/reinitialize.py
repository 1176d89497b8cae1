"""Forget the embedding or the head at the phase switch: the paper's ablation that loses what superposition gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..errors import TSTError

logger = logging.get_logger(__name__)

Reinitialized = Literal["embeddings", "head", "both"]
REINITIALIZED: tuple[Reinitialized, ...] = get_args(Reinitialized)


class ReinitializeCallback(TrainerCallback):
    """Gives the embedding, the head or both new random weights when superposition ends, before the checkpoint there.

    Where they are one weight, both are new. The optimizer's states stay. Nothing happens in a run without superposition.

    Args:
        parts (`str`): `"embeddings"`, `"head"` or `"both"`.
        schedule: Gives the run's phases, once training has begun.

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
            raise TSTError("reinit_at_switch cannot go with FSDP, whose shards it would not fill alike.")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        schedule = self._schedule()
        if schedule is None or schedule.switch_step == 0 or state.global_step != schedule.switch_step:
            return
        model = kwargs["model"]
        # All ranks draw the same numbers, and those of training stay what they would have been.
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
