"""Local files as training data: text, read by `datasets`, and token ids, as one NumPy array on disk."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import TSTError, bad_input

TOKEN_FILE_SUFFIX = ".npy"
TOKEN_DTYPES = ("uint16", "uint32")
FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text_file(path: str, streaming: bool = False) -> Any:
    """A `datasets` data set of local text, JSON, CSV or Parquet files.

    Lines of a text file keep their line breaks, so that they join to the file's text again.

    Args:
        path (`str`): The file, or a pattern such as `"corpus/*.jsonl"` for several of one kind, read in the order of
            their names; the ending says how to read them. A `.npy` file of token ids is a [`TokenFile`].
        streaming (`bool`, defaults to `False`): Read the files during training; each file is a shard.

    Raises:
        TSTError: If a file is missing, empty, of no known kind, text that is not UTF-8, or cannot be read as what its
            ending says.
    """
    files = matching_files(path)
    if not files or not all(Path(file).is_file() for file in files):
        raise TSTError(f"There is no file {path}.")
    if path.endswith(TOKEN_FILE_SUFFIX):
        if streaming:
            raise TSTError(f"{path} is always read from disk during training: leave streaming out.")
        return TokenFile(path)
    import datasets

    kinds = sorted({Path(file).suffix for file in files})
    if len(kinds) > 1 or kinds[0] not in FILE_LOADERS:
        endings = ", ".join([*FILE_LOADERS, TOKEN_FILE_SUFFIX])
        raise TSTError(
            f"Cannot read {path} with endings {kinds}: name files of one kind, which must end in one of {endings}."
        )
    loader = FILE_LOADERS[kinds[0]]
    if loader != "parquet":
        for file in files:
            _check_text(file)
    options = {"keep_linebreaks": True} if loader == "text" else {}
    with bad_input(f"Cannot read {path} as {loader}: ", Exception):
        return datasets.load_dataset(loader, data_files=files, split="train", streaming=streaming, **options)


def matching_files(path: str) -> list[str]:
    """The file of that name, or those that fit it as a pattern, in the order of their names."""
    return sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path]


def _check_text(path: str) -> None:
    """Read a file through: a stream would come upon bad bytes in the middle of training, and readers may pass them on."""
    position, blank = 0, True
    with open(path, "rb") as file:
        while lines := file.read(1 << 20) + file.readline():
            try:
                blank &= lines.decode().isspace()
            except UnicodeDecodeError as error:
                raise TSTError(
                    f"The file {path} is not UTF-8 text: byte {position + error.start} is 0x{lines[error.start]:02x}; "
                    "convert it, for example with `iconv -f latin1 -t utf-8`."
                ) from None
            position += len(lines)
    if blank:
        problem = "holds nothing but white space" if position else "is empty"
        raise TSTError(f"The file {path} {problem}: name one that holds text.")


class TokenFile(Dataset[dict[str, NDArray[Any]]]):
    """Blocks of a file of token ids, each a view of the file, which is memory-mapped.

    Args:
        path (`str`): A `.npy` file with one row of ids, `(n,)`, uint16 or uint32.
        block_size (`int`, defaults to 1): Tokens per block, L.
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
        # A pickled memory map is a copy of the file: a loader process opens it anew.
        return type(self), (self.path, self.block_size, self.starts)

    # As `datasets.Dataset` names it; a stream has no such number.
    num_rows = property(__len__)

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
        """Check that the model has an embedding for every id of the file, in one pass over it.

        Raises:
            TSTError: If not, with the highest id.
        """
        if (highest := int(self.ids.max())) >= vocab_size:
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
