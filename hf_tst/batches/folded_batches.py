"""Batches of a user's own loader, folded into bags: superposition works with any loader, sampler and collator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from .blocks import copied
from .collators import fold_batch
from .random_numbers import DataRandomNumbers
from .rows import EpochSampler, one_thread

logger = logging.get_logger(__name__)


@dataclass(eq=False, repr=False)
class FoldedBatches(IterableDataset[dict[str, Tensor]]):
    """The micro-batches of a run, from a loader whose batches hold rows of L tokens.

    A micro-batch of superposition joins `blocks_per_row` batches and folds each row to L/s bags, so that it has as many
    positions as one batch. A micro-batch of recovery is one unchanged batch. The loader is iterated as often as needed.

    Which batches step k takes follows from k alone: a resumed run skips the earlier ones, which a torch loader does
    without loading them. Random numbers are seeded for each pass, see [`DataRandomNumbers`].

    Args:
        loader: Its batches are mappings with `input_ids` `(B, L)` and `labels` `(B, L)`, `-100` for no target.
        collator (`DataCollatorForTokenSuperposition`): Makes bags of rows.
        schedule (`PhaseSchedule`): The run's phases.
        micro_batches (`EpochSampler`): Numbers of the micro-batches to make, counted over the whole run.
        seed (`int`, *optional*, defaults to 0): The seed of random numbers that the loader draws.
        first_step (`int`, *optional*, defaults to 0): The optimizer step whose first batch is the loader's first one. Not 0 if
            the user resumes with `ignore_data_skip`: the loader then begins where the checkpoint ends.
    """

    loader: Any
    collator: DataCollatorForTokenSuperposition
    schedule: PhaseSchedule
    micro_batches: EpochSampler
    seed: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        self._random = DataRandomNumbers(self.seed)
        self._batches: Iterator[Any] = iter(())
        self._next: int | None = None  # the micro-batch that they continue with

    def __len__(self) -> int:
        """Micro-batches of a whole epoch."""
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        per_step = self.micro_batches.rows_per_step
        for number in self.micro_batches:
            if number != self._next:  # an epoch continues where the last one ended
                self._batches = self._batches_from(number // per_step)
            self._next = number + 1
            if number < self.schedule.switch_step * per_step:
                joined = islice(self._batches, self.schedule.blocks_per_row)
                yield self._joined([copied(batch) for batch in joined])
            else:
                yield next(self._batches)

    @one_thread()
    def _joined(self, batches: list[Any]) -> dict[str, Tensor]:
        first = batches[0]
        for batch in batches:
            if not isinstance(batch, Mapping) or batch.keys() != first.keys():
                found = " and ".join(
                    str([*part] if isinstance(part, Mapping) else type(part).__name__)
                    for part in (first, batch)
                )
                raise TSTError(
                    f"The training loader's batches must be mappings with the same columns, but two are {found}: let it return the same "
                    "columns in all of them."
                )
        given = [name for name in first if any(batch[name] is not None for batch in batches)]
        tensors = {name: [torch.as_tensor(batch[name]) for batch in batches] for name in given}
        for name, parts in tensors.items():
            if len(shapes := {part.shape[1:] for part in parts}) > 1:
                found = " and ".join(sorted(str((None, *shape)) for shape in shapes))
                raise TSTError(
                    f"The training loader's batches hold {name} of several shapes ({found}), but bags are made of batches with rows of one "
                    "length: pack the data into blocks."
                )
        joined = {name: torch.cat(parts) for name, parts in tensors.items()}
        return fold_batch(joined, len(next(iter(joined.values()))), self.collator)

    def _batches_from(self, step: int) -> Iterator[Any]:
        """The loader's batches from those of an optimizer step on, pass after pass."""
        first, now = (
            self.schedule.amount_read(k, self.micro_batches.rows_per_step) for k in (self.first_step, step)
        )
        length = len(self.loader) if isinstance(self.loader, DataLoader) and has_length(self.loader) else 0
        skipped = now - first
        for data_pass in count(first // length if length else 0):
            # A torch loader can skip batches without reading them. Its generators still draw the same numbers.
            left_out = min(skipped, length)
            number = left_out
            for number, batch in enumerate(self._batches_of_pass(data_pass, left_out), left_out + 1):
                if number > skipped:
                    yield batch
            if not number:
                raise TSTError(
                    f"The training loader gave no batch in pass {data_pass + 1} over its data: let it start again in each pass."
                )
            skipped = max(0, skipped - number)

    def _batches_of_pass(self, data_pass: int, left_out: int) -> Iterator[Any]:
        """The loader's batches of one pass, without the first `left_out` ones."""
        loader = skip_first_batches(self.loader, left_out) if left_out else self.loader
        # With several processes, Accelerate wraps a batch sampler.
        of_batches = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
        with self._random.drawn():
            self._random.start_pass(data_pass)
            for owner in (self.loader, loader, getattr(loader, "sampler", None), of_batches):
                getattr(owner, "set_epoch", lambda _: None)(data_pass)
            batches = iter(loader)
        end = object()
        while True:
            with self._random.drawn():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch
