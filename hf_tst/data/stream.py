"""The rows of a run over a stream of blocks, and the state that lets a resumed run read on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Dataset
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from .blocks import NO_RULES, TOKEN_COLUMNS, BlockFacts, BlockRules, join_blocks
from .packing import BlockStream, stream_state
from .read_order import BatchLayout
from .rows import Row

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class StreamState:
    """State of a reader's share of the stream after a batch: what is saved with a checkpoint.

    Args:
        reader (`int`): The reader, counted from 0.
        values (`dict`): The pass over the data, the blocks read in it, their length, and the stream's own state.
    """

    reader: int
    values: dict[str, Any]


@dataclass(eq=False, repr=False)
class StreamedRows(Dataset[Row]):
    """Rows of a run from a stream of blocks, in the order of the stream. They are asked for in their order, batch by batch.

    Superposition rows join `blocks_per_row` consecutive blocks; once superposition is over, a row is one block. If
    the stream ends before the run does, it is read again as the next pass (`set_epoch`), with a warning.

    Ranks, and the loader processes of a rank, read shards of their own if their number divides the shards. Loader
    process or not, reader i of n makes the micro-batches i, i + n, i + 2n … of its rank. If the ranks cannot share the shards,
    each reads the whole stream, and keeps its own rows.

    Args:
        blocks: Iterable of blocks, best with `state_dict` and `load_state_dict`.
        schedule (`PhaseSchedule`): The run's phases.
        layout (`BatchLayout`): How rows are dealt out to ranks.
        workers (`int`, defaults to 0): Loader processes of each rank.
        columns (`Sequence[str]`, *optional*): Columns to pass on in recovery; all by default.
        bag_columns (`Sequence[str]`, defaults to `TOKEN_COLUMNS`): Columns that superposition reads.
        joins (`bool`, defaults to `True`): Join the blocks of a row, see [`PlannedRows`].
        rules (`BlockRules`): What the blocks must keep to besides being of equal length.

    Raises:
        TSTError: If the loader processes cannot share the shards of the stream.
    """

    blocks: Iterable[Mapping[str, Any]]
    schedule: PhaseSchedule
    layout: BatchLayout
    workers: int = 0
    columns: Sequence[str] | None = None
    bag_columns: Sequence[str] = TOKEN_COLUMNS
    joins: bool = True
    rules: BlockRules = NO_RULES

    def __post_init__(self) -> None:
        import datasets

        documents = getattr(self.blocks, "documents", self.blocks)
        shards = documents.num_shards if isinstance(documents, datasets.IterableDataset) else None
        length = getattr(self.blocks, "block_size", 0)
        self.facts = BlockFacts(None, length, f"stream of {shards or 'unknown'} shards")
        self.rules = replace(self.rules, length=length or None)
        self.readers = max(1, self.workers)
        shares = self.layout.world_size * self.readers
        self._shares = shares if shards and shards % shares == 0 else 1
        if self.workers and self._shares != shares:
            raise TSTError(
                f"dataloader_num_workers={self.workers} needs a stream of `datasets` whose shards divide among "
                f"{self.layout.world_size} processes with {self.workers} loader processes each, but this one has "
                f"{shards or 'no'} shards: set it to 0 or to a number that divides them, or load the data set without streaming."
            )
        self.split_by_rank = self.layout.world_size > 1 and self._shares > 1
        # Rows that are read for a micro-batch: those of all ranks, unless each has a share of its own.
        shared_by = self.layout.world_size if self._shares == 1 else 1
        self._rows_per_batch = self.layout.per_device_batch_size * shared_by
        self._resumed: tuple[int, Mapping[int, dict[str, Any]]] = (0, {})
        self._next_batch: int | None = None

    def __len__(self) -> int:
        return self.schedule.max_steps * self.layout.rows_per_step

    def load_states(self, step: int, states: Mapping[int, dict[str, Any]]) -> None:
        """Let each reader continue from where it stood once `step` optimizer steps were done."""
        self._resumed = step, states

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """The rows of one micro-batch of one rank; the last one holds the state of the stream after it."""
        layout = self.layout
        batch, rank = divmod(rows[0] // layout.per_device_batch_size, layout.world_size)
        if batch != self._next_batch:
            self._start(batch, rank)
        self._next_batch = batch + self.readers
        superposed = self._is_superposed(batch)
        found = [Row(self._read_row(superposed), superposed) for _ in range(self._rows_per_batch)]
        if self._shares == 1:
            found = found[rank * len(rows) : (rank + 1) * len(rows)]
        values = {
            "pass": self._pass,
            "blocks_in_pass": self._blocks_in_pass,
            "block_length": self.rules.length,
            "stream": stream_state(self._stream),
        }
        return [*found[:-1], replace(found[-1], stream_state=StreamState(batch % self.readers, values))]

    def _is_superposed(self, batch: int) -> bool:
        return self.schedule.phase(batch // self.layout.accumulation_steps) == "superposition"

    def _read_row(self, superposed: bool) -> Any:
        group = [next(self._blocks) for _ in range(self.schedule.blocks_per_row if superposed else 1)]
        if superposed and self.joins:
            return join_blocks([{k: block[k] for k in self.bag_columns if k in block} for block in group])
        blocks = [
            {k: block[k] for k in block if self.columns is None or k in self.columns} for block in group
        ]
        return blocks if superposed else blocks[0]

    def _start(self, batch: int, rank: int) -> None:
        """Open the share of the reader whose turn `batch` is, at the place where it is to read that batch."""
        reader = batch % self.readers
        step, states = self._resumed
        is_next = batch - step * self.layout.accumulation_steps in range(self.readers)
        state = states.get(reader, {}) if is_next else {}
        stream = state.get("stream")
        self._pass: int = 0 if stream is None else state["pass"]
        self._blocks_in_pass: int = 0 if stream is None else state["blocks_in_pass"]
        # Without states of its own a share is that of the whole world.
        share = reader * self.layout.world_size + rank if self._shares > 1 else 0
        self._blocks = self._endless_blocks(share, stream)
        if stream is not None:
            return
        earlier = range(reader, batch, self.readers)
        skipped = self._rows_per_batch * sum(
            self.schedule.blocks_per_row if self._is_superposed(done) else 1 for done in earlier
        )
        if skipped:
            logger.warning(
                f"The stream of training data cannot say where it stands, so {len(earlier) * self._rows_per_batch} rows "
                f"({skipped} blocks) that are trained already are read again and skipped."
            )
        for _ in range(skipped):
            next(self._blocks)

    def _endless_blocks(self, share: int, state: dict[str, Any] | None) -> Iterator[Mapping[str, Any]]:
        while True:
            self._stream = open_stream(self.blocks, share, self._shares, self._pass)
            if state is not None:
                self._stream.load_state_dict(state)
                state = None
            for block in self._stream:
                tokens = self.rules.check(block, self._blocks_in_pass)
                if self.rules.length is None:
                    self.rules = replace(self.rules, length=len(tokens))
                self._blocks_in_pass += 1
                yield block
            if not self._blocks_in_pass:
                raise TSTError(
                    "The stream of training data is empty: check the data set's name, split and files."
                )
            logger.warning(
                f"The stream of training data ended after {self._blocks_in_pass} blocks, before the run did: it is "
                "read again."
            )
            self._pass, self._blocks_in_pass = self._pass + 1, 0


def open_stream(stream: Any, share: int, shares: int, data_pass: int) -> Any:
    """A share of a stream at the beginning of a pass over it.

    A stream that is not of `datasets` is never cut, and must begin at the beginning by itself when it is iterated again.

    Args:
        stream: A `datasets.IterableDataset`, a [`BlockStream`], or any other iterable.
        share (`int`), shares (`int`): Which of how many shares.
        data_pass (`int`): The pass, counted from 0, by which a shuffled stream orders its data.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    if isinstance(stream, BlockStream):
        return BlockStream(open_stream(stream.documents, share, shares, data_pass), stream.block_size)
    if isinstance(stream, datasets.IterableDataset):
        # An object of its own: the one given may stand anywhere, and shares its epoch with other loader processes.
        stream = split_dataset_by_node(stream, rank=share, world_size=shares)
        stream.set_epoch(data_pass)
        return _Share(stream)
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(data_pass)
    return stream


class _Share:
    """A stream of `datasets` that is one reader's already, so that loader processes do not divide it again."""

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
