"""The order in which a run reads its blocks: the blocks of each row, and the rows of each rank. Pure arithmetic.

- A *block* is a row of the user's data set: L tokens.
- A *row* is a row of a training batch. The rows of a run are numbered from 0, over both phases.
- A *group* is what a row of superposition reads: `blocks_per_row` consecutive blocks. Its first block is a multiple of
  `blocks_per_row`. A row of recovery reads one block.
- A *pass* is one reading of the data. The *switch pass* is the one in which superposition ends.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bags.phases import PhaseSchedule
from ..errors import TSTError

Indices = NDArray[np.int64]

# Rounds of the Feistel network, and the constants of SplitMix64.
_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of an optimizer step are distributed over ranks and micro-batches.

    Step k trains on rows `k · rows_per_step … (k + 1) · rows_per_step - 1` for any world size. The first
    `per_device_batch_size` of them are micro-batch 0 of rank 0, the next ones micro-batch 0 of rank 1, and so on.

    Args:
        per_device_batch_size (`int`): Rows of one forward pass on one device.
        accumulation_steps (`int`, *optional*, defaults to 1): Micro-batches per optimizer step.
        world_size (`int`, *optional*, defaults to 1): Ranks that read different data (data-parallel ranks).
    """

    per_device_batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step, over all ranks and micro-batches: the global batch."""
        return self.per_device_batch_size * self.accumulation_steps * self.world_size

    def rows(self, step: int, rank: int) -> Indices:
        """Rows of the run that `rank` trains on in step `step`: `(accumulation_steps, per_device_batch_size)`."""
        shape = (self.accumulation_steps, self.world_size, self.per_device_batch_size)
        return (step * self.rows_per_step + np.arange(self.rows_per_step)).reshape(shape)[:, rank]


@dataclass(frozen=True)
class DataPlan:
    """The blocks that row i of a run reads, as a pure function of the seed.

    Rows `0 … superposed_rows - 1` are superposition. They read the groups in random order. The rows after them are recovery. They
    first read, in random order, the blocks of the switch pass that superposition has not read, then whole passes. Within a pass
    no block is read twice.

    Args:
        num_blocks (`int`): Blocks in the data set.
        schedule (`PhaseSchedule`): The run's phases.
        rows_per_step (`int`): Rows per optimizer step, over all devices and accumulation steps.
        seed (`int`): Seed of the order.
        shuffle (`bool`, *optional*, defaults to `True`): Without it, groups and blocks keep the order of the data.
    """

    num_blocks: int
    schedule: PhaseSchedule
    rows_per_step: int
    seed: int
    shuffle: bool = True

    @property
    def superposed_rows(self) -> int:
        """Rows of superposition, over all processes, in the whole run."""
        return self.schedule.switch_step * self.rows_per_step

    @property
    def total_rows(self) -> int:
        """Rows of both phases, over all processes, in the whole run."""
        return self.schedule.max_steps * self.rows_per_step

    @property
    def groups_per_pass(self) -> int:
        """Groups in the data. Blocks at its end that do not fill a group are read in recovery only."""
        return self.num_blocks // self.schedule.blocks_per_row

    @property
    def switch_pass(self) -> int:
        """The pass in which superposition ends, counted from 0."""
        if not self.superposed_rows:
            return 0
        return math.ceil(self.superposed_rows / self.groups_per_pass) - 1

    @property
    def left_over(self) -> int:
        """Number of blocks in the switch pass that superposition leaves to recovery."""
        used_groups = self.superposed_rows - self.switch_pass * self.groups_per_pass
        return self.num_blocks - used_groups * self.schedule.blocks_per_row

    @property
    def blocks_consumed(self) -> int:
        """Blocks from the start of the first pass to the end of the run, those that superposition skips included."""
        whole_passes = (self.switch_pass + 1) * self.num_blocks
        return whole_passes - self.left_over + self.total_rows - self.superposed_rows

    def check_one_pass(self) -> None:
        """Raise `TSTError` if the data has fewer blocks than the run reads."""
        schedule, needed = self.schedule, self.schedule.blocks_needed(self.rows_per_step)
        if needed > self.num_blocks:
            affordable = int(self.num_blocks / max(1.0, needed / schedule.max_steps))
            raise TSTError(
                f"The schedule needs {needed} blocks ({schedule.max_steps} steps of {self.rows_per_step} rows, "
                f"{schedule.switch_step} of them with {schedule.blocks_per_row} blocks per row), but the training data has "
                f"{self.num_blocks}: lower max_steps to about {affordable}, lower tst_phase_ratio, tst_bag_size or the batch "
                "size, give more data, or set num_train_epochs instead of max_steps to read the data several times."
            )

    def first_blocks_of_groups(self, rows: Indices) -> Indices:
        """First block of the group that each row of superposition reads. `rows` and the result: `(n,)`."""
        passes, position = np.divmod(rows, self.groups_per_pass)
        return self._permute(passes, position, self.groups_per_pass, "groups") * self.schedule.blocks_per_row

    def recovery_blocks(self, rows: Indices) -> Indices:
        """Block that each row of recovery reads. `rows` (at least `superposed_rows`) and the result: `(n,)`."""
        # Pass -1 is the rest of the switch pass. Here `blocks` are positions in the order of a pass, below they become blocks.
        passes, blocks = np.divmod(rows - self.superposed_rows - self.left_over, self.num_blocks)
        whole = passes >= 0
        passes = passes[whole] + self.switch_pass + 1
        blocks[whole] = self._permute(passes, blocks[whole], self.num_blocks, "blocks")
        blocks[~whole] = self._left_over_blocks(blocks[~whole])
        return blocks

    def first_blocks(self, rows: Indices) -> Indices:
        """First block of each row, of both phases. `rows` and the result: `(n,)`."""
        superposed = rows < self.superposed_rows
        blocks = np.empty_like(rows)
        blocks[superposed] = self.first_blocks_of_groups(rows[superposed])
        blocks[~superposed] = self.recovery_blocks(rows[~superposed])
        return blocks

    def row_blocks(self, row: int) -> list[int]:
        """Blocks that row `row` of the run reads, in order."""
        first = int(self.first_blocks(np.array([row]))[0])
        size = self.schedule.blocks_per_row if row < self.superposed_rows else 1
        return list(range(first, first + size))

    def row_passes(self, rows: Indices) -> Indices:
        """Pass over the data, counted from 0, in which each row is read. `rows` and the result: `(n,)`."""
        later = (rows - self.superposed_rows - self.left_over) // self.num_blocks + 1
        superposed = rows // max(1, self.groups_per_pass)
        return np.where(rows < self.superposed_rows, superposed, self.switch_pass + later)

    def _left_over_blocks(self, position: Indices) -> Indices:
        """Blocks of the switch pass that superposition did not read, in shuffled order.

        `position` counts blocks in the order of the switch pass: group after group, then the blocks that fill no group.
        """
        passes, used = np.full_like(position, self.switch_pass), self.num_blocks - self.left_over
        blocks = used + self._permute(passes, position - used, self.left_over, "left over")
        group, place = np.divmod(blocks, self.schedule.blocks_per_row)
        in_group = group < self.groups_per_pass
        rows = self.switch_pass * self.groups_per_pass + group[in_group]
        blocks[in_group] = self.first_blocks_of_groups(rows) + place[in_group]
        return blocks

    def _permute(self, passes: Indices, position: Indices, size: int, purpose: str) -> Indices:
        """The shuffled `position`, below `size`, within each pass. Each `purpose` is shuffled independently."""
        if not self.shuffle:
            return position
        result = np.empty_like(position)
        for data_pass in np.unique(passes):
            here = passes == data_pass
            seed = (self.seed % 2**64, int(data_pass), *purpose.encode())
            result[here] = Permutation(size, seed)(position[here])
        return result


def longest_plan(passes: float, make_plan: Callable[[int], DataPlan]) -> DataPlan:
    """The plan with the most optimizer steps that fits into `passes` passes over the data.

    Args:
        passes (`float`): Passes over the data (`num_train_epochs`).
        make_plan: Function from a number of steps to the plan of such a run.

    Raises:
        TSTError: If the data is too short for one step, or for one row of superposition.
    """
    smallest = make_plan(1)
    num_blocks, rows_per_step = smallest.num_blocks, smallest.rows_per_step
    size = smallest.schedule.blocks_per_row
    budget, fits = math.floor(passes * num_blocks), 0
    if num_blocks >= size or not smallest.schedule.phase_ratio:
        # More steps never consume fewer blocks, so bisection finds the largest number that fits.
        candidates = range(1, budget // rows_per_step + 1)
        fits = bisect_right(candidates, budget, key=lambda steps: make_plan(steps).blocks_consumed)
    if not fits:
        raise TSTError(
            f"The training data has {num_blocks} blocks, too few for one optimizer step of {rows_per_step} rows with {size} "
            "blocks each: give more data, a smaller batch, a shorter block or a smaller tst_bag_size."
        )
    return make_plan(fits)


class Permutation:
    """A pseudo-random permutation of `range(size)`, a pure function of `(size, seed)`.

    A Feistel network over the smallest domain of 4^k values that holds `size`. Values outside `size` are permuted again until they
    are inside (cycle walking), so it stays a bijection. It stores eight keys, where a shuffled index of a trillion blocks would
    not fit into memory.

    Args:
        size (`int`): Number of elements.
        seed (`Sequence[int]`): Non-negative integers.
    """

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: Indices) -> Indices:
        """Elements at `positions`, an int64 array of any shape with values in `[0, size)`."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
