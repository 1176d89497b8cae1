"""Local files as training data: text, read by `datasets`, and token ids, as one NumPy array on disk."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import TSTError, one_line

TOKEN_FILE_SUFFIX = ".npy"
TOKEN_DTYPES = ("uint16", "uint32")
FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text_file(path: str, streaming: bool = False) -> Any:
    """A `datasets` data set of local text, JSON, CSV or Parquet files.

    Lines of a text file keep their line breaks, so that they join to the file's text again.

    Args:
        path (`str`): The file, or a pattern such as `"corpus/*.jsonl"` for several of one kind, read in the order of
            their names; the ending says how to read them. A `.npy` file of token ids is a [`TokenFile`].
        streaming (`bool`, defaults to `False`): Read the file as training goes on; every file is a shard.

    Raises:
        TSTError: If a file is missing, empty, of no known kind, text that is not UTF-8, or cannot be read as what its
            ending says.
    """
    if path.endswith(TOKEN_FILE_SUFFIX):
        if streaming:
            raise TSTError(f"{path} is read from the disk as training goes on, always: leave streaming out.")
        return TokenFile(path)
    import datasets

    files = matching_files(path)
    if not files:
        raise TSTError(f"There is no file that fits {path}.")
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1:
        raise TSTError(
            f"The files that fit {path} end in {', '.join(sorted(kinds))}: name files of one kind."
        )
    for file in files:
        _check_file(Path(file))
    loader = FILE_LOADERS[kinds.pop()]
    options = {"keep_linebreaks": True} if loader == "text" else {}
    try:
        return datasets.load_dataset(
            loader, data_files={"train": files}, split="train", streaming=streaming, **options
        )
    except Exception as error:
        raise TSTError(f"Cannot read {path} as {loader}: {one_line(error)}.") from error


def matching_files(path: str) -> list[str]:
    """The file of that name, or those that fit it as a pattern, in the order of their names."""
    return sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path]


def _check_file(file: Path) -> None:
    if file.suffix not in FILE_LOADERS:
        raise TSTError(
            f"Cannot read {file}: its name must end in one of {', '.join([*FILE_LOADERS, TOKEN_FILE_SUFFIX])}."
        )
    if not file.is_file():
        raise TSTError(f"There is no file {file}.")
    if file.stat().st_size == 0:
        raise TSTError(f"The file {file} is empty: name one that holds text.")
    if file.suffix != ".parquet":
        _check_text(file)


def _check_text(path: Path) -> None:
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
        raise TSTError(f"The file {path} holds nothing but white space: name one that holds text.")


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
        self.ids = _open_ids(path)
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


def _open_ids(path: str) -> NDArray[Any]:
    try:
        ids = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise TSTError(f"There is no file {path}.") from None
    except (OSError, ValueError, EOFError) as error:
        raise TSTError(f"Cannot read {path} as a NumPy array: {one_line(error)}.") from error
    if ids.ndim != 1 or ids.dtype.name not in TOKEN_DTYPES or not len(ids):
        raise TSTError(
            f"The file {path} must hold one row of token ids of type {' or '.join(TOKEN_DTYPES)}, but holds an array of shape "
            f"{ids.shape} and type {ids.dtype}: write it with numpy.save(path, ids.astype('uint16'))."
        )
    return np.asarray(ids)  # still mapped; slices of the class memmap cost more
