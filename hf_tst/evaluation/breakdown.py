"""Next-token loss by the frequency of the target token, and by its position in the row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

IGNORED = -100
CLASSES = 10
# Logits in float32 at a time, of a slice of positions; their cross entropy takes a few times as much memory.
NUMBERS_AT_ONCE = 2**25


class LossTally:
    """Sums next-token losses by target token and by position, batch after batch.

    `by_token` and `by_position` are `torch.DoubleTensor` of shape `(2, V)` and `(2, l)`: summed nats, and number of tokens.
    """

    def __init__(self) -> None:
        self.by_token = self.by_position = torch.zeros(2, 0, dtype=torch.double)

    @property
    def nats(self) -> float:
        """Sum of the negative log-likelihoods."""
        return self.by_token[0].sum().item()

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits (`torch.FloatTensor` of shape `(B, l, V)`): The model's logits.
            targets (`torch.LongTensor` of shape `(B, l)`): The target token of each position; -100 is ignored.
        """
        targets = targets.to(logits.device)
        length = max(1, NUMBERS_AT_ONCE // (len(logits) * logits.shape[-1]))
        slices = zip(logits.split(length, dim=1), targets.split(length, dim=1), strict=True)
        losses = torch.cat(
            [
                cross_entropy(
                    part.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
                ).view(wanted.shape)
                for part, wanted in slices
            ],
            dim=1,
        )
        losses, targets = losses.cpu().double(), targets.cpu()
        rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
        losses, tokens = losses[rows, positions], targets[rows, positions]
        self.by_token = _summed(self.by_token, tokens, losses, logits.shape[-1])
        self.by_position = _summed(self.by_position, positions, losses, logits.shape[1])

    def loss_by_frequency(self) -> list[float | None]:
        """Mean loss, nats per token, by the frequency of the target token in the text itself, the most frequent first.

        Ten classes of tokens, each with a tenth of the text as nearly as whole tokens of the vocabulary allow; `None` for a
        class that one frequent token takes up.
        """
        counts = self.by_token[1]
        order = counts.argsort(descending=True, stable=True)
        middle = counts[order].cumsum(0) - counts[order] / 2
        return _means(self.by_token[:, order], middle / counts.sum())

    def loss_by_position(self) -> list[float | None]:
        """Mean loss, nats per token, by tenths of the longest row, from its start on."""
        length = self.by_position.shape[1]
        return _means(self.by_position, (torch.arange(length) + 0.5) / length)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Context in which a model is in evaluation mode, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def tally_blocks(model: Any, blocks: Iterable[Any], batch_size: int = 8) -> LossTally:
    """The losses of a causal language model on blocks, whose first token is not predicted.

    Args:
        model (`PreTrainedModel`): Put in evaluation mode during the call.
        blocks: Rows with `input_ids`, all of one length.
        batch_size (`int`, *optional*, defaults to 8): Rows per batch.
    """
    rows, tally = (block["input_ids"] for block in blocks), LossTally()
    with evaluating(model):
        while batch := list(islice(rows, batch_size)):
            ids = torch.as_tensor(np.asarray(batch, dtype=np.int64), device=model.device)
            tally.add(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    return tally


def _summed(sums: Tensor, index: Tensor, losses: Tensor, size: int) -> Tensor:
    sums = pad(sums, (0, max(0, size - sums.shape[1])))
    return sums.index_add(1, index, torch.stack([losses, torch.ones_like(losses)]))


def _means(sums: Tensor, share: Tensor) -> list[float | None]:
    """Mean losses by class; `share`, from 0 to 1, gives the class of each column."""
    index = (share * CLASSES).long().clamp(max=CLASSES - 1)
    nats, counts = torch.zeros(2, CLASSES, dtype=torch.double).index_add(1, index, sums).tolist()
    return [total / count if count else None for total, count in zip(nats, counts, strict=True)]
