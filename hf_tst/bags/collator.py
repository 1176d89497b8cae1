"""Batches of bags from rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TSTError, check_choice
from .folding import (
    IGNORE_INDEX,
    DocumentBoundaries,
    document_bags,
    document_starts,
    document_windows,
    fold_into_bags,
    next_bag_labels,
    next_window_labels,
    positions_in_documents,
)
from .phases import (
    SuperpositionRows,
    TSTMode,
    check_bag_size,
    folded_length,
    folds_single_blocks,
)

# Of them the first one that a batch has tells documents apart: by a change, or by a step other than 1.
DOCUMENT_COLUMNS = ("document_ids", "position_ids")
NO_DOCUMENT_ENDS = (
    "Nothing says where documents end: give an eos_token_id (a tokenizer with one as processing_class), or a column 'document_ids', or "
    "set tst_document_boundaries='ignore'."
)


@dataclass
class DataCollatorForTokenSuperposition:
    """Collates rows of l·s contiguous token ids into bags with bag-aligned labels.

    Each feature is a mapping with `input_ids`, one sequence of l·s ids, all of equal length. `labels`, if given,
    hold one target token per position (`-100` for no target), as for an ordinary causal model; they default
    to the ids. An `attention_mask` must be all ones and is dropped, because rows of bags are always full.

    Contents of a batch:

    - `bag_size` s > 1, `mode` `"full"` or `"input"`: `input_ids` `(B, l, s)` and `labels` `(B, l, s)`; position t holds
      bag t + 1, the last position -100.
    - `bag_size` s > 1, `mode` `"output"`: `input_ids` `(B, l)` and `labels` `(B, l, s)`; position t holds tokens
      t+1 … t+s, -100 beyond the row.
    - `superposition_rows` `"more"` folds each of the s blocks of a row by itself: `(B·s, l/s, s)` instead of `(B, l, s)`.
    - `bag_size` 1: `input_ids` `(B, l)` and `labels` `(B, l)`, unshifted, for the model's own loss; other columns are kept.

    With `document_boundaries="respect"`, bags and their targets end where documents end. Short bags have -100 in
    their empty places, the last bag of a document has no target, and `position_ids` `(B, l)` restart with each
    document. There is no `attention_mask`: if positions restart and there is no mask, models of Transformers keep attention
    inside documents. A row keeps l bags; tokens that no longer fit because of short bags are dropped. With `bag_size=1`, the
    first token of a document is not a target. Documents are identified by a column `document_ids`, else by `position_ids`
    (which count up within a document), else by the end-of-sequence token.

    With a cache, a model of Transformers lets attention cross documents. [`TSTTrainer`], [`token_superposition`] and
    [`fused_next_token_loss`] switch the cache off. In a loop without them, pass
    `use_cache=False` to the model, or set `model.config.use_cache = False`.

    Args:
        bag_size (`int`): Tokens per bag, s.
        mode (`"full" | "input" | "output"`, *optional*, defaults to `"full"`): See `TSTTrainingArguments.tst_mode`.
        superposition_rows (`"longer" | "more"`, *optional*, defaults to `"longer"`): See
            `TSTTrainingArguments.tst_superposition_rows`.
        document_boundaries (`"ignore" | "respect"`, *optional*, defaults to `"ignore"`): See
            `TSTTrainingArguments.tst_document_boundaries`.
        eos_token_id (`int`, *optional*): Last token of a document, for `document_boundaries="respect"`.

    Raises:
        TSTError: If rows lack `input_ids`, differ in length, do not divide into bags, are padded (allowed if `bag_size` is 1 and
            documents are ignored), or do not say where documents end although `document_boundaries` is `"respect"`.

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
    superposition_rows: SuperpositionRows = "longer"
    document_boundaries: DocumentBoundaries = "ignore"
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        check_bag_size(self.bag_size)
        check_choice("mode", self.mode, TSTMode)
        check_choice("superposition_rows", self.superposition_rows, SuperpositionRows)
        check_choice("document_boundaries", self.document_boundaries, DocumentBoundaries)

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of rows, as described above, all `torch.LongTensor`. A row may be its ids alone."""
        features = [row if isinstance(row, Mapping) else {"input_ids": row} for row in features]
        for feature in features:
            if "input_ids" not in feature:
                raise TSTError(
                    f"Rows need a column 'input_ids', but have {sorted(feature)}: tokenize the data."
                )
        lengths = sorted({len(feature["input_ids"]) for feature in features})
        if len(lengths) > 1:
            raise TSTError(
                f"Rows of one batch must be of equal length, but have {lengths[0]} to {lengths[-1]} tokens: "
                "pack the data into blocks."
            )
        if self.bag_size == 1 and self.document_boundaries == "ignore":
            return self._collate_tokens(features)
        masks = [feature.get("attention_mask") for feature in features]
        check_no_padding(all(mask is None or np.asarray(mask).all() for mask in masks))
        names = [name for name in ("input_ids", "labels") if name in features[0]]
        if self.document_boundaries == "respect":
            names += [name for name in DOCUMENT_COLUMNS if features[0].get(name) is not None][:1]
        check_all_have(features, names)
        return self.fold(
            {
                name: torch.from_numpy(np.stack([feature[name] for feature in features], dtype=np.int64))
                for name in names
            }
        )

    def fold(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch of rows that are stacked already, on the device of the rows.

        Args:
            columns: `input_ids` and, optionally, `labels` and a column that tells documents apart, integers of shape `(B, l·s)`.

        Returns:
            The batch, as for a list of rows.
        """
        columns = {name: self._as_rows(column).long() for name, column in columns.items()}
        tokens = columns["input_ids"]
        targets = columns.get("labels", tokens)
        if self.document_boundaries == "respect":
            return self._fold_documents(columns, targets)
        if self.mode == "output":
            return {"input_ids": tokens, "labels": next_window_labels(targets, self.bag_size)}
        labels = next_bag_labels(fold_into_bags(targets, self.bag_size))
        return {"input_ids": fold_into_bags(tokens, self.bag_size), "labels": labels}

    def _collate_tokens(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        from transformers import default_data_collator

        batch = default_data_collator(list(features))
        batch["input_ids"] = batch["input_ids"].long()
        if "labels" not in batch:
            padding = batch.get("attention_mask", torch.ones(())) == 0
            batch["labels"] = batch["input_ids"].masked_fill(padding, IGNORE_INDEX)
        return batch | {"labels": batch["labels"].long()}

    def _fold_documents(self, columns: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        tokens, starts = columns["input_ids"], document_starts(self._follows_an_end(columns))
        if self.bag_size > 1 and self.mode != "output":
            tokens, labels, positions = document_bags(tokens, targets, starts, self.bag_size)
        else:
            positions = positions_in_documents(starts)
            labels = targets.masked_fill(starts, IGNORE_INDEX)
            if self.bag_size > 1:
                labels = document_windows(targets, starts, self.bag_size)
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}

    def _follows_an_end(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Whether each token except the first of the row starts a document, `(B, n - 1)`."""
        for name, same in zip(DOCUMENT_COLUMNS, (0, 1), strict=True):
            if name in columns:
                return columns[name].diff() != same
        if self.eos_token_id is None:
            raise TSTError(NO_DOCUMENT_ENDS)
        return columns["input_ids"][:, :-1] == self.eos_token_id

    def _as_rows(self, column: Tensor) -> Tensor:
        """A column `(B, l·s)` as the rows to fold: each of its s blocks by itself, if there are more rows in superposition."""
        if not folds_single_blocks(self.bag_size, self.mode, self.superposition_rows):
            return column
        length = column.shape[1] // self.bag_size
        folded_length(length, self.bag_size)  # or its refusal
        return column.reshape(-1, length)


def check_no_padding(is_full: bool) -> None:
    """Raise `TSTError` unless the rows to fold are full: all of their attention masks hold ones."""
    if not is_full:
        raise TSTError(
            "A row is padded (its attention_mask holds zeros), and a bag would average padding with text: "
            "pack the data into full blocks."
        )


def check_all_have(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raise `TSTError` if one of `rows` lacks one of the columns `names`."""
    for name in names:
        if any(row.get(name) is None for row in rows):
            raise TSTError(f"Some rows have {name}, and some have no {name}: give it to all or to none.")


def holds_bags(batch: Any) -> bool:
    """Whether a batch holds bags: its labels have three dimensions."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3
