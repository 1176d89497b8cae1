"""From text to blocks, before training: tokenize documents and cut them into blocks."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging

from ..errors import TSTError
from .columns import TOKENS, choose_column, is_readable, log_column, no_text
from .data_sets import is_stored, read_rows
from .text_files import in_parts
from .written_once import open_arrow, written_once

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# Part of the name of a packed file: raise it when the same input would be packed differently.
PACKING_VERSION = 2
# Documents in memory at once, and characters that the tokenizer gets at once: it needs hundreds of bytes per token.
BATCH_DOCUMENTS = 100
TOKENIZED_CHARACTERS = 1 << 21
# Columns that say which tokens of a document are targets.
TARGET_COLUMNS = ("labels", "attention_mask")


def tokenize_documents(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    append_eos: bool = True,
    num_proc: int | None = None,
) -> Any:
    """Replace the columns of a `datasets` data set by `input_ids`, one row per document.

    Args:
        documents (`datasets.Dataset` or `datasets.IterableDataset`): Rows of text. Returned unchanged if it already has
            `input_ids`.
        tokenizer: No special tokens are added, except at the end of a document.
        text_column (`str`, *optional*): The column of text; by default `input_ids`, `"text"` or the only one.
        append_eos (`bool`, *optional*, defaults to `True`): End each document with the tokenizer's end-of-sequence token.
        num_proc (`int`, *optional*): Processes to tokenize with.

    Returns:
        A data set of the same kind, whose only column is `input_ids`: the ids of one document per row.

    Raises:
        TSTError: If the column is missing or holds no text, or there is no end-of-sequence token to append.
        RunError: If the disk is full.
    """
    _check_one_split(documents)
    columns = list(documents.column_names or next(read_rows(documents), {}))
    column = choose_column(columns, text_column, "The data")
    _check_column(documents, column)
    log_column(column, columns, "the data")
    if column == TOKENS:
        return documents
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise TSTError("The tokenizer has no end-of-sequence token: set append_eos to False, or add one.")
    end = [eos] if append_eos else []

    def tokenize(batch: Mapping[str, list[str | None]]) -> dict[str, list[list[int]]]:
        for text in batch[column]:
            if text is not None and not isinstance(text, str):
                raise _not_text(column, reprlib.repr(text))
        texts = [text or "" for text in batch[column]]
        parts = in_parts(texts, len, TOKENIZED_CHARACTERS)
        encoded = (tokenizer(part, add_special_tokens=False, verbose=False)[TOKENS] for part in parts)
        return {TOKENS: [ids + end for part in encoded for ids in part]}

    if not hasattr(documents, "num_rows"):
        return documents.map(tokenize, batched=True, batch_size=BATCH_DOCUMENTS, remove_columns=columns)

    from datasets.fingerprint import update_fingerprint

    name = update_fingerprint(documents._fingerprint, tokenize, {})

    def write(folder: Path) -> None:
        documents.map(
            tokenize,
            batched=True,
            batch_size=BATCH_DOCUMENTS,
            remove_columns=columns,
            num_proc=num_proc,
            new_fingerprint=name,
            cache_file_name=str(folder / "data-tokens.arrow"),
            desc="Tokenizing",
        )

    return open_arrow(written_once(f"tokens-{name}", write))


def _check_one_split(documents: Any) -> None:
    """Raise `TSTError` for all splits of a data set, as `load_dataset` returns them where it is not told which."""
    if isinstance(documents, Mapping):
        raise TSTError(
            f"The data is a {type(documents).__name__} of {', '.join(documents)}: give one data set, such as "
            f"data[{next(iter(documents), 'train')!r}]."
        )


def _check_column(documents: Any, column: str) -> None:
    """Raise `TSTError` if a column of a data set has another type than text or tokens, or no values. Warn of null values."""
    if not documents.features:
        return
    kind = documents.features.arrow_schema.field(column).type
    if not is_readable(kind, column):
        raise _not_text(column, str(kind).partition("<")[0])
    if hasattr(documents, "num_rows") and column != TOKENS:
        empty = documents.data.column(column).null_count  # also in rows that `filter` or `select` left out
        if empty:
            parts = documents.select_columns(column).with_format("arrow").iter(batch_size=1000)
            empty = sum(part[column].null_count for part in parts)
        if empty == len(documents):
            raise no_text(f"The column {column!r} of the data")
        if empty:
            logger.warning(f"{empty} rows of the column {column!r} are null: each becomes an empty document.")


def _not_text(column: str, found: str) -> TSTError:
    wanted = "lists of whole numbers" if column == TOKENS else "text"
    return TSTError(
        f"The column {column!r} of the data holds {found}, not {wanted}: set text_column to one that holds text."
    )


def pack_blocks(documents: datasets.Dataset, block_size: int) -> datasets.Dataset:
    """Join tokenized documents in their order and cut them into blocks; only the last remainder is dropped.

    The blocks are in one Arrow file in the cache of `datasets`, named by the fingerprint of `documents` and their number
    of tokens: packing the same documents again opens the file. How many tokens were kept and dropped is logged.

    Args:
        documents (`datasets.Dataset`): Rows of `input_ids`, of any lengths.
        block_size (`int`): Tokens per block, L.

    Returns:
        `datasets.Dataset`, memory-mapped, with `input_ids` of `block_size` tokens per row.

    Raises:
        TSTError: If the data is a stream or has a transform, does not fill one block, is padded or has labels that are not its ids.
        RunError: If the disk is full.
    """
    from datasets.fingerprint import Hasher

    _check_one_split(documents)
    if not hasattr(documents, "num_rows"):
        raise TSTError(
            f"The documents are a {type(documents).__name__}, not a stored Dataset: cut them into blocks during training "
            "with hf_tst.BlockStream(documents, block_size)."
        )
    if TOKENS not in documents.column_names:
        raise TSTError(
            f"Documents need a column {TOKENS!r}, but have {documents.column_names}: tokenize them with hf_tst.tokenize_documents."
        )
    if not is_stored(documents):
        raise TSTError(
            "The documents have a transform, which blocks would not have: apply it by documents.map, or remove it by "
            "documents.with_format(None)."
        )

    def write(folder: Path) -> None:
        tokens = _write_blocks(documents, block_size, folder / "blocks.arrow")
        (folder / "blocks.arrow").rename(folder / f"data-{tokens}.arrow")

    name = Hasher.hash((documents._fingerprint, block_size, PACKING_VERSION))
    (packed,) = written_once(f"blocks-{name}", write)
    blocks = open_arrow([packed])
    tokens = int(packed.stem.removeprefix("data-"))
    logger.info(
        f"{len(documents)} documents of {tokens} tokens give {len(blocks)} blocks of {block_size}; the last "
        f"{tokens - len(blocks) * block_size} tokens are dropped."
    )
    return blocks


def _has_lists(documents: datasets.Dataset, name: str) -> bool:
    """Whether a data set has a column of lists, such as labels of tokens."""
    import pyarrow as pa

    schema = documents.data.schema
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return name in documents.column_names and any(is_kind(schema.field(name).type) for is_kind in kinds)


def check_all_targets(columns: Mapping[str, Any]) -> None:
    """Raise `TSTError` if documents are padded, or their labels are not their tokens: blocks hold tokens alone, which all become targets."""
    if not np.all(np.asarray(columns.get("attention_mask", True))):
        raise TSTError(
            "The documents are padded, as zeros in their attention_mask say, and blocks would train on the padding: tokenize them without "
            "padding."
        )
    tokens = columns[TOKENS]
    if not np.array_equal(np.asarray(tokens), np.asarray(columns.get("labels", tokens))):
        raise TSTError(
            "The documents have labels that differ from their input_ids, such as masked prompts, which blocks do not keep: remove the column "
            "labels to train on all tokens, or make blocks with labels of your own."
        )


def _write_blocks(documents: datasets.Dataset, block_size: int, path: Path) -> int:
    """Write the blocks of tokenized documents to an Arrow file, and return how many tokens the documents hold."""
    import pyarrow as pa

    schema = pa.schema({"input_ids": pa.list_(pa.int32(), block_size)})
    rest, tokens = np.empty(0, dtype=np.int32), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        given = [TOKENS, *(name for name in TARGET_COLUMNS if _has_lists(documents, name))]
        for table in documents.select_columns(given).with_format("arrow").iter(batch_size=1000):
            if table.num_columns > 1:
                check_all_targets({name: table[name].combine_chunks().flatten() for name in given})
            for chunk in table["input_ids"].chunks:
                found = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
                tokens += len(found)
                joined = np.concatenate([rest, found])
                whole = len(joined) - len(joined) % block_size
                rest = joined[whole:]
                if whole:
                    column = pa.FixedSizeListArray.from_arrays(pa.array(joined[:whole]), block_size)
                    writer.write_batch(pa.record_batch([column], schema=schema))
    if tokens < block_size:
        raise TSTError(
            f"The data holds {tokens} tokens, which do not fill one block of {block_size}: give more text or a "
            "smaller block_size."
        )
    return tokens
