"""What `get_train_dataloader` does: check the data, plan the run over it, and make the loader of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..bags.collator import DOCUMENT_COLUMNS, NO_DOCUMENT_ENDS, DataCollatorForTokenSuperposition
from ..bags.phases import PhaseSchedule
from ..batches.blocks import TOKEN_COLUMNS, BlockFacts, check_blocks
from ..batches.folded_batches import FoldedBatches
from ..batches.read_order import BatchLayout
from ..batches.resume_position import DataPosition
from ..batches.rows import EpochSampler, PlannedRows, StreamedRows, stream_facts
from ..errors import TSTError
from ..models.temporary import replaced
from .arguments import TSTArguments
from .overriding import overrides
from .row_checks import block_rules
from .run_collators import document_end, keeps_ids
from .run_data import RunData
from .schedule import choose_schedule, make_plan, order_seed, steps_per_epoch, warn_of_fewer_steps

logger = logging.get_logger(__name__)


def open_run_data(trainer: Any) -> RunData:
    """Check a trainer's training data, and plan the run over it.

    Args:
        trainer (`TSTTrainer`): The trainer; `auto_find_batch_size` may have lowered its batch size.

    Raises:
        TSTError: If the data has no full blocks of equal length, or too few of them, or batches would come out of order.
    """
    args, blocks, layout = trainer.args, trainer.train_dataset, _layout(trainer)
    streamed = isinstance(blocks, IterableDataset)
    _check_loader(args, streamed)
    rules = block_rules(trainer.model, trainer.processing_class)
    # A user's collator gets the blocks of a row one by one, and may change their ids: those of its batches are checked.
    joins = keeps_ids(trainer.data_collator)
    if not joins:
        rules = replace(rules, vocab_size=None)
    respects, end = args.tst_document_boundaries == "respect", document_end(trainer)
    document_columns = DOCUMENT_COLUMNS if respects else ()
    used = _columns_for_collator(trainer, document_columns)
    facts = stream_facts(blocks) if streamed else check_blocks(blocks, replace(rules, end_token_id=end))
    reading: dict[str, Any] = {
        "columns": used,
        "bag_columns": TOKEN_COLUMNS + document_columns,
        "joins": joins,
        "rules": replace(rules, length=facts.block_length or None),
    }
    rows: PlannedRows | StreamedRows
    if streamed:
        schedule, workers = choose_schedule(args, blocks, layout.rows_per_step), args.dataloader_num_workers
        rows = StreamedRows(blocks, schedule, layout, workers, seed=order_seed(args), **reading)
    else:
        plan = make_plan(args, len(blocks), layout.rows_per_step)
        warn_of_fewer_steps(args, plan.schedule, len(blocks) / layout.rows_per_step)
        rows = PlannedRows(blocks, plan, **reading)
    if respects and end is None and rows.column_names and not {*rows.column_names} & {*DOCUMENT_COLUMNS}:
        raise TSTError(NO_DOCUMENT_ENDS)
    position = _position(args, rows, layout, facts)
    if facts.block_length and rows.schedule.switch_step:
        rows.schedule.positions_per_row("superposition", facts.block_length)  # or its refusal
    rank = args.process_index // (args.world_size // layout.world_size)
    return RunData(rows, position, steps_per_epoch(args, rows.schedule), rank, 0 if respects else None)


def _columns_for_collator(trainer: Any, document_columns: Sequence[str]) -> list[str] | None:
    """The columns of blocks that the collator gets: those of the model's forward and of documents, or all (`None`)."""
    own_collator = overrides(trainer, Trainer, "_get_collator_with_removed_columns")
    if own_collator or not trainer.args.remove_unused_columns:
        return None
    blocks = trainer.train_dataset
    if hasattr(blocks, "select") and overrides(trainer, Trainer, "_remove_unused_columns"):
        kept = trainer._remove_unused_columns(blocks.select([0]), description="training")
        return [*kept.column_names, *document_columns]
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
    # Here the items are batches: superposition joins s batches, where it joins s blocks of a data set.
    per_step = args.gradient_accumulation_steps
    schedule = choose_schedule(args, loader, per_step)
    logger.info(
        f"Batches of {type(trainer).__name__}'s own loader or sampler are folded as they come: a micro-batch of superposition joins "
        f"{schedule.blocks_per_row} batches."
    )
    collator = DataCollatorForTokenSuperposition(args.tst_bag_size, args.tst_mode)
    steps_per_pass = len(loader) / per_step if has_length(loader) else math.inf
    epoch_steps = steps_per_epoch(args, schedule, steps_per_pass)
    micro_batches = _sampler(trainer, schedule, per_step, epoch_steps)
    rows = FoldedBatches(loader, collator, schedule, micro_batches, order_seed(args))
    facts = BlockFacts(None, 0, f"batches of {type(trainer).__name__}")
    return RunData(rows, _position(args, rows, layout, facts), epoch_steps, args.process_index, None)


def _layout(trainer: Any) -> BatchLayout:
    batch_size, accumulation = trainer._train_batch_size, trainer.args.gradient_accumulation_steps
    ranks = trainer.get_total_train_batch_size(trainer.args) // (batch_size * accumulation)
    return BatchLayout(batch_size, accumulation, ranks)


def _position(
    args: TSTArguments,
    rows: PlannedRows | StreamedRows | FoldedBatches,
    layout: BatchLayout,
    facts: BlockFacts,
) -> DataPosition:
    """The position before the first step."""
    schedule = rows.schedule
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
        seed=order_seed(args),
        shuffle=isinstance(rows, PlannedRows) and rows.plan.shuffle,
        split_by_rank=isinstance(rows, StreamedRows) and rows.split_by_rank,
        stream_workers=rows.workers if isinstance(rows, StreamedRows) else 0,
    )


def make_loader(trainer: Any, data: RunData) -> DataLoader | FoldedBatches:
    """The loader of a run's rows. It starts at the trainer's current step."""
    if isinstance(data.rows, FoldedBatches):
        return data.rows
    sampler = _sampler(trainer, data.start.schedule, data.start.rows_per_step, data.steps_per_epoch)
    # A copy of pinned memory that is waited for also waits for all work of the device before it.
    copies = vars(trainer.accelerator.dataloader_config)
    non_blocking = copies["non_blocking"] or (
        trainer.args.dataloader_pin_memory and trainer.args.device.type == "cuda"
    )
    with replaced(copies, non_blocking=non_blocking):
        loader = trainer._get_dataloader(
            dataset=data.rows,
            description="Training",
            batch_size=trainer._train_batch_size,
            sampler_fn=lambda rows: sampler,
            is_training=True,
        )
    return with_own_generator(loader, trainer.args)


def _sampler(trainer: Any, schedule: PhaseSchedule, per_step: int, epoch_steps: int) -> EpochSampler:
    """Numbers of rows or micro-batches, from the trainer's current step on."""
    return EpochSampler(schedule.max_steps, per_step, epoch_steps, lambda: trainer.state.global_step)


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


def check_plain_resume(checkpoint: str | None, args: TSTArguments) -> None:
    """Raise `TSTError` if plain training would resume from a checkpoint with superposition, whose data it would read again."""
    if checkpoint is None or args.tst_allow_data_change or DataPosition.load(checkpoint) is None:
        return
    raise TSTError(
        f"{checkpoint} was written in a run with superposition, but tst_phase_ratio={args.tst_phase_ratio:g} and tst_bag_size="
        f"{args.tst_bag_size} have none, so the same data would be read again: resume with the values of that run, or set "
        "tst_allow_data_change."
    )


def with_own_generator(loader: Any, args: TSTArguments) -> Any:
    """A loader that draws the seed of its workers from random numbers of its own when it starts.

    Those of training must be the same after a resume, when persistent workers start once more.
    """
    base: Any = getattr(loader, "base_dataloader", loader)
    base.generator = torch.Generator().manual_seed(args.seed)
    return loader


def plain_loader(loader: Any, args: TSTArguments) -> Any:
    """The loader of resumed plain training.

    With persistent workers, an uninterrupted run draws their seed only in its first epoch. A resumed run must not draw it from
    the random numbers of training, so the loader gets its own generator.
    """
    persists = args.dataloader_persistent_workers and args.dataloader_num_workers
    return with_own_generator(loader, args) if persists else loader
