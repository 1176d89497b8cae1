"""Bags, targets and positions that stay inside documents. Pure functions of tensors.

Shapes: B rows, n tokens a row, l latent positions, s tokens a bag. Rows may begin and end inside a document; what a
row holds of one document is treated as a document of its own.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import TSTError

DocumentBoundaries = Literal["ignore", "respect"]

DOCUMENT_BOUNDARIES: tuple[DocumentBoundaries, ...] = get_args(DocumentBoundaries)


def check_document_boundaries(boundaries: str, name: str = "document_boundaries") -> None:
    """Raise `TSTError` unless the argument `name` is one of `DOCUMENT_BOUNDARIES`."""
    if boundaries not in DOCUMENT_BOUNDARIES:
        raise TSTError(f"{name} must be one of {', '.join(DOCUMENT_BOUNDARIES)}, but is {boundaries!r}.")


def starts_after_end_token(tokens: Tensor, eos_token_id: int) -> Tensor:
    """Where documents start, if each ends in `eos_token_id`. `(B, n) -> (B, n)`, bool; true at the row's start."""
    return _with_row_start(tokens[:, :-1] == eos_token_id, tokens)


def starts_of_ids(document_ids: Tensor) -> Tensor:
    """Where documents start, from the number of each token's document. `(B, n) -> (B, n)`, bool."""
    return _with_row_start(document_ids[:, 1:] != document_ids[:, :-1], document_ids)


def starts_of_positions(position_ids: Tensor) -> Tensor:
    """Where documents start, from positions that count up within each. `(B, n) -> (B, n)`, bool."""
    return _with_row_start(position_ids[:, 1:] != position_ids[:, :-1] + 1, position_ids)


def positions_in_documents(starts: Tensor) -> Tensor:
    """Position of each element in its document, from 0. `(B, n) -> (B, n)`, int64."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - index.masked_fill(~starts, 0).cummax(dim=1).values


def document_bags(
    tokens: Tensor, targets: Tensor, starts: Tensor, bag_size: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Bags that are cut at the end of each document, and their targets.

    A document of m tokens fills ⌈m / s⌉ bags, the last one perhaps not wholly. A row keeps its first n / s bags, so
    for every token of room that short bags leave, a token at the row's end is left out.

    Args:
        tokens (`torch.LongTensor` of shape `(B, n)`): Token ids; n is a multiple of `bag_size`.
        targets (`torch.LongTensor` of shape `(B, n)`): The token each position holds as a target, or `ignore_index`.
        starts (`torch.BoolTensor` of shape `(B, n)`): First tokens of documents.
        bag_size (`int`): Tokens a bag, s.
        ignore_index (`int`, defaults to -100): Fills empty places of a bag, and labels that are no target.

    Returns:
        `input_ids` of shape `(B, l, s)` with `ignore_index` in empty places; `labels` of shape `(B, l, s)`, where
        position t holds bag t + 1 if that is of the same document, else `ignore_index`; and `position_ids` of shape
        `(B, l)`, which count the bags of each document from 0.
    """
    rows, length = tokens.shape
    num_bags = length // bag_size
    positions = positions_in_documents(starts)
    opens_bag = positions % bag_size == 0
    bag = opens_bag.cumsum(dim=1) - 1
    # One bag too many takes in all that finds no place, and is cut off.
    place = bag.clamp_max(num_bags) * bag_size + torch.where(bag < num_bags, positions % bag_size, 0)
    size = (rows, (num_bags + 1) * bag_size)

    def fill(values: Tensor) -> Tensor:
        filled = values.new_full(size, ignore_index).scatter(1, place, values)
        return filled.unflatten(1, (-1, bag_size))[:, :num_bags]

    input_ids, target_bags = fill(tokens), fill(targets)
    position_ids = fill(positions)[..., 0] // bag_size
    continues = position_ids[:, 1:] > 0
    labels = torch.full_like(target_bags, ignore_index)
    labels[:, :-1] = target_bags[:, 1:].masked_fill(~continues[..., None], ignore_index)
    return input_ids, labels, position_ids


def document_windows(targets: Tensor, starts: Tensor, bag_size: int, ignore_index: int = -100) -> Tensor:
    """Targets of output-only superposition inside documents: position t is asked for tokens t+1 … t+s of its own.

    `(B, n) -> (B, n, s)`; tokens of other documents and beyond the row are `ignore_index`.
    """
    rows = targets.shape[0]
    beyond = targets.new_full((rows, bag_size), ignore_index)
    document = starts.cumsum(dim=1)
    windows = torch.cat([targets[:, 1:], beyond], dim=1).unfold(1, bag_size, 1)
    documents = torch.cat([document[:, 1:], torch.zeros_like(beyond)], dim=1).unfold(1, bag_size, 1)
    return windows.masked_fill(documents != document[..., None], ignore_index)


def _with_row_start(starts_after_first: Tensor, tokens: Tensor) -> Tensor:
    first = torch.ones_like(tokens[:, :1], dtype=torch.bool)
    return torch.cat([first, starts_after_first], dim=1)
