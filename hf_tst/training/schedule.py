"""The phases and steps of a run, and the order of its blocks, from the arguments and the length of the data alone."""

from __future__ import annotations

import math
from typing import Any

from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..batches.read_order import DataPlan, longest_plan
from ..errors import TSTError
from .arguments import TSTArguments

logger = logging.get_logger(__name__)


def make_schedule(args: Any, steps: int) -> PhaseSchedule:
    """The phases of a run of `steps` optimizer steps. `args` has the fields of [`TSTArguments`]."""
    rows = args.tst_superposition_rows
    return PhaseSchedule(steps, args.tst_phase_ratio, args.tst_bag_size, args.tst_mode, rows)


def make_plan(args: TSTArguments, num_blocks: int, rows_per_step: int) -> DataPlan:
    """The plan of a run over a map-style data set. It depends on the arguments and the number of blocks alone.

    Args:
        args (`TSTArguments`): The run's arguments.
        num_blocks (`int`): Blocks in the data set.
        rows_per_step (`int`): Rows per optimizer step, over all ranks and accumulation steps.

    Raises:
        TSTError: If the data has too few blocks.
    """

    shuffle = args.train_sampling_strategy != "sequential"

    def plan(steps: int) -> DataPlan:
        return DataPlan(num_blocks, make_schedule(args, steps), rows_per_step, order_seed(args), shuffle)

    if args.max_steps <= 0:
        return longest_plan(args.num_train_epochs, plan)
    plan(args.max_steps).check_one_pass()
    return plan(args.max_steps)


def order_seed(args: TSTArguments) -> int:
    """The seed of the order of the data."""
    return args.seed if args.data_seed is None else args.data_seed


def choose_schedule(args: TSTArguments, data: Any, per_step: int) -> PhaseSchedule:
    """The phases of a run over `data`. A recovery step reads `per_step` items of it.

    Raises:
        TSTError: If neither `max_steps` is set nor the data has a length.
    """
    if args.max_steps > 0:
        return make_schedule(args, args.max_steps)
    if not has_length(data):
        raise TSTError(
            "The training data has no length, so num_train_epochs cannot be counted in steps: set max_steps."
        )
    schedule = make_plan(args, len(data), per_step).schedule
    warn_of_fewer_steps(args, schedule, len(data) / per_step)
    return schedule


def warn_of_fewer_steps(args: TSTArguments, schedule: PhaseSchedule, steps_per_pass: float) -> None:
    """Warn if `num_train_epochs` gives fewer steps than in Trainer. `steps_per_pass` recovery steps would read the data once."""
    if args.max_steps > 0:
        return
    plain = math.ceil(args.num_train_epochs * math.ceil(steps_per_pass))
    if plain != schedule.max_steps:
        logger.warning(
            f"num_train_epochs={args.num_train_epochs:g} gives {schedule.max_steps} optimizer steps instead of Trainer's {plain}, since "
            f"superposition reads {schedule.blocks_per_row} blocks per row: set what counts in steps for {schedule.max_steps} (warmup_steps, "
            "lr_scheduler_kwargs, a schedule in `optimizers`), or set max_steps."
        )


def steps_per_epoch(args: TSTArguments, schedule: PhaseSchedule, steps_per_pass: float = math.inf) -> int:
    """Optimizer steps in what Trainer calls an epoch: an equal share of the steps or, with `max_steps`, a pass of recovery steps."""
    if args.max_steps > 0:
        return math.ceil(min(schedule.max_steps, steps_per_pass))
    return math.ceil(schedule.max_steps / max(1, args.num_train_epochs))
