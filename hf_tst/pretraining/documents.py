"""The text of a run: where it is read from, and its blocks of tokens."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.data_sets import load_data_set
from ..data.files import load_text_file, text_name
from ..data.packing import pack_blocks, tokenize_documents
from ..data.quickstart import standard_library_documents
from ..data.streams import BlockStream
from ..data.text_files import ending
from ..data.token_file import TokenFile
from ..errors import TSTError
from .options import DataArguments, ModelArguments

logger = logging.get_logger(__name__)

QUICK_START_BYTES = 6_000_000


def load_documents(args: DataArguments, model_args: ModelArguments) -> tuple[Any, Any]:
    """Training and validation text, as `datasets` data sets or token files.

    Raises:
        TSTError: If a stream would have to be split, or a split would be empty.
    """
    share = args.validation_split_percentage
    if args.is_quick_start:
        documents = standard_library_documents(QUICK_START_BYTES)
        if not share:
            return documents, None
        split = documents.train_test_split(test_size=share / 100, seed=0)
        return split["train"], split["test"]
    validation = None
    if args.validation_file:
        validation = load_text_file(
            args.validation_file, text_column=args.text_column, files=args.validation_files
        )
    if args.train_file:
        trained = {*map(text_name, args.train_files)} if args.validation_file else set()
        if both := [file for file in args.validation_files if text_name(file) in trained]:
            logger.warning(
                f"{', '.join(both)} is both training and evaluation data, so the evaluation loss says nothing about new text."
            )
        train = load_text_file(args.train_file, args.streaming, args.text_column, args.train_files)
    else:
        splits = _load_data_set(args, model_args)
        train = splits["train"]
        if validation is None:
            validation = splits.get("validation")
    if validation is not None or not share:
        return train, validation
    return _hold_out(train, share, args.streaming)


def _load_data_set(args: DataArguments, model_args: ModelArguments) -> Any:
    """The splits of the data set that `dataset_name` names, of the Hub or in a folder. One is `"train"`."""
    name = args.dataset_name or ""
    folder = os.path.abspath(name)
    if os.path.isdir(folder) and glob.has_magic(folder):
        raise TSTError(
            f"dataset_name={args.dataset_name} is the folder {folder}, which `datasets` takes for a pattern: rename it without "
            "*, ? and [, or name its files with train_file."
        )
    splits = load_data_set(
        name, args.dataset_config_name, cache_dir=model_args.cache_dir, streaming=args.streaming
    )
    if "train" not in splits:
        raise TSTError(f"{args.dataset_name} has no split train, but only {', '.join(splits)}.")
    return splits


def _hold_out(train: Any, share: int, streaming: bool) -> tuple[Any, Any]:
    """The training data without its first `share` percent, and these."""
    if streaming:
        raise TSTError("A stream cannot be split: give a validation_file, or validation_split_percentage=0.")
    held_out = round(len(train) * share / 100)
    if not 0 < held_out < len(train):
        raise TSTError(
            f"validation_split_percentage={share} of the {len(train)} rows of training data is {held_out} rows: "
            "give more text or a validation_file, or set it to 0."
        )
    return train.select(range(held_out, len(train))), train.select(range(held_out))


def prepare_blocks(
    args: DataArguments, documents: Any, tokenizer: Any, block_size: int, *, evaluation: bool = False
) -> Any:
    """Blocks of tokens, packed on disk or, for a streamed data set, on the fly; of a token file, views.

    `max_train_samples` takes the first blocks. `max_eval_samples` takes blocks at equal distances, because neighbors come from a
    few documents, which do not represent the rest; of a stream it takes the first, as a list.
    """
    limit = "max_eval_samples" if evaluation else "max_train_samples"
    max_samples = getattr(args, limit)
    if isinstance(documents, TokenFile):
        if args.append_eos:
            raise TSTError(
                "append_eos ends rows of text, but a file of token ids is read as it is: leave it out."
            )
        blocks: Any = documents.cut(block_size)
    else:
        files = (args.validation_files if evaluation else []) or args.train_files
        append_eos = _appends_eos(args, files)
        tokenized = tokenize_documents(
            documents,
            tokenizer,
            text_column=args.text_column,
            append_eos=append_eos,
            num_proc=args.preprocessing_num_workers,
        )
        if not hasattr(tokenized, "num_rows"):
            from datasets.fingerprint import Hasher

            reading = None if tokenized is documents else (append_eos, tokenizer.get_vocab())
            facts = (_describe_source(args, files), args.text_column, reading, evaluation)
            stream = BlockStream(tokenized, block_size, Hasher.hash(facts))
            if evaluation:
                return _first_blocks(stream, max_samples)
            if max_samples is not None:
                raise TSTError(f"A stream has no number of blocks for {limit}={max_samples}: leave it out.")
            return stream
        blocks = pack_blocks(tokenized, block_size)
    if max_samples is None or max_samples >= len(blocks):
        return blocks
    taken = range(max_samples)
    return blocks.select([i * len(blocks) // max_samples for i in taken] if evaluation else taken)


def _appends_eos(args: DataArguments, files: Sequence[str]) -> bool:
    """Whether each row of text becomes a document of its own: by default unless the rows are the lines of text files."""
    if args.append_eos is not None:
        return args.append_eos
    is_text = bool(files) and ending(files[0]) == ".txt"
    if len(files) > 1 and is_text:
        logger.warning(
            f"The {len(files)} files {files[0]} … {files[-1]} are joined into one text, without end tokens between them: write them as "
            "JSON Lines with one document per row, or set append_eos=True if each line is a document. append_eos=False silences this "
            "warning."
        )
    return not is_text


def _describe_source(args: DataArguments, files: Sequence[str]) -> list[Any]:
    """What tells a stream's data from others: names and sizes of its local files, or the name of a data set on the Hub."""
    folder = Path(args.dataset_name or "")
    if not files and folder.is_dir():
        files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    sizes = [(Path(file).name, os.path.getsize(file)) for file in files]
    return sizes or [args.dataset_name, args.dataset_config_name]


def _first_blocks(stream: BlockStream, count: int | None) -> Any:
    """The first blocks of a stream to evaluate on: the same ones each time, and no more is read. All of it without a `count`."""
    if count is None:
        logger.warning(
            "Each evaluation reads the whole stream of evaluation data: set max_eval_samples to evaluate on its first blocks."
        )
        return stream
    if not (blocks := list(islice(stream, count))):
        raise TSTError(
            f"The stream of evaluation data does not fill one block of {stream.block_size}: give more text or a smaller block_size."
        )
    return blocks
