"""Which blocks an optimizer step reads, and on which rank: from the arguments and the length of the data alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bags.phases import Phase
from ..data.read_order import BatchLayout, DataPlan
from ..data.resume_position import DataPosition
from ..errors import TSTError
from .arguments import TSTTrainingArguments
from .data import make_plan

# Rows that are looked at at a time when a whole plan is verified.
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step reads.

    Args:
        step (`int`): The optimizer step, counted from 0.
        phase (`"superposition" | "recovery"`): Its phase.
        raw_tokens (`int`): Tokens of all blocks that it reads. Where bags end with documents, some of them are
            left out; how many depends on the text (see `tokens_left_out` in `data_position.json`).
        blocks (`list[list[list[list[int]]]]`): Blocks by rank, micro-batch and row.
    """

    step: int
    phase: Phase
    raw_tokens: int
    blocks: list[list[list[list[int]]]]


@dataclass(frozen=True)
class PlanSummary:
    """What a whole run reads, as [`verify_plan`] found it.

    Args:
        steps (`int`), switch_step (`int`): Optimizer steps, and those that are superposition.
        blocks_read (`int`): Blocks read, over all passes.
        passes (`int`): Passes over the data that are begun.
        unread (`int`): Blocks that no step reads.
    """

    steps: int
    switch_step: int
    blocks_read: int
    passes: int
    unread: int


def plan_of_arguments(
    args: TSTTrainingArguments, num_blocks: int, world_size: int = 1
) -> tuple[DataPlan, BatchLayout]:
    """The plan that [`TSTTrainer`] follows with these arguments on a data set of `num_blocks` blocks.

    Args:
        args (`TSTTrainingArguments`): The run's arguments, with superposition on.
        num_blocks (`int`): Blocks in the training data.
        world_size (`int`, defaults to 1): Ranks that read data of their own.

    Raises:
        TSTError: If superposition is off (the plain Trainer orders the data then), or there are too few blocks.
    """
    if not args.tst_enabled:
        raise TSTError(
            f"tst_phase_ratio={args.tst_phase_ratio} and tst_bag_size={args.tst_bag_size} switch superposition off, and "
            "the plain Trainer orders the data by itself: there is no plan to audit."
        )
    layout = BatchLayout(args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size)
    return make_plan(args, num_blocks, layout.rows_per_step), layout


def plan_of_position(position: DataPosition) -> tuple[DataPlan, BatchLayout]:
    """The plan of the run that a `data_position.json` comes from.

    Raises:
        TSTError: If the run reads a stream: what it gives is not known ahead.
    """
    if position.num_blocks is None:
        raise TSTError("The run reads a stream, which has no plan: which blocks come next is for it to say.")
    plan = DataPlan(
        position.num_blocks, position.schedule, position.rows_per_step, position.seed, position.shuffle
    )
    return plan, position.layout


def audit_step(plan: DataPlan, layout: BatchLayout, step: int, block_length: int) -> StepRecord:
    """What optimizer step `step` reads, rank by rank.

    Args:
        plan (`DataPlan`), layout (`BatchLayout`): From [`plan_of_arguments`] or [`plan_of_position`].
        step (`int`): The optimizer step, counted from 0.
        block_length (`int`): Tokens a block, L.

    Raises:
        TSTError: If the run has no such step.
    """
    steps = plan.schedule.max_steps
    if not 0 <= step < steps:
        raise TSTError(f"The run has optimizer steps 0 to {steps - 1}, but step {step} is asked for.")
    blocks = [
        [[plan.row_blocks(int(row)) for row in rows] for rows in layout.rows(step, rank)]
        for rank in range(layout.world_size)
    ]
    tokens = plan.schedule.tokens_seen(step + 1, 1) - plan.schedule.tokens_seen(step, 1)
    return StepRecord(step, plan.schedule.phase(step), tokens * layout.rows_per_step * block_length, blocks)


def verify_plan(plan: DataPlan) -> PlanSummary:
    """Check that a whole run reads each block at most once a pass.

    It goes through every row of the run, in four bytes of memory per block.

    Raises:
        TSTError: If a block is read twice in a pass, naming both.
    """
    size = plan.schedule.blocks_per_row
    last_pass = np.full(plan.num_blocks, -1, dtype=np.int32)  # in which each block was read
    read = 0
    for start in range(0, plan.total_rows, _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, plan.total_rows))
        passes = plan.row_passes(rows)
        for data_pass in np.unique(passes):
            here = rows[passes == data_pass]
            superposed = here[here < plan.superposed_rows]
            groups = plan.superposed_groups(superposed)[:, None] + np.arange(size)
            blocks = np.concatenate([groups.ravel(), plan.recovery_blocks(here[len(superposed) :])])
            values, counts = np.unique(blocks, return_counts=True)
            if (twice := (counts > 1) | (last_pass[values] == data_pass)).any():
                raise TSTError(
                    f"Block {values[twice.argmax()]} is read more than once in pass {data_pass}: the plan is wrong."
                )
            last_pass[values] = data_pass
            read += len(blocks)
    steps, switch_step = plan.schedule.max_steps, plan.schedule.switch_step
    return PlanSummary(steps, switch_step, read, int(last_pass.max()) + 1, int((last_pass < 0).sum()))
