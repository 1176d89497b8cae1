"""Reading blocks from a map-style data set, and checking that it holds blocks.

A `datasets.Dataset` is read as slices of its memory-mapped Arrow table: consecutive blocks are one slice of one
buffer, and nothing is turned into Python objects on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def check_blocks(blocks: Any, pad_token_id: int | None = None) -> BlockFacts:
    """Check that a map-style data set holds full, equal blocks of tokens.

    The cost does not grow with the data: 256 blocks spread over it are read and, of a `datasets.Dataset` whose type
    does not fix the length of `input_ids`, the first 100 000 stored lengths. Blocks are checked again as they
    are read.

    Args:
        blocks: The data set.
        pad_token_id (`int`, *optional*): Id that marks padding, if it marks nothing else.

    Raises:
        ValueError: If there is no `input_ids`, blocks differ in length or are padded, or there is no block.
    """
    if len(blocks) == 0:
        raise ValueError("The training data is empty: it has no block of tokens.")
    if hasattr(blocks, "with_format"):
        blocks = blocks.with_format("numpy")
    first = blocks[0]
    check_has_tokens(first)
    length = len(first["input_ids"])
    digest = hashlib.sha256(f"{len(blocks)} blocks".encode())
    sample = {int(index) for index in np.linspace(0, len(blocks) - 1, num=SAMPLED_BLOCKS)}
    for index in sorted(sample):
        block = blocks[index]
        tokens = np.asarray(block["input_ids"], dtype=np.int64)
        check_length(len(tokens), length, index)
        _check_padding(block, tokens, pad_token_id, index)
        digest.update(tokens.tobytes())
    if hasattr(blocks, "select_columns") and not _has_fixed_length(blocks):
        _check_stored_lengths(blocks, length)
    return BlockFacts(len(blocks), length, digest.hexdigest()[:16])


def check_has_tokens(block: Any) -> None:
    """Raise `ValueError` unless the block has `input_ids`."""
    if not isinstance(block, Mapping) or "input_ids" not in block:
        names = sorted(block) if isinstance(block, Mapping) else type(block).__name__
        raise ValueError(
            f"The training data needs a column 'input_ids', but has {names}: tokenise and pack it."
        )


def check_length(found: int, length: int, index: int) -> None:
    """Raise `ValueError` unless block `index`, of `found` tokens, has `length` tokens."""
    if found != length:
        raise ValueError(
            f"Blocks must be of equal length, but block 0 of the training data has {length} tokens and block "
            f"{index} has {found}: pack the data into blocks."
        )


def _check_padding(
    block: Mapping[str, Any], tokens: NDArray[np.int64], pad_token_id: int | None, index: int
) -> None:
    mask = block.get("attention_mask")
    if mask is not None and not np.asarray(mask).all():
        raise ValueError(
            f"Block {index} of the training data is padded (its attention_mask holds zeros), and a bag would "
            "average padding with text: pack the data into full blocks."
        )
    if pad_token_id is not None and int(tokens[-1]) == pad_token_id:
        raise ValueError(
            f"Block {index} of the training data ends in the padding token {pad_token_id}, and a bag would "
            "average padding with text: pack the data into full blocks."
        )


def _has_fixed_length(blocks: Any) -> bool:
    return getattr(blocks.features["input_ids"], "length", -1) not in (-1, None)


def _check_stored_lengths(blocks: Any, length: int) -> None:
    import pyarrow.compute as pc

    stored = blocks.select_columns("input_ids").with_format("arrow")[: min(CHECKED_LENGTHS, len(blocks))]
    lengths = pc.list_value_length(stored["input_ids"]).to_numpy()
    if (differs := lengths != length).any():
        index = int(differs.argmax())
        check_length(int(lengths[index]), length, index)


class BlockReader:
    """Reads the `columns` of blocks by number.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, any with `__getitem__`).
        columns (`Sequence[str]`): Columns to read.
        as_arrays (`bool`, defaults to `True`): Read a `datasets.Dataset` as NumPy arrays, not in its own format.
    """

    def __init__(self, blocks: Any, columns: Sequence[str], as_arrays: bool = True) -> None:
        self.columns = list(columns)
        self._is_dataset = hasattr(blocks, "select_columns")
        self._as_arrays = as_arrays
        self._blocks = blocks.select_columns(self.columns) if self._is_dataset else blocks
        self._formatted = (
            self._blocks.with_format("numpy") if self._is_dataset and as_arrays else self._blocks
        )
        self._arrow: dict[str, _ArrowColumn] | None = None
        self._opened = False

    def __getstate__(self) -> dict[str, Any]:
        # Views into memory-mapped files would be pickled as copies of the files: a worker makes its own.
        return vars(self) | {"_arrow": None, "_opened": False}

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """The columns of each of some blocks."""
        if (arrow := self._open()) is not None:
            return [{name: column.read(i, 1) for name, column in arrow.items()} for i in indices]
        if self._is_dataset:
            batch = self._formatted[list(indices)]
            return [{name: batch[name][i] for name in self.columns} for i in range(len(indices))]
        return [{name: block[name] for name in self.columns} for block in (self._blocks[i] for i in indices)]

    def read_joined(self, start: int, count: int) -> dict[str, NDArray[Any]]:
        """The columns of `count` consecutive blocks, each joined to one array."""
        if (arrow := self._open()) is not None:
            return {name: column.read(start, count) for name, column in arrow.items()}
        return join_blocks(self.read(range(start, start + count)))

    def _open(self) -> dict[str, _ArrowColumn] | None:
        if not self._opened:
            self._opened = True
            if self._as_arrays and self._is_dataset and getattr(self._blocks, "_indices", self) is None:
                self._arrow = _open_columns(self._blocks.data, self.columns)
        return self._arrow


def join_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The columns of consecutive blocks, each joined to one array."""
    return {name: np.concatenate([np.asarray(block[name]) for block in blocks]) for name in blocks[0]}


def _open_columns(table: Any, columns: Sequence[str]) -> dict[str, _ArrowColumn] | None:
    opened = {}
    for name in columns:
        column = _ArrowColumn.open(table.column(name))
        if column is None:
            return None
        opened[name] = column
    return opened


class _ArrowColumn:
    """A column of lists of numbers, as views into the table's buffers."""

    def __init__(self, starts: NDArray[np.int64], values: list[Any], offsets: list[Any], length: int) -> None:
        self.starts = starts  # first block of each chunk, and the number of blocks
        self.values = values
        self.offsets = offsets
        self.length = length

    @classmethod
    def open(cls, column: Any) -> _ArrowColumn | None:
        """The column, or `None` if its values cannot be viewed as they are."""
        import pyarrow as pa

        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        number = is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
        if not number or column.null_count:
            return None
        values, offsets = [], []
        for chunk in column.chunks:
            flat = chunk.values
            if flat.null_count:
                return None
            values.append(flat.to_numpy(zero_copy_only=True))
            if pa.types.is_fixed_size_list(kind):
                offsets.append(range(chunk.offset * kind.list_size, len(flat) + 1, kind.list_size))
            else:
                offsets.append(chunk.offsets.to_numpy(zero_copy_only=True))
        length = int(offsets[0][1] - offsets[0][0])
        starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])
        return cls(starts, values, offsets, length)

    def read(self, start: int, count: int) -> NDArray[Any]:
        pieces = []
        chunk = int(np.searchsorted(self.starts, start, side="right")) - 1
        stop = start + count
        while start < stop:
            first = int(self.starts[chunk])
            end = min(stop, int(self.starts[chunk + 1]))
            pieces.append(self._slice(chunk, start - first, end - first, start))
            start, chunk = end, chunk + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _slice(self, chunk: int, first: int, end: int, block: int) -> NDArray[Any]:
        offsets = self.offsets[chunk]
        if not isinstance(offsets, range):
            for i, length in enumerate(np.diff(offsets[first : end + 1])):
                check_length(int(length), self.length, block + i)
        return self.values[chunk][offsets[first] : offsets[end]]
