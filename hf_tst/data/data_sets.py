"""Data sets of the Hub or of a folder, as `datasets` loads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import TSTError, bad_input, whole_message


def load_data_set(
    name: str, config: str | None, split: str | None = None, streaming: bool = False, **options: Any
) -> Any:
    """What `datasets.load_dataset` returns, unless it is of `.txt` files, whose text it changes.

    Raises:
        TSTError: If it is, before its files are read; or a file cannot be read.
    """
    import datasets

    errors = datasets.exceptions.DatasetGenerationError  # its message is in its cause
    with bad_input(f"Cannot load {name}: ", errors, lambda error: whole_message(error.__cause__ or error)):
        if datasets.load_dataset_builder(name, config, **options).info.builder_name == "text":
            raise TSTError(
                f"{name} holds .txt files, whose line breaks `datasets` removes: name the files themselves (after `hf download`, if they are on "
                f"the Hub), as in --train_file '{name.rstrip('/')}/**/*.txt' or Axolotl's data_files."
            )
        return datasets.load_dataset(name, config, split=split, streaming=streaming, **options)


def read_rows(documents: Iterable[Any]) -> Iterator[Any]:
    """The rows of a data set or stream of `datasets`.

    Raises:
        TSTError: If a file cannot be read as what it should be, which shows in a stream only here.
    """
    with bad_input("Cannot read the data: "):
        yield from documents
