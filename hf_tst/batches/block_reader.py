"""Reads blocks of a map-style data set.

Token columns of a `datasets.Dataset` are taken out of its memory-mapped Arrow table, all blocks of a batch at once,
without Python objects in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bags.collator import check_all_have
from ..data.data_sets import is_stored
from .blocks import (
    NO_RULES,
    TOKEN_COLUMNS,
    BlockRules,
    as_block,
    check_length,
    check_stored_lengths,
    copied,
    holds_ids,
)


class BlockReader:
    """Reads the `columns` of blocks by number, one block per row or several.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, any with `__getitem__`).
        columns (`Sequence[str]`): Columns to read.
        as_arrays (`bool`, *optional*, defaults to `True`): Read a `datasets.Dataset` as NumPy arrays, not in its own format,
            and rows of ids alone as mappings.
        rules (`BlockRules`): Requirements for the blocks; by default one length per column.
    """

    def __init__(
        self, blocks: Any, columns: Sequence[str], as_arrays: bool = True, rules: BlockRules = NO_RULES
    ) -> None:
        self.columns = list(columns)
        self.rules = rules
        self._as_arrays = as_arrays
        self._is_table = False
        if is_stored(blocks):
            blocks = blocks.select_columns(self.columns)
            if as_arrays:
                self._is_table = holds_ids(blocks)
                blocks = blocks.with_format("arrow" if self._is_table else "numpy")
        self._blocks = blocks

    def read(self, first_blocks: Sequence[int], size: int = 1) -> list[Any]:
        """The columns of some rows, each of `size` consecutive blocks.

        Raises:
            TSTError: If a block is of another length.
        """
        indices = [first + i for first in first_blocks for i in range(size)]
        if self._is_table:
            return self._read_table(indices, size)
        if hasattr(self._blocks, "__getitems__"):
            found = self._blocks.__getitems__(indices)
        else:
            found = [copied(self._blocks[i]) for i in indices]
        if self.rules.length is not None:
            for index, row in zip(indices, found, strict=True):
                block = as_block(row, index)
                for name in {*self.columns} & {*TOKEN_COLUMNS}:
                    given = block.get(name)
                    check_length(0 if given is None else len(given), self.rules.length, index)
                self.rules.check_ids(np.asarray(block["input_ids"]), index)
        found = [self._chosen(row) for row in found]
        if size == 1:
            return found
        return [join_blocks(found[i : i + size], self.columns) for i in range(0, len(found), size)]

    def _chosen(self, row: Any) -> Any:
        """The columns to read of a row; the whole row if it is only ids and goes to a user's collator."""
        if not self._as_arrays and not isinstance(row, Mapping):
            return row
        block = as_block(row)
        return {name: block.get(name) for name in self.columns}

    def _read_table(self, indices: list[int], size: int) -> list[dict[str, Any]]:
        """All blocks at once, each row a view of one array per column."""
        arrays: list[NDArray[np.int64]] = []
        for column in self._blocks[indices].columns:
            lists = column.combine_chunks()
            length = self.rules.length or len(lists[0])
            check_stored_lengths(lists, length, indices)
            values = lists.flatten().to_numpy(zero_copy_only=False)
            is_ids = len(arrays) == self.columns.index("input_ids")
            if is_ids and (at := self.rules.find_bad_id(values)) is not None:
                raise self.rules.error_of_id(indices[at // length], values[at])
            arrays.append(values.astype(np.int64).reshape(-1, size * length))
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*arrays, strict=True)]


def join_blocks(blocks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named columns of consecutive blocks, each joined to one array.

    Raises:
        TSTError: If a block lacks one.
    """
    check_all_have(blocks, names)
    return {name: np.concatenate([np.asarray(block[name]) for block in blocks]) for name in names}
