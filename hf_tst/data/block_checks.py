"""Checking that a data set holds blocks: full rows of tokens, all of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TSTError

# Blocks, spread over the data, that are read before training starts.
SAMPLED_BLOCKS = 256
# Stored lengths that are looked at before training starts, where the data's type does not say the length.
CHECKED_LENGTHS = 100_000


@dataclass(frozen=True)
class BlockFacts:
    """What is known of a data set of blocks before training.

    Args:
        count (`int`): Blocks.
        length (`int`): Tokens a block, L.
        fingerprint (`str`): Hash of the number of blocks and of up to 256 blocks spread over the data. It does not
            depend on where or how the data is stored.
    """

    count: int
    length: int
    fingerprint: str


@dataclass(frozen=True)
class BlockRules:
    """What every block of the training data must keep to, checked block by block as they are read.

    Args:
        length (`int`, *optional*): Tokens a block, L, where it is known.
        pad_token_id (`int`, *optional*): Id that marks padding, if it marks nothing else.
        vocab_size (`int`, *optional*): Ids that the model has an embedding for.
    """

    length: int | None = None
    pad_token_id: int | None = None
    vocab_size: int | None = None

    def check(self, block: Any, index: int) -> NDArray[np.int64]:
        """The tokens of block `index` of the data, `(L,)`.

        Raises:
            TSTError: If it has no `input_ids`, or they are not one row of ids of the vocabulary, differ in length from
                the other blocks or from the labels, or are padded.
        """
        tokens = _tokens(block, index)
        if self.length is not None:
            check_length(len(tokens), self.length, index)
        if "labels" in block and len(block["labels"]) != len(tokens):
            raise TSTError(
                f"Block {index} of the training data has {len(tokens)} input_ids and {len(block['labels'])} labels: give "
                "every token its label, or leave the labels out."
            )
        self._check_ids(tokens, index)
        self.check_padding(tokens, block.get("attention_mask"), index)
        return tokens

    def check_padding(self, tokens: NDArray[Any], attention_mask: Any, index: int) -> None:
        """Raise `TSTError` if the blocks from `index` on, joined to one row, are padded."""
        if attention_mask is not None and not (real := np.asarray(attention_mask).astype(bool)).all():
            padded = index + int(real.argmin()) // (self.length or len(tokens))
            raise TSTError(
                f"Block {padded} of the training data is padded (its attention_mask holds zeros), and a bag would "
                "average padding with text: pack the data into full blocks."
            )
        if self.pad_token_id is None:
            return
        length = self.length or len(tokens)
        if (ends := tokens[length - 1 :: length] == self.pad_token_id).any():
            raise TSTError(
                f"Block {index + int(ends.argmax())} of the training data ends in the padding token "
                f"{self.pad_token_id}, and a bag would average padding with text: pack the data into full blocks."
            )

    def _check_ids(self, tokens: NDArray[np.int64], index: int) -> None:
        size = self.vocab_size
        bad = tokens < 0 if size is None else (tokens < 0) | (tokens >= size)
        if bad.any():
            known = (
                "ids are not negative" if size is None else f"the model has embeddings for 0 to {size - 1}"
            )
            raise TSTError(
                f"Block {index} of the training data holds the id {tokens[bad.argmax()]}, but {known}: tokenise it with the "
                "model's own tokenizer."
            )


def check_blocks(blocks: Any, pad_token_id: int | None = None, vocab_size: int | None = None) -> BlockFacts:
    """Check that a map-style data set holds full, equal blocks of tokens.

    The cost does not grow with the data on disk: 256 blocks spread over it are read and, of a `datasets.Dataset` whose
    type does not fix the length of `input_ids`, the first 100 000 stored lengths. Of a list, every length is looked at.
    Blocks are checked again as they are read.

    Args:
        blocks: The data set.
        pad_token_id (`int`, *optional*): Id that marks padding, if it marks nothing else.
        vocab_size (`int`, *optional*): Ids that the model has an embedding for.

    Raises:
        TSTError: If there is no `input_ids`, blocks differ in length or are padded, or there is no block.
    """
    if len(blocks) == 0:
        raise TSTError("The training data is empty: it has no block of tokens.")
    if hasattr(blocks, "with_format"):
        blocks = blocks.with_format("numpy")
    length = len(BlockRules().check(blocks[0], 0))
    rules = BlockRules(length, pad_token_id, vocab_size)
    digest = hashlib.sha256(f"{len(blocks)} blocks".encode())
    sample = {int(index) for index in np.linspace(0, len(blocks) - 1, num=SAMPLED_BLOCKS)}
    for index in sorted(sample):
        digest.update(rules.check(blocks[index], index).tobytes())
    if isinstance(blocks, (list, tuple)):
        for index, block in enumerate(blocks):
            check_length(len(block["input_ids"]) if "input_ids" in block else 0, length, index)
    elif hasattr(blocks, "select_columns") and not _has_fixed_length(blocks):
        _check_stored_lengths(blocks, length)
    return BlockFacts(len(blocks), length, digest.hexdigest()[:16])


def check_length(found: int, length: int, index: int) -> None:
    """Raise `TSTError` unless block `index`, of `found` tokens, has `length` tokens."""
    if found != length:
        raise TSTError(
            f"Blocks must be of equal length, but block 0 of the training data has {length} tokens and block "
            f"{index} has {found}: pack the data into blocks."
        )


def _tokens(block: Any, index: int) -> NDArray[np.int64]:
    """The `input_ids` of a block, `(L,)`."""
    if not isinstance(block, Mapping) or "input_ids" not in block:
        names = sorted(block) if isinstance(block, Mapping) else type(block).__name__
        raise TSTError(
            f"The training data needs a column 'input_ids', but has {names}: tokenise and pack it."
        )
    try:
        tokens = np.asarray(block["input_ids"])
    except (TypeError, ValueError) as error:
        raise TSTError(
            f"The input_ids of block {index} of the training data are not one row of token ids: {error}."
        ) from None
    if tokens.ndim == 1 and not len(tokens):
        raise TSTError(f"Block {index} of the training data holds no token: pack the data into blocks.")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"an array of shape {tokens.shape} and type {tokens.dtype}" if tokens.ndim else "text"
        raise TSTError(
            f"The input_ids of block {index} of the training data must be one row of whole numbers, but are {found}: "
            "tokenise the data and pack it into blocks."
        )
    return tokens.astype(np.int64, copy=False)


def _has_fixed_length(blocks: Any) -> bool:
    return getattr(blocks.features["input_ids"], "length", -1) not in (-1, None)


def _check_stored_lengths(blocks: Any, length: int) -> None:
    import pyarrow.compute as pc

    stored = blocks.select_columns("input_ids").with_format("arrow")[: min(CHECKED_LENGTHS, len(blocks))]
    lengths = pc.list_value_length(stored["input_ids"]).to_numpy()
    if (differs := lengths != length).any():
        index = int(differs.argmax())
        check_length(int(lengths[index]), length, index)
