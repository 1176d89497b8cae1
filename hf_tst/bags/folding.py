"""Rows of tokens as bags, their targets, and averaged embeddings; also where documents end in a row. Pure functions.

Shapes: B rows, n tokens per row, l latent positions, s tokens per bag, L block length, d hidden size. A superposition row
holds l·s contiguous tokens. Rows may begin and end inside a document; the part of a document that a row holds is
treated as a document.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import TSTError

DocumentBoundaries = Literal["ignore", "respect"]

# Label of a position without a target, and token of an empty place of a bag. Models of Transformers ignore it.
IGNORE_INDEX = -100


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


def next_bag_labels(bags: Tensor) -> Tensor:
    """Targets of superposition, `(B, l, s)`: the target of position t is bag t + 1; the last position has none."""
    last = torch.full_like(bags[:, :1], IGNORE_INDEX)
    return torch.cat([bags[:, 1:], last], dim=1)


def next_window_labels(tokens: Tensor, bag_size: int) -> Tensor:
    """Targets of output-only superposition, `(B, L) -> (B, L, s)`: the targets of position t are tokens t+1 … t+s.

    Tokens beyond the end of the row are -100.
    """
    beyond = tokens.new_full((tokens.shape[0], bag_size), IGNORE_INDEX)
    return torch.cat([tokens[:, 1:], beyond], dim=1).unfold(1, bag_size, 1)


def average_embeddings(
    embedded: Tensor, bags: Tensor, weights: Tensor | None = None, has_short_bags: bool = False
) -> Tensor:
    """Mean embedding of each bag, `(B, l·s, d) -> (B, l, d)`, summed in float32, in the dtype of `embedded`.

    Args:
        embedded (`torch.FloatTensor` of shape `(B, l·s, d)`): Output of the model's input embedding for the tokens.
        bags (`torch.LongTensor` of shape `(B, l, s)`): The tokens.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): Weight of each offset in the mean; equal by default.
        has_short_bags (`bool`, *optional*, defaults to `False`): Whether bags may have empty places, which hold -100: the mean of
            such a bag is over the tokens that it holds.
    """
    vectors = embedded.unflatten(-2, bags.shape[-2:])
    if weights is None and not has_short_bags:
        # Not `mean`, whose gradient is a float32 tensor of the size of all s vectors.
        return (vectors.sum(dim=-2, dtype=torch.float32) / bags.shape[-1]).to(embedded.dtype)
    held = bags != IGNORE_INDEX if has_short_bags else torch.ones_like(bags)
    if weights is not None:  # made where the parameters are, which FSDP's offload keeps in main memory
        weights = weights.to(bags.device, non_blocking=True)
    shares = held.float() if weights is None else held * weights
    total = (shares[..., None] * vectors).sum(dim=-2)
    smallest = torch.finfo(torch.float32).tiny  # a bag may hold nothing
    return (total / shares.sum(dim=-1, keepdim=True).clamp_min(smallest)).to(embedded.dtype)


def document_starts(starts_after_first: Tensor) -> Tensor:
    """First tokens of documents, from those of all tokens except the first of the row. `(B, n - 1) -> (B, n)`, bool."""
    return pad(starts_after_first, (1, 0), value=True)


def positions_in_documents(starts: Tensor) -> Tensor:
    """Position of each element in its document, from 0. `(B, n) -> (B, n)`, int64."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - index.masked_fill(~starts, 0).cummax(dim=1).values


def document_bags(
    tokens: Tensor, targets: Tensor, starts: Tensor, bag_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bags that are cut at the end of each document, and their targets.

    A document of m tokens fills ⌈m / s⌉ bags; the last one may be short. A row keeps its first n / s bags: for each
    empty place of a short bag, one token at the end of the row is dropped.

    Args:
        tokens (`torch.LongTensor` of shape `(B, n)`): Token ids; n is a multiple of `bag_size`.
        targets (`torch.LongTensor` of shape `(B, n)`): The token each position holds as a target, or -100.
        starts (`torch.BoolTensor` of shape `(B, n)`): First tokens of documents.
        bag_size (`int`): Tokens per bag, s.

    Returns:
        `input_ids` of shape `(B, l, s)` with -100 in empty places; `labels` of shape `(B, l, s)`, where
        position t holds bag t + 1 if that is of the same document, else -100; and `position_ids` of shape
        `(B, l)`, which count the bags of each document from 0.
    """
    positions = positions_in_documents(starts)
    bag = (positions % bag_size == 0).cumsum(dim=1) - 1
    # One extra place collects all tokens that do not fit, and is cut off.
    length = tokens.shape[1]
    place = (bag * bag_size + positions % bag_size).clamp_max(length)

    def fill(values: Tensor) -> Tensor:
        empty = pad(torch.full_like(values, IGNORE_INDEX), (0, 1))
        return fold_into_bags(empty.scatter(1, place, values)[:, :length], bag_size)

    position_ids = fill(positions)[..., 0] // bag_size
    # A bag that begins a document is no target.
    target_bags = fill(targets).masked_fill((position_ids == 0)[..., None], IGNORE_INDEX)
    return fill(tokens), next_bag_labels(target_bags), position_ids


def document_windows(targets: Tensor, starts: Tensor, bag_size: int) -> Tensor:
    """Targets of output-only superposition inside documents: the targets of position t are tokens t+1 … t+s of its document.

    `(B, n) -> (B, n, s)`; tokens of other documents and beyond the row are -100.
    """
    document = starts.cumsum(dim=1)
    windows = next_window_labels(targets, bag_size)
    documents = next_window_labels(document, bag_size)
    return windows.masked_fill(documents != document[..., None], IGNORE_INDEX)
