"""The data of one training run: its plan or stream, its place in a checkpoint, and the collators of its rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers.utils import logging

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.phases import PhaseSchedule
from ..data.blocks import NO_RULES, BlockRules, check_blocks
from ..data.plan import BatchLayout, DataPlan, plan_for_passes, plan_for_steps
from ..data.position import DataPosition
from ..data.rows import DOCUMENT_COLUMNS, STREAM_STATE, TOKEN_COLUMNS, EpochSampler, PlannedRows
from ..data.stream import StreamedRows
from ..errors import TSTError
from .arguments import TSTTrainingArguments

logger = logging.get_logger(__name__)


def make_schedule(args: TSTTrainingArguments, steps: int) -> PhaseSchedule:
    """The phases of a run of `steps` optimizer steps."""
    return PhaseSchedule(steps, args.tst_phase_ratio, args.tst_bag_size, args.tst_mode)


def make_plan(args: TSTTrainingArguments, num_blocks: int, rows_per_step: int) -> DataPlan:
    """The plan of a run over a map-style data set: from the arguments and the number of blocks alone.

    Args:
        args (`TSTTrainingArguments`): The run's arguments.
        num_blocks (`int`): Blocks in the data set.
        rows_per_step (`int`): Rows per optimizer step, over all ranks and accumulation steps.

    Raises:
        TSTError: If the data has too few blocks.
    """
    seed, shuffle = _order(args)
    if args.max_steps > 0:
        return plan_for_steps(num_blocks, make_schedule(args, args.max_steps), rows_per_step, seed, shuffle)
    return plan_for_passes(
        num_blocks, args.num_train_epochs, lambda n: make_schedule(args, n), rows_per_step, seed, shuffle
    )


def _order(args: TSTTrainingArguments) -> tuple[int, bool]:
    seed = args.seed if args.data_seed is None else args.data_seed
    return seed, getattr(args, "train_sampling_strategy", "random") != "sequential"


@dataclass
class RunData:
    """The training data of one run, made by [`open_run_data`].

    Args:
        rows (`PlannedRows` or `StreamedRows`): The rows of the run.
        start (`DataPosition`): The position before the first step.
        steps_per_epoch (`int`): Optimizer steps that Trainer calls an epoch.
        rank (`int`): This process among those that read data of their own.
    """

    rows: PlannedRows | StreamedRows
    start: DataPosition
    steps_per_epoch: int
    rank: int
    # Where the readers of this rank stand in a stream, behind the batches that training got.
    _stream_states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def schedule(self) -> PhaseSchedule:
        """The phases of the run."""
        return self.start.schedule

    @property
    def plan(self) -> DataPlan | None:
        """Which blocks are read; `None` for a stream."""
        return self.rows.plan if isinstance(self.rows, PlannedRows) else None

    def sampler(self, current_step: Callable[[], int]) -> EpochSampler:
        """The order of the rows, from the step that training has reached."""
        steps, rows_per_step = self.start.max_steps, self.start.rows_per_step
        return EpochSampler(steps, rows_per_step, self.steps_per_epoch, current_step)

    def epoch(self, step: int) -> float:
        """What Trainer calls the epoch once `step` (at least 1) optimizer steps are done."""
        epoch = (step - 1) // self.steps_per_epoch
        return epoch + (step - epoch * self.steps_per_epoch) / self.steps_per_epoch

    def blocks_of_step(self, step: int, rank: int, micro_batch: int | None) -> list[int] | None:
        """Blocks that a micro-batch of a step trains on, or all ranks in the whole step; `None` for a stream."""
        if self.plan is None:
            return None
        count = self.start.rows_per_step
        rows = np.arange(step * count, (step + 1) * count)
        if micro_batch is not None:
            rows = self.start.layout.rows(step, rank)[micro_batch]
        return [block for row in rows.tolist() for block in self.plan.row_blocks(row)]

    def received(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches that training gets, without the state of the stream that comes with them."""
        for batch in batches:
            if isinstance(batch, dict) and (state := batch.pop(STREAM_STATE, None)) is not None:
                self._stream_states[state.reader] = state.values
                self.start = replace(self.start, block_length=state.values["block_length"])
            yield batch

    def position(self, step: int, tokens_left_out: int = 0) -> DataPosition:
        """What the run has trained on once `step` optimizer steps are done."""
        return replace(self.start, step=step, tokens_left_out=tokens_left_out)

    def save(self, folder: str | Path, step: int, tokens_left_out: int, writes_position: bool) -> None:
        """Write the position, and this rank's state of a stream, into a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        if writes_position:
            self.position(step, tokens_left_out).save(folder)
        if self.plan is None:
            torch.save({"step": step, "workers": self._stream_states}, _state_file(folder, self.rank))

    def resume(self, folder: str | Path, allow_change: bool) -> DataPosition | None:
        """Continue from a checkpoint.

        Args:
            folder: The checkpoint.
            allow_change (`bool`): Continue although the data or what decides its order has changed.

        Returns:
            The position in the checkpoint, or `None` if it holds none.

        Raises:
            TSTError: If data would be read twice or never, and `allow_change` is not set.
        """
        saved = DataPosition.load(folder)
        if saved is None:
            logger.warning(
                f"{folder} has no data_position.json, as if the plain Trainer had written it: whether data and "
                "arguments are those that it was trained with cannot be checked."
            )
            return None
        length = self.start.block_length or saved.block_length
        try:
            saved.check_resumable(replace(self.start, block_length=length))
            if isinstance(self.rows, StreamedRows):
                # Of a stream that does not say its block length, the blocks are checked as they come.
                self.rows.rules = replace(self.rows.rules, length=length or None)
        except TSTError as error:
            if not allow_change:
                raise
            logger.warning(f"tst_allow_data_change is set, so training continues. {error}")
        same_readers = all(
            getattr(saved, name) == getattr(self.start, name)
            for name in ("split_by_rank", "data", "stream_workers")
        )
        if isinstance(self.rows, StreamedRows) and same_readers:
            # Without shards by rank every rank reads the same stream, and after a step all stand at the same place.
            file = _state_file(folder, self.rank if saved.split_by_rank else 0)
            if not file.is_file():
                raise TSTError(
                    f"The checkpoint has no {file.name} to read the stream on from: copy the files of all processes "
                    "into one folder."
                )
            state = torch.load(file, weights_only=True)
            self._stream_states = dict(state["workers"])
            self.rows.load_states(state["step"], state["workers"])
        return saved


def open_run_data(
    blocks: Any,
    args: TSTTrainingArguments,
    layout: BatchLayout,
    rank: int,
    *,
    columns: Callable[[list[str] | None], Sequence[str] | None],
    rules: BlockRules = NO_RULES,
    as_arrays: bool = True,
) -> RunData:
    """Check the training data and plan the run over it.

    Args:
        blocks: Map-style data set or stream of blocks.
        args (`TSTTrainingArguments`): The run's arguments.
        layout (`BatchLayout`), rank (`int`): How rows are dealt out to ranks, and which rank this is.
        columns: Returns those of some columns (of all, for `None`) that the collator gets.
        rules (`BlockRules`): What the blocks must keep to besides being of equal length.
        as_arrays (`bool`, defaults to `True`): See [`PlannedRows`].

    Raises:
        TSTError: If the data has no full blocks of equal length, or too few of them, or batches would not come in order.
    """
    streamed = isinstance(blocks, IterableDataset)
    _check_loader(args, streamed)
    respect = args.tst_document_boundaries == "respect"
    bag_columns = TOKEN_COLUMNS + (DOCUMENT_COLUMNS if respect else ())
    workers = args.dataloader_num_workers if streamed else 0
    rows: PlannedRows | StreamedRows
    if streamed:
        schedule = make_schedule(args, args.max_steps)
        rows = StreamedRows(blocks, schedule, layout, workers, columns(None), bag_columns, rules)
        facts = rows.facts
    else:
        facts = check_blocks(blocks, rules.pad_token_id, rules.vocab_size)
        plan = make_plan(args, len(blocks), layout.rows_per_step)
        schedule = plan.schedule
        rules = replace(rules, length=facts.length)
        rows = PlannedRows(blocks, plan, columns(list(blocks[0])) or [], bag_columns, as_arrays, rules)
    seed, shuffle = _order(args)
    start = DataPosition(
        step=0,
        max_steps=schedule.max_steps,
        phase_ratio=args.tst_phase_ratio,
        bag_size=args.tst_bag_size,
        mode=args.tst_mode,
        offset_weighting=args.tst_offset_weighting,
        input_weighting=args.tst_input_weighting,
        document_boundaries=args.tst_document_boundaries,
        seed=seed,
        shuffle=shuffle and not streamed,
        per_device_batch_size=layout.per_device_batch_size,
        accumulation_steps=layout.accumulation_steps,
        world_size=layout.world_size,
        block_length=facts.length,
        num_blocks=facts.count,
        data=facts.fingerprint,
        split_by_rank=isinstance(rows, StreamedRows) and rows.split_by_rank,
        stream_workers=workers,
    )
    epochs = 1 if args.max_steps > 0 else max(1, args.num_train_epochs)
    return RunData(rows, start, math.ceil(schedule.max_steps / epochs), rank)


def _check_loader(args: TSTTrainingArguments, streamed: bool) -> None:
    if args.dataloader_num_workers and not getattr(args, "dataloader_in_order", True):
        raise TSTError(
            "dataloader_in_order=False lets batches come in any order, but the phase of a batch and the place to resume "
            "from follow from their order: leave it at True, or set dataloader_num_workers to 0."
        )
    if streamed and getattr(args.accelerator_config, "dispatch_batches", False):
        raise TSTError(
            "accelerator_config's dispatch_batches=True lets one process read for all, but each process reads its own rows of "
            "a stream: leave it out."
        )


def make_collators(
    args: TSTTrainingArguments, data_collator: Any, eos_token_id: int | None
) -> tuple[Any, Any, Any]:
    """Collators of superposition rows, of recovery rows and of evaluation, from the one the user gave, if any.

    Raises:
        TSTError: If the user's collator does other bags than the arguments say, or cannot respect documents.
    """
    boundaries = args.tst_document_boundaries
    superposition, recovery = (
        DataCollatorForTokenSuperposition(
            bag_size, args.tst_mode, document_boundaries=boundaries, eos_token_id=eos_token_id
        )
        for bag_size in (args.tst_bag_size, 1)
    )
    evaluation = DataCollatorForTokenSuperposition(1)
    if data_collator is None:
        return superposition, recovery, evaluation
    ours = isinstance(data_collator, DataCollatorForTokenSuperposition)
    if boundaries == "respect" and not (ours and data_collator.document_boundaries == "respect"):
        raise TSTError(
            f"tst_document_boundaries='respect' needs a collator that keeps documents apart, but data_collator is "
            f"{type(data_collator).__name__}: leave it out, or give DataCollatorForTokenSuperposition(1, "
            "document_boundaries='respect')."
        )
    if not ours or data_collator.bag_size == 1:
        return superposition, data_collator, data_collator
    bags, asked = (data_collator.bag_size, data_collator.mode), (args.tst_bag_size, args.tst_mode)
    if args.tst_enabled and bags != asked:
        raise TSTError(
            f"data_collator makes bags of {bags[0]} in mode {bags[1]!r}, but the arguments say tst_bag_size={asked[0]} "
            f"and tst_mode={asked[1]!r}: leave data_collator out."
        )
    return data_collator, recovery, evaluation


def _state_file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stream_state_{rank}.pt"
