"""The rows of a run, in the order of its plan or of a stream.

A batch of a stream contains the state to resume from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..data.streams import describe_stream, number_of_shards, open_stream, stream_state
from ..errors import TSTError, bad_input, whole_message
from .block_reader import BlockReader, join_blocks
from .blocks import NO_RULES, TOKEN_COLUMNS, BlockFacts, BlockRules, as_block, check_columns, copied
from .random_numbers import DataRandomNumbers
from .read_order import BatchLayout, DataPlan

logger = logging.get_logger(__name__)

# Rows that are looked up ahead.
_LOOK_AHEAD = 256
# The entry of a batch that holds the `StreamState`.
STREAM_STATE = "tst_stream_state"


@dataclass(frozen=True)
class Row:
    """One row of a batch before collation, and whether it is to be folded into bags.

    `columns` are those of the row or, for a user's collator in superposition, the list of its blocks. The last row of
    a batch of a stream also holds the state of the stream after it.
    """

    columns: Any
    superposed: bool
    stream_state: Any = None


@dataclass(eq=False, repr=False)
class PlannedRows(Dataset[Row]):
    """Map-style data set of the rows of a [`DataPlan`]. Row i is the same in every process and worker.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, anything with `__getitem__`).
        plan (`DataPlan`): The blocks that row i reads.
        columns (`Sequence[str]`, *optional*): Columns to pass on in recovery, of those that the first block has; all by default.
        bag_columns (`Sequence[str]`, *optional*, defaults to `TOKEN_COLUMNS`): Those of them that superposition reads.
        joins (`bool`, *optional*, defaults to `True`): Join the blocks of a row, and read a `datasets.Dataset` as NumPy arrays,
            which is faster. Otherwise blocks are passed unchanged, for a collator without bags.
        rules (`BlockRules`): Requirements for the blocks, checked as they are read.

    Raises:
        TSTError: If superposition drops a column that recovery passes on.
    """

    blocks: Any
    plan: DataPlan
    columns: Sequence[str] | None = None
    bag_columns: Sequence[str] = TOKEN_COLUMNS
    joins: bool = True
    rules: BlockRules = NO_RULES

    def __post_init__(self) -> None:
        self.schedule = self.plan.schedule
        self._first_blocks: dict[int, int] = {}
        first = as_block(self.blocks[0])
        if self.joins:
            check_columns(first, self.columns, self.bag_columns)
        given = [name for name in first if first[name] is not None]
        # Under the name that `datasets` uses. Some trainers read it.
        self.column_names = [name for name in given if self.columns is None or name in self.columns]
        bag_columns = [name for name in self.column_names if name in self.bag_columns]
        self._read_bags = BlockReader(self.blocks, bag_columns, rules=self.rules).read
        self._read = BlockReader(self.blocks, self.column_names, self.joins, self.rules).read

    def __getattr__(self, name: str) -> Any:
        # What a script's callback, or Trainer with `set_epoch`, wants of the data set.
        if name.startswith("_") or name == "blocks":
            raise AttributeError(name)
        return getattr(self.blocks, name)

    def __len__(self) -> int:
        return self.plan.total_rows

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """Rows of one batch, all of one phase."""
        if not all(row in self._first_blocks for row in rows):
            # Hundreds of rows take hardly longer than one, and the next batch usually needs the rows after these.
            wanted = np.arange(min(rows), min(max(rows) + _LOOK_AHEAD, len(self)))
            firsts = self.plan.first_blocks(wanted)
            self._first_blocks = dict(zip(wanted.tolist(), firsts.tolist(), strict=True))
        first_blocks = [self._first_blocks[row] for row in rows]
        if rows[0] >= self.plan.superposed_rows:
            return [Row(columns, superposed=False) for columns in self._read(first_blocks)]
        size = self.plan.schedule.blocks_per_row
        if not self.joins:
            read = self._read([first + offset for first in first_blocks for offset in range(size)])
            return [Row(read[i : i + size], superposed=True) for i in range(0, len(read), size)]
        found = self._read_bags(first_blocks, size)
        for first, columns in zip(first_blocks, found, strict=True):
            self.rules.check_padding(columns, first)
        return [Row(columns, superposed=True) for columns in found]


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
    """Rows of a run from a stream of blocks, in the order of the stream. They must be read in order, batch by batch.

    Superposition rows join `blocks_per_row` consecutive blocks; once superposition is over, a row is one block. If
    the stream ends before the run does, it is read again as the next pass (`set_epoch`), with a warning.

    Ranks, and the loader processes of a rank, read their own shards if their number divides the number of shards. Otherwise each
    rank reads the whole stream and keeps its own rows. Reader i of the n readers of a rank makes its micro-batches
    i, i + n, i + 2n …

    Args:
        blocks: Iterable of blocks, best with `state_dict` and `load_state_dict`.
        schedule (`PhaseSchedule`): The run's phases.
        layout (`BatchLayout`): How rows are distributed over ranks.
        workers (`int`, *optional*, defaults to 0): Loader processes of each rank.
        columns (`Sequence[str]`, *optional*): Columns to pass on in recovery; all by default.
        bag_columns (`Sequence[str]`, *optional*, defaults to `TOKEN_COLUMNS`): Columns that superposition reads.
        joins (`bool`, *optional*, defaults to `True`): Join the blocks of a row, see [`PlannedRows`].
        rules (`BlockRules`): Requirements for the blocks, which are also of equal length.
        seed (`int`, *optional*, defaults to 0): The seed of random numbers that the stream draws, see [`DataRandomNumbers`].
        first_step (`int`, *optional*, defaults to 0): The optimizer step that reads the first blocks of the stream. Not 0 if the
            user resumes with `ignore_data_skip`: the stream then begins where the checkpoint ends.

    Raises:
        TSTError: If the loader processes cannot share the shards of the stream.
    """

    blocks: Iterable[Any]
    schedule: PhaseSchedule
    layout: BatchLayout
    workers: int = 0
    columns: Sequence[str] | None = None
    bag_columns: Sequence[str] = TOKEN_COLUMNS
    joins: bool = True
    rules: BlockRules = NO_RULES
    seed: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        shards = number_of_shards(self.blocks)
        self.readers = max(1, self.workers)
        shares = self.layout.world_size * self.readers
        self._shares = shares if shards and shards % shares == 0 else 1
        if self.workers and self._shares != shares:
            found = (
                f"has {shards}"
                if shards
                else "cannot be divided (it has no shards, or comes after skip or take)"
            )
            raise TSTError(
                f"dataloader_num_workers={self.workers} needs a stream of `datasets` with a multiple of {shares} shards, one for each loader "
                f"process, but this one {found}: set it to 0 or to a number that divides them, or load the data set without streaming."
            )
        self.split_by_rank = self.layout.world_size > 1 and self._shares > 1
        # Rows that are read for a micro-batch: those of all ranks, unless each rank has its own share.
        shared_by = self.layout.world_size if self._shares == 1 else 1
        self._rows_per_batch = self.layout.per_device_batch_size * shared_by
        self._resumed: tuple[int, Mapping[int, dict[str, Any]]] = (0, {})
        self._next_batch: int | None = None
        self.first_block = ""  # a hash of the first block that was read
        self._random = DataRandomNumbers(self.seed)

    @property
    def column_names(self) -> list[str] | None:
        """The columns, under the name that `datasets` uses; `None` if only the stream knows them. Some trainers read it."""
        known = getattr(self.blocks, "column_names", None) or self.columns
        if known is None:
            return None
        return [name for name in known if self.columns is None or name in self.columns]

    def __len__(self) -> int:
        return self.schedule.max_steps * self.layout.rows_per_step

    def load_states(self, step: int, states: Mapping[int, dict[str, Any]]) -> None:
        """Make each reader continue from its state after `step` optimizer steps."""
        self._resumed = step, states

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """The rows of one micro-batch of one rank; the last one holds the state of the stream after it."""
        layout = self.layout
        batch, rank = divmod(rows[0] // layout.per_device_batch_size, layout.world_size)
        superposed = self._is_superposed(batch)
        with self._random.drawn():
            if batch != self._next_batch:
                self._start(batch, rank)
            found = [Row(self._read_row(superposed), superposed) for _ in range(self._rows_per_batch)]
        self._next_batch = batch + self.readers
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
        group = [copied(next(self._blocks)) for _ in range(self.schedule.blocks_per_row if superposed else 1)]
        if superposed and self.joins:
            blocks = [as_block(row) for row in group]
            check_columns(blocks[0], self.columns, self.bag_columns)
            names = [name for name in self.bag_columns if blocks[0].get(name) is not None]
            return join_blocks(blocks, names)
        rows = [self._chosen(row) for row in group]
        return rows if superposed else rows[0]

    def _chosen(self, row: Any) -> Any:
        """The columns to pass on of a row; the whole row if it is only ids and goes to a user's collator."""
        if not self.joins and not isinstance(row, Mapping):
            return row
        return {k: v for k, v in as_block(row).items() if self.columns is None or k in self.columns}

    def _start(self, batch: int, rank: int) -> None:
        """Open the share of the reader that makes micro-batch `batch`, at the position of that batch."""
        reader = batch % self.readers
        step, states = self._resumed
        is_next = batch - step * self.layout.accumulation_steps in range(self.readers)
        state: dict[str, Any] = states[reader] if is_next and reader in states else {"stream": None}
        if (stream := state["stream"]) is None:
            state = {"pass": 0, "blocks_in_pass": 0}
        self._pass, self._blocks_in_pass = state["pass"], state["blocks_in_pass"]
        # Shares are numbered over all ranks. With one share, each rank reads the whole stream.
        share = reader * self.layout.world_size + rank if self._shares > 1 else 0
        self._blocks = self._endless_blocks(share, stream)
        if stream is not None:
            what = "The checkpoint's position in the stream does not fit this stream (ignore_data_skip=True begins it as it is): "
            with bad_input(what, (KeyError, TypeError, ValueError, IndexError), whole_message):
                block = next(self._blocks)
            self._blocks = chain([block], self._blocks)
            return
        first = self.first_step * self.layout.accumulation_steps
        earlier = [done for done in range(reader, batch, self.readers) if done >= first]
        skipped = self._rows_per_batch * sum(
            self.schedule.blocks_per_row if self._is_superposed(done) else 1 for done in earlier
        )
        if skipped:
            logger.warning(
                f"The stream of training data cannot save its position, so {len(earlier) * self._rows_per_batch} rows "
                f"({skipped} blocks) that were trained on already are read again and skipped."
            )
        for _ in range(skipped):
            next(self._blocks)

    def _endless_blocks(self, share: int, state: dict[str, Any] | None) -> Iterator[Any]:
        while True:
            self._random.start_pass(self._pass)
            self._stream = open_stream(self.blocks, share, self._shares, self._pass)
            if state is not None:
                self._stream.load_state_dict(state)
                state = None
            for block in self._stream:
                tokens = self.rules.check(block, self._blocks_in_pass)
                self.first_block = self.first_block or hashlib.sha256(tokens.tobytes()).hexdigest()
                if self.rules.length is None:
                    self.rules = replace(self.rules, length=len(tokens))
                self._blocks_in_pass += 1
                yield {**as_block(block), "input_ids": tokens} if self.joins else block
            if not self._blocks_in_pass:
                raise TSTError(
                    "The stream of training data is empty: check the data set's name, split and files."
                )
            logger.warning(
                f"The stream of training data ended after {self._blocks_in_pass} blocks, before the run did: it is "
                "read again."
            )
            self._pass, self._blocks_in_pass = self._pass + 1, 0


def stream_facts(blocks: Any) -> BlockFacts:
    """What is known of the blocks of a stream before it is read. Only a [`BlockStream`] says their length."""
    return BlockFacts(None, getattr(blocks, "block_size", 0), describe_stream(blocks))


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """Numbers of rows, or of micro-batches, from the current optimizer step to the end of its epoch.

    The rows are already in order, so these are consecutive numbers, and starting in the middle of an epoch costs nothing.

    Args:
        steps (`int`): Optimizer steps of the run.
        rows_per_step (`int`): Rows per optimizer step, over all ranks; or micro-batches.
        steps_per_epoch (`int`): Optimizer steps that Trainer calls an epoch.
        current_step: Function that returns the optimizer steps done so far. Called when iteration starts.
    """

    steps: int
    rows_per_step: int
    steps_per_epoch: int
    current_step: Callable[[], int]

    def __len__(self) -> int:
        """Rows of a whole epoch."""
        return min(self.steps_per_epoch, self.steps) * self.rows_per_step

    @property
    def first_step(self) -> int:
        """The current step; the first one if all are done, for a callback that looks at a batch."""
        return self.current_step() % self.steps

    def __iter__(self) -> Iterator[int]:
        step = self.first_step
        last_step = min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.steps)
        return iter(range(step * self.rows_per_step, last_step * self.rows_per_step))


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch has one thread on the CPU, as in the processes of a loader.

    A batch of bags is large enough for torch to share out its copies among all threads. On busy cores, each copy then waits for the
    slowest thread: ten times as long as one thread takes for all of it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
