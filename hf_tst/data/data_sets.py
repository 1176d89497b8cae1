"""Data sets of the Hub or of a folder, as `datasets` loads them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers.utils import logging

from ..errors import TSTError, bad_input, whole_message
from .text_files import ENDINGS, ending

logger = logging.get_logger(__name__)

# Files of `datasets` beside the data.
NO_TEXT = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"}


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
        builder = datasets.load_dataset_builder(name, config, **options)
        if builder.info.builder_name == "text":
            raise TSTError(
                f"{name} holds .txt files, whose line breaks `datasets` removes: name the files themselves (after `hf download`, if they are on "
                f"the Hub), as in --train_file '{name.rstrip('/')}/**/*.txt' or Axolotl's data_files."
            )
        if config is None and os.path.isdir(name):
            _tell_unread_files(name, builder.config.data_files or {})
        return datasets.load_dataset(name, config, split=split, streaming=streaming, **options)


def _tell_unread_files(folder: str, splits: Mapping[str, Iterable[str]]) -> None:
    """Warn of the text files of a folder that are in none of its splits, as `datasets` finds these."""
    read = {os.path.realpath(file) for files in splits.values() for file in files}
    names = glob.glob("**", root_dir=folder, recursive=True)  # without hidden ones, as `datasets` finds them
    found = [
        os.path.join(folder, name)
        for name in names
        if ending(name) in ENDINGS and os.path.basename(name) not in NO_TEXT
    ]
    if read and (unread := sorted(file for file in found if os.path.realpath(file) not in read)):
        logger.warning(
            f"{folder}: `datasets` reads {len(read)} files for the splits {', '.join(map(str, splits))}, and does not read {len(unread)} others, such as "
            f"{unread[0]}. If any file has a split in its name (train, test, …), it reads only these, and of several kinds only one: name all "
            f"files by train_file, as in --train_file '{folder.rstrip('/')}/**/*.jsonl'."
        )


def is_stored(rows: Any) -> bool:
    """Whether the rows of a data set are those that a `datasets.Dataset` has stored, and not made by a transform as they are read."""
    form = getattr(rows, "format", None)
    return hasattr(rows, "select_columns") and isinstance(form, Mapping) and form.get("type") != "custom"


def read_rows(documents: Iterable[Any]) -> Iterator[Any]:
    """The rows of a data set or stream of `datasets`.

    Raises:
        TSTError: If a file cannot be read as what it should be, which shows in a stream only here.
    """
    with bad_input("Cannot read the data: "):
        yield from documents
