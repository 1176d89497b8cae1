"""Text that is read as a stream: blocks cut during training, shares of a stream, and its state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset

from .columns import TOKENS
from .data_sets import read_rows
from .packing import TARGET_COLUMNS, check_all_targets


class BlockStream(IterableDataset[dict[str, Any]]):
    """Blocks of a stream of tokenized documents, cut during training.

    Args:
        documents: Iterable of rows with `input_ids`, of any lengths.
        block_size (`int`): Tokens per block, L.
        fingerprint (`str`, *optional*): Identifies the data. A run that resumes with another one is refused.

    Yields:
        `{"input_ids": array}` with int64 arrays of shape `(L,)`. Tokens after the last full block of a pass are dropped.

    Raises:
        TSTError: While it is read, if a document cannot be read, is padded, or has labels that differ from its ids.
    """

    column_names = (TOKENS,)  # as `datasets` has them

    def __init__(
        self, documents: Iterable[Mapping[str, Any]], block_size: int, fingerprint: str | None = None
    ) -> None:
        self.documents = documents
        self.block_size = block_size
        self.fingerprint = fingerprint
        self._rest = self._first = np.empty(0, dtype=np.int32)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Loaded tokens may hold whole blocks, which come before the next document is read.
        self._rest, self._first = self._first, self._rest[:0]
        for document in chain([{"input_ids": []}], read_rows(self.documents)):
            ids = document["input_ids"]
            # Null is an empty document, as in `pack_blocks`.
            tokens = np.asarray([] if ids is None else ids, dtype=np.int32)
            others = {name: document[name] for name in TARGET_COLUMNS if np.ndim(document.get(name)) == 1}
            check_all_targets({TOKENS: tokens} | others)
            self._rest = np.concatenate([self._rest, tokens])
            while len(self._rest) >= self.block_size:
                block, self._rest = self._rest[: self.block_size], self._rest[self.block_size :]
                yield {"input_ids": block.astype(np.int64)}  # as a loss takes labels

    def state_dict(self) -> dict[str, Any] | None:
        """The state of the documents, and the tokens that were read but are not in a block yet.

        `None` if the documents have no state. Valid while a block is yielded.
        """
        documents = stream_state(self.documents)
        return None if documents is None else {"documents": documents, "tokens": torch.from_numpy(self._rest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from `state`."""
        cast("Any", self.documents).load_state_dict(state["documents"])
        self._first = state["tokens"].numpy()


def open_stream(stream: Any, share: int, shares: int, data_pass: int) -> Any:
    """A share of a stream at the beginning of a pass over it.

    A stream that is not of `datasets` cannot be divided, and must start again by itself when it is iterated again.

    Args:
        stream: A `datasets.IterableDataset`, a [`BlockStream`], or any other iterable.
        share (`int`), shares (`int`): The index of the share, and the number of shares.
        data_pass (`int`): The pass, counted from 0. It decides the order of a shuffled stream.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    if isinstance(stream, BlockStream):
        return BlockStream(open_stream(stream.documents, share, shares, data_pass), stream.block_size)
    if isinstance(stream, datasets.IterableDataset):
        # A copy, since the given stream may be in the middle of a pass and shares its epoch with other loader processes.
        part = split_dataset_by_node(stream, rank=share, world_size=shares)
        if shares == 1:
            # A part of one would take other rows of joined streams.
            part._distributed, part._ex_iterable = stream._distributed, _copied_nodes(stream._ex_iterable)
        part.set_epoch(data_pass)
        return _Share(part)
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(data_pass)
    return stream


class _Share:
    """One reader's share of a stream of `datasets`, which loader processes must not divide again."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._stream.iter(batch_size=1):
            batch = batch.to_pydict() if hasattr(batch, "to_pydict") else batch  # format "arrow"
            yield {name: values[0] for name, values in batch.items()}

    def state_dict(self) -> dict[str, Any] | None:
        return stream_state(self._stream)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)


def stream_state(stream: Any) -> dict[str, Any] | None:
    """The state of a stream, or `None` if the stream has no state or could not be restored from it.

    The state of `datasets` does not include a shuffle buffer, so a stream with one cannot be restored.
    """
    if not hasattr(stream, "state_dict") or not hasattr(stream, "load_state_dict"):
        return None
    import datasets

    is_shuffled = isinstance(stream, datasets.IterableDataset) and any(
        node is None or "BufferShuffled" in type(node).__name__ for node in _nodes(stream)
    )
    return None if is_shuffled else stream.state_dict()


def number_of_shards(stream: Any) -> int | None:
    """The shards that a stream of `datasets`, or the documents of a [`BlockStream`], can be divided into; `None` if it cannot be.

    After `skip` and `take`, `datasets` would leave out or take a part of their number in each share, so other rows.
    """
    import datasets

    documents = getattr(stream, "documents", stream)
    if not isinstance(documents, datasets.IterableDataset):
        return None
    counts_rows = any(getattr(node, "split_when_sharding", False) for node in _nodes(documents))
    return None if counts_rows else documents.num_shards


def describe_stream(stream: Any) -> str:
    """What tells a stream from others without reading it: its shards, its order and, of a [`BlockStream`], its own fingerprint.

    A stream of `datasets` that is shuffled without a seed has another order in each process. One that was divided by
    `split_dataset_by_node` has other rows.
    """
    import datasets

    documents = getattr(stream, "documents", stream)
    parts = ["stream of unknown shards"]
    if isinstance(documents, datasets.IterableDataset):
        parts = [f"stream of {documents.num_shards} shards"]
        if (part := getattr(documents, "_distributed", None)) is not None:
            parts.append(f"part {part.rank + 1} of {part.world_size}")
        generators = [getattr(node, "generator", None) for node in _nodes(documents)]
        states = [each.bit_generator.state for each in generators if isinstance(each, np.random.Generator)]
        if states:
            parts.append(f"order {hashlib.sha256(repr(states).encode()).hexdigest()[:16]}")
    return ", ".join([*parts, *filter(None, [getattr(stream, "fingerprint", None)])])


def _copied_nodes(node: Any) -> Any:
    """A node of a stream of `datasets`, and those that it reads from, with positions of their own."""
    made = copy(node)
    if hasattr(node, "ex_iterable"):
        made.ex_iterable = _copied_nodes(node.ex_iterable)
    if hasattr(node, "ex_iterables"):
        made.ex_iterables = [_copied_nodes(each) for each in node.ex_iterables]
    return made


def _nodes(stream: Any) -> Iterator[Any]:
    """The nodes of a stream of `datasets`, each before those that it reads from. `None` if they are unknown."""
    waiting = [getattr(stream, "_ex_iterable", None)]
    while waiting:
        node = waiting.pop()
        yield node
        sources = [getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or [])]
        waiting += [source for source in sources if source is not None]
