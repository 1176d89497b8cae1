"""From text to blocks: tokenise documents and cut the stream of tokens into rows of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_text_file(path: str, split: str = "train", streaming: bool = False) -> Any:
    """A `datasets` data set of a local text, JSON, CSV or Parquet file.

    Lines of a text file keep their line breaks, so that they join to the file's text again.

    Args:
        path (`str`): The file; its ending says how to read it.
        split (`str`, defaults to `"train"`): A slice of the file, such as `"train[:5%]"`.
        streaming (`bool`, defaults to `False`): Read the file as training goes on.

    Raises:
        ValueError: If the file is missing, empty, or of no known kind.
    """
    import datasets

    file = Path(path)
    if file.suffix not in FILE_LOADERS:
        raise ValueError(f"Cannot read {path}: its name must end in one of {', '.join(FILE_LOADERS)}.")
    if not file.is_file():
        raise ValueError(f"There is no file {path}.")
    if file.stat().st_size == 0:
        raise ValueError(f"The file {path} is empty: name one that holds text.")
    loader = FILE_LOADERS[file.suffix]
    options = {"keep_linebreaks": True} if loader == "text" else {}
    return datasets.load_dataset(
        loader, data_files={"train": path}, split=split, streaming=streaming, **options
    )


def tokenize_documents(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str | None = None,
    append_eos: bool = True,
    num_proc: int | None = None,
) -> Any:
    """Replace the columns of a `datasets` data set by `input_ids`, one row a document.

    Args:
        documents (`datasets.Dataset` or `datasets.IterableDataset`): Rows of text. Returned as it is if it has
            `input_ids` already.
        tokenizer: Its special tokens are not added, but for the end of a document.
        text_column (`str`, *optional*): The column of text; `"text"` by default, else the first one.
        append_eos (`bool`, defaults to `True`): End each document with the tokenizer's end-of-sequence token.
        num_proc (`int`, *optional*): Processes to tokenise with.

    Raises:
        ValueError: If the column is missing, or there is no end-of-sequence token to append.
    """
    columns = list(documents.column_names or next(iter(documents)))
    if "input_ids" in columns:
        return documents
    column = text_column or ("text" if "text" in columns else columns[0])
    if column not in columns:
        raise ValueError(
            f"The data has no column {column!r}, only {', '.join(columns)}: set text_column to one of these."
        )
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise ValueError("The tokenizer has no end-of-sequence token: set append_eos to False, or add one.")
    end = [eos] if append_eos else []

    def tokenize(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch[column], add_special_tokens=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded["input_ids"]]}

    options: dict[str, Any] = {"batched": True, "remove_columns": columns}
    if hasattr(documents, "num_rows"):
        options |= {"num_proc": num_proc, "desc": "Tokenising"}
    return documents.map(tokenize, **options)


def pack_blocks(documents: datasets.Dataset, block_size: int) -> datasets.Dataset:
    """Join tokenised documents in their order and cut them into blocks; only the last remainder is dropped.

    Args:
        documents (`datasets.Dataset`): Rows of `input_ids`, of any lengths.
        block_size (`int`): Tokens a block, L.

    Returns:
        `datasets.Dataset` on disk, with `input_ids` of `block_size` tokens a row.

    Raises:
        ValueError: If the data does not fill one block.
    """
    import datasets

    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"), length=block_size)})
    tokens = sum(len(batch) for batch in _token_batches(documents))
    if tokens < block_size:
        raise ValueError(
            f"The data holds {tokens} tokens, which do not fill one block of {block_size}: give more text or a "
            "smaller block_size."
        )
    return datasets.Dataset.from_generator(
        _generate_blocks, features=features, gen_kwargs={"documents": documents, "block_size": block_size}
    )


class BlockStream(IterableDataset[dict[str, Any]]):
    """Blocks of a stream of tokenised documents, cut as training goes on.

    Args:
        documents: Iterable of rows with `input_ids`, of any lengths.
        block_size (`int`): Tokens a block, L.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]], block_size: int) -> None:
        self.documents = documents
        self.block_size = block_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        arrays = (np.asarray(document["input_ids"], dtype=np.int32) for document in self.documents)
        for block in cut_blocks(arrays, self.block_size):
            yield {"input_ids": block}


def cut_blocks(arrays: Iterable[NDArray[np.int32]], block_size: int) -> Iterator[NDArray[np.int32]]:
    """Cut joined arrays of tokens into blocks of `block_size`, dropping the last remainder."""
    pending: list[NDArray[np.int32]] = []
    length = 0
    for array in arrays:
        pending.append(array)
        length += len(array)
        if length < block_size:
            continue
        joined = np.concatenate(pending)
        whole = length - length % block_size
        yield from joined[:whole].reshape(-1, block_size)
        pending, length = [joined[whole:]], length - whole


def _generate_blocks(documents: datasets.Dataset, block_size: int) -> Iterator[dict[str, Any]]:
    for block in cut_blocks(_token_batches(documents), block_size):
        yield {"input_ids": block}


def _token_batches(documents: datasets.Dataset) -> Iterator[NDArray[np.int32]]:
    """The tokens of many documents at a time, as one array."""
    for table in documents.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        for chunk in table["input_ids"].chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
