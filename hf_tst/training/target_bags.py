"""The target bags of a superposition step: their number, which divides the loss, and the lowest possible loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bags.weighting import offset_weights, resolve_weighting
from ..losses.multi_hot import count_target_bags, sum_bag_entropies


class TargetBagMeter:
    """Counts the target bags of each superposition step and sums their entropies. Only `report` waits for the device.

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

    def note_step(self, batches: Sequence[Any], device: torch.device) -> Tensor:
        """Return the number of target bags of a step, and add the entropy of its bags to the next report.

        A bag with ignored labels counts by the weights of its valid tokens.
        With `average_tokens_across_devices` it is the number on all ranks, and every rank must take part.

        Args:
            batches: The micro-batches of this rank, with `labels`.
            device (`torch.device`): Device of the result.
        """
        trainer, args = self._trainer, self._trainer.args
        weights = offset_weights(
            resolve_weighting(args.tst_mode, args.tst_offset_weighting), args.tst_bag_size
        )

        def total(function: Callable[..., Tensor]) -> Tensor:
            parts = [
                function(batch["labels"].to(device, non_blocking=True), weights=weights) for batch in batches
            ]
            return torch.stack(parts).sum()

        bags = total(count_target_bags)
        if args.average_tokens_across_devices and args.world_size > 1:
            bags = trainer.accelerator.gather(bags).sum()
        floor = total(sum_bag_entropies) / torch.where(bags > 0, bags, 1.0)
        self._floor = floor if self._floor is None else self._floor + floor
        self._steps += 1
        return bags

    def report(self, loss: float) -> dict[str, float]:
        """Log entry `tst_loss_above_floor`: the mean loss since the last report, `loss`, minus the lowest possible loss.

        Empty in recovery. Every rank must take part.
        """
        total, steps = self._floor, self._steps
        self.clear()
        if total is None:
            return {}
        # If so, each rank has divided by the bags of all ranks, and the quotients add up.
        summed = self._trainer.args.average_tokens_across_devices
        floor = self._trainer.accelerator.reduce(total, "sum" if summed else "mean").item() / steps
        return {"tst_loss_above_floor": round(loss - floor, 6)}
