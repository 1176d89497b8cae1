"""The rows of a run over a map-style data set, in the order of its plan, and their collation by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from .blocks import NO_RULES, TOKEN_COLUMNS, BlockReader, BlockRules
from .read_order import DataPlan

# Rows after the ones asked for that are looked up with them.
_LOOK_AHEAD = 256
# Under which name a batch of a stream holds its `StreamState`.
STREAM_STATE = "tst_stream_state"


@dataclass(frozen=True)
class Row:
    """One row of a batch before collation, and whether it is to be folded into bags.

    `columns` are those of the row or, for somebody else's collator in superposition, the list of its blocks. The last row of
    a batch of a stream also holds the state of the stream after it.
    """

    columns: Any
    superposed: bool
    stream_state: Any = None


@dataclass(eq=False, repr=False)
class PlannedRows(Dataset[Row]):
    """Map-style data set of the rows of a [`DataPlan`]: row i of the run, whatever process or worker asks.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, any with `__getitem__`).
        plan (`DataPlan`): Which blocks row i reads.
        columns (`Sequence[str]`): Columns to pass on in recovery.
        bag_columns (`Sequence[str]`, defaults to `TOKEN_COLUMNS`): Those of them that superposition reads.
        joins (`bool`, defaults to `True`): Join the blocks of a row, and read a `datasets.Dataset` as NumPy arrays, which is
            faster. Otherwise blocks are as the data set gives them, for a collator that knows nothing of bags.
        rules (`BlockRules`): What the blocks must keep to, checked as they are read.
    """

    blocks: Any
    plan: DataPlan
    columns: Sequence[str]
    bag_columns: Sequence[str] = TOKEN_COLUMNS
    joins: bool = True
    rules: BlockRules = NO_RULES

    def __post_init__(self) -> None:
        self._first_blocks: dict[int, int] = {}
        bag_columns = [name for name in self.columns if name in self.bag_columns]
        self._read_bags = BlockReader(self.blocks, bag_columns, rules=self.rules).read
        self._read = BlockReader(self.blocks, self.columns, self.joins, self.rules).read

    def __len__(self) -> int:
        return self.plan.total_rows

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """Rows of one batch, which is wholly in one phase."""
        first_blocks = self._look_up(rows)
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

    def _look_up(self, rows: Sequence[int]) -> list[int]:
        """First block of each row.

        To look up hundreds of rows takes hardly longer than to look up one, and the rows asked for next are those
        after these.
        """
        if not all(row in self._first_blocks for row in rows):
            wanted = np.arange(min(rows), min(max(rows) + _LOOK_AHEAD, len(self)))
            self._first_blocks = dict(
                zip(wanted.tolist(), self.plan.first_blocks(wanted).tolist(), strict=True)
            )
        return [self._first_blocks[row] for row in rows]


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """Row numbers from the optimizer step that training has reached to the end of the epoch it is in.

    The rows are in their order already, so these are consecutive numbers, and starting in the middle of an epoch costs
    what starting at its beginning costs.

    Args:
        steps (`int`): Optimizer steps of the run.
        rows_per_step (`int`): Rows per optimizer step, over all ranks.
        steps_per_epoch (`int`): Optimizer steps that Trainer calls an epoch.
        current_step: Returns the optimizer steps done so far; asked when iteration starts.
    """

    steps: int
    rows_per_step: int
    steps_per_epoch: int
    current_step: Callable[[], int]

    def __len__(self) -> int:
        """Rows of a whole epoch."""
        return min(self.steps_per_epoch, self.steps) * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        step = self.current_step()
        last_step = min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.steps)
        return iter(range(step * self.rows_per_step, last_step * self.rows_per_step))


@dataclass
class PhaseCollator:
    """Sends superposition rows, recovery rows and all other features to a collator each.

    Args:
        superposition: Collator of superposition rows.
        recovery: Collator of recovery rows.
        evaluation: Collator of evaluation and prediction.
    """

    superposition: Callable[[list[Any]], dict[str, Any]]
    recovery: Callable[[list[Any]], dict[str, Any]]
    evaluation: Callable[[list[Any]], dict[str, Any]]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the collator of recovery holds, which Trainer saves with the model; `None` without one."""
        return getattr(self.recovery, "tokenizer", None)

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        if not isinstance(features[0], Row):
            return self.evaluation(features)
        collate = self.superposition if features[0].superposed else self.recovery
        batch = collate([row.columns for row in features])
        state = features[-1].stream_state
        return batch if state is None else {**batch, STREAM_STATE: state}
