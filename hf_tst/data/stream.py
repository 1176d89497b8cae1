"""The rows of a run over a stream of blocks, and the state that lets a resumed run read on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from .block_checks import BlockRules
from .blocks import join_blocks
from .packing import BlockStream, load_stream_state, stream_state
from .plan import BatchLayout
from .rows import TOKEN_COLUMNS, Row, WorkerNote

logger = logging.get_logger(__name__)


class StreamedRows(IterableDataset[Row]):
    """Rows of a run from a stream of blocks, in the order of the stream.

    Superposition rows join `blocks_per_row` consecutive blocks; once superposition is over, a row is one block. If
    the stream ends before the run does, it is read again, with a warning. Rows of other ranks are read and left
    out, unless the stream holds this rank's share only (then `layout` has a world of one).

    Iteration starts at the optimizer step that training has reached: from the state that [`load_state`] was given, or
    without one by reading up to there again.

    In the processes of a loader each reads shards of its own and makes every w-th batch of this rank; where its stream
    stands goes with each batch to the main process (see [`WorkerNote`]).

    Args:
        blocks: Iterable of blocks, best with `state_dict` and `load_state_dict`.
        schedule (`PhaseSchedule`): The run's phases.
        layout (`BatchLayout`): How rows are dealt out to ranks.
        rank (`int`, defaults to 0): The rank whose rows these are.
        columns (`Sequence[str]`, *optional*): Columns to hand on in recovery; all by default.
        bag_columns (`Sequence[str]`, defaults to `TOKEN_COLUMNS`): Columns that superposition reads.
        current_step: Returns the optimizer steps done so far; asked when iteration starts.
        rules (`BlockRules`, *optional*): What the blocks must keep to besides being of equal length.
    """

    def __init__(
        self,
        blocks: Iterable[Mapping[str, Any]],
        schedule: PhaseSchedule,
        layout: BatchLayout,
        rank: int = 0,
        columns: Sequence[str] | None = None,
        bag_columns: Sequence[str] = TOKEN_COLUMNS,
        current_step: Callable[[], int] = lambda: 0,
        rules: BlockRules | None = None,
    ) -> None:
        self.blocks = blocks
        self.schedule = schedule
        self.layout = layout
        self.rank = rank
        self.columns = columns
        self.bag_columns = bag_columns
        self.current_step = current_step
        self._rules = rules or BlockRules()
        self.block_length: int | None = getattr(blocks, "block_size", None)
        self._pass = self._blocks_in_pass = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._loaded: dict[str, Any] | None = None

    def load_state(self, state: dict[str, Any]) -> None:
        """Let iteration start from a `state` that [`state`] gave, possibly on another world size."""
        self._loaded = state

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands once the rows of optimizer steps `0 … step - 1` are read, and no more.

        Loaders fetch ahead of training, so the state is noted when the last row of a step is read, and kept until
        training is past it.
        """
        return self._states[step]

    def __getstate__(self) -> dict[str, Any]:
        # A loader process that is not forked is told the step, and not the way to ask for it.
        step = self.current_step()
        return vars(self) | {"current_step": partial(int, step)}

    def __iter__(self) -> Iterator[Row]:
        step = self.current_step()
        worker = get_worker_info()
        if worker is not None:
            yield from self._rows_of_worker(step, worker.id, worker.num_workers)
            return
        blocks = self._start(step)
        self._note_state(step)
        while step < self.schedule.max_steps:
            # The last row of this rank waits for those of the other ranks, so that its batch comes out only when
            # the stream stands at the end of the step and its state can be noted.
            waiting: Row | None = None
            for row in range(step * self.layout.rows_per_step, (step + 1) * self.layout.rows_per_step):
                columns = self._read_row(blocks, step)
                if self.layout.owner(row) == self.rank:
                    if waiting is not None:
                        yield waiting
                    waiting = Row(columns, self.schedule.phase(step) == "superposition")
            step += 1
            self._note_state(step)
            assert waiting is not None
            yield waiting

    def _rows_of_worker(self, step: int, worker: int, num_workers: int) -> Iterator[Row]:
        layout = self.layout
        start = step * layout.accumulation_steps
        # The loader asks process 0 first, but it may be another one's turn.
        turn = start % num_workers
        if worker < turn:
            nothing = Row({}, False, WorkerNote(worker, None))
            yield from [nothing] * layout.per_device_batch_size
        first = start + (worker - turn) % num_workers
        blocks = self._start_worker(start, first, worker, num_workers)
        for batch in range(first, self.schedule.max_steps * layout.accumulation_steps, num_workers):
            step = batch // layout.accumulation_steps
            superposed = self.schedule.phase(step) == "superposition"
            for _ in range(layout.per_device_batch_size - 1):
                yield Row(self._read_row(blocks, step), superposed)
            columns = self._read_row(blocks, step)
            yield Row(columns, superposed, WorkerNote(worker, self._state()))

    def _start_worker(
        self, start: int, first: int, worker: int, num_workers: int
    ) -> Iterator[Mapping[str, Any]]:
        """Blocks of a loader process, from the state it left behind its last batch before batch `start`."""
        loaded, self._loaded = self._loaded, None
        self._pass = self._blocks_in_pass = 0
        state = None if loaded is None else loaded["workers"].get(worker)
        if state is not None and state["stream"] is not None:
            load_stream_state(self.blocks, state["stream"])
            self._pass, self._blocks_in_pass = state["pass"], state["blocks_in_pass"]
            return self._endless_blocks()
        load_stream_state(self.blocks, None)
        blocks = self._endless_blocks()
        if first > worker:
            logger.warning(
                f"The stream of training data cannot say where it stands, so loader process {worker} reads the rows that "
                "are trained already again and skips them."
            )
        for batch in range(worker, first, num_workers):
            for _ in range(self.layout.per_device_batch_size):
                self._read_row(blocks, batch // self.layout.accumulation_steps)
        return blocks

    def _read_row(self, blocks: Iterator[Mapping[str, Any]], step: int) -> Mapping[str, Any]:
        if self.schedule.phase(step) == "superposition":
            group = [next(blocks) for _ in range(self.schedule.blocks_per_row)]
            return join_blocks([{k: block[k] for k in self.bag_columns if k in block} for block in group])
        block = next(blocks)
        return {k: block[k] for k in block if self.columns is None or k in self.columns}

    def _note_state(self, step: int) -> None:
        done = self.current_step()
        self._states = {k: state for k, state in self._states.items() if k >= done}
        self._states[step] = {"step": step} | self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "pass": self._pass,
            "blocks_in_pass": self._blocks_in_pass,
            "stream": stream_state(self.blocks),
        }

    def _start(self, step: int) -> Iterator[Mapping[str, Any]]:
        loaded, self._loaded = self._loaded, None
        self._states = {}
        self._pass = self._blocks_in_pass = 0
        if loaded is not None and loaded["step"] == step and loaded["stream"] is not None:
            load_stream_state(self.blocks, loaded["stream"])
            self._pass, self._blocks_in_pass = loaded["pass"], loaded["blocks_in_pass"]
            return self._endless_blocks()
        load_stream_state(self.blocks, None)
        blocks = self._endless_blocks()
        if step:
            rows = self.layout.rows_per_step
            skipped = rows * (self.schedule.tokens_seen(step, 1))
            logger.warning(
                f"The stream of training data cannot say where it stands, so {step * rows} rows ({skipped} blocks) that "
                "are trained already are read again and skipped."
            )
            for _ in range(skipped):
                next(blocks)
        return blocks

    def _endless_blocks(self) -> Iterator[Mapping[str, Any]]:
        while True:
            for block in self.blocks:
                self._check(block)
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
            load_stream_state(self.blocks, None)

    def _check(self, block: Mapping[str, Any]) -> None:
        if self._rules.length != self.block_length:
            self._rules = replace(self._rules, length=self.block_length)
        tokens = self._rules.check(block, self._blocks_in_pass)
        if self.block_length is None:
            self.block_length = len(tokens)


def split_stream(blocks: Any, rank: int, world_size: int) -> Any | None:
    """The share of a stream that `rank` reads, or `None` if the stream has no shards to deal out evenly.

    Args:
        blocks: A `datasets.IterableDataset`, a [`BlockStream`] of one, or any other iterable (never split).
        rank (`int`), world_size (`int`): Which of how many shares.
    """
    if isinstance(blocks, BlockStream):
        documents = split_stream(blocks.documents, rank, world_size)
        return None if documents is None else BlockStream(documents, blocks.block_size)
    if world_size == 1 or not hasattr(blocks, "num_shards") or blocks.num_shards % world_size:
        return None
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(blocks, rank=rank, world_size=world_size)


def check_stream_workers(blocks: Any, num_workers: int, world_size: int) -> None:
    """Raise `TSTError` unless the shards of a stream divide among ranks and their loader processes."""
    shards = count_shards(blocks)
    if num_workers and (not shards or shards % (world_size * num_workers)):
        raise TSTError(
            f"dataloader_num_workers={num_workers} needs a stream of `datasets` whose shards divide among {world_size} "
            f"processes with {num_workers} loader processes each, but this one has {shards or 'no'} shards: set it to "
            "0 or to a number that divides them, or load the data set without streaming."
        )


def count_shards(blocks: Any) -> int | None:
    """Shards of a stream, or `None` if it has none."""
    return getattr(getattr(blocks, "documents", blocks), "num_shards", None)
