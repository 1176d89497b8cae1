"""In which order a run reads its blocks: which blocks each row reads, and which rows each rank trains on. Pure arithmetic.

Words: a *block* is a row of the user's data set, L tokens. A *row* is a row of a training batch: in
superposition `blocks_per_row` consecutive blocks, in recovery one block. A *pass* is one reading of the data.
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

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of an optimizer step are distributed over ranks and micro-batches.

    Step k trains on rows `k · rows_per_step … (k + 1) · rows_per_step - 1`, whatever the world size. Within it,
    micro-batch after micro-batch, each rank in turn takes the next `per_device_batch_size` rows.

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
    """Which blocks row i of a run reads, as a pure function of the seed.

    Rows `0 … superposed_rows - 1` belong to superposition: each reads a group of `blocks_per_row` consecutive
    blocks, the groups in random order. The rows after them belong to recovery and read, in random order, the
    blocks that superposition left of its last pass, then whole passes. Within a pass no block is read twice.

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
        """Rows of superposition that a pass over the data can give."""
        return self.num_blocks // self.schedule.blocks_per_row

    @property
    def switch_pass(self) -> int:
        """Pass over the data in which superposition ends, counted from 0."""
        if not self.superposed_rows:
            return 0
        return math.ceil(self.superposed_rows / self.groups_per_pass) - 1

    @property
    def left_over(self) -> int:
        """Blocks of that pass that superposition leaves to recovery."""
        used_groups = self.superposed_rows - self.switch_pass * self.groups_per_pass
        return self.num_blocks - used_groups * self.schedule.blocks_per_row

    @property
    def blocks_consumed(self) -> int:
        """Blocks from the start of the first pass to the end of the run; at most passes · `num_blocks`."""
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

    def superposed_groups(self, rows: Indices) -> Indices:
        """First block of the group that each superposition row reads. `rows` and the result: `(n,)`."""
        passes, position = np.divmod(rows, self.groups_per_pass)
        return self._permute(passes, position, self.groups_per_pass, "groups") * self.schedule.blocks_per_row

    def recovery_blocks(self, rows: Indices) -> Indices:
        """Block that each recovery row reads. `rows` (at least `superposed_rows`) and the result: `(n,)`."""
        passes, blocks = np.divmod(rows - self.superposed_rows - self.left_over, self.num_blocks)
        whole = passes >= 0
        passes = passes[whole] + self.switch_pass + 1
        blocks[whole] = self._permute(passes, blocks[whole], self.num_blocks, "blocks")
        blocks[~whole] = self._left_over_blocks(blocks[~whole])
        return blocks

    def first_blocks(self, rows: Indices) -> Indices:
        """First block of each row of either phase. `rows` and the result: `(n,)`."""
        superposed = rows < self.superposed_rows
        blocks = np.empty_like(rows)
        blocks[superposed] = self.superposed_groups(rows[superposed])
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
        """Blocks of the switch pass that superposition did not use, in shuffled order.

        `position` counts the blocks of the pass as superposition reads them: group after group, then the tail that fills no
        group.
        """
        passes, used = np.full_like(position, self.switch_pass), self.num_blocks - self.left_over
        blocks = used + self._permute(passes, position - used, self.left_over, "left over")
        group, place = np.divmod(blocks, self.schedule.blocks_per_row)
        in_group = group < self.groups_per_pass
        rows = self.switch_pass * self.groups_per_pass + group[in_group]
        blocks[in_group] = self.superposed_groups(rows) + place[in_group]
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


def longest_plan(passes: float, make_plan: Callable[[int], DataPlan]) -> DataPlan:
    """The longest plan of whole optimizer steps that `passes` passes over the data give.

    Args:
        passes (`float`): Passes over the data (`num_train_epochs`).
        make_plan: Plan of a run of so many steps.

    Raises:
        TSTError: If the data does not give a single step, or fill a single row of superposition.
    """
    smallest = make_plan(1)
    num_blocks, rows_per_step = smallest.num_blocks, smallest.rows_per_step
    size = smallest.schedule.blocks_per_row
    budget, fits = math.floor(passes * num_blocks), 0
    if num_blocks >= size or not smallest.schedule.phase_ratio:
        # A step more never reads less, so the number of steps that fit can be found by bisection.
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

    A Feistel network over the smallest square power-of-two domain that holds `size`; values outside `size`
    are permuted again until they are inside (cycle walking), which keeps it a bijection. A
    shuffled index of a trillion blocks would not fit into memory; this holds eight keys.

    Args:
        size (`int`): Number of elements.
        seed (`Sequence[int]`): Non-negative integers that name this permutation.
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
