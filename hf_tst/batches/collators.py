"""The collators of a run, each a layer around others, and the folding of a batch into bags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..bags.collator import DOCUMENT_COLUMNS, DataCollatorForTokenSuperposition, check_no_padding
from ..bags.folding import IGNORE_INDEX
from ..errors import TSTError
from .blocks import (
    IDS_ALONE,
    POSITIONS_ARE_DROPPED,
    SHIFTED,
    TOKEN_COLUMNS,
    BlockRules,
    are_shifted,
    as_block,
)
from .rows import STREAM_STATE, Row

logger = logging.get_logger(__name__)


@dataclass
class PhaseCollator:
    """Dispatches superposition rows, recovery rows and other features to one collator each.

    Args:
        superposition: Collator of superposition rows.
        recovery: Collator of recovery rows.
        evaluation: Collator of evaluation and prediction.
    """

    superposition: Callable[[list[Any]], dict[str, Any]]
    recovery: Callable[[list[Any]], dict[str, Any]]
    evaluation: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        if not isinstance(features[0], Row):
            return self.evaluation(features)
        collate = self.superposition if features[0].superposed else self.recovery
        batch = collate([row.columns for row in features])
        state = features[-1].stream_state
        return batch if state is None else {**batch, STREAM_STATE: state}


@dataclass(frozen=True)
class FoldingCollator:
    """Collates superposition rows with a user's collator of blocks. Its labels count in both phases.

    Args:
        blocks: The user's collator: from a list of blocks to a batch of tokens.
        bags (`DataCollatorForTokenSuperposition`): Folds that batch into bags.
    """

    blocks: Callable[[list[Any]], Any]
    bags: DataCollatorForTokenSuperposition

    def __call__(self, rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """A batch of rows, each given as its consecutive blocks."""
        blocks = [block for row in rows for block in row]
        batch = self.blocks(blocks)
        if isinstance(batch, Mapping) and "input_ids" in batch:
            given = sum(len(as_block(block)["input_ids"]) for block in blocks)
            made = torch.as_tensor(batch["input_ids"]).numel()
            if given != made:
                raise TSTError(
                    f"The collator got {given} tokens and returned {made}, but a row of bags needs all tokens of its blocks: return all, "
                    "and set labels to -100 where a token is no target."
                )
        return fold_batch(batch, len(rows), self.bags)


@dataclass(frozen=True)
class CheckingCollator:
    """A collator that also checks the ids of its batches. On a GPU, an id without an embedding would crash the process.

    Args:
        collate: The collator.
        rules (`BlockRules`): The rules, with the size of the vocabulary.
    """

    collate: Any
    rules: BlockRules

    def __call__(self, features: list[Any]) -> Any:
        """The batch.

        Raises:
            TSTError: If the batch has an id without an embedding.
        """
        batch = self.collate(features)
        self.rules.check_batch(batch)
        return batch


@dataclass(frozen=True)
class DefaultCollator:
    """The collator of evaluation and plain training.

    It is Trainer's own with three additions: a row may be a plain list of ids, rows without labels get their ids as labels, and
    blocks of equal length need no padding token.

    Args:
        default: Trainer's collator.
        adds_labels (`bool`, *optional*, defaults to `True`): Whether rows without labels get them. Prediction does not need them.
    """

    default: Any
    adds_labels: bool = True

    def __call__(self, features: list[Any]) -> Any:
        """The batch."""
        if isinstance(features[0], IDS_ALONE):
            features = [as_block(row, index) for index, row in enumerate(features)]
        first = features[0]
        if not isinstance(first, Mapping) or "input_ids" not in first or not _are_ids(first["input_ids"]):
            return self.default(features)
        given = {"label", "labels", "label_ids"} & set(first)
        per_token = not given or np.shape(first.get("labels", 0)) == np.shape(first["input_ids"])
        if per_token and len({len(row["input_ids"]) for row in features}) == 1:
            batch: Any = DataCollatorForTokenSuperposition(1)(features)
        else:
            batch = self.default(features)
            if not given:
                padding = batch["attention_mask"] == 0
                batch = {**batch, "labels": batch["input_ids"].masked_fill(padding, IGNORE_INDEX)}
        if not given and not self.adds_labels:
            del batch["labels"]
        return batch


def _are_ids(values: Any) -> bool:
    """Whether `input_ids` are integers. Models of another kind may take floats."""
    return bool(np.asarray(values).dtype.kind in "iu")


def fold_batch(batch: Any, rows: int, collator: DataCollatorForTokenSuperposition) -> dict[str, Tensor]:
    """A batch of bags, made of a batch of tokens from a user's collator.

    Args:
        batch: A mapping with `input_ids` `(N, L)` and `labels` `(N, L)`, `-100` for no target. It may have an `attention_mask` of
            ones, and the columns that identify documents.
        rows (`int`): Rows of bags, a divisor of N. Each joins the tokens of N / rows consecutive rows.
        collator (`DataCollatorForTokenSuperposition`): Makes the bags.

    Returns:
        The batch of the collator, with l = N · L / (rows · s), on the device of the given one.

    Raises:
        TSTError: If the batch lacks labels, has columns that a bag cannot hold, is padded, or does not divide into bags.
    """
    names = (
        {name for name, value in batch.items() if value is not None} if isinstance(batch, Mapping) else set()
    )
    if not {"input_ids", "labels"} <= names:
        raise TSTError(
            f"A training batch must hold input_ids and labels, but has {sorted(names) or type(batch).__name__}: let the collator "
            "make labels, as DataCollatorForLanguageModeling(tokenizer, mlm=False) does."
        )
    if unknown := names - {*TOKEN_COLUMNS, *DOCUMENT_COLUMNS}:
        raise TSTError(
            f"The collator's batches hold {', '.join(sorted(unknown))}, which a bag cannot hold: leave it out in superposition."
        )
    if "position_ids" in names and collator.document_boundaries == "ignore":
        logger.warning_once(POSITIONS_ARE_DROPPED)
    documents = DOCUMENT_COLUMNS if collator.document_boundaries == "respect" else ()
    used = [name for name in (*TOKEN_COLUMNS, *documents) if name in names]
    columns = {name: torch.as_tensor(batch[name]) for name in used}
    if wrong := sorted(name for name, column in columns.items() if column.dim() != 2):
        raise TSTError(
            f"The training loader's or collator's batches hold {wrong[0]} of shape {tuple(columns[wrong[0]].shape)}, but the trainer makes "
            "the bags itself, of batches of shape (rows, tokens): use a collator that makes none."
        )
    if columns["labels"].device.type == "cpu" and are_shifted(columns["input_ids"], columns["labels"]):
        raise TSTError(f"The training loader or collator gives a batch {SHIFTED}.")
    columns = {name: column.reshape(rows, -1) for name, column in columns.items()}
    # On a device this waits for it, once for each batch of bags with a mask.
    check_no_padding("attention_mask" not in columns or bool(columns.pop("attention_mask").all()))
    return collator.fold(columns)
