"""The multi-hot loss of some rows of logits, with the gradient written in place, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# If a copy of the rows is needed, this many elements are copied at a time: 4 MiB in a CPU's cache, 256 MiB where launches cost.
_TILE_ELEMENTS = {"cpu": 2**20}


def align(columns: int) -> int:
    """The next multiple of 16: rows so far apart are moved 16 bytes at a time by the kernel and by matrix products on a GPU."""
    return -(-columns // 16) * 16


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
    """Loss of each row; overwrites `logits` with their gradient.

    A row's loss is the sum of `w_i · (logsumexp(z) - z[y_i])` over its valid targets, with `z = logit_scale · logits`, or
    `softcap · tanh(logit_scale · logits / softcap)`. Arithmetic is float32; its cost does not depend on s.

    Args:
        logits (`torch.FloatTensor` of shape `(n, V)`): Outputs of the head. Overwritten if `write_gradient`. Where rows are a multiple
            of 16 elements apart, what is between them up to `align(V)` columns may be overwritten, too.
        labels (`torch.LongTensor` of shape `(n, s)`): Targets in `[0, V)`, or `ignore_index`.
        weights (`torch.FloatTensor` of shape `(s,)`): Weight of each offset. A target of weight 0 is ignored.
        gradient_scale (0-dim `torch.FloatTensor`): Factor on the gradient of the sum of the losses.
        ignore_index (`int`, *optional*, defaults to -100): Label of positions without a target.
        softcap (`float`, *optional*): Cap on the scaled logits.
        logit_scale (`float`, *optional*, defaults to 1): Factor on the logits.
        write_gradient (`bool`, *optional*, defaults to `True`): If `False`, `logits` are not changed.

    Returns:
        `torch.FloatTensor` of shape `(n,)`: Losses. A row without a target has loss 0 and gradient 0, whatever its logits are.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    in_place = write_gradient and softcap is None and logits.dtype == torch.float32
    changes = write_gradient or softcap is not None or logit_scale != 1
    rows = max(
        1, len(logits) if in_place else _TILE_ELEMENTS.get(logits.device.type, 2**26) // logits.shape[1]
    )
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        tile = logits[part]
        scaled = tile if in_place else tile.to(torch.float32, copy=changes)
        if logit_scale != 1:
            scaled *= logit_scale
        if softcap is not None:
            scaled.div_(softcap).tanh_()
            slope = 1 - scaled.square() if write_gradient else 1.0
            scaled *= softcap
        if not write_gradient:
            losses[part] = _loss(scaled, labels[part], weights, ignore_index)
            continue
        factor = gradient_scale * logit_scale
        losses[part] = _loss_and_gradient(scaled, labels[part], weights, factor, ignore_index)
        if softcap is not None:
            scaled *= slope
        if not in_place:
            tile.copy_(scaled)
    if write_gradient:
        # A row without a target gets a gradient of 0, also where its logits are NaN.
        without = ((labels == ignore_index) | (weights == 0)).all(-1)
        if logits.device.type == "cpu":
            logits.index_fill_(0, without.nonzero().squeeze(1), 0.0)
        else:  # `nonzero` would wait for the device
            logits.masked_fill_(without.unsqueeze(1), 0.0)
    return losses


def _loss(logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int) -> Tensor:
    """Losses of float32 `logits`, which are not changed."""
    valid = labels != ignore_index
    row_weights = weights * valid
    cross_entropies = -logits.log_softmax(-1).gather(-1, labels.masked_fill(~valid, 0))
    return torch.where(row_weights != 0, row_weights * cross_entropies, 0.0).sum(-1)


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, factor: Tensor, ignore_index: int
) -> Tensor:
    """Losses of float32 `logits`, which are overwritten with the gradient of their sum times `factor`."""
    valid = labels != ignore_index
    row_weights = torch.where(valid, weights, 0.0)
    targets = labels.masked_fill(~valid, 0)
    largest = logits.amax(-1, keepdim=True)
    target_logits = logits.gather(-1, targets) - largest
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    cross_entropies = total.log() - target_logits
    weight = row_weights.sum(-1, keepdim=True)
    logits *= weight * factor / total
    logits.scatter_add_(-1, targets, -factor * row_weights)
    return torch.where(row_weights != 0, row_weights * cross_entropies, 0.0).sum(-1)
