"""Which blocks each row of a run reads, and the data sets that read them.

Words: a *block* is a row of the user's data set, L tokens. A *row* is a row of a training batch: in
superposition `blocks_per_row` consecutive blocks, in recovery one block. A *pass* is one reading of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers.utils import logging

from .permutation import Indices, Permutation
from .phases import PhaseSchedule

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Row:
    """One row of a batch before collation: its columns, and whether it is to be folded into bags."""

    columns: Mapping[str, Any]
    superposed: bool


@dataclass(frozen=True)
class DataPlan:
    """Which blocks row i of a run reads, as a pure function of the seed.

    Rows `0 … superposed_rows - 1` belong to superposition: each reads a group of `blocks_per_row` consecutive
    blocks, the groups in random order. The rows after them belong to recovery and read, in random order, the
    blocks that superposition left of its last pass, then whole passes. Within a pass no block is read twice.

    Args:
        num_blocks (`int`): Blocks in the data set.
        schedule (`PhaseSchedule`): The run's phases.
        rows_per_step (`int`): Rows an optimizer step, over all devices and accumulation steps.
        seed (`int`): Seed of the order.
        shuffle (`bool`, defaults to `True`): Without it, groups and blocks keep the order of the data.
    """

    num_blocks: int
    schedule: PhaseSchedule
    rows_per_step: int
    seed: int
    shuffle: bool = True

    @property
    def superposed_rows(self) -> int:
        return self.schedule.switch_step * self.rows_per_step

    @property
    def total_rows(self) -> int:
        return self.schedule.max_steps * self.rows_per_step

    @property
    def groups_per_pass(self) -> int:
        return self.num_blocks // self.schedule.blocks_per_row

    @property
    def switch_pass(self) -> int:
        """Pass over the data in which superposition ends, counted from 0."""
        if not self.superposed_rows:
            return 0
        return math.ceil(self.superposed_rows / self.groups_per_pass) - 1

    @property
    def blocks_consumed(self) -> int:
        """Blocks from the start of the first pass to the end of the run; at most passes · `num_blocks`."""
        recovery_rows = self.total_rows - self.superposed_rows
        used_groups = self.superposed_rows - self.switch_pass * self.groups_per_pass
        return self.switch_pass * self.num_blocks + used_groups * self.schedule.blocks_per_row + recovery_rows

    def superposed_groups(self, rows: Indices) -> Indices:
        """First block of the group that each superposition row reads. `rows` and the result: `(n,)`."""
        passes, position = np.divmod(rows, self.groups_per_pass)
        return self._permute(passes, position, self.groups_per_pass, "groups") * self.schedule.blocks_per_row

    def recovery_blocks(self, rows: Indices) -> Indices:
        """Block that each recovery row reads. `rows` (at least `superposed_rows`) and the result: `(n,)`."""
        position = rows - self.superposed_rows
        used_groups = self.superposed_rows - self.switch_pass * self.groups_per_pass
        left_over = self.num_blocks - used_groups * self.schedule.blocks_per_row
        in_switch_pass = position < left_over
        blocks = np.empty_like(position)
        blocks[in_switch_pass] = self._left_over_blocks(position[in_switch_pass], left_over, used_groups)
        later = position[~in_switch_pass] - left_over
        passes, position = np.divmod(later, self.num_blocks)
        blocks[~in_switch_pass] = self._permute(
            passes + self.switch_pass + 1, position, self.num_blocks, "blocks"
        )
        return blocks

    def _left_over_blocks(self, position: Indices, left_over: int, used_groups: int) -> Indices:
        """Blocks of the switch pass that superposition did not use, in shuffled order."""
        size = self.schedule.blocks_per_row
        passes = np.full_like(position, self.switch_pass)
        position = self._permute(passes, position, left_over, "left over")
        group_blocks = (self.groups_per_pass - used_groups) * size
        blocks = self.groups_per_pass * size + position - group_blocks  # the tail that fills no group
        in_group = position < group_blocks
        groups = self._permute(
            passes[in_group], position[in_group] // size + used_groups, self.groups_per_pass, "groups"
        )
        blocks[in_group] = groups * size + position[in_group] % size
        return blocks

    def _permute(self, passes: Indices, position: Indices, size: int, stream: str) -> Indices:
        if not self.shuffle:
            return position
        result = np.empty_like(position)
        for data_pass in np.unique(passes):
            here = passes == data_pass
            seed = (self.seed, int(data_pass), *stream.encode())
            result[here] = Permutation(size, seed)(position[here])
        return result


def plan_for_passes(
    num_blocks: int,
    passes: float,
    make_schedule: Callable[[int], PhaseSchedule],
    rows_per_step: int,
    seed: int,
    shuffle: bool = True,
) -> DataPlan:
    """The longest plan of whole optimizer steps that `passes` passes over the data give.

    Args:
        num_blocks (`int`): Blocks in the data set.
        passes (`float`): Passes over the data (`num_train_epochs`).
        make_schedule: Schedule of a run of so many steps.
        rows_per_step, seed, shuffle: See [`DataPlan`].

    Raises:
        ValueError: If the data does not give a single step.
    """
    budget = math.floor(passes * num_blocks)

    def plan(steps: int) -> DataPlan:
        return DataPlan(num_blocks, make_schedule(steps), rows_per_step, seed, shuffle)

    # A step more never reads less, so the number of steps that fit can be found by bisection.
    fits, too_many = 0, budget // rows_per_step + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        candidate = plan(middle)
        if _has_groups(candidate) and candidate.blocks_consumed <= budget:
            fits = middle
        else:
            too_many = middle
    if not fits:
        schedule = make_schedule(1)
        raise ValueError(
            f"The training data has {num_blocks} blocks, too few for one optimizer step of {rows_per_step} rows "
            f"with {schedule.blocks_per_row} blocks each: give more data, a smaller batch, a shorter block or a "
            "smaller tst_bag_size."
        )
    return plan(fits)


def plan_for_steps(
    num_blocks: int, schedule: PhaseSchedule, rows_per_step: int, seed: int, shuffle: bool = True
) -> DataPlan:
    """The plan of `schedule.max_steps` steps within one pass over the data.

    Raises:
        ValueError: If the data has fewer blocks than the schedule needs.
    """
    needed = schedule.blocks_needed(rows_per_step)
    if needed > num_blocks:
        superposed, recovery = schedule.switch_step, schedule.max_steps - schedule.switch_step
        per_step = max(1.0, needed / schedule.max_steps)
        raise ValueError(
            f"The schedule needs {needed} blocks ({superposed} superposition steps of {rows_per_step} rows with "
            f"{schedule.blocks_per_row} blocks each, {recovery} recovery steps of {rows_per_step} rows with one), but the "
            f"training data has {num_blocks}: lower max_steps to about {int(num_blocks / per_step)}, lower "
            "tst_phase_ratio, tst_bag_size or the batch size, give more data, or leave max_steps unset and say with "
            "num_train_epochs how often to read the data."
        )
    return DataPlan(num_blocks, schedule, rows_per_step, seed, shuffle)


def _has_groups(plan: DataPlan) -> bool:
    return plan.groups_per_pass > 0 or plan.superposed_rows == 0


class PlannedRows(Dataset[Row]):
    """Map-style data set of the rows of a [`DataPlan`]: row i of the run, whatever process or worker asks.

    Args:
        blocks: Map-style data set of blocks (`datasets.Dataset`, a list, any with `__getitem__`).
        plan (`DataPlan`): Which blocks row i reads.
        columns (`Sequence[str]`): Columns to hand on in recovery; superposition reads `input_ids`, `labels` and
            `attention_mask` only.
        as_arrays (`bool`, defaults to `True`): Read recovery blocks of a `datasets.Dataset` as NumPy arrays, which
            is faster, not in the data set's own format.
    """

    def __init__(self, blocks: Any, plan: DataPlan, columns: Sequence[str], as_arrays: bool = True) -> None:
        self.plan = plan
        bag_columns = [name for name in ("input_ids", "labels", "attention_mask") if name in columns]
        self._bag_blocks = _select(blocks, bag_columns, as_arrays=True)
        self._blocks = _select(blocks, list(columns), as_arrays=as_arrays)

    def __len__(self) -> int:
        return self.plan.total_rows

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """Rows of one batch; a batch lies wholly in one phase."""
        indices = np.asarray(rows, dtype=np.int64)
        if indices[0] < self.plan.superposed_rows:
            size = self.plan.schedule.blocks_per_row
            starts = self.plan.superposed_groups(indices)
            return [
                Row(_concatenate(self._bag_blocks(range(s, s + size))), superposed=True)
                for s in starts.tolist()
            ]
        blocks = self._blocks(self.plan.recovery_blocks(indices).tolist())
        return [Row(columns, superposed=False) for columns in blocks]


class StreamedRows(IterableDataset[Row]):
    """Rows of a run from a stream of blocks, in the order of the stream.

    Superposition rows join `blocks_per_row` consecutive blocks; once `superposed_rows` rows are read, a row is
    one block. If the stream ends before the run does, it is read again, with a warning.

    Args:
        blocks: Iterable of blocks.
        schedule (`PhaseSchedule`): The run's phases.
        rows_per_step (`int`): Rows an optimizer step, over all devices and accumulation steps.
        columns (`Sequence[str]`, *optional*): Columns to hand on in recovery; all by default.
    """

    def __init__(
        self,
        blocks: Iterable[Mapping[str, Any]],
        schedule: PhaseSchedule,
        rows_per_step: int,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.blocks = blocks
        self.schedule = schedule
        self.rows_per_step = rows_per_step
        self.columns = columns
        self.block_length: int | None = None

    def __iter__(self) -> Iterator[Row]:
        superposed_rows = self.schedule.switch_step * self.rows_per_step
        blocks = self._endless_blocks()
        for row in range(self.schedule.max_steps * self.rows_per_step):
            if row < superposed_rows:
                group = [_bag_columns(next(blocks)) for _ in range(self.schedule.blocks_per_row)]
                yield Row(_concatenate(group), superposed=True)
            else:
                block = next(blocks)
                yield Row({k: block[k] for k in block if self.columns is None or k in self.columns}, False)

    def _endless_blocks(self) -> Iterator[Mapping[str, Any]]:
        while True:
            count = 0
            for block in self.blocks:
                self._check(block, count)
                count += 1
                yield block
            if not count:
                raise ValueError(
                    "The stream of training data is empty: check the data set's name, split and files."
                )
            logger.warning(
                f"The stream of training data ended after {count} blocks, before the run did: it is read again."
            )

    def _check(self, block: Mapping[str, Any], index: int) -> None:
        _check_has_tokens(block)
        if self.block_length is None:
            self.block_length = len(block["input_ids"])
        _check_length(len(block["input_ids"]), self.block_length, index)


class EpochSampler(Sampler[int]):
    """Row numbers of the epoch that training is in, in order: the plan has shuffled already.

    Args:
        plan (`DataPlan`): The run.
        steps_per_epoch (`int`): Optimizer steps that Trainer calls an epoch.
        current_step: Returns the optimizer steps done so far; asked when iteration starts.
    """

    def __init__(self, plan: DataPlan, steps_per_epoch: int, current_step: Callable[[], int]) -> None:
        self.plan = plan
        self.steps_per_epoch = steps_per_epoch
        self.current_step = current_step

    def __len__(self) -> int:
        return min(self.steps_per_epoch * self.plan.rows_per_step, self.plan.total_rows)

    def __iter__(self) -> Iterator[int]:
        epoch = self.current_step() // self.steps_per_epoch
        first = epoch * self.steps_per_epoch * self.plan.rows_per_step
        return iter(range(first, min(first + len(self), self.plan.total_rows)))


class PhaseCollator:
    """Sends superposition rows to one collator, all other rows and features to another.

    Args:
        superposition: Collator of superposition rows.
        recovery: Collator of recovery rows, evaluation and prediction.
    """

    def __init__(
        self,
        superposition: Callable[[list[Mapping[str, Any]]], dict[str, Any]],
        recovery: Callable[[list[Any]], dict[str, Any]],
    ) -> None:
        self.superposition = superposition
        self.recovery = recovery

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        if not isinstance(features[0], Row):
            return self.recovery(features)
        collate = self.superposition if features[0].superposed else self.recovery
        return collate([row.columns for row in features])


def check_blocks(blocks: Any, pad_token_id: int | None = None) -> int:
    """Check that a map-style data set holds full, equal blocks of tokens, and return their length L.

    A `datasets.Dataset` is checked whole by its stored lengths; of any other data set, 256 blocks spread
    over it are read (batches are checked again as they are made).

    Args:
        blocks: The data set.
        pad_token_id (`int`, *optional*): Id that marks padding, if it marks nothing else.

    Raises:
        ValueError: If there is no `input_ids`, blocks differ in length or are padded, or there is no block.
    """
    if len(blocks) == 0:
        raise ValueError("The training data is empty: it has no block of tokens.")
    first = blocks[0]
    _check_has_tokens(first)
    length = len(first["input_ids"])
    sample = {int(index) for index in np.linspace(0, len(blocks) - 1, num=256)}
    for index in sorted(sample):
        block = blocks[index]
        _check_length(len(block["input_ids"]), length, index)
        mask = block.get("attention_mask")
        if mask is not None and not np.asarray(mask).all():
            raise ValueError(
                f"Block {index} of the training data is padded (its attention_mask holds zeros), and a bag would "
                "average padding with text: pack the data into full blocks."
            )
        if pad_token_id is not None and int(block["input_ids"][-1]) == pad_token_id:
            raise ValueError(
                f"Block {index} of the training data ends in the padding token {pad_token_id}, and a bag would "
                "average padding with text: pack the data into full blocks."
            )
    if hasattr(blocks, "with_format"):
        _check_stored_lengths(blocks, length)
    return length


def _check_has_tokens(block: Any) -> None:
    if not isinstance(block, Mapping) or "input_ids" not in block:
        names = sorted(block) if isinstance(block, Mapping) else type(block).__name__
        raise ValueError(
            f"The training data needs a column 'input_ids', but has {names}: tokenise and pack it."
        )


def _check_stored_lengths(blocks: Any, length: int) -> None:
    import pyarrow.compute as pc

    start = 0
    for table in blocks.select_columns("input_ids").with_format("arrow").iter(batch_size=100_000):
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
        if (differs := lengths != length).any():
            index = int(differs.argmax())
            _check_length(int(lengths[index]), length, start + index)
        start += len(lengths)


def _check_length(found: int, length: int, index: int) -> None:
    if found != length:
        raise ValueError(
            f"Blocks must be of equal length, but block 0 of the training data has {length} tokens and block "
            f"{index} has {found}: pack the data into blocks."
        )


def _select(
    blocks: Any, columns: list[str], as_arrays: bool
) -> Callable[[Sequence[int]], list[Mapping[str, Any]]]:
    """A function that reads the `columns` of some blocks."""
    if hasattr(blocks, "select_columns"):  # datasets.Dataset
        blocks = blocks.select_columns(columns)
        if as_arrays:
            blocks = blocks.with_format("numpy")

        def read(indices: Sequence[int]) -> list[Mapping[str, Any]]:
            batch = blocks[indices]
            return [{name: batch[name][i] for name in columns} for i in range(len(indices))]
    else:

        def read(indices: Sequence[int]) -> list[Mapping[str, Any]]:
            return [{name: block[name] for name in columns} for block in (blocks[i] for i in indices)]

    return read


def _bag_columns(block: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: block[name] for name in ("input_ids", "labels", "attention_mask") if name in block}


def _concatenate(blocks: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.asarray(block[name]) for block in blocks]) for name in blocks[0]}
