"""The target bags of superposition: how many a step has, which its loss is divided by, and the lowest loss that they allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bags.weighting import offset_weights, resolve_weighting
from ..losses.multi_hot import count_target_bags, sum_bag_entropies


class TargetBagMeter:
    """Counts the target bags of each step of superposition, and adds up their entropies. Only a report waits for the device.

    Args:
        trainer (`TSTTrainer`): The trainer, with its arguments and accelerator.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.clear()

    def clear(self) -> None:
        """Forget the entropies, at the start of a run."""
        self._floor: Tensor | None = None
        self._steps = 0

    def count(self, batches: Sequence[Any], device: torch.device) -> Tensor:
        """Target bags of one step, of all ranks if the loss is averaged over their tokens; every rank must take part then.

        A bag that weighs less than a whole one counts in part.

        Args:
            batches: The micro-batches of this rank, with `labels`.
            device (`torch.device`): Where the count is to be.
        """
        trainer, args = self._trainer, self._trainer.args
        weights = offset_weights(
            resolve_weighting(args.tst_mode, args.tst_offset_weighting), args.tst_bag_size
        )

        def total(function: Callable[..., Tensor]) -> Tensor:
            parts = [function(batch["labels"], weights=weights) for batch in batches]
            return torch.stack(parts).sum().to(device)

        bags = total(count_target_bags)
        if args.average_tokens_across_devices and args.world_size > 1:
            bags = trainer.accelerator.gather(bags).sum()
        floor = total(sum_bag_entropies) / torch.where(bags > 0, bags, 1.0)
        self._floor = floor if self._floor is None else self._floor + floor
        self._steps += 1
        return bags

    def report(self, loss: float) -> dict[str, float]:
        """`tst_loss_above_floor` of the steps since the last report, whose mean loss is `loss`; nothing in recovery.

        Every rank must take part.
        """
        total, steps = self._floor, self._steps
        self.clear()
        if total is None:
            return {}
        summed = self._trainer.args.average_tokens_across_devices  # each has divided by the bags of all
        floor = self._trainer.accelerator.reduce(total, "sum" if summed else "mean").item() / steps
        return {"tst_loss_above_floor": round(loss - floor, 6)}
