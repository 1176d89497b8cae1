"""The data of one training run: a plan over a data set, a stream or the user's own loader, and its position in checkpoints."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..bags.collator import DOCUMENT_COLUMNS, DataCollatorForTokenSuperposition
from ..bags.phases import PhaseSchedule
from ..data.blocks import TOKEN_COLUMNS, BlockFacts, as_block, check_blocks, check_columns
from ..data.own_batches import FoldedBatches
from ..data.read_order import BatchLayout, DataPlan, longest_plan
from ..data.resume_position import DataPosition
from ..data.rows import STREAM_STATE, EpochSampler, PlannedRows, StreamedRows, one_thread
from ..errors import TSTError
from .arguments import TSTArguments
from .collators import keeps_ids
from .refusals import block_rules

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

    def plan(steps: int) -> DataPlan:
        return DataPlan(
            num_blocks, make_schedule(args, steps), rows_per_step, _order_seed(args), _shuffles(args)
        )

    if args.max_steps <= 0:
        return longest_plan(args.num_train_epochs, plan)
    plan(args.max_steps).check_one_pass()
    return plan(args.max_steps)


def _order_seed(args: TSTArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def _shuffles(args: TSTArguments) -> bool:
    return bool(args.train_sampling_strategy != "sequential")


@dataclass
class RunData:
    """The training data of one run, made by [`open_run_data`].

    Args:
        rows (`PlannedRows`, `StreamedRows` or `FoldedBatches`): The rows of the run, or the batches of the user's own loader.
        start (`DataPosition`): The position before the first step.
        steps_per_epoch (`int`): Optimizer steps in what Trainer calls an epoch.
        rank (`int`): Data-parallel rank of this process.
        tokens_left_out (`int`, *optional*): Tokens that all ranks have read but that did not fit into a row of bags, as of the
            last [`gather_left_out`]. `None` if bags may cross documents.
    """

    rows: PlannedRows | StreamedRows | FoldedBatches
    start: DataPosition
    steps_per_epoch: int
    rank: int
    tokens_left_out: int | None
    _left_out_here: Tensor | int = 0  # on this rank, since the last gather_left_out
    # State of the stream after the last batch that training got, by loader process of this rank.
    _stream_states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def epoch(self, step: int) -> float:
        """What Trainer calls the epoch once `step` (at least 1) optimizer steps are done."""
        epoch = (step - 1) // self.steps_per_epoch
        return epoch + (step - epoch * self.steps_per_epoch) / self.steps_per_epoch

    def blocks_of_step(self, step: int, rank: int, micro_batch: int | None) -> list[int] | None:
        """Blocks of one micro-batch of a rank or, with `micro_batch=None`, of the whole step on all ranks; `None` without a plan."""
        if not isinstance(self.rows, PlannedRows):
            return None
        count = self.start.rows_per_step
        rows = range(step * count, (step + 1) * count)
        if micro_batch is not None:
            rows = self.start.layout.rows(step, rank)[micro_batch].tolist()
        return [block for row in rows for block in self.rows.plan.row_blocks(row)]

    def check_accumulation(self, steps: int) -> None:
        """Raise `TSTError` if `gradient_accumulation_steps` is no longer that which the rows of a step were planned for."""
        if steps != self.start.accumulation_steps:
            raise TSTError(
                f"gradient_accumulation_steps was {self.start.accumulation_steps} when the order of the data was planned, but is {steps} now: "
                "do not change it during training; resume with another value instead."
            )

    def received(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches for training. Takes the state of the stream out of them, and stores it."""
        # A loader of the user's own may compute in this process.
        reading = nullcontext if isinstance(self.rows, FoldedBatches) else one_thread
        while True:
            with reading():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, dict) and (state := batch.pop(STREAM_STATE, None)) is not None:
                self._stream_states[state.reader] = state.values
                self.start = replace(self.start, block_length=state.values["block_length"])
            elif isinstance(self.rows, FoldedBatches) and not self.start.block_length:
                if self.start.world_size > 1:  # not the ranks of tensor parallelism, which read the same
                    _check_shared_out(batch["input_ids"])
                positions = batch["input_ids"].shape[:2].numel()
                self.start = replace(self.start, block_length=positions // self.start.per_device_batch_size)
            if self.tokens_left_out is not None and batch["input_ids"].dim() == 3:
                # A row of bags has one place per token that it reads, so each empty place is a token left out.
                self._left_out_here = self._left_out_here + (batch["input_ids"] < 0).sum()
            yield batch

    def gather_left_out(self, total: Callable[[Tensor], Tensor]) -> None:
        """Update `tokens_left_out`. Every rank must take part. `total` sums a 0-dim tensor over all ranks."""
        if self.tokens_left_out is not None and isinstance(self._left_out_here, Tensor):
            self.tokens_left_out += int(total(self._left_out_here))
            self._left_out_here = 0

    def save(self, folder: str | Path, step: int, writes_position: bool) -> None:
        """Write the position and, for a stream, this rank's state into a checkpoint."""
        os.makedirs(folder, exist_ok=True)
        if writes_position:
            replace(self.start, step=step, tokens_left_out=self.tokens_left_out or 0).save(folder)
        if isinstance(self.rows, StreamedRows):
            torch.save({"step": step, "workers": self._stream_states}, _state_file(folder, self.rank))

    def resume(self, folder: str | Path, allow_change: bool) -> None:
        """Continue from a checkpoint.

        Args:
            folder: The checkpoint.
            allow_change (`bool`): Continue even if the data, or a setting that decides its order, has changed.

        Raises:
            TSTError: If data would be read twice or never, and `allow_change` is not set.
        """
        saved = DataPosition.load(folder)
        if saved is None:
            logger.warning(
                f"{folder} has no data_position.json, like a checkpoint of the plain Trainer: whether the data is the same is not checked."
            )
            return
        length = self.start.block_length or saved.block_length
        try:
            saved.check_resumable(replace(self.start, block_length=length))
            if isinstance(self.rows, StreamedRows):
                # The block length of a stream may not be known yet; the blocks are then checked when they are read.
                self.rows.rules = replace(self.rows.rules, length=length or None)
        except TSTError as error:
            if not allow_change:
                raise
            logger.warning(f"tst_allow_data_change is set, so training continues. {error}")
        if isinstance(self.rows, FoldedBatches):  # whose next batch may be the short last one of a pass
            self.start = replace(self.start, block_length=length)
        if self.tokens_left_out is not None:
            self.tokens_left_out = saved.tokens_left_out
        readers = attrgetter("split_by_rank", "data", "stream_workers")
        if isinstance(self.rows, StreamedRows) and readers(saved) == readers(self.start):
            # Unless each rank has its own shards, all ranks read the same stream and have the same state after a step.
            file = _state_file(folder, self.rank if saved.split_by_rank else 0)
            if not file.is_file():
                raise TSTError(
                    f"The checkpoint has no {file.name} to continue the stream from: copy the files of all processes "
                    "into one folder."
                )
            state = torch.load(file, weights_only=True)
            self._stream_states = dict(state["workers"])
            self.rows.load_states(state["step"], state["workers"])


def _state_file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stream_state_{rank}.pt"


def open_run_data(trainer: Any) -> RunData:
    """Check a trainer's training data, and plan the run over it.

    Args:
        trainer (`TSTTrainer`): The trainer; `auto_find_batch_size` may have lowered its batch size.

    Raises:
        TSTError: If the data has no full blocks of equal length, or too few of them, or batches would come out of order.
    """
    args, blocks = trainer.args, trainer.train_dataset
    streamed = isinstance(blocks, IterableDataset)
    _check_loader(args, streamed)
    layout = _layout(trainer)
    rules = block_rules(trainer.model, trainer.processing_class)
    # A user's collator gets the blocks of a row one by one, and may change their ids: those of its batches are checked.
    joins = keeps_ids(trainer.data_collator)
    if not joins:
        rules = replace(rules, vocab_size=None)
    respects = args.tst_document_boundaries == "respect"
    document_columns = DOCUMENT_COLUMNS if respects else ()
    bag_columns = TOKEN_COLUMNS + document_columns
    used = _columns_for_collator(trainer, document_columns)
    workers = args.dataloader_num_workers if streamed else 0
    rows: PlannedRows | StreamedRows
    if streamed:
        schedule = _choose_schedule(trainer, blocks, layout.rows_per_step)
        rows = StreamedRows(blocks, schedule, layout, workers, used, bag_columns, joins, rules)
        facts = rows.facts
    else:
        facts = check_blocks(blocks, rules)
        plan = make_plan(args, len(blocks), layout.rows_per_step)
        schedule = plan.schedule
        _log_steps_of_epochs(trainer, schedule, len(blocks) / layout.rows_per_step)
        first = as_block(blocks[0])
        columns = [name for name in first if used is None or name in used]
        if joins:
            check_columns(first, used, bag_columns)
        rules = replace(rules, length=facts.block_length)
        _warn_of_overlap(blocks, facts)
        rows = PlannedRows(blocks, plan, columns, bag_columns, joins, rules)
    position = _position(
        args,
        schedule,
        layout,
        facts,
        shuffle=_shuffles(args) and not streamed,
        split_by_rank=isinstance(rows, StreamedRows) and rows.split_by_rank,
        stream_workers=workers,
    )
    if facts.block_length and schedule.switch_step:
        schedule.positions_per_row("superposition", facts.block_length)  # raises if L is not a multiple of s
    rank = args.process_index // (args.world_size // layout.world_size)
    return RunData(rows, position, _steps_per_epoch(args, schedule), rank, 0 if respects else None)


def _columns_for_collator(trainer: Any, document_columns: Sequence[str]) -> list[str] | None:
    """The columns of blocks that the collator gets: those of the model's forward and of documents, or all (`None`)."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()
    used = [*trainer._signature_columns, *document_columns]
    if "input_ids" not in used:
        raise TSTError(
            f"The forward of {type(trainer.model).__name__} has no argument input_ids, so remove_unused_columns=True removes this column: "
            "set it to False. If the model was made by torch.compile, pass the original and set torch_compile=True instead."
        )
    return used


def fold_own_loader(trainer: Any, loader: Any) -> RunData:
    """The training data of a run with the user's own loader or sampler. Its batches are folded into bags as they come.

    Args:
        trainer (`TSTTrainer`): The trainer.
        loader: The result of its `get_train_dataloader`.

    Raises:
        TSTError: If `tst_document_boundaries="respect"`, or the number of steps is unknown.
    """
    args, layout = trainer.args, _layout(trainer)
    if isinstance(getattr(loader, "dataset", None), (PlannedRows, StreamedRows)):
        raise TSTError(
            f"{type(trainer).__name__}.get_train_dataloader makes another loader over the dataset of super().get_train_dataloader(), whose "
            "rows must be read in their order: return that loader unchanged, or make a loader over train_dataset."
        )
    if args.tst_document_boundaries == "respect":
        raise TSTError(
            "tst_document_boundaries='respect' needs the trainer's own order of the data: do not override get_train_dataloader or "
            "_get_train_sampler, or set it to 'ignore'."
        )
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler) and sampler.generator is None and loader.generator is None:
        # It would draw its order from the numbers of the whole process, which a resumed run has later than its first batch.
        sampler.generator = torch.Generator().manual_seed(_order_seed(args))
    # Here the items are batches: superposition joins s batches, where it joins s blocks of a data set.
    schedule = _choose_schedule(trainer, loader, args.gradient_accumulation_steps)
    logger.info(
        f"Batches of {type(trainer).__name__}'s own loader or sampler are folded as they come: a micro-batch of superposition joins "
        f"{schedule.blocks_per_row} batches."
    )
    collator = DataCollatorForTokenSuperposition(args.tst_bag_size, args.tst_mode)
    steps_per_epoch = _steps_per_epoch(args, schedule)
    rows = FoldedBatches(
        loader,
        collator,
        schedule,
        args.gradient_accumulation_steps,
        steps_per_epoch,
        lambda: trainer.state.global_step,
    )
    facts = BlockFacts(None, 0, f"batches of {type(trainer).__name__}")
    return RunData(rows, _position(args, schedule, layout, facts), steps_per_epoch, args.process_index, None)


def _check_shared_out(first: Tensor) -> None:
    """Raise `TSTError` if all ranks read the same first batch. Every rank must take part."""
    digests = gather_object([hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()])
    if len(digests) > 1 and len(set(digests)) == 1:
        raise TSTError(
            f"All {len(digests)} processes read the same batches from get_train_dataloader: let it return "
            "self.accelerator.prepare(loader), or give the loader a DistributedSampler."
        )


def _choose_schedule(trainer: Any, data: Any, per_step: int) -> PhaseSchedule:
    """The phases of a run over `data`. A recovery step reads `per_step` items of it.

    Raises:
        TSTError: If neither `max_steps` is set nor the data has a length.
    """
    args: TSTArguments = trainer.args
    if args.max_steps > 0:
        return make_schedule(args, args.max_steps)
    if not has_length(data):
        raise TSTError(
            "The training data has no length, so num_train_epochs cannot be counted in steps: set max_steps."
        )
    schedule = make_plan(args, len(data), per_step).schedule
    _log_steps_of_epochs(trainer, schedule, len(data) / per_step)
    return schedule


def _log_steps_of_epochs(trainer: Any, schedule: PhaseSchedule, steps_per_pass: float) -> None:
    """Log how many steps `num_train_epochs` gives. `steps_per_pass` recovery steps would read the data once."""
    args: TSTArguments = trainer.args
    if args.max_steps > 0:
        return
    plain = math.ceil(args.num_train_epochs * math.ceil(steps_per_pass))
    logger.info(
        f"num_train_epochs={args.num_train_epochs:g} gives {schedule.max_steps} optimizer steps, since superposition reads "
        f"{schedule.blocks_per_row} blocks per row; Trainer would take {plain}."
    )
    if trainer._has_own_schedule and plain != schedule.max_steps:
        logger.warning(
            f"The learning rate schedule in `optimizers` may be made for {plain} steps, but num_train_epochs="
            f"{args.num_train_epochs:g} gives {schedule.max_steps}: make it for {schedule.max_steps} steps, or set max_steps."
        )


def _layout(trainer: Any) -> BatchLayout:
    batch_size, accumulation = trainer._train_batch_size, trainer.args.gradient_accumulation_steps
    ranks = trainer.get_total_train_batch_size(trainer.args) // (batch_size * accumulation)
    return BatchLayout(batch_size, accumulation, ranks)


def _position(
    args: TSTArguments,
    schedule: PhaseSchedule,
    layout: BatchLayout,
    facts: BlockFacts,
    shuffle: bool = False,
    split_by_rank: bool = False,
    stream_workers: int = 0,
) -> DataPosition:
    """The position before the first step."""
    if schedule.switch_step == 0:
        logger.warning(
            f"tst_phase_ratio={schedule.phase_ratio} of {schedule.max_steps} steps is less than one step: there is no superposition."
        )
    if schedule.switch_step == schedule.max_steps:
        logger.warning(
            "All steps are superposition, so the model never trains on next tokens: set tst_phase_ratio below 1."
        )
    return DataPosition(
        step=0,
        **vars(schedule),
        **vars(layout),
        **vars(facts),
        offset_weighting=args.tst_offset_weighting,
        input_weighting=args.tst_input_weighting,
        document_boundaries=args.tst_document_boundaries,
        seed=_order_seed(args),
        shuffle=shuffle,
        split_by_rank=split_by_rank,
        stream_workers=stream_workers,
    )


def _steps_per_epoch(args: TSTArguments, schedule: PhaseSchedule) -> int:
    return math.ceil(schedule.max_steps / (1 if args.max_steps > 0 else max(1, args.num_train_epochs)))


def _warn_of_overlap(blocks: Any, facts: BlockFacts) -> None:
    """Warn if the first blocks overlap, as windows with a stride do."""
    first = [
        np.asarray(as_block(blocks[index])["input_ids"]) for index in range(min(4, facts.num_blocks or 0))
    ]
    length = facts.block_length
    shared = []
    for one, following in pairwise(first):
        # An overlap begins where this block has the first token of the next one.
        sizes = {length - int(at) for at in np.flatnonzero(one == following[0])}
        shared.append(
            {size for size in sizes if 8 <= size < length and np.array_equal(one[-size:], following[:size])}
        )
    overlaps = set.intersection(*shared) if len(shared) > 1 else set()
    if overlaps and len(np.unique(first[0])) > 4:
        logger.warning(
            f"Consecutive blocks share {max(overlaps)} of their {length} tokens, as windows with a stride do. A row of superposition "
            "joins consecutive blocks and would read these tokens several times: cut the text into blocks that do not overlap."
        )


def make_loader(trainer: Any, data: RunData) -> DataLoader | FoldedBatches:
    """The loader of a run's rows. It starts at the trainer's current step."""
    if isinstance(data.rows, FoldedBatches):
        return data.rows
    steps, rows_per_step = data.start.max_steps, data.start.rows_per_step
    sampler = EpochSampler(steps, rows_per_step, data.steps_per_epoch, lambda: trainer.state.global_step)
    loader = trainer._get_dataloader(
        dataset=data.rows,
        description="Training",
        batch_size=trainer._train_batch_size,
        sampler_fn=lambda rows: sampler,
        is_training=True,
    )
    # A loader draws a seed for its workers when it starts. With its own generator it does not change the random numbers of
    # training, which must be the same after a resume.
    loader.base_dataloader.generator = torch.Generator().manual_seed(trainer.args.seed)
    return loader


def _check_loader(args: TSTArguments, streamed: bool) -> None:
    if args.dataloader_num_workers and not getattr(args, "dataloader_in_order", True):
        raise TSTError(
            "dataloader_in_order=False would mix the batches of both phases: set it to True, or set dataloader_num_workers=0."
        )
    if streamed and getattr(args.accelerator_config, "dispatch_batches", False):
        raise TSTError(
            "accelerator_config's dispatch_batches=True does not work with a stream, since each process reads its own rows: "
            "leave it out."
        )


def plain_loader(loader: Any, args: TSTArguments) -> Any:
    """The loader of resumed plain training.

    With persistent workers, an uninterrupted run draws their seed only in its first epoch. A resumed run must not draw it from
    the random numbers of training, so the loader gets its own generator.
    """
    if args.dataloader_persistent_workers and args.dataloader_num_workers:
        base: Any = getattr(loader, "base_dataloader", loader)
        base.generator = torch.Generator().manual_seed(args.seed)
    return loader
