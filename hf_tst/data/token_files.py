"""Files of token ids: text that is tokenized already, as one NumPy array on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import TSTError, one_line

TOKEN_FILE_SUFFIX = ".npy"
DTYPES = ("uint16", "uint32")


class TokenFile(Dataset[dict[str, NDArray[Any]]]):
    """Blocks of a file of token ids, each a view of the file, which is memory-mapped.

    Args:
        path (`str`): A `.npy` file with one row of ids, `(n,)`, uint16 or uint32.
        block_size (`int`, defaults to 1): Tokens per block, L.
        offset (`int`, defaults to 0): Tokens before the first block.
        indices (`Sequence[int]`, *optional*): Blocks to take, counted from there; all by default.

    Raises:
        TSTError: If there is no such file, or it holds something else.
    """

    def __init__(
        self, path: str, block_size: int = 1, offset: int = 0, indices: Sequence[int] | None = None
    ) -> None:
        self.path, self.block_size, self.offset = path, block_size, offset
        self.ids = _open(path)
        self.indices = range((len(self.ids) - offset) // block_size) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        start = self.offset + self.indices[index] * self.block_size
        return {"input_ids": self.ids[start : start + self.block_size]}

    def __reduce__(self) -> Any:
        # A pickled memory map is a copy of the file: a loader process opens it anew.
        return type(self), (self.path, self.block_size, self.offset, self.indices)

    # As `datasets.Dataset` names it; a stream has no such number.
    num_rows = property(__len__)

    def select(self, rows: Sequence[int]) -> TokenFile:
        """Some of the blocks."""
        if isinstance(rows, range) and rows.step == 1:  # millions of them, before they are cut
            indices: Sequence[int] = self.indices[rows.start : rows.stop]
        else:
            indices = [self.indices[row] for row in rows]
        return TokenFile(self.path, self.block_size, self.offset, indices)

    def cut(self, block_size: int) -> TokenFile:
        """Single tokens that follow each other as blocks of `block_size`; the last remainder is dropped.

        Raises:
            TSTError: If they do not fill one block.
        """
        count = len(self) // block_size
        if not count:
            raise TSTError(
                f"The file {self.path} gives {len(self)} tokens, which do not fill one block of {block_size}: give more text "
                "or a smaller block_size."
            )
        return TokenFile(self.path, block_size, self.indices[0], range(count))

    def check_ids(self, vocab_size: int) -> None:
        """Check that the model has an embedding for every id of the file, in one pass over it.

        Raises:
            TSTError: If not, with the highest id.
        """
        if (highest := int(self.ids.max())) >= vocab_size:
            raise TSTError(
                f"The file {self.path} holds the id {highest}, but the model has embeddings for 0 to {vocab_size - 1}: set "
                "vocab_size in config_overrides to that of the tokenizer that made the file."
            )


def _open(path: str) -> NDArray[Any]:
    try:
        ids = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise TSTError(f"There is no file {path}.") from None
    except (OSError, ValueError, EOFError) as error:
        raise TSTError(f"Cannot read {path} as a NumPy array: {one_line(error)}.") from error
    if ids.ndim != 1 or ids.dtype.name not in DTYPES or not len(ids):
        raise TSTError(
            f"The file {path} must hold one row of token ids of type {' or '.join(DTYPES)}, but holds an array of shape "
            f"{ids.shape} and type {ids.dtype}: write it with numpy.save(path, ids.astype('uint16'))."
        )
    return np.asarray(ids)  # still mapped; slices of the class memmap cost more
