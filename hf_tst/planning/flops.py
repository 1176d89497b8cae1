"""Floating-point operations of a training step, from shapes alone."""

from __future__ import annotations

from typing import Any

from ..bags.phases import Phase
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind, check_mtp
from .costs import operations_per_position


def step_flops(
    model: Any,
    rows: int,
    length: int,
    *,
    phase: Phase = "recovery",
    mtp_num_heads: int = 1,
    mtp_kind: MTPKind = "parallel",
) -> int:
    """Operations of the forward and backward pass of one training step.

    Counted, as `torch.utils.flop_counter.FlopCounterMode` counts them, are matrix products, 2 a multiplication with
    addition: those of the layers, with the experts that a position is sent to; scores and values of softmax attention over
    all l · l pairs, masked ones, too; the head at all positions, once for each head of multi-token prediction, which trains
    in recovery only. Not counted are the optimizer, what is computed twice by activation checkpointing, element by element
    operations (norms, softmax, averaging a bag) and the scans of state-space and linear-attention layers. Norm weights and
    biases are counted as if they were columns of matrices, which is far below 1 % at any size that is trained.

    A superposition step costs what a recovery step without extra heads does, whatever the bag size: a bag is one latent
    position. It is the count of `hf-tst plan`, apart from attention, which the plan counts as causal, at half of that.
    The trainer's `total_flos` is Transformers' 6 · N · D: N all parameters that are no embeddings, experts that are not used
    included, D latent positions; it leaves out attention, the head if it is tied, and further uses of the head.

    Args:
        model (`PretrainedConfig` or `PreTrainedModel`): A causal language model, or its configuration.
        rows (`int`): Rows of the step, over all devices and micro-batches.
        length (`int`): Latent positions a row, l, the same in both phases.
        phase (`str`, defaults to `"recovery"`): `"superposition"` or `"recovery"`, which ordinary training is, too.
        mtp_num_heads (`int`, defaults to 1): Heads with the model's own, n.
        mtp_kind (`str`, defaults to `"parallel"`): `"parallel"` or `"sequential"`.

    Raises:
        ValueError: If `mtp_num_heads` or `mtp_kind` is out of range.

    Example:
        >>> step_flops(config, rows=8, length=1024, mtp_num_heads=2) / step_flops(config, rows=8, length=1024)
    """
    check_mtp(mtp_num_heads, mtp_kind, prefix="mtp_")
    shape = ModelShape.from_config(getattr(model, "config", model))
    if phase == "recovery":
        shape = shape.with_mtp_heads(mtp_num_heads, mtp_kind)
    return rows * length * operations_per_position(shape, length, causal=False)
