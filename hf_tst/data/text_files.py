"""Local files of text as `datasets` data sets."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from ..errors import TSTError, one_line
from .token_files import TOKEN_FILE_SUFFIX, TokenFile

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
