"""The data of one training run: its plan or stream, its place in a checkpoint, and the collators of its rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers.utils import logging

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.phases import PhaseSchedule
from ..data.block_checks import BlockRules, check_blocks
from ..data.plan import BatchLayout, DataPlan, plan_for_passes, plan_for_steps
from ..data.position import DataPosition, consumed_by_phase
from ..data.rows import DOCUMENT_COLUMNS, TOKEN_COLUMNS, WORKER_NOTE, EpochSampler, PlannedRows
from ..data.stream import StreamedRows, check_stream_workers, count_shards, split_stream
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
        rows_per_step (`int`): Rows an optimizer step, over all ranks and accumulation steps.

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
    _worker_states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def schedule(self) -> PhaseSchedule:
        """The phases of the run."""
        return self.start.schedule

    @property
    def plan(self) -> DataPlan | None:
        """Which blocks are read; `None` for a stream."""
        return self.rows.plan if isinstance(self.rows, PlannedRows) else None

    def sampler(self, current_step: Callable[[], int]) -> EpochSampler:
        """The order of the rows of a map-style data set, from the step that training has reached."""
        assert self.plan is not None
        return EpochSampler(self.plan, self.steps_per_epoch, current_step)

    def epoch(self, step: int) -> float:
        """What Trainer calls the epoch once `step` (at least 1) optimizer steps are done."""
        epoch = (step - 1) // self.steps_per_epoch
        return epoch + (step - epoch * self.steps_per_epoch) / self.steps_per_epoch

    def blocks_of_step(self, step: int, rank: int, micro_batch: int | None) -> list[int] | None:
        """Blocks that a micro-batch of a step trains on, or all ranks in the whole step; `None` for a stream."""
        if self.plan is None:
            return None
        count = self.start.rows_per_step
        if micro_batch is None:
            rows = range(step * count, (step + 1) * count)
        else:
            rows = self.start.layout.rows(step, rank)[micro_batch].tolist()
        return [block for row in rows for block in self.plan.row_blocks(row)]

    def received(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches that training gets, without what loader processes tell this one with them."""
        for batch in batches:
            note = batch.pop(WORKER_NOTE, None) if isinstance(batch, dict) else None
            if note is not None:
                if note.state is None:
                    continue
                self._worker_states[note.worker] = note.state
            yield batch

    def position(self, step: int, tokens_left_out: int = 0) -> DataPosition:
        """What the run has trained on once `step` optimizer steps are done."""
        start = self.start
        length = start.block_length
        if isinstance(self.rows, StreamedRows):
            length = self.rows.block_length or 0
        consumed = consumed_by_phase(self.schedule, step, start.rows_per_step, length, tokens_left_out)
        return replace(
            start, step=step, block_length=length, consumed=consumed, tokens_left_out=tokens_left_out
        )

    def save(self, folder: str | Path, step: int, tokens_left_out: int, writes_position: bool) -> None:
        """Write the position, and this rank's state of a stream, into a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        if writes_position:
            self.position(step, tokens_left_out).save(folder)
        if isinstance(self.rows, StreamedRows):
            if self.start.stream_workers:
                state = {"step": step, "workers": self._worker_states}
            else:
                state = self.rows.state(step)
            torch.save(_compact(state), _state_file(folder, self.rank))

    def resume(self, folder: str | Path, allow_change: bool) -> DataPosition | None:
        """Go on from a checkpoint.

        Args:
            folder: The checkpoint.
            allow_change (`bool`): Go on although the data or what decides its order has changed.

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
        try:
            now = self.start
            if isinstance(self.rows, StreamedRows) and not now.block_length:
                now = replace(now, block_length=saved.block_length)  # checked by the rows as they come
                self.rows.block_length = saved.block_length or None
            saved.check_resumable(now)
        except ValueError as error:
            if not allow_change:
                raise
            logger.warning(f"tst_allow_data_change is set, so training goes on. {error}")
            if isinstance(self.rows, StreamedRows):
                self.rows.block_length = self.start.block_length or None
        if isinstance(self.rows, StreamedRows):
            self._load_stream_state(folder, saved)
        return saved

    def _load_stream_state(self, folder: str | Path, saved: DataPosition) -> None:
        assert isinstance(self.rows, StreamedRows)
        # Without shards by rank every rank reads the same stream, and after a step all stand at the same place.
        file = _state_file(folder, self.rank if saved.split_by_rank else 0)
        names = ("split_by_rank", "data", "stream_workers")
        if any(getattr(saved, name) != getattr(self.start, name) for name in names):
            return
        if not file.is_file():
            raise TSTError(
                f"The checkpoint has no {file.name} to read the stream on from: copy the files of all processes "
                "into one folder."
            )
        state = torch.load(file, weights_only=True)
        self._worker_states = dict(state.get("workers", {}))
        self.rows.load_state(state)


def open_run_data(
    blocks: Any,
    args: TSTTrainingArguments,
    layout: BatchLayout,
    rank: int,
    *,
    columns: Callable[[list[str] | None], Sequence[str] | None],
    current_step: Callable[[], int],
    rules: BlockRules | None = None,
    as_arrays: bool = True,
) -> RunData:
    """Check the training data and plan the run over it.

    Args:
        blocks: Map-style data set or stream of blocks.
        args (`TSTTrainingArguments`): The run's arguments.
        layout (`BatchLayout`), rank (`int`): How rows are dealt out to ranks, and which rank this is.
        columns: Returns those of some columns (of all, for `None`) that the collator gets.
        current_step: Returns the optimizer steps done so far.
        rules (`BlockRules`, *optional*): What the blocks must keep to besides being of equal length.
        as_arrays (`bool`, defaults to `True`): See [`PlannedRows`].

    Raises:
        TSTError: If the data has no full blocks of equal length, or too few of them.
    """
    seed, shuffle = _order(args)
    rules = rules or BlockRules()
    respect = args.tst_document_boundaries == "respect"
    bag_columns = TOKEN_COLUMNS + (DOCUMENT_COLUMNS if respect else ())
    rows: PlannedRows | StreamedRows
    if isinstance(blocks, TorchIterableDataset):
        schedule = make_schedule(args, args.max_steps)
        check_stream_workers(blocks, args.dataloader_num_workers, layout.world_size)
        share = split_stream(blocks, rank, layout.world_size)
        split = share is not None
        if share is None:
            share, own, own_rank = blocks, layout, rank
        else:
            own, own_rank = BatchLayout(layout.per_device_batch_size, layout.accumulation_steps), 0
        rows = StreamedRows(share, schedule, own, own_rank, columns(None), bag_columns, current_step, rules)
        facts = {
            "shuffle": False,
            "block_length": rows.block_length or 0,
            "num_blocks": None,
            "data": f"stream of {count_shards(blocks) or 'unknown'} shards",
            "split_by_rank": split,
            "stream_workers": args.dataloader_num_workers,
        }
        steps_per_epoch = schedule.max_steps
    else:
        checked = check_blocks(blocks, rules.pad_token_id, rules.vocab_size)
        rules = replace(rules, length=checked.length)
        plan = make_plan(args, checked.count, layout.rows_per_step)
        schedule = plan.schedule
        rows = PlannedRows(blocks, plan, columns(list(blocks[0])) or [], bag_columns, as_arrays, rules)
        facts = {
            "shuffle": shuffle,
            "block_length": checked.length,
            "num_blocks": checked.count,
            "data": checked.fingerprint,
            "split_by_rank": False,
        }
        steps_per_epoch = schedule.max_steps
        if args.max_steps <= 0:
            steps_per_epoch = min(steps_per_epoch, math.ceil(steps_per_epoch / args.num_train_epochs))
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
        rows_per_step=layout.rows_per_step,
        per_device_batch_size=layout.per_device_batch_size,
        accumulation_steps=layout.accumulation_steps,
        world_size=layout.world_size,
        consumed={},
        **facts,
    )
    return RunData(rows, start, steps_per_epoch, rank)


def make_stream_loader(
    data: RunData, batch_size: int, collator: Any, args: TSTTrainingArguments, accelerator: Any
) -> DataLoader:
    """The loader of a stream: its rows are this rank's already, so accelerate deals out nothing."""
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(
        data.rows,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory,
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def make_collators(
    args: TSTTrainingArguments, data_collator: Any, eos_token_id: int | None
) -> tuple[Any, Any, Any]:
    """Collators of superposition rows, of recovery rows and of evaluation, from the one the user gave, if any.

    Raises:
        TSTError: If the user's collator does other bags than the arguments say, or cannot respect documents.
    """
    boundaries = args.tst_document_boundaries

    def own_collator(bag_size: int) -> DataCollatorForTokenSuperposition:
        return DataCollatorForTokenSuperposition(
            bag_size, args.tst_mode, document_boundaries=boundaries, eos_token_id=eos_token_id
        )

    superposition, recovery = own_collator(args.tst_bag_size), own_collator(1)
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
    if args.tst_enabled and (data_collator.bag_size, data_collator.mode) != (
        args.tst_bag_size,
        args.tst_mode,
    ):
        raise TSTError(
            f"data_collator makes bags of {data_collator.bag_size} in mode {data_collator.mode!r}, but the arguments "
            f"say tst_bag_size={args.tst_bag_size} and tst_mode={args.tst_mode!r}: leave data_collator out."
        )
    return data_collator, recovery, evaluation


def _state_file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stream_state_{rank}.pt"


def _compact(value: Any) -> Any:
    """`value` with tensors that hold nothing but their own elements, so that views are not saved whole."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _compact(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_compact(entry) for entry in value)
    return value
