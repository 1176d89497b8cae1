"""The language-model head and the multi-hot cross entropy, fused: only one chunk of logits is in memory at a time.

Shapes: N positions, d hidden size, V vocabulary, s tokens per target bag.

The positions are processed in chunks. For each chunk, the logits are computed, a kernel overwrites them with their gradient, and
the gradients of the hidden states and of the weight follow from it. So all gradients are complete at the end of the forward
pass, and the backward pass only scales them. The cost is three matrix products, as in an ordinary forward and backward pass, and
one logsumexp per position for any s. It is one PyTorch operator (`torch.ops.hf_tst.linear_multi_hot_cross_entropy`), so
`torch.compile` has no graph break.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import TSTError
from .kernels import select_kernel
from .kernels.torch_multi_hot import align
from .multi_hot import (
    check_labels,
    check_shape,
    check_weights,
    count_target_bags,
    resolve_divisor,
    resolve_weights,
)

# Maximum bytes of logits per chunk. On a CPU, larger chunks are not faster.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
# Each chunk reads and writes the float32 gradient of the weight: 8 bytes per element. In the time of a byte a GPU does about 240
# FLOPs, and the product has 2 FLOPs per element and row. With fewer than about 8 · 240 / 2 rows, memory bandwidth is the limit.
MIN_EFFICIENT_ROWS = 1024
TILE_ROWS = 128  # of matrix products on a GPU


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """[`multi_hot_cross_entropy`] of the logits `hidden @ weight.T + bias`, which are never all in memory.

    Loss and gradients are the same. Peak memory beyond the arguments and their gradients is one chunk of logits (see [`chunk_rows`]),
    a float32 gradient of the weight and, if the matrix products run in another dtype, a copy of the weight. It does not grow with
    N or s. Under autocast the matrix products run in the autocast dtype, as in `torch.nn.Linear`. Gradients are accumulated in
    float32; those that are not needed are not computed.

    Args:
        hidden (`torch.FloatTensor` of shape `(N, d)`, or `(..., d)`): Last hidden states, aligned with `labels`.
        weight (`torch.FloatTensor` of shape `(V, d)`): Weight of the language-model head.
        labels (`torch.LongTensor` of shape `(N, s)`, or `(..., s)`): Target tokens; `ignore_index` marks ignored
            ones.
        bias (`torch.FloatTensor` of shape `(V,)`, *optional*): Bias of the head.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): Weight of each offset in the target bag. Defaults to `1/s` each.
        num_items_in_batch (`float` or 0-dim tensor, *optional*): Divisor of the loss. Defaults to the sum of the weights of all
            valid targets.
        ignore_index (`int`, *optional*, defaults to -100): Label of positions without a target.
        softcap (`float`, *optional*): Logits are `softcap · tanh(logits / softcap)`, after scaling.
        logit_scale (`float`, *optional*): Logits are multiplied by it.

    Returns:
        `torch.FloatTensor`: The loss in nats, float32, 0-dim. It has first derivatives only, and backward runs only once.

    Raises:
        TSTError: If shapes do not fit, a label is outside `[0, V)`, or the weights are negative or all zero.
            On CUDA, labels and weights are checked by an assertion on the device, without a synchronization.

    Source: arXiv 2605.06546, section 3.2, leaves this reuse of one logsumexp unexplored.
    """
    check_shape("labels", labels, (*hidden.shape[:-1], *labels.shape[-1:]))
    check_shape("weight", weight, (*weight.shape[:1], hidden.shape[-1]))
    if bias is not None:
        check_shape("bias", bias, (len(weight),))
    if softcap is not None and not softcap > 0:
        raise TSTError(f"softcap must be more than 0, or None for no cap, but is {softcap}.")
    labels = labels.to(hidden.device)
    weights = resolve_weights(weights, labels)
    targets = count_target_bags(labels, weights=weights, ignore_index=ignore_index)
    if torch.is_autocast_enabled(hidden.device.type):
        matmul_dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        matmul_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    loss, *_ = torch.ops.hf_tst.linear_multi_hot_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        bias,
        labels.flatten(0, -2),
        weights,
        resolve_divisor(num_items_in_batch, targets),
        ignore_index,
        softcap,
        1.0 if logit_scale is None else float(logit_scale),
        matmul_dtype,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)],
    )
    return loss


def chunk_rows(rows: int, vocabulary: int, hidden_size: int, itemsize: int, device_type: str) -> int:
    """Rows of logits per chunk, of `rows` in total.

    It is the number that fits in `CHUNK_BYTES`, but at most the larger of `2 d` and `MIN_EFFICIENT_ROWS`. With `2 d` rows, a chunk
    of bfloat16 logits is as large as the float32 gradient of the weight, which is in memory anyway. Chunks are of equal size, in whole
    tiles of matrix products.
    """
    fits = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (vocabulary * itemsize)
    most = max(1, min(fits, max(MIN_EFFICIENT_ROWS, 2 * hidden_size)))
    if most >= TILE_ROWS:
        most -= most % TILE_ROWS
    even = math.ceil(rows / math.ceil(rows / most)) if rows else 1
    return min(most, math.ceil(even / TILE_ROWS) * TILE_ROWS, max(1, rows))


@torch.library.custom_op(
    "hf_tst::linear_multi_hot_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor weights, Tensor divisor, "
    "int ignore_index, float? softcap, float logit_scale, ScalarType matmul_dtype, bool[] needs_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    divisor: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    matmul_dtype: torch.dtype,
    needs_grad: list[bool],
) -> tuple[Tensor, ...]:
    """The loss, and the gradients of hidden, weight and bias. A gradient that is not needed is an empty tensor.

    In float16 the gradients are those of the loss times the divisor, because most of them would underflow after the division.
    """
    vocabulary, hidden_size = weight.shape
    check_labels(labels, vocabulary, ignore_index)
    check_weights(weights)
    needs_hidden, needs_weight, needs_bias = needs_grad
    gradients = _allocate_gradients(hidden, weight, bias, matmul_dtype, needs_grad)
    hidden_gradient, weight_gradient, bias_gradient = gradients
    bias_gradient.zero_()
    rows, device = hidden.shape[0], hidden.device
    reciprocal = 1 / divisor
    gradient_scale = torch.ones_like(reciprocal) if matmul_dtype == torch.float16 else reciprocal
    kernel = select_kernel(device)

    with torch.autocast(device.type, enabled=False):
        matrix = weight.to(matmul_dtype)
        losses = torch.empty(rows, dtype=torch.float32, device=device)
        chunk = chunk_rows(rows, vocabulary, hidden_size, matmul_dtype.itemsize, device.type)
        buffer = hidden.new_empty((min(chunk, rows), align(vocabulary)), dtype=matmul_dtype)[:, :vocabulary]
        for start in range(0, max(1, rows), chunk):  # the first chunk, even empty, initializes the gradient
            part = hidden[start : start + chunk].to(matmul_dtype)
            logits = buffer[: part.shape[0]]
            if bias is None:
                torch.mm(part, matrix.t(), out=logits)
            else:
                torch.addmm(bias.to(matmul_dtype), part, matrix.t(), out=logits)
            # From here on, `logits` holds the gradient of the logits.
            losses[start : start + chunk] = kernel(
                logits,
                labels[start : start + chunk],
                weights,
                gradient_scale=gradient_scale,
                ignore_index=ignore_index,
                softcap=softcap,
                logit_scale=logit_scale,
                write_gradient=any(needs_grad),
            )
            if needs_hidden and hidden_gradient.dtype == matmul_dtype:
                torch.mm(logits, matrix, out=hidden_gradient[start : start + chunk])
            elif needs_hidden:
                hidden_gradient[start : start + chunk] = torch.mm(logits, matrix)
            if needs_weight:
                _accumulate_product(weight_gradient, logits, part, is_first=start == 0)
            if needs_bias:
                bias_gradient += logits.sum(0, dtype=torch.float32)
    return losses.sum() * reciprocal, *gradients


def _allocate_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype, needs_grad: list[bool]
) -> list[Tensor]:
    """Buffers for the gradients of hidden, weight and bias; an empty tensor for one that is not needed."""
    hidden_dtype = torch.float32 if matmul_dtype == torch.float16 else hidden.dtype
    dtypes = (hidden_dtype, torch.float32, torch.float32)
    return [
        x.new_empty(x.shape, dtype=dtype) if needed and x is not None else hidden.new_empty(0)
        for x, dtype, needed in zip((hidden, weight, bias), dtypes, needs_grad, strict=True)
    ]


def _accumulate_product(total: Tensor, gradient: Tensor, hidden: Tensor, is_first: bool) -> None:
    """`total += gradient.T @ hidden` in float32; `total = gradient.T @ hidden` for the first chunk, so `total` needs no zeros."""
    left, beta = gradient.t(), 0 if is_first else 1
    if total.dtype == gradient.dtype:
        total.addmm_(left, hidden, beta=beta)
    elif _adds_in_float32(gradient.dtype, gradient.device):
        torch.addmm(total, left, hidden, out_dtype=torch.float32, beta=beta, out=total)
    elif is_first:
        total.copy_(torch.mm(left, hidden))
    else:
        total += torch.mm(left, hidden)


@lru_cache
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `addmm` can add a product of `dtype` matrices to a float32 matrix: on CUDA, from torch 2.8 on."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(ones.float(), ones, ones, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise  # this is no answer, and `lru_cache` would keep it
    except (TypeError, RuntimeError):
        return False
    return True


@_operator.register_fake
def _empty_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """The outputs of the operator without values, for `torch.compile`."""
    *_, matmul_dtype, needs_grad = options
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    return loss, *_allocate_gradients(hidden, weight, bias, matmul_dtype, needs_grad)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradients that the forward pass has computed."""
    hidden, weight, bias, _, _, divisor, *_, matmul_dtype, ctx.needs_grad = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    ctx.divided = matmul_dtype != torch.float16
    ctx.spent = False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(divisor, *output[1:])


def _backward(ctx: Any, loss_gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The saved gradients times that of the loss, cast to the dtypes of the inputs."""
    if ctx.spent:  # the saved gradients were scaled in place
        raise RuntimeError(
            "backward has passed through linear_multi_hot_cross_entropy already: compute the loss again instead of using retain_graph."
        )
    gradients: list[Tensor | None] = [None, None, None]
    if loss_gradient is not None:
        ctx.spent = True
        divisor, *saved = ctx.saved_tensors
        scale = loss_gradient.float()
        if not ctx.divided:
            scale = scale * (1 / divisor)
        for i, needed in enumerate(ctx.needs_grad):
            if needed:
                gradient, dtype = saved[i], ctx.dtypes[i]
                scaled = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
                gradients[i] = torch.mul(gradient, scale, out=scaled)
    return (*gradients, *[None] * 8)  # the other eight inputs have no gradient


_operator.register_autograd(_backward, setup_context=_save_gradients)
