"""Token ids in one NumPy array on disk, as blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import TSTError, bad_input
from .columns import TOKENS

TOKEN_FILE_SUFFIX = ".npy"
TOKEN_DTYPES = ("uint16", "uint32")


class TokenFile(Dataset[dict[str, NDArray[Any]]]):
    """Blocks of a file of token ids, each a view of the file, which is memory-mapped.

    Args:
        path (`str`): A `.npy` file with one row of ids, `(n,)`, uint16 or uint32.
        block_size (`int`, *optional*, defaults to 1): Tokens per block, L.
        starts (`Sequence[int]`, *optional*): First token of each block; by default the file is cut from its beginning.

    Raises:
        TSTError: If there is no such file, or it holds something else.
    """

    def __init__(self, path: str, block_size: int = 1, starts: Sequence[int] | None = None) -> None:
        self.path, self.block_size = path, block_size
        self.ids = _open_ids(path)
        self.starts = range(0, len(self.ids) - block_size + 1, block_size) if starts is None else starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        start = self.starts[index]
        return {"input_ids": self.ids[start : start + self.block_size]}

    def __reduce__(self) -> Any:
        # A pickled memory map would be a copy of the file, so a loader process opens it again.
        return type(self), (self.path, self.block_size, self.starts)

    # As `datasets.Dataset` has them; a stream has no such number.
    num_rows = property(__len__)
    column_names = (TOKENS,)

    def select(self, rows: Sequence[int]) -> TokenFile:
        """Some of the blocks."""
        if isinstance(rows, range) and rows.step == 1:  # millions of them, before they are cut
            starts: Sequence[int] = self.starts[rows.start : rows.stop]
        else:
            starts = [self.starts[row] for row in rows]
        return TokenFile(self.path, self.block_size, starts)

    def cut(self, block_size: int) -> TokenFile:
        """Single tokens that follow each other as blocks of `block_size`; the last remainder is dropped.

        Raises:
            TSTError: If they do not fill one block.
        """
        starts = self.starts[: len(self) // block_size * block_size : block_size]
        if not starts:
            raise TSTError(
                f"The file {self.path} gives {len(self)} tokens, which do not fill one block of {block_size}: give more text "
                "or a smaller block_size."
            )
        return TokenFile(self.path, block_size, starts)

    def check_ids(self, vocab_size: int) -> None:
        """Check that the model has an embedding for every id of the file, in one pass over it unless the type of ids says so.

        Raises:
            TSTError: If not, with the highest id.
        """
        if np.iinfo(self.ids.dtype).max >= vocab_size and (highest := int(self.ids.max())) >= vocab_size:
            raise TSTError(
                f"The file {self.path} holds the id {highest}, but the model has embeddings for 0 to {vocab_size - 1}: set "
                "vocab_size in config_overrides to that of the tokenizer that made the file."
            )


def _open_ids(path: str) -> NDArray[Any]:
    with bad_input(f"Cannot read {path} as a NumPy array: ", (OSError, ValueError, EOFError)):
        ids = np.load(path, mmap_mode="r")
    if ids.ndim != 1 or ids.dtype.name not in TOKEN_DTYPES or not len(ids):
        raise TSTError(
            f"The file {path} must hold one row of token ids of type {' or '.join(TOKEN_DTYPES)}, but holds an array of shape "
            f"{ids.shape} and type {ids.dtype}: write it with numpy.save(path, ids.astype('uint16'))."
        )
    return np.asarray(ids)  # still mapped; slices of the class memmap cost more
