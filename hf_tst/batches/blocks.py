"""Blocks of a map-style data set: full rows of tokens, all of one length. How they are checked."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging

from ..bags.collator import DOCUMENT_COLUMNS
from ..bags.folding import IGNORE_INDEX
from ..data.data_sets import is_stored
from ..errors import TSTError, bad_input

logger = logging.get_logger(__name__)

# Columns that superposition reads. Recovery passes on all columns that the model accepts.
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")
POSITIONS_ARE_DROPPED = (
    "Superposition does not pass position_ids on, but recovery does. If they begin again at each document, set "
    "tst_document_boundaries='respect', so that attention stays inside documents in both phases."
)
SHIFTED = (
    "labels that are its tokens shifted by one, but the model shifts labels itself and would learn to predict the token after the next one: "
    "give labels that equal input_ids (-100 for no target), or leave them out"
)
# Blocks, spread over the data, that are read before training starts.
SAMPLED_BLOCKS = 256
# Stored lengths that are checked before training starts.
CHECKED_LENGTHS = 100_000
# Types of rows that are ids without a mapping.
IDS_ALONE = (list, tuple, np.ndarray, Tensor)


def as_block(row: Any, index: int = 0) -> Mapping[str, Any]:
    """Row `index` of a data set as a mapping. A row that is only ids becomes `{"input_ids": ids}`.

    Raises:
        TSTError: If the row is something else.
    """
    if isinstance(row, Mapping):
        return row
    if isinstance(row, (list, tuple)) and len(row) == 1 and np.ndim(row[0]) == 1:
        (row,) = row  # as TensorDataset gives it
    if not isinstance(row, IDS_ALONE):
        raise NO_RULES.error_of_block(
            index, f"is of the type {type(row).__name__}: give input_ids, or rows that are only ids"
        )
    return {"input_ids": row}


def copied(row: Any) -> Any:
    """A row, or a batch, with copies of its values: data may reuse their memory for its next one, before a row of bags has both."""
    if isinstance(row, MutableMapping):
        made = copy(row)  # of its own class, which a collator may ask for
        made.update({name: copied(value) for name, value in row.items()})
        return made
    return row.clone() if isinstance(row, Tensor) else copy(row)


@dataclass(frozen=True)
class BlockFacts:
    """Facts about the blocks of a data set, known before training.

    Args:
        num_blocks (`int` or `None`): Blocks; `None` for a stream.
        block_length (`int`): Tokens per block, L; 0 if unknown, as for some streams.
        data (`str`): Fingerprint: a hash of the number of blocks and of up to 256 blocks spread over the data. It does not depend
            on where or how the data is stored. For a stream, it has the number of shards and the stream's own fingerprint, if any.
    """

    num_blocks: int | None
    block_length: int
    data: str


@dataclass(frozen=True)
class BlockRules:
    """Requirements for every block, checked as blocks are read.

    Args:
        length (`int`, *optional*): Tokens per block, L, if known.
        pad_token_id (`int`, *optional*): Id of the padding token, unless it is also another special token.
        vocab_size (`int`, *optional*): Number of ids with an embedding.
        context (`int`, *optional*): Positions that the model can distinguish.
        end_token_id (`int`, *optional*): Token that ends documents, if documents are to be kept apart.
        purpose (`str`, *optional*, defaults to `"training"`): What the blocks are for.
    """

    length: int | None = None
    pad_token_id: int | None = None
    vocab_size: int | None = None
    context: int | None = None
    end_token_id: int | None = None
    purpose: str = "training"

    def check(self, block: Any, index: int) -> NDArray[np.int64]:
        """The tokens of block `index` of the data, `(L,)`.

        Raises:
            TSTError: If it has no `input_ids`, or they are not one row of ids of the vocabulary, differ in length from
                the other blocks or from the labels, or are padded.
        """
        block = as_block(block, index)
        tokens = _tokens(block, index)
        if self.length is not None:
            check_length(len(tokens), self.length, index)
        if len(tokens) < 2:
            raise self.error_of_block(
                index, "has a single token, so there is nothing to predict: pack the data into longer blocks"
            )
        if "labels" in block:
            self._check_labels(block["labels"], tokens, index)
        self.check_context(len(tokens), index)
        self.check_ids(tokens, index)
        self.check_padding({**block, "input_ids": tokens}, index)
        return tokens

    def _check_labels(self, labels: Any, tokens: NDArray[np.int64], index: int) -> None:
        found, advice = np.asarray(labels), "give every token its label, or leave the labels out"
        if found.ndim != 1 or found.dtype.kind not in "iu":
            kind = f"of shape {found.shape} and type {found.dtype}"
            raise self.error_of_block(index, f"has labels {kind}, which are no row of token ids: {advice}")
        if len(found) != len(tokens):
            raise self.error_of_block(index, f"has {len(tokens)} input_ids and {len(found)} labels: {advice}")
        if are_shifted(tokens, found):
            raise self.error_of_block(index, f"has {SHIFTED}")

    def check_context(self, length: int, index: int) -> None:
        """Raise `TSTError` if block `index`, of `length` tokens, is longer than the model's context."""
        if self.context is not None and length > self.context:
            problem = f"has {length} tokens, more than the model's context of {self.context}"
            advice = "pack the data into shorter blocks, or make the model for longer ones (max_position_embeddings)"
            raise self.error_of_block(index, f"{problem}: {advice}")

    def check_ids(self, tokens: NDArray[Any], index: Any) -> None:
        """Raise `TSTError` if block `index`, of these tokens, holds an id that the model has no embedding for."""
        if (at := self.find_bad_id(tokens)) is not None:
            raise self.error_of_id(index, tokens[at])

    def check_batch(self, batch: Any) -> None:
        """Raise `TSTError` if a batch in main memory has an id without an embedding."""
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if (
            not isinstance(ids, Tensor)
            or ids.device.type != "cpu"
            or ids.dim() < 2
            or ids.is_floating_point()
        ):
            return
        tokens = ids.flatten().numpy()
        if ids.dim() > 2:
            tokens = tokens[tokens != -100]  # empty places of bags that end with a document
        if (at := self.find_bad_id(tokens)) is not None:
            raise self.error_of_id(
                f"that begins with {ids[(ids == tokens[at]).nonzero()[0, 0]].flatten()[:8].tolist()}",
                tokens[at],
            )

    def find_bad_id(self, tokens: NDArray[Any]) -> int | None:
        """The index of the first id without an embedding, or `None`."""
        size = np.iinfo(np.int64).max if self.vocab_size is None else self.vocab_size
        if not tokens.size or (tokens.min() >= 0 and tokens.max() < size):
            return None
        return int(((tokens < 0) | (tokens >= size)).argmax())

    def error_of_id(self, index: Any, token: int) -> TSTError:
        """The error for such an id in block `index`."""
        size = self.vocab_size
        known = "ids are not negative" if size is None else f"the model has embeddings for 0 to {size - 1}"
        return self.error_of_block(
            index,
            f"holds the id {token}, but {known}: tokenize it with the model's own tokenizer, or add rows to the model with "
            "model.resize_token_embeddings(len(tokenizer))",
        )

    def check_stored(self, blocks: Any, limit: int | None = None) -> None:
        """Check ids and lengths of the rows, or the first `limit` ones, of a `datasets.Dataset`, a list or token ids on disk.

        Other data is not checked: reading it may be slow, or draw random numbers. Rows may have several lengths.
        """
        if hasattr(blocks, "select_columns"):
            if is_stored(blocks) and "input_ids" in blocks.column_names:
                self._check_table(blocks.select_columns("input_ids"), limit)
        elif isinstance(blocks, (list, tuple)) or hasattr(blocks, "starts"):
            for index in range(min(len(blocks), limit or len(blocks))):
                block = blocks[index]
                if not isinstance(block, Mapping) or "input_ids" not in block:
                    return
                tokens = np.asarray(block["input_ids"])
                if tokens.ndim == 1 and tokens.dtype.kind in "iu":
                    self.check_context(len(tokens), index)
                    self.check_ids(tokens, index)

    def _check_table(self, blocks: Any, limit: int | None) -> None:
        import pyarrow.compute as pc

        if not holds_ids(blocks):
            return
        table, end = blocks.with_format("arrow"), min(len(blocks), limit or len(blocks))
        for start in range(0, end, 1000):
            column = table[start : min(start + 1000, end)]["input_ids"]
            lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
            tokens = np.asarray(pc.list_flatten(column))
            self.check_context(int(lengths.max()), start + int(lengths.argmax()))
            if (at := self.find_bad_id(tokens)) is not None:
                raise self.error_of_id(start + int((lengths.cumsum() <= at).sum()), tokens[at])

    def error_of_block(self, index: Any, problem: str) -> TSTError:
        """The error for block `index`, of which `problem` is the end of the sentence."""
        return TSTError(f"Block {index} of the {self.purpose} data {problem}.")

    def check_padding(self, row: Mapping[str, Any], index: int) -> None:
        """Raise `TSTError` if one of the consecutive blocks that `row` holds, the first of which is `index`, is padded."""
        length = self.length or len(row["input_ids"])
        advice = "and a bag would average padding with text: pack the data into full blocks"
        # One padding token at the end may separate documents.
        mask, ends = row.get("attention_mask"), np.asarray(row["input_ids"]).reshape(-1, length)[:, -2:]
        if mask is not None and not (real := np.asarray(mask).astype(bool)).all():
            first = index + int(real.argmin()) // length
            raise self.error_of_block(first, f"is padded (its attention_mask holds zeros), {advice}")
        if self.pad_token_id is not None and (padded := (ends == self.pad_token_id).all(axis=1)).any():
            first = index + int(padded.argmax())
            raise self.error_of_block(first, f"ends in the padding token {self.pad_token_id}, {advice}")


NO_RULES = BlockRules()


def check_blocks(blocks: Any, rules: BlockRules = NO_RULES) -> BlockFacts:
    """Check that a map-style data set holds full, equal blocks of tokens.

    256 blocks spread over the data are read and, of a `datasets.Dataset` without a transform, the first 100 000 stored lengths. Of
    a list, every length is looked at. Blocks are checked again as they are read. A warning is logged if the first blocks overlap, and if
    documents are to be kept apart and none of these blocks says where one ends: it is no error, since documents may be longer than all
    of them.

    Args:
        blocks: The data set.
        rules (`BlockRules`): Requirements for each block, besides the length of the first.

    Raises:
        TSTError: If there is no `input_ids`, blocks differ in length or are padded, or there is no block.
    """
    if len(blocks) == 0:
        raise TSTError("The training data is empty: it has no block of tokens.")
    if isinstance(blocks, Mapping):
        raise TSTError(
            f"The training data is several data sets, {', '.join(map(repr, blocks))}: choose one, such as data[{next(iter(blocks))!r}]."
        )
    stored = is_stored(blocks)
    if stored:
        blocks = blocks.with_format("numpy", columns=blocks.format["columns"])
    length = len(NO_RULES.check(blocks[0], 0))
    rules = replace(rules, length=length)
    digest = hashlib.sha256(f"{len(blocks)} blocks".encode())
    sampled = sorted({int(index) for index in np.linspace(0, len(blocks) - 1, num=SAMPLED_BLOCKS)})
    end = rules.end_token_id
    has_end = end is None or bool({*as_block(blocks[0])} & {*DOCUMENT_COLUMNS})
    for index in sampled:
        tokens = rules.check(blocks[index], index)
        digest.update(tokens.tobytes())
        has_end = has_end or end in tokens
    if not has_end:
        logger.warning(
            f"tst_document_boundaries='respect' may keep nothing apart: none of {len(sampled)} blocks, spread over the training data, holds "
            f"the token {end} that ends a document. If it has several documents, end each with this token, as hf-tst train does with JSON "
            "Lines of one document per row, or with append_eos=True for lines of text; or give a column document_ids."
        )
    if isinstance(blocks, (list, tuple)):
        for index, block in enumerate(blocks):
            check_length(len(as_block(block, index).get("input_ids", ())), length, index)
    elif stored:
        lengths = blocks.select_columns("input_ids").with_format("arrow")[: min(CHECKED_LENGTHS, len(blocks))]
        check_stored_lengths(lengths["input_ids"], length, range(len(lengths)))
    _warn_of_overlap([_tokens(as_block(blocks[index]), index) for index in range(min(4, len(blocks)))])
    return BlockFacts(len(blocks), length, digest.hexdigest()[:16])


def _warn_of_overlap(first: Sequence[NDArray[np.int64]]) -> None:
    """Warn if the first blocks of the data overlap, as windows with a stride do."""
    length = len(first[0])
    shared = []
    for one, following in pairwise(first):
        # An overlap begins where this block has the first token of the next one.
        sizes = {length - int(at) for at in np.flatnonzero(one == following[0])}
        shared.append(
            {size for size in sizes if 8 <= size < length and np.array_equal(one[-size:], following[:size])}
        )
    overlaps = set.intersection(*shared) if len(shared) > 1 else set()
    if overlaps and len(np.unique(first[0])) > 4:
        logger.warning(
            f"Consecutive blocks share {max(overlaps)} of their {length} tokens, as windows with a stride do. A row of superposition "
            "joins consecutive blocks and would read these tokens several times: cut the text into blocks that do not overlap."
        )


def are_shifted(tokens: Any, labels: Any) -> bool:
    """Whether the labels of rows, `(..., L)`, are their tokens shifted by one, as for a loss that does not shift them itself."""
    tokens, labels = np.asarray(tokens), np.asarray(labels)
    targets = labels[..., :-1] != IGNORE_INDEX
    given, own, following = labels[..., :-1][targets], tokens[..., :-1][targets], tokens[..., 1:][targets]
    # Fewer may be equal by chance.
    return len(given) > 3 and bool((given == following).all() and (given != own).any())


def check_columns(
    block: Mapping[str, Any], passed_on: Collection[str] | None, bag_columns: Collection[str] = TOKEN_COLUMNS
) -> None:
    """Check that superposition drops no column of a block that recovery passes to the model or to `compute_loss`.

    A warning is logged, once, if it drops `position_ids`.

    Args:
        block: The columns of a block.
        passed_on (`Collection[str]`, *optional*): Names of columns that are passed on. Defaults to all.
        bag_columns (`Collection[str]`, *optional*, defaults to `TOKEN_COLUMNS`): Those that superposition reads.

    Raises:
        TSTError: If it drops one.
    """
    dropped = {*block} & {"position_ids"} - {*bag_columns}
    if dropped and (passed_on is None or dropped & {*passed_on}):
        logger.warning_once(POSITIONS_ARE_DROPPED)
    known = {*TOKEN_COLUMNS, *DOCUMENT_COLUMNS, "special_tokens_mask"}
    if "labels" in block:
        known |= {"label", "label_ids"}  # collators prefer `labels`
    if passed_on is None:
        known.add("token_type_ids")  # made by tokenizers, not used by most models
    lost = sorted(
        name
        for name, value in block.items()
        if name not in known and not isinstance(value, str) and (passed_on is None or name in passed_on)
    )
    if lost:
        advice = ", or set remove_unused_columns=True" if passed_on is None else ""
        raise TSTError(
            f"The training data has the columns {', '.join(lost)}, which bags cannot hold: leave them out{advice}."
        )


def check_length(found: int, length: int, index: int) -> None:
    """Raise `TSTError` unless block `index`, of `found` tokens, has `length` tokens."""
    if found != length:
        raise TSTError(
            f"Blocks must be of equal length, but block 0 of the training data has {length} tokens and block "
            f"{index} has {found}: pack the rows with hf_tst.pack_blocks(dataset, block_size), or a stream with "
            "hf_tst.BlockStream(dataset, block_size)."
        )


def check_stored_lengths(column: Any, length: int, indices: Sequence[int]) -> None:
    """Raise `TSTError` unless every list of an Arrow column has `length` tokens."""
    import pyarrow.compute as pc

    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    if (differs := lengths != length).any():
        check_length(int(lengths[differs.argmax()]), length, indices[differs.argmax()])


def _tokens(block: Mapping[str, Any], index: int) -> NDArray[np.int64]:
    """The `input_ids` of a block, `(L,)`."""
    if "input_ids" not in block:
        raise TSTError(
            f"The training data needs a column 'input_ids', but has {sorted(block)}: tokenize and pack it."
        )
    with bad_input(
        f"The input_ids of block {index} must be one row of whole numbers: ", (TypeError, ValueError)
    ):
        tokens = np.asarray(block["input_ids"])
    if tokens.shape == (0,):
        raise NO_RULES.error_of_block(index, "holds no token: pack the data into blocks")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"of shape {tokens.shape} and type {tokens.dtype}"
        raise NO_RULES.error_of_block(
            index, f"needs input_ids that are one row of whole numbers, but they are {found}: tokenize it"
        )
    return tokens.astype(np.int64, copy=False)


def holds_ids(blocks: Any) -> bool:
    """Whether a `datasets.Dataset` has only columns with one whole number per token."""
    import pyarrow as pa

    known = {*TOKEN_COLUMNS, *DOCUMENT_COLUMNS}
    return all(
        column.name in known and pa.types.is_integer(getattr(column.type, "value_type", pa.null()))
        for column in blocks.data.schema
    )
