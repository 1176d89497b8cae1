"""The multi-hot cross entropy of token superposition. A pure function of tensors.

Shapes: V vocabulary, s tokens per target bag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TSTError


def multi_hot_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Weighted mean of the s cross entropies of every position, from one logsumexp in float32.

    With CE(z, y) = logsumexp(z) - z[y], the loss is the sum of w_i · CE(z_t, y_{t,i}) over all valid targets,
    divided by the sum of w_i over the same targets. A position whose targets are all ignored contributes
    nothing; if every target is ignored, loss and gradient are 0.

    Args:
        logits (`torch.FloatTensor` of shape `(..., V)`): Logits aligned with `labels`; they are not shifted.
        labels (`torch.LongTensor` of shape `(..., s)`): Target tokens; `ignore_index` marks ignored ones.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): Weight of each offset, not normalized. Defaults to `1/s` each.
        num_items_in_batch (`float` or 0-dim tensor, *optional*): Divisor of the loss, so that the losses of several
            micro-batches add up to that of one large batch: the number of their target bags (see [`count_target_bags`]).
            Defaults to the sum of the weights of all valid targets.
        ignore_index (`int`, *optional*, defaults to -100): Label of positions without a target.

    Returns:
        `torch.FloatTensor`: The loss in nats, float32, 0-dim.

    Raises:
        TSTError: If shapes do not fit, a label is outside `[0, V)`, or the weights are negative or all zero.
            On CUDA, labels and weights are checked by an assertion on the device, without a synchronization.

    Source: arXiv 2605.06546, section 3.2. The paper computes s cross entropies; one logsumexp gives the same value.
    """
    check_shape("labels", labels, (*logits.shape[:-1], *labels.shape[-1:]))
    weights = resolve_weights(weights, labels)
    check_labels(labels, logits.shape[-1], ignore_index)
    check_weights(weights)
    valid = labels != ignore_index
    weights = weights * valid
    total = _SumOfCrossEntropies.apply(logits, labels.masked_fill(~valid, 0), weights)
    return total / resolve_divisor(num_items_in_batch, weights.sum())


def count_target_bags(labels: Tensor, *, weights: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Sum of the weights of all valid targets: the number of target bags, when the weights sum to 1.

    Args:
        labels (`torch.LongTensor` of shape `(..., s)`): Target tokens.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): As in [`multi_hot_cross_entropy`].
        ignore_index (`int`, *optional*, defaults to -100): Label of positions without a target.

    Returns:
        `torch.FloatTensor`: The sum, float32, 0-dim.

    Raises:
        TSTError: If `weights` does not have the shape `(s,)`.
    """
    valid_by_offset = (labels != ignore_index).flatten(0, -2).sum(dim=0)
    return (resolve_weights(weights, labels) * valid_by_offset).sum()


def sum_bag_entropies(labels: Tensor, *, weights: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Sum over the positions of the lowest multi-hot loss that a model can have: the entropy of each target bag.

    A bag whose valid targets weigh W in all has the loss sum of w_i · CE_i >= sum of w_i · log(W / q_i), where q_i is the weight of
    all its tokens that are token i. With s different tokens of weight 1/s that is log s, and 0 with s equal ones.

    Args:
        labels (`torch.LongTensor` of shape `(..., s)`), weights (`torch.FloatTensor` of shape `(s,)`, *optional*),
            ignore_index (`int`, *optional*, defaults to -100): As in [`multi_hot_cross_entropy`].

    Returns:
        `torch.FloatTensor`: In nats, 0-dim float32.
    """
    shares = resolve_weights(weights, labels) * (labels != ignore_index)
    equal = ((labels[..., :, None] == labels[..., None, :]) * shares[..., None, :]).sum(dim=-1)
    whole = shares.sum(dim=-1, keepdim=True)
    return torch.where(shares > 0, shares * (whole / equal).log(), 0.0).sum()


def resolve_weights(weights: Tensor | None, labels: Tensor) -> Tensor:
    """The weight of each offset, float32 of shape `(s,)` beside `labels`: those given, or `1/s` each.

    Raises:
        TSTError: If `weights` is of another shape.
    """
    bag_size = labels.shape[-1]
    if weights is None:
        return torch.full((bag_size,), 1 / bag_size, dtype=torch.float32, device=labels.device)
    check_shape("weights", weights, (bag_size,))
    # A non-blocking copy from the host is safe; a copy to the host could be read before it arrives.
    return weights.to(labels.device, torch.float32, non_blocking=weights.device.type == "cpu")


def resolve_divisor(num_items_in_batch: Tensor | float | None, targets: Tensor) -> Tensor:
    """The divisor of the summed losses: the given number, or the number of targets.

    It is 1 if both are 0, since the sum is 0 then. A given number of 0 with targets makes the loss infinite.
    """
    if num_items_in_batch is None:
        divisor = targets
    elif isinstance(num_items_in_batch, Tensor):
        divisor = num_items_in_batch.to(targets.device, torch.float32)
    else:  # filled in without the synchronization of a copy
        divisor = torch.full((), num_items_in_batch, dtype=torch.float32, device=targets.device)
    return torch.where((divisor == 0) & (targets == 0), 1.0, divisor)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `TSTError` unless the argument `name` has the shape that fits the other arguments."""
    if tensor.shape != shape:
        raise TSTError(
            f"{name} has shape {tuple(tensor.shape)}, but must have {shape} to fit the other arguments."
        )


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int = -100) -> None:
    """Raise `TSTError` if a label is neither in `[0, vocabulary)` nor `ignore_index`; on CUDA, assert it on the device."""
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if _holds_somewhere(wrong, "A label is outside the vocabulary."):
        found = labels[wrong][0].item()
        raise TSTError(
            f"labels must be from 0 to {vocabulary - 1}, or {ignore_index} for no target, but one is {found}: does the tokenizer have more "
            "tokens than the model's vocab_size?"
        )


def check_weights(weights: Tensor) -> None:
    """Raise `TSTError` if a weight is negative or not finite, or all are zero; on CUDA, assert it on the device."""
    wrong = ~torch.isfinite(weights) | (weights < 0) | (weights == 0).all()
    if _holds_somewhere(wrong, "The offset weights are negative or all zero."):
        raise TSTError(f"weights must be at least 0, and one of them above 0, but are {weights.tolist()}.")


class _SumOfCrossEntropies(torch.autograd.Function):
    """The sum of `weights · CE` over all targets, whose gradient takes one float32 tensor of the logits' size.

    Autograd's own takes two, of the logsumexp and of the gather. The gradient is a separate operator, because Inductor (torch 2.13) may
    read the sum that the gradient of a gather is added to before it has added it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        values = logits.float()
        logsumexp = torch.logsumexp(values, dim=-1, keepdim=True)
        cross_entropies = logsumexp - values.gather(-1, targets)
        ctx.save_for_backward(logits, logsumexp, targets, weights, cross_entropies)
        # A target without weight may have an infinite loss.
        return torch.where(weights == 0, 0, weights * cross_entropies).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor]:
        logits, logsumexp, targets, weights, cross_entropies = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_gradients(gradient, logits, targets, weights)
        of_logits = None
        if ctx.needs_input_grad[0]:
            of_logits = _gradient_of_logits(logits, logsumexp, targets, gradient * weights)
        return of_logits, None, gradient * cross_entropies


@torch.library.custom_op("hf_tst::multi_hot_gradient", mutates_args=())
def _gradient_of_logits(logits: Tensor, logsumexp: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the sum of `weights · CE`: probabilities times the weights of a position, less the weights at its targets."""
    gradient = torch.sub(logits, logsumexp).exp_().mul_(weights.sum(-1, keepdim=True))  # in float32
    gradient.scatter_add_(-1, targets, -weights.to(gradient.dtype))
    return gradient.to(logits.dtype).contiguous()


@_gradient_of_logits.register_fake
def _empty_gradient(logits: Tensor, logsumexp: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _differentiable_gradients(
    gradient: Tensor, logits: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, None, Tensor]:
    """The same gradients by operators that can be differentiated again (`create_graph=True`)."""
    values, shares = logits.float(), gradient * weights
    logsumexp = torch.logsumexp(values, dim=-1, keepdim=True)
    of_logits = torch.exp(values - logsumexp) * shares.sum(-1, keepdim=True)
    of_logits = of_logits.scatter_add(-1, targets, -shares)
    return of_logits.to(logits.dtype), None, gradient * (logsumexp - values.gather(-1, targets))


def _holds_somewhere(wrong: Tensor, message: str) -> bool:
    """Whether `wrong` is true anywhere. On CUDA, an assertion on the device avoids the synchronization."""
    if torch.compiler.is_compiling() or wrong.is_meta:
        return False
    if wrong.device.type == "cuda":
        torch._assert_async(~wrong.any(), message)
        return False
    return bool(wrong.any())
