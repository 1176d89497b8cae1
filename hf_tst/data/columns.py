"""Which column of a data set is read, and as what type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..errors import TSTError

logger = logging.get_logger(__name__)

TOKENS = "input_ids"


def choose_column(columns: Sequence[str], text_column: str | None, source: str) -> str:
    """The column to train on: `text_column` if given, else `input_ids`, else `text` or `Text`, else the only one.

    Raises:
        TSTError: If there is no such column, or the choice is ambiguous.
    """
    if not columns:
        raise no_text(source)
    lower = [name for name in columns if name.lower() == "text"]
    choices = [[text_column]] if text_column else [[TOKENS], ["text"], lower, list(columns)]
    for names in choices:
        if len(names) == 1 and columns.count(names[0]) == 1:
            return str(names[0])
    name = text_column or "text"
    found = f"{columns.count(name)} columns" if name in columns else "no column"
    raise TSTError(
        f"{source} has {found} {name!r}: set text_column to the one that holds the text, of {', '.join(columns)}."
    )


def log_column(column: str, columns: Sequence[str], source: str) -> None:
    """Log which column is read if there are several, or if it has an unusual name. Logs once for training and evaluation data."""
    others = ", ".join(name for name in columns if name != column)
    if others or column not in (TOKENS, "text"):
        logger.warning_once(
            f"Reading the column {column!r} of {source}{', ignoring ' if others else ''}{others}."
        )


def column_type(column: str) -> Any:
    """The Arrow type that a column is read as."""
    import pyarrow as pa

    return pa.list_(pa.int32()) if column == TOKENS else pa.large_string()


def is_readable(kind: Any, column: str) -> bool:
    """Whether an Arrow type holds text or, in the column `input_ids`, rows of whole numbers."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if column != TOKENS:
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and (types.is_integer(kind.value_type) or types.is_null(kind.value_type))


def no_text(source: str) -> TSTError:
    """The error for a source without text."""
    return TSTError(f"{source} holds no text: name data that does.")
