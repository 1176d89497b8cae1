"""Reading blocks from a map-style data set.

A `datasets.Dataset` is read as slices of its memory-mapped Arrow table: consecutive blocks are one slice of one
buffer, and nothing is turned into Python objects on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .block_checks import BlockRules, check_length

# Columns with one value a token.
PER_TOKEN_COLUMNS = {"input_ids", "labels", "attention_mask"}


class BlockReader:
    """Reads the `columns` of blocks by number.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, any with `__getitem__`).
        columns (`Sequence[str]`): Columns to read.
        as_arrays (`bool`, defaults to `True`): Read a `datasets.Dataset` as NumPy arrays, not in its own format.
        rules (`BlockRules`, *optional*): What the blocks must keep to; by default nothing but one length a column.

    Raises:
        TSTError: In reading, if a block breaks the rules.
    """

    def __init__(
        self,
        blocks: Any,
        columns: Sequence[str],
        as_arrays: bool = True,
        rules: BlockRules | None = None,
    ) -> None:
        self.columns = list(columns)
        self.rules = rules or BlockRules()
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
        found: list[Mapping[str, Any]]
        if (arrow := self._open()) is not None:
            found = [{name: column.read(i, 1) for name, column in arrow.items()} for i in indices]
        elif self._is_dataset:
            batch = self._formatted[list(indices)]
            found = [{name: batch[name][i] for name in self.columns} for i in range(len(indices))]
        else:
            blocks = (self._blocks[i] for i in indices)
            found = [{name: block[name] for name in self.columns} for block in blocks]
        if self.rules.length is not None:
            for index, block in zip(indices, found, strict=True):
                for name in PER_TOKEN_COLUMNS & block.keys():
                    check_length(len(block[name]), self.rules.length, index)
        return found

    def read_joined(self, start: int, count: int) -> dict[str, NDArray[Any]]:
        """The columns of `count` consecutive blocks, each joined to one array; full blocks, without padding."""
        if (arrow := self._open()) is not None:
            joined = {name: column.read(start, count) for name, column in arrow.items()}
        else:
            joined = join_blocks(self.read(range(start, start + count)))
        if "input_ids" in joined:
            self.rules.check_padding(joined["input_ids"], joined.get("attention_mask"), start)
        return joined

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
