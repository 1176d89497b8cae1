"""The multi-hot loss of some rows of logits, with the gradient written in place, as one Triton kernel.

One program processes one row in two sweeps: the first reads the logits and keeps a running maximum and sum, the second
writes the gradient of the logsumexp. The second runs backward, because the logits that were read last are still in the
cache. Comparing each logit with the targets would cost s comparisons per logit. Instead, the s target logits
are gathered once, and their gradients, computed in registers, overwrite those of the second sweep at the
end. A token that occurs twice in a bag is stored twice with the same value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_multi_hot import align

# Logits of a row per block: a larger block needs more registers than a program has.
_MAX_BLOCK = 8192


def multi_hot_loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    gradient_scale: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    write_gradient: bool = True,
) -> Tensor:
    """Loss of each row; overwrites `logits` with their gradient. Arguments as in `torch_multi_hot.py`."""
    rows, vocabulary = logits.shape
    row_stride, bag_size = logits.stride(0), labels.shape[1]
    # Of aligned rows, whole multiples are read and written: 16 bytes at a time instead of one element.
    width = align(vocabulary) if align(row_stride) == row_stride else vocabulary
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses
    with torch.cuda.device_of(logits):
        multi_hot_kernel[(rows,)](
            logits,
            row_stride,
            labels.contiguous(),
            weights.contiguous(),
            gradient_scale,
            losses,
            vocabulary,
            width,
            bag_size,
            ignore_index,
            logit_scale,
            0.0 if softcap is None else softcap,
            HAS_SOFTCAP=softcap is not None,
            WRITE_GRADIENT=write_gradient,
            **launch_options(vocabulary, bag_size),
        )
    return losses


def launch_options(vocabulary: int, bag_size: int) -> dict[str, int]:
    """Sizes of the kernel's blocks, and its warps."""
    block = min(_MAX_BLOCK, triton.next_power_of_2(vocabulary))
    return {
        "BLOCK": block,
        "TARGETS": triton.next_power_of_2(bag_size),
        "num_warps": max(1, min(16, block // 256)),
    }


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to the last bits of its own value.

    Triton has none, and libdevice's cannot be interpreted. Below 1 a quotient of exponentials would lose digits, so
    the Padé approximant of degrees 7 and 6 is used there. Its relative error is below 1e-8.
    """
    size = tl.abs(x)
    square = size * size
    exponential = tl.exp(-2.0 * size)
    is_small = size < 1.0
    numerator = tl.where(
        is_small, size * (135135.0 + square * (17325.0 + square * (378.0 + square))), 1.0 - exponential
    )
    denominator = tl.where(
        is_small, 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0)), 1.0 + exponential
    )
    quotient = numerator / denominator
    return tl.where(x < 0.0, -quotient, quotient)


@triton.jit
def _transform(logits, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):  # noqa: N803
    """Scaled and capped logits, float32."""
    z = logits.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _slope(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):  # noqa: N803
    """Derivative of `_transform` by the logit, where it is `z`."""
    slope = tl.zeros_like(z) + logit_scale
    if HAS_SOFTCAP:
        ratio = z / softcap
        slope *= 1 - ratio * ratio
    return slope


@triton.jit
def multi_hot_kernel(
    logits_pointer,
    row_stride,
    labels_pointer,
    weights_pointer,
    scale_pointer,
    losses_pointer,
    vocabulary,
    width,
    bag_size,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    WRITE_GRADIENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TARGETS: tl.constexpr,  # noqa: N803
):
    # 64 bits, because n·V may exceed 2^31.
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * row_stride
    columns = tl.arange(0, BLOCK)

    places = tl.arange(0, TARGETS)
    targets = tl.load(labels_pointer + row * bag_size + places, mask=places < bag_size, other=ignore_index)
    weights = tl.load(weights_pointer + places, mask=places < bag_size, other=0.0)
    weights = tl.where(targets != ignore_index, weights, 0.0)
    counts = weights != 0
    row_weight = tl.sum(weights)
    if tl.max(counts.to(tl.int32)) == 0:
        tl.store(losses_pointer + row, 0.0)
        if WRITE_GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                zeros = tl.zeros((BLOCK,), dtype=logits_pointer.dtype.element_ty)
                tl.store(logits_pointer + start + columns, zeros, mask=start + columns < width)
        return

    largest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(logits_pointer + start + columns, mask=start + columns < width, other=-float("inf"))
        z = _transform(logits, logit_scale, softcap, HAS_SOFTCAP)
        z = tl.where(start + columns < vocabulary, z, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(z))
        # While every logit so far is -inf there is nothing to subtract.
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift))
        largest = new_largest

    target_logits = tl.load(logits_pointer + targets, mask=counts, other=0.0)
    target_z = _transform(target_logits, logit_scale, softcap, HAS_SOFTCAP)
    loss = tl.sum(tl.where(counts, weights * (tl.log(total) - (target_z - largest)), 0.0))
    tl.store(losses_pointer + row, loss)

    if WRITE_GRADIENT:
        scale = tl.load(scale_pointer)
        same = (targets[:, None] == targets[None, :]).to(tl.float32)
        weight_of_target = tl.sum(same * weights[None, :], axis=1)
        target_gradient = scale * (row_weight / total * tl.exp(target_z - largest) - weight_of_target)
        target_gradient *= _slope(target_z, logit_scale, softcap, HAS_SOFTCAP)
        # Every warp must have read the targets' logits before any of them writes over one.
        tl.debug_barrier()
        last = (vocabulary - 1) // BLOCK * BLOCK
        for step in range(0, vocabulary, BLOCK):
            start = last - step
            inside = start + columns < width
            logits = tl.load(logits_pointer + start + columns, mask=inside, other=0.0)
            z = _transform(logits, logit_scale, softcap, HAS_SOFTCAP)
            gradient = scale * row_weight / total * tl.exp(z - largest)
            gradient *= _slope(z, logit_scale, softcap, HAS_SOFTCAP)
            gradient = gradient.to(logits_pointer.dtype.element_ty)
            tl.store(logits_pointer + start + columns, gradient, mask=inside)
        # The targets' gradients must come after the sweep's.
        tl.debug_barrier()
        tl.store(logits_pointer + targets, target_gradient.to(logits_pointer.dtype.element_ty), mask=counts)
