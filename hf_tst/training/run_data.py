"""The data of one training run, and its position in checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging

from ..batches.folded_batches import FoldedBatches
from ..batches.resume_position import DataPosition
from ..batches.rows import STREAM_STATE, PlannedRows, StreamedRows, one_thread
from ..errors import TSTError

logger = logging.get_logger(__name__)


@dataclass
class RunData:
    """The training data of one run, made by [`open_run_data`] or [`fold_own_loader`].

    Args:
        rows (`PlannedRows`, `StreamedRows` or `FoldedBatches`): The rows of the run, or the batches of the user's own loader.
        start (`DataPosition`): The position before the first step.
        steps_per_epoch (`int`): Optimizer steps in what Trainer calls an epoch.
        rank (`int`): Data-parallel rank of this process.
        tokens_left_out (`int`, *optional*): Tokens that all ranks have read but that did not fit into a row of bags, as of the
            last [`gather_left_out`]. `None` if bags may cross documents.
        loader (*optional*): The loader of the rows, once the trainer has made it.
    """

    rows: PlannedRows | StreamedRows | FoldedBatches
    start: DataPosition
    steps_per_epoch: int
    rank: int
    tokens_left_out: int | None
    loader: Any = None
    _left_out_here: Tensor | int = 0  # on this rank, since the last gather_left_out
    _has_checked_stream: bool = False
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

    def check_same_data(self) -> None:
        """Raise `TSTError` unless all ranks have the same data, of which each reads its own rows. Every rank must take part."""
        _check_equal_on_all_ranks(self.start.data)

    def check_accumulation(self, steps: int) -> None:
        """Raise `TSTError` if `gradient_accumulation_steps` is no longer that which the rows of a step were planned for."""
        if steps != self.start.accumulation_steps:
            raise TSTError(
                f"gradient_accumulation_steps was {self.start.accumulation_steps} when the order of the data was planned, but is {steps} now: "
                "do not change it during training; resume with another value instead."
            )

    def received(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches for training.

        Stores the stream's state, learns the block length of streams and own loaders, and counts the tokens left out.

        Raises:
            TSTError: If all ranks read the same batches of an own loader, or a stream that all read is another on each.
        """
        # A loader of the user's own may compute in this process.
        reading = nullcontext if isinstance(self.rows, FoldedBatches) else one_thread
        while True:
            with reading():
                batch = next(batches, None)
            if batch is None:
                return
            self._store_stream_state(batch)
            self._check_same_stream()
            self._learn_block_length(batch)
            self._count_left_out(batch)
            yield batch

    def _store_stream_state(self, batch: Any) -> None:
        """Take the state of the stream out of its batch. It also has the block length."""
        if isinstance(batch, dict) and (state := batch.pop(STREAM_STATE, None)) is not None:
            self._stream_states[state.reader] = state.values
            self.start = replace(self.start, block_length=state.values["block_length"])

    def _check_same_stream(self) -> None:
        """Check, with the first batch, that all ranks read the same stream, unless each has its own shards of it."""
        if self._has_checked_stream or not isinstance(self.rows, StreamedRows):
            return
        self._has_checked_stream = True
        if not self.start.split_by_rank:
            _check_equal_on_all_ranks(self.rows.first_block)

    def _learn_block_length(self, batch: Any) -> None:
        """Compute the block length of a user's own loader from its first batch, which every rank must take part in."""
        if not isinstance(self.rows, FoldedBatches) or self.start.block_length:
            return
        if self.start.world_size > 1:  # not the ranks of tensor parallelism, which read the same
            _check_shared_out(batch["input_ids"])
        positions = batch["input_ids"].shape[:2].numel()
        self.start = replace(self.start, block_length=positions // self.start.per_device_batch_size)

    def _count_left_out(self, batch: Any) -> None:
        if self.tokens_left_out is not None and batch["input_ids"].dim() == 3:
            # A row of bags has one place per token that it reads, so each empty place is a token left out.
            self._left_out_here = self._left_out_here + (batch["input_ids"] < 0).sum()

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

    def resume(self, folder: str | Path, allow_change: bool, begins_there: bool = False) -> None:
        """Continue from a checkpoint.

        Args:
            folder: The checkpoint.
            allow_change (`bool`): Continue even if the data, or a setting that decides its order, has changed.
            begins_there (`bool`, *optional*, defaults to `False`): Whether a stream or a user's own loader begins where the
                checkpoint ends (`ignore_data_skip`), so that nothing of it is skipped.

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
            counts_batches = isinstance(self.rows, FoldedBatches) or self.start.stream_workers > 1
            saved.check_resumable(replace(self.start, block_length=length), counts_batches)
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
        if begins_there and not isinstance(self.rows, PlannedRows):
            logger.warning(
                "ignore_data_skip is set, so the training data is read from its beginning, which must be where the checkpoint ends."
            )
            self.rows.first_step = saved.step
            return
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


def _check_equal_on_all_ranks(data: str) -> None:
    """Raise `TSTError` unless the data that `data` describes is the same on all ranks. Every rank must take part."""
    if len(set(gather_object([data]))) > 1:
        raise TSTError(
            "The processes have different training data, but the trainer shares out the rows of one data set: give every process all of it "
            "in the same order, so shuffle with a fixed seed and do not divide it by rank."
        )


def _check_shared_out(first: Tensor) -> None:
    """Raise `TSTError` if all ranks read the same first batch. Every rank must take part."""
    digests = gather_object([hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()])
    if len(digests) > 1 and len(set(digests)) == 1:
        raise TSTError(
            f"All {len(digests)} processes read the same batches from get_train_dataloader: let it return "
            "self.accelerator.prepare(loader), or give the loader a DistributedSampler."
        )
