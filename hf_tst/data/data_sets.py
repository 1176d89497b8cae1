"""Data sets of the Hub or of a folder, as `datasets` loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import TSTError, bad_input, whole_message


def load_data_set(name: str, *args: Any, **options: Any) -> Any:
    """What `datasets.load_dataset` returns, unless it is of `.txt` files, whose text it changes.

    Raises:
        TSTError: If it is, or a file cannot be read.
    """
    import datasets

    errors = datasets.exceptions.DatasetGenerationError  # its message is in its cause
    with bad_input(f"Cannot load {name}: ", errors, lambda error: whole_message(error.__cause__ or error)):
        data = datasets.load_dataset(name, *args, **options)
    rows = next(iter(data.values())) if isinstance(data, Mapping) else data
    if rows.info.builder_name == "text":
        raise TSTError(
            f"{name} holds .txt files, whose line breaks `datasets` removes: name the files themselves (after `hf download`, if they are on "
            f"the Hub), as in --train_file '{name.rstrip('/')}/**/*.txt' or Axolotl's data_files."
        )
    return data
