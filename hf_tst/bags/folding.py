"""Bags of tokens as tensors: folding, targets, averaged embeddings, offset weights. Pure functions.

Shapes: B rows, l latent positions, s tokens a bag, L block length, d hidden size. A superposition row holds
l·s contiguous tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import TSTError
from .phases import check_bag_size

OffsetWeighting = Literal["uniform", "power_law", "fitted_power_law", "exponential", "first_token"]

OFFSET_WEIGHTINGS: tuple[OffsetWeighting, ...] = get_args(OffsetWeighting)

# C0 + a·i^k, the power law that the paper fits to the information an earlier token carries about a later one.
FITTED_POWER_LAW = (3.63, 1.35, -1.25)


def fold_into_bags(tokens: Tensor, bag_size: int) -> Tensor:
    """Fold `(B, l·s)` into `(B, l, s)`: bag t holds tokens `t·s … t·s + s - 1`.

    Raises:
        TSTError: If the row length is no multiple of `bag_size`.
    """
    if tokens.dim() != 2 or tokens.shape[1] % bag_size:
        raise TSTError(
            f"Rows of shape {tuple(tokens.shape)} cannot be folded into bags of {bag_size}: "
            "give a 2-D tensor whose row length is a multiple of the bag size."
        )
    return tokens.unflatten(1, (-1, bag_size))


def next_bag_labels(bags: Tensor, ignore_index: int = -100) -> Tensor:
    """Targets of superposition, `(B, l, s)`: position t is asked for bag t + 1, the last position for nothing."""
    last = torch.full_like(bags[:, :1], ignore_index)
    return torch.cat([bags[:, 1:], last], dim=1)


def next_window_labels(tokens: Tensor, bag_size: int, ignore_index: int = -100) -> Tensor:
    """Targets of output-only superposition, `(B, L) -> (B, L, s)`: position t is asked for tokens t+1 … t+s.

    Tokens beyond the end of the row are `ignore_index`.
    """
    beyond = tokens.new_full((tokens.shape[0], bag_size), ignore_index)
    return torch.cat([tokens[:, 1:], beyond], dim=1).unfold(1, bag_size, 1)


def average_embeddings(
    embedding: Callable[[Tensor], Tensor], bags: Tensor, ignore_index: int | None = None
) -> Tensor:
    """Mean embedding of each bag, `(B, l, s) -> (B, l, d)`, summed in float32, in the embedding's dtype.

    Args:
        embedding: The model's own input embedding, `(B, n) -> (B, n, d)`. It sees ordinary 2-D ids, so scaled
            embeddings, adapters and hooks on it do what they do in an ordinary forward pass.
        bags (`torch.LongTensor` of shape `(B, l, s)`): Token ids.
        ignore_index (`int`, *optional*): Marks empty places of short bags: a bag's mean is over the tokens that it
            holds. By default every bag is taken to be full.
    """
    if ignore_index is None:
        embedded = embedding(bags.flatten(1))
        return embedded.unflatten(1, bags.shape[1:]).mean(dim=2, dtype=torch.float32).to(embedded.dtype)
    held = bags != ignore_index
    embedded = embedding(bags.masked_fill(~held, 0).flatten(1))
    total = (
        embedded.unflatten(1, bags.shape[1:]).masked_fill(~held[..., None], 0).sum(dim=2, dtype=torch.float32)
    )
    return (total / held.sum(dim=2, keepdim=True).clamp_min(1)).to(embedded.dtype)


def offset_weights(weighting: OffsetWeighting, bag_size: int) -> Tensor:
    """Weight of each token in a target bag by its offset i = 1 … s, float32 of shape `(s,)`, summing to 1.

    Args:
        weighting: `"uniform"`, `"power_law"` (1/i), `"fitted_power_law"` (C0 + a·i^k with the paper's fit),
            `"exponential"` (exp(-i)) or `"first_token"` (only i = 1).
        bag_size (`int`): Tokens a bag, s, at least 1.

    Raises:
        TSTError: If `weighting` is unknown, or `bag_size` out of range.
    """
    _check_offset_weighting(weighting, "weighting")
    check_bag_size(bag_size)
    offset = torch.arange(1, bag_size + 1, dtype=torch.float64)
    if weighting == "uniform":
        weights = torch.ones_like(offset)
    elif weighting == "power_law":
        weights = 1 / offset
    elif weighting == "fitted_power_law":
        constant, scale, exponent = FITTED_POWER_LAW
        weights = constant + scale * offset**exponent
    elif weighting == "exponential":
        weights = torch.exp(-offset)
    else:
        weights = (offset == 1).double()
    return (weights / weights.sum()).float()


def _check_offset_weighting(weighting: str, name: str) -> None:
    if weighting not in OFFSET_WEIGHTINGS:
        raise TSTError(f"{name} must be one of {', '.join(OFFSET_WEIGHTINGS)}, but is {weighting!r}.")


def resolve_weighting(mode: str, weighting: OffsetWeighting, prefix: str = "") -> OffsetWeighting:
    """The weighting that `mode` trains with: input-only superposition has one target, the first token.

    `prefix` is what the names of the two arguments begin with, for messages.

    Raises:
        TSTError: If `weighting` is unknown, or `mode` leaves it nothing to weigh.
    """
    _check_offset_weighting(weighting, f"{prefix}offset_weighting")
    if mode != "input":
        return weighting
    if weighting not in ("uniform", "first_token"):
        raise TSTError(
            f"{prefix}mode='input' has a single target token, so {prefix}offset_weighting={weighting!r} has nothing "
            f"to weigh: leave it at 'uniform', or use {prefix}mode='full'."
        )
    return "first_token"
