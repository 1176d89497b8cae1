"""Local files of text as `datasets` data sets."""

from __future__ import annotations

import codecs
import glob
from pathlib import Path
from typing import Any

from ..errors import TSTError, one_line
from .token_files import TOKEN_FILE_SUFFIX, TokenFile

FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text_file(path: str, split: str = "train", streaming: bool = False) -> Any:
    """A `datasets` data set of local text, JSON, CSV or Parquet files.

    Lines of a text file keep their line breaks, so that they join to the file's text again.

    Args:
        path (`str`): The file, or a pattern such as `"corpus/*.jsonl"` for several of one kind, read in the order of
            their names; the ending says how to read them. A `.npy` file of token ids is a [`TokenFile`].
        split (`str`, defaults to `"train"`): A slice of the file, such as `"train[:5%]"`.
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
    if loader == "json" or (streaming and loader != "parquet"):
        # A stream would come upon the bytes in the middle of training, and the JSON reader passes them on.
        for file in files:
            check_utf8(file)
    try:
        return datasets.load_dataset(
            loader, data_files={"train": files}, split=split, streaming=streaming, **options
        )
    except Exception as error:
        if loader != "parquet":
            for file in files:
                check_utf8(file)
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
    if file.suffix == ".txt" and not _holds_text(file):
        raise TSTError(f"The file {file} holds nothing but white space: name one that holds text.")


def _holds_text(path: Path, chunk_size: int = 1 << 20) -> bool:
    with open(path, "rb") as file:
        return any(chunk.strip() for chunk in iter(lambda: file.read(chunk_size), b""))


def check_utf8(path: str, chunk_size: int = 1 << 20) -> None:
    """Read a file through, `chunk_size` bytes at a time.

    Raises:
        TSTError: If it is not UTF-8 text; it names the first byte that is not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(chunk_size)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise TSTError(
                    f"The file {path} is not UTF-8 text: byte {position - pending + error.start} is "
                    f"0x{error.object[error.start]:02x}; convert it, for example with "
                    "`iconv -f latin1 -t utf-8`."
                ) from None
            if not chunk:
                return
            position += len(chunk)
