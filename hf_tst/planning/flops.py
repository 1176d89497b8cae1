"""FLOPs of training, from shapes alone: the count that trainer, plans and comparisons share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.utils import logging

from ..bags.phases import Phase
from ..errors import check_choice
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind, check_mtp

logger = logging.get_logger(__name__)

FORMULA = (
    "6 · parameters that multiply a position's state (4 if frozen) + 6 · layers of softmax attention · heads · "
    "(query size + value size) · row length, per latent token"
)


def flops_per_token(
    shape: ModelShape,
    length: int,
    phase: Phase = "recovery",
    mtp_num_heads: int = 1,
    mtp_kind: MTPKind = "parallel",
) -> int:
    """FLOPs of the forward and backward pass per latent token. [`step_flops`] says what is counted.

    4 per active parameter (forward, and backward to the layer before) and 2 per trained one (its gradient), so 6 · P where
    all are trained; and for each layer of softmax attention 6 · heads · (query size + value size) · l.

    Args:
        shape (`ModelShape`): The model.
        length (`int`): Latent positions per row, l.
        phase (`str`), mtp_num_heads (`int`), mtp_kind (`str`): As for [`step_flops`].
    """
    if phase == "recovery":
        shape = shape.with_mtp_heads(mtp_num_heads, mtp_kind)
    attention = 6 * shape.score_width * length
    return 4 * shape.active_parameters + 2 * shape.active_trainable_parameters + attention


def step_flops(
    model: Any,
    rows: int,
    length: int,
    *,
    phase: Phase = "recovery",
    mtp_num_heads: int = 1,
    mtp_kind: MTPKind = "parallel",
) -> int:
    """FLOPs of the forward and backward pass of one training step.

    Only matrix products are counted, as in `torch.utils.flop_counter.FlopCounterMode`: 2 per multiply-add.

    - Counted: the layers, with the experts that a position is sent to; scores and values of softmax attention over all l · l
      pairs, including masked ones; the head at all positions, and in recovery once more per extra head of multi-token prediction.
    - Not counted: the optimizer, recomputation by activation checkpointing, elementwise operations (norms, softmax, averaging a
      bag), and the scans of state-space and linear-attention layers.
    - Norm weights and biases are counted like columns of matrices, which adds far less than 1 % at any realistic size.

    A superposition step costs the same as a recovery step without extra heads, at any bag size: a bag is one latent
    position. `total_flos` of [`TSTTrainer`], `tst_model_flops_utilization`, `hf-tst plan` and `hf-tst compare` all use this
    count.

    Args:
        model (`PretrainedConfig` or `PreTrainedModel`): A causal language model, or its configuration.
        rows (`int`): Rows per step, over all devices and micro-batches.
        length (`int`): Latent positions per row, l: L, but L/s in superposition with `superposition_rows="more"`.
        phase (`str`, *optional*, defaults to `"recovery"`): `"superposition"` or `"recovery"` (also for ordinary training).
        mtp_num_heads (`int`, *optional*, defaults to 1): Number of heads, n, including the model's own.
        mtp_kind (`str`, *optional*, defaults to `"parallel"`): `"parallel"` or `"sequential"`.

    Returns:
        `int`: FLOPs of the step, over all devices.

    Raises:
        TSTError: If `phase`, `mtp_num_heads` or `mtp_kind` is out of range.
    """
    check_mtp(mtp_num_heads, mtp_kind, prefix="mtp_")
    check_choice("phase", phase, Phase)
    shape = ModelShape.from_config(getattr(model, "config", model))
    return rows * length * flops_per_token(shape, length, phase, mtp_num_heads, mtp_kind)


def find_shape(model: Any) -> ModelShape | None:
    """The shape of a model to train, with its PEFT adapter; `None`, with a warning, if its FLOPs cannot be counted."""
    try:
        adapter = next(iter(model.peft_config.values())) if hasattr(model, "peft_config") else None
        base = model if adapter is None else model.get_base_model()
        with torch.random.fork_rng(devices=[]):  # models may draw numbers when they are made
            return ModelShape.from_config(copy.deepcopy(base.config), adapter, type(base))
    except Exception as error:  # a model may have any configuration, and a count must not end its training
        logger.warning(
            f"The FLOPs of {type(model).__name__} cannot be counted, so total_flos stays 0 and no utilization is logged: "
            f"{type(error).__name__}: {error}"
        )
        return None
