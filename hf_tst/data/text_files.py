"""Read one column of text from files of lines, JSON, CSV or Parquet, and check it."""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TSTError, bad_input, one_line
from .columns import TOKENS, choose_column, column_type, is_readable, no_text

PART_ROWS = 1000
PART_CHARACTERS = 1 << 26
BLOCK_BYTES = 1 << 20
# A file with a larger share of NUL characters is not text.
NUL_SHARE = 0.1
# Arrow's name of each compression, by ending. Arrow does not read .xz.
COMPRESSIONS = {".gz": "gzip", ".dz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": None}
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
# Values of the column in some rows, and a function that describes the place of the i-th of them in the file.
Part = tuple[Any, Callable[[int], str]]
Item = TypeVar("Item")


def ending(path: str) -> str:
    """The ending that tells the format, in lower case and without a compression: `.jsonl` for `a.JSONL` and `a.jsonl.gz`."""
    name = Path(path.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix


def columns_of(path: str) -> list[str]:
    """The names of the columns of a file, from its first rows, header or schema.

    Raises:
        TSTError: If it cannot be read.
    """
    with _reading(path):
        return _KINDS[ending(path)][0](path)


def read_column(path: str, column: str) -> Iterator[Any]:
    """The rows of a file: Arrow arrays of the texts in a column or, for the column `input_ids`, of lists of tokens.

    Raises:
        TSTError: If the file cannot be read, lacks the column, has no text in it, or has a value of another type.
    """
    found = False
    with _reading(path):
        for values, place in _KINDS[ending(path)][1](path, column):
            array = _checked(values, place, column, path)
            found = found or _has_text(array)
            yield array
    if not found:
        raise no_text(f"The column {column!r} of {path}")


def read_text(path: str) -> str:
    """The text of a file, with line feeds at the ends of lines.

    Raises:
        TSTError: If it cannot be read, or is not UTF-8 text.
    """
    with _reading(path):
        return io.StringIO("".join(_decoded(path)), newline=None).read()


def check_column(path: str, column: str) -> None:
    """Read a file up to the first part with text, with the checks of `read_column`."""
    any(map(_has_text, read_column(path, column)))


def _has_text(array: Any) -> bool:
    """Whether an array of texts or token lists holds more than white space."""
    return any(value and (isinstance(value, list) or not value.isspace()) for value in array.to_pylist())


def _reading(path: str) -> AbstractContextManager[None]:
    import pyarrow as pa

    errors = (OSError, EOFError, csv.Error, lzma.LZMAError, pa.ArrowException)
    return bad_input(f"Cannot read {path}: ", errors)


def _checked(values: Any, place: Callable[[int], str], column: str, path: str) -> Any:
    """The values as one array of the column's type, checked."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def convert(values: Any) -> Any:
        array = values if isinstance(values, pa.Array) else pa.array(values)
        if not pa.types.is_null(array.type) and not is_readable(array.type, column):
            raise TypeError(array.type)
        array = array.cast(column_type(column))
        array.validate(full=True)
        if column == TOKENS and array.flatten().null_count:
            raise TypeError("a list with null")
        return array

    errors = (TypeError, ValueError, pa.ArrowException)
    try:
        array = convert(values)
    except errors:
        for row in range(len(values)):
            try:
                convert(values[row : row + 1])
            except errors as error:
                found = one_line(error) if isinstance(values, pa.Array) else reprlib.repr(values[row])[:80]
                wanted = "a list of whole numbers" if column == TOKENS else "text"
                raise TSTError(
                    f"The column {column!r} of {path} holds {found} in {place(row)}, not {wanted}: set text_column to a column "
                    "of text, or change the file."
                ) from error
        raise
    if column != TOKENS:
        count, size = pc.sum(pc.count_substring(array, "\0")), pc.sum(pc.binary_length(array))
        _check_nuls(count.as_py() or 0, size.as_py() or 0, path)
    return array


def _check_nuls(count: int, size: int, path: str) -> None:
    if count > NUL_SHARE * size:
        raise TSTError(
            f"The file {path} is full of NUL characters, like UTF-16 text that was read as another encoding: convert the "
            "original, for example with `iconv -f UTF-16LE -t UTF-8`."
        )


# Bytes and characters


def _open(path: str) -> io.BufferedReader | lzma.LZMAFile:
    """The file, decompressed."""
    import pyarrow as pa

    suffix = Path(path).suffix.lower()
    if suffix == ".xz":
        return lzma.open(path)
    return io.BufferedReader(pa.input_stream(path, compression=COMPRESSIONS.get(suffix)))


def _decoded(path: str) -> Iterator[str]:
    """The text of a file, in blocks of whole lines, without a byte order mark."""
    position = 0
    with _open(path) as file:
        while block := file.read(BLOCK_BYTES) + file.readline():
            if not position and block.startswith(
                (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
            ):
                name = "UTF-32" if block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
                raise TSTError(f"The file {path} is {name} text: convert it with `iconv -f {name} -t UTF-8`.")
            _check_nuls(block.count(0), len(block), path)
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise TSTError(
                    f"The file {path} is not UTF-8 text: byte {position + error.start} is 0x{block[error.start]:02x}; find out "
                    "its encoding, for example with `file`, and convert it with `iconv -f ENCODING -t UTF-8`."
                ) from None
            yield text if position else text.removeprefix("\ufeff")
            position += len(block)


def in_parts(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Lists of up to `PART_ROWS` consecutive items, which end early where the sizes of their items reach `most`."""
    part: list[Item] = []
    total = 0
    for item in items:
        part.append(item)
        total += size(item)
        if len(part) == PART_ROWS or total >= most:
            yield part
            part, total = [], 0
    if part:
        yield part


def _column_parts(rows: Iterator[tuple[str, Any]]) -> Iterator[Part]:
    def size(row: tuple[str, Any]) -> int:
        return len(row[1]) if isinstance(row[1], (str, list)) else 0

    for part in in_parts(rows, size, PART_CHARACTERS):
        places = [place for place, _ in part]
        yield [value for _, value in part], places.__getitem__


# Lines


def _line_columns(path: str) -> list[str]:
    return ["text"]


def _read_lines(path: str, column: str) -> Iterator[Part]:
    """Lines with a line feed at the end, so that together they are the text of the file."""
    choose_column(_line_columns(path), column, f"The file {path}")
    for text in _decoded(path):
        yield io.StringIO(text, newline=None).readlines(), str


# JSON


def _json_rows(path: str) -> Iterator[tuple[str, Any]]:
    """The objects of a file, each with its place. The file has one object per line, one list of objects, or one object."""
    number, is_first = 0, True
    for text in _decoded(path):
        for line in io.StringIO(text, newline="\n"):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if is_first and ending(path) == ".json":
                    yield from _json_list(path)
                    return
                reason = one_line(error).replace("line 1 ", "")
                raise TSTError(f"Cannot read line {number} of {path} as JSON: {reason}.") from error
            if isinstance(row, list) and is_first:
                yield from _json_list(path)
                return
            is_first = False
            yield f"line {number}", row


def _json_list(path: str) -> Iterator[tuple[str, Any]]:
    with bad_input(f"Cannot read {path} as JSON: ", (ValueError, RecursionError)):
        rows = json.loads("".join(_decoded(path)))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"row {number}", row


def _json_columns(path: str) -> list[str]:
    """The names in the first rows, since a row may lack some."""
    rows = (row for _, row in islice(_json_rows(path), PART_ROWS))
    return list(dict.fromkeys(name for row in rows for name in (row if isinstance(row, dict) else ["text"])))


def _read_json(path: str, column: str) -> Iterator[Part]:
    def value(place: str, row: Any) -> Any:
        if isinstance(row, str) and column == "text":
            return row
        if not isinstance(row, dict):
            raise TSTError(
                f"The file {path} holds {reprlib.repr(row)} in {place}, not an object with names and values."
            )
        if column not in row:
            choose_column(list(row), column, f"The object in {place} of {path}")
        return row[column]

    return _column_parts((place, value(place, row)) for place, row in _json_rows(path))


# CSV


def _csv_rows(path: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a file, each with its place, the header first. Each must have as many fields as the header."""
    separators = SEPARATORS[ending(path)]
    lines = (line for text in _decoded(path) for line in io.StringIO(text, newline=""))
    first = next(lines, "")
    separator = max(separators, key=lambda separator: len(next(csv.reader([first], delimiter=separator), [])))
    reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    fields = 0
    while True:
        place = f"line {reader.line_num + 1}"
        limit = csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TSTError(f"Cannot read the row in {place} of {path} as CSV: {one_line(error)}.") from error
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        fields = fields or len(row)
        if row and len(row) != fields:
            raise TSTError(
                f"The row in {place} of {path} has {len(row)} fields with {separator!r} between them, but the header has "
                f"{fields}: put quotes around texts that hold {separator!r}."
            )
        if row:
            yield place, row


def _csv_columns(path: str) -> list[str]:
    return next(_csv_rows(path), ("", []))[1]


def _read_csv(path: str, column: str) -> Iterator[Part]:
    rows = _csv_rows(path)
    header = next(rows, ("", []))[1]
    index = header.index(choose_column(header, column, f"The file {path}"))
    return _column_parts((place, row[index]) for place, row in rows)


# Parquet


def _parquet_columns(path: str) -> list[str]:
    from pyarrow import parquet

    return list(parquet.read_schema(path).names)


def _read_parquet(path: str, column: str) -> Iterator[Part]:
    from pyarrow import parquet

    choose_column(_parquet_columns(path), column, f"The file {path}")
    first = 1
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(PART_ROWS, columns=[column]):
            yield batch.column(0), lambda row, first=first: f"row {first + row}"  # type: ignore[misc]
            first += len(batch)


# By ending: a function for the names of a file's columns, and a reader of one column.
_KINDS: dict[str, tuple[Callable[[str], list[str]], Callable[[str, str], Iterator[Part]]]] = {
    ".txt": (_line_columns, _read_lines),
    ".json": (_json_columns, _read_json),
    ".jsonl": (_json_columns, _read_json),
    ".ndjson": (_json_columns, _read_json),
    ".csv": (_csv_columns, _read_csv),
    ".tsv": (_csv_columns, _read_csv),
    ".parquet": (_parquet_columns, _read_parquet),
}
ENDINGS = tuple(_KINDS)
