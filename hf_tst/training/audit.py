"""Which blocks an optimizer step reads, and on which rank, computed from the arguments and the length of the data alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..batches.read_order import BatchLayout, DataPlan
from ..batches.resume_position import DataPosition
from ..errors import TSTError
from .arguments import TSTArguments
from .schedule import make_plan

# Rows per chunk when a whole plan is verified.
_CHUNK_ROWS = 1 << 16


def plan_of_arguments(
    args: TSTArguments, num_blocks: int, world_size: int = 1
) -> tuple[DataPlan, BatchLayout]:
    """The plan that [`TSTTrainer`] follows with these arguments on a data set of `num_blocks` blocks.

    Args:
        args (`TSTArguments`): The run's arguments, with superposition on.
        num_blocks (`int`): Blocks in the training data.
        world_size (`int`, *optional*, defaults to 1): Data-parallel ranks.

    Raises:
        TSTError: If superposition is off (the plain Trainer orders the data then), or there are too few blocks.
    """
    if not args.tst_enabled:
        raise TSTError(
            f"tst_phase_ratio={args.tst_phase_ratio} and tst_bag_size={args.tst_bag_size} switch superposition off, and "
            "the plain Trainer orders the data: there is no plan to audit."
        )
    layout = BatchLayout(args.per_device_train_batch_size, args.gradient_accumulation_steps, world_size)
    return make_plan(args, num_blocks, layout.rows_per_step), layout


def plan_of_position(position: DataPosition) -> tuple[DataPlan, BatchLayout]:
    """The plan of the run that wrote a `data_position.json`.

    Raises:
        TSTError: If the run reads a stream, whose blocks are not known ahead.
    """
    if position.num_blocks is None:
        raise TSTError("The run reads a stream, whose blocks are not known ahead: there is no plan to audit.")
    plan = DataPlan(
        position.num_blocks, position.schedule, position.rows_per_step, position.seed, position.shuffle
    )
    return plan, position.layout


def audit_step(plan: DataPlan, layout: BatchLayout, step: int, block_length: int) -> dict[str, Any]:
    """What optimizer step `step` reads, rank by rank.

    Args:
        plan (`DataPlan`), layout (`BatchLayout`): From [`plan_of_arguments`] or [`plan_of_position`].
        step (`int`): The optimizer step, counted from 0.
        block_length (`int`): Tokens per block, L.

    Returns:
        `step`; its `phase`; `raw_tokens`, the tokens of all blocks that it reads (if bags end with documents, some of them are left
        out: see `tokens_left_out` in `data_position.json`); and `blocks`, their numbers by rank, micro-batch and row.

    Raises:
        TSTError: If the run has no such step.
    """
    steps = plan.schedule.max_steps
    if not 0 <= step < steps:
        raise TSTError(f"There is no step {step}: the run has optimizer steps 0 to {steps - 1}.")
    blocks = [
        [[plan.row_blocks(int(row)) for row in rows] for rows in layout.rows(step, rank)]
        for rank in range(layout.world_size)
    ]
    tokens_per_step = layout.rows_per_step * block_length
    raw_tokens = plan.schedule.amount_read(step + 1, tokens_per_step) - plan.schedule.amount_read(
        step, tokens_per_step
    )
    return {"step": step, "phase": plan.schedule.phase(step), "raw_tokens": raw_tokens, "blocks": blocks}


def verify_plan(plan: DataPlan) -> dict[str, int]:
    """Check that a whole run reads each block at most once per pass.

    It checks every row of the run and needs four bytes of memory per block.

    Returns:
        `steps`, all optimizer steps; `switch_step`, those of superposition; `blocks_read` in all passes; `passes` over the data,
        the last of which may be partial; `unread`, the blocks that no step reads.

    Raises:
        TSTError: If a block is read twice in a pass. The message names both.
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
            groups = plan.first_blocks_of_groups(superposed)[:, None] + np.arange(size)
            blocks = np.concatenate([groups.ravel(), plan.recovery_blocks(here[len(superposed) :])])
            values, counts = np.unique(blocks, return_counts=True)
            if (twice := (counts > 1) | (last_pass[values] == data_pass)).any():
                raise TSTError(
                    f"Block {values[twice.argmax()]} is read more than once in pass {data_pass}. This is an error of hf_tst: please report the run's options."
                )
            last_pass[values] = data_pass
            read += len(blocks)
    return {
        "steps": plan.schedule.max_steps,
        "switch_step": plan.schedule.switch_step,
        "blocks_read": read,
        "passes": int(last_pass.max()) + 1,
        "unread": int((last_pass < 0).sum()),
    }
