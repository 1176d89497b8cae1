"""The paper's ablation: new random weights at the phase switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...bags.phases import PhaseSchedule
from ...errors import TSTError, check_choice

logger = logging.get_logger(__name__)

Reinitialized = Literal["embeddings", "head", "both"]


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
        check_choice("reinit_at_switch", parts, Reinitialized)
        self._parts = parts
        self._schedule = schedule

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any(hasattr(module.weight, "device_mesh") for module in self._modules(kwargs["model"])):
            raise TSTError(
                "reinit_at_switch does not work with FSDP, whose shards would get different weights: use DDP, or leave it out."
            )

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
