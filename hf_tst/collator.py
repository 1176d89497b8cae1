"""Batches of bags from rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bags import fold_into_bags, next_bag_labels, next_window_labels
from .phases import TSTMode, check_bag_size, check_mode


@dataclass
class DataCollatorForTokenSuperposition:
    """Collates rows of l·s contiguous token ids into bags with bag-aligned labels.

    Each feature is a mapping with `input_ids`, one sequence of l·s ids, all of equal length. `labels`, if there, are
    the token each position holds as a target (`-100` where it is none), exactly as for an ordinary causal
    model; by default they are the ids. `attention_mask` is accepted if it is all ones, and dropped: what the
    model sees is a full row of l bags.

    | `bag_size` | `mode` | `input_ids` | `labels` |
    |---|---|---|---|
    | s > 1 | `"full"`, `"input"` | `(B, l, s)` | `(B, l, s)`: position t holds bag t + 1, the last position -100 |
    | s > 1 | `"output"` | `(B, l)` | `(B, l, s)`: position t holds tokens t+1 … t+s, -100 beyond the row |
    | 1 | any | `(B, l)` | `(B, l)`, unshifted, for the model's own loss; other columns are kept |

    Args:
        bag_size (`int`): Tokens a bag, s.
        mode (`"full" | "input" | "output"`, defaults to `"full"`): See `TSTTrainingArguments.tst_mode`.
        ignore_index (`int`, defaults to -100): Label that is no target.

    Raises:
        ValueError: If rows differ in length, do not divide into bags, are padded, or lack `input_ids`.

    Example:
        >>> collator = DataCollatorForTokenSuperposition(bag_size=2)
        >>> batch = collator([{"input_ids": [1, 2, 3, 4, 5, 6]}])
        >>> batch["input_ids"]
        tensor([[[1, 2],
                 [3, 4],
                 [5, 6]]])
        >>> batch["labels"]
        tensor([[[   3,    4],
                 [   5,    6],
                 [-100, -100]]])
    """

    bag_size: int
    mode: TSTMode = "full"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        check_bag_size(self.bag_size)
        check_mode(self.mode)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for feature in features:
            if "input_ids" not in feature:
                raise ValueError(
                    f"Rows need a column 'input_ids', but have {sorted(feature)}: tokenise the data."
                )
        lengths = sorted({len(feature["input_ids"]) for feature in features})
        if len(lengths) > 1:
            raise ValueError(
                f"Rows of one batch must be of equal length, but have {lengths[0]} to {lengths[-1]} tokens: "
                "pack the data into blocks."
            )
        if self.bag_size == 1:
            return self._collate_tokens(features)
        return self._collate_bags(features)

    def _collate_tokens(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        from transformers import default_data_collator

        batch = default_data_collator(list(features))
        batch["input_ids"] = batch["input_ids"].long()
        batch["labels"] = batch["labels"].long() if "labels" in batch else batch["input_ids"].clone()
        return batch

    def _collate_bags(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for feature in features:
            mask = feature.get("attention_mask")
            if mask is not None and not torch.as_tensor(mask).all():
                raise ValueError(
                    "A row is padded (its attention_mask holds zeros), and a bag would average padding with text: "
                    "pack the data into full blocks."
                )
        tokens = _stack(features, "input_ids")
        targets = _stack(features, "labels") if "labels" in features[0] else tokens
        if self.mode == "output":
            return {
                "input_ids": tokens,
                "labels": next_window_labels(targets, self.bag_size, self.ignore_index),
            }
        return {
            "input_ids": fold_into_bags(tokens, self.bag_size),
            "labels": next_bag_labels(fold_into_bags(targets, self.bag_size), self.ignore_index),
        }


def _stack(features: Sequence[Mapping[str, Any]], column: str) -> Tensor:
    return torch.stack([torch.as_tensor(feature[column], dtype=torch.long) for feature in features])
