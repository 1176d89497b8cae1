"""Local files as training data: text, as a data set of `datasets`, or a file of token ids."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import TSTError
from .columns import choose_column, column_type, log_column
from .text_files import COMPRESSIONS, ENDINGS, check_column, columns_of, ending, read_column
from .token_file import TOKEN_FILE_SUFFIX, TokenFile
from .written_once import open_arrow, written_once

# Part of the name of a file of texts: raise it when the same files would be read differently.
READING_VERSION = 1


def load_text_file(
    path: str, streaming: bool = False, text_column: str | None = None, files: list[str] | None = None
) -> Any:
    """A `datasets` data set of one column of local text, JSON, CSV or Parquet files, whose values are checked.

    Lines of a text file keep their line breaks, so that they join to the file's text again.

    Args:
        path (`str`): The file, or a pattern such as `"corpus/**/*.jsonl"` for several of one kind, read in the order of
            their names. The ending decides the format; an ending of a compression may follow. A `.npy` file of token ids is a
            [`TokenFile`].
        streaming (`bool`, *optional*, defaults to `False`): Read the files during training; each file is a shard.
        text_column (`str`, *optional*): The column of text; by default `input_ids`, `text` or the only one.
        files (`list[str]`, *optional*): What [`matching_files`] finds for `path`, if it is known.

    Raises:
        TSTError: If a file is missing, of an unknown kind, unreadable in the format of its ending, without text, or has values that
            are not text.
        RunError: If the disk is full.
    """
    files = files or matching_files(path)
    if all(file.endswith(TOKEN_FILE_SUFFIX) for file in files):
        if len(files) > 1:
            raise TSTError(
                f"{path} matches {len(files)} files of token ids, but only one can be read: name one, or join them with scripts/pack_ids.py."
            )
        if streaming:
            raise TSTError(f"{path} is always read from disk during training: leave streaming out.")
        return TokenFile(files[0])
    import datasets

    kinds = sorted({ending(file) for file in files})
    if len(kinds) > 1 or kinds[0] not in ENDINGS:
        raise TSTError(
            f"Cannot read {path} with the endings {kinds}: name files of one kind, which must end in one of "
            f"{', '.join([*ENDINGS, TOKEN_FILE_SUFFIX])}; all but .parquet and {TOKEN_FILE_SUFFIX} may also end in .gz, .bz2, .zst or .xz."
        )
    names = [text_name(file) for file in files]
    counts = Counter(names)
    if twins := [file for file, name in zip(files, names, strict=True) if counts[name] > 1]:
        raise TSTError(
            f"{path} matches {twins[0]} and {twins[1]}, the same text twice: name the plain or the compressed files."
        )
    columns = columns_of(files[0])
    column = choose_column(columns, text_column, f"The file {files[0]}")
    log_column(column, columns, path)
    if streaming:
        for file in files:
            check_column(file, column)
        parts = datasets.IterableDataset.from_generator(_parts, gen_kwargs={"files": files, "column": column})
        return parts.map(_rows, batched=True, batch_size=1)
    states = [os.stat(file) for file in files]
    facts = [
        (os.path.abspath(f), state.st_size, state.st_mtime_ns) for f, state in zip(files, states, strict=True)
    ]
    name = datasets.fingerprint.Hasher.hash((facts, column, READING_VERSION))
    return open_arrow(
        written_once(f"text-{name}", lambda folder: _copy(files, column, folder / "data-text.arrow"))
    )


def matching_files(path: str) -> list[str]:
    """The file of that name, or the files that match it as a pattern, sorted by name; `**` matches any folders.

    An existing name, also of a folder at the start of the pattern, is taken literally. Of a file and the links to it that match, the
    first counts.

    Raises:
        TSTError: If there is none.
    """
    # Path.expanduser would raise an error of its own if there is no such user.
    pattern = Path(os.path.expanduser(path))
    if pattern.is_file():
        return [str(pattern)]
    if pattern.is_dir():
        raise TSTError(f"{path} is a folder: name its files, for example with {path.rstrip('/')}/**/*.jsonl.")
    root = next(folder for folder in pattern.parents if folder.is_dir())
    found = glob.glob(str(pattern.relative_to(root)), root_dir=root, recursive=True)
    names = sorted(str(root / name) for name in found if (root / name).is_file())
    files = sorted({os.path.realpath(name): name for name in reversed(names)}.values())
    if not files:
        where = "" if pattern.is_absolute() else f" in {Path.cwd()}"
        raise TSTError(f"There is no file {path}{where}.")
    return files


def text_name(path: str) -> str:
    """The name that a file, the links to it, and its compressed copy in the same folder have in common."""
    name = Path(os.path.realpath(path))
    return str(name.with_suffix("") if name.suffix.lower() in COMPRESSIONS else name)


def _schema(column: str) -> Any:
    import pyarrow as pa

    return pa.schema({column: column_type(column)})


def _copy(files: Sequence[str], column: str, path: Path) -> None:
    """Write the rows of text files to an Arrow file."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _schema(column)) as writer:
        for name in files:
            for array in read_column(name, column):
                writer.write_batch(pa.record_batch([array], schema=_schema(column)))


def _parts(files: Sequence[str], column: str) -> Iterator[dict[str, Any]]:
    """Many rows per part, because `datasets` is several times slower with single rows."""
    for file in files:
        for array in read_column(file, column):
            yield {column: array.to_pylist()}


def _rows(part: dict[str, list[Any]]) -> dict[str, Any]:
    return {column: values[0] for column, values in part.items()}
