"""A loss or gradient that is not finite: found without waiting for the device, told with the blocks it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import TSTError

BadLoss = Literal["stop", "skip", "ignore"]
BAD_LOSS_CHOICES: tuple[BadLoss, ...] = get_args(BadLoss)
# Blocks that a message names.
_NAMED_BLOCKS = 32


def check_bad_loss(choice: str) -> None:
    """Raise `TSTError` unless `choice` is one of `BAD_LOSS_CHOICES`."""
    if choice not in BAD_LOSS_CHOICES:
        raise TSTError(f"tst_bad_loss must be one of {', '.join(BAD_LOSS_CHOICES)}, but is {choice!r}.")


@dataclass(frozen=True)
class BadNumber:
    """The first number of a run that is not finite.

    Args:
        step (`int`): Optimizer step, counted from 0.
        micro_batch (`int` or `None`): Micro-batch of the step; `None` if it is the gradient of all of them.
        value (`float`): `nan`, `inf` or `-inf`.
    """

    step: int
    micro_batch: int | None
    value: float

    def describe(self, phase: str, blocks: Sequence[int] | None) -> str:
        """What happened, as the beginning of a sentence.

        Args:
            phase (`str`): The phase of the step.
            blocks: Blocks of the training data that were read, if they are known.
        """
        what = "gradient" if self.micro_batch is None else "loss"
        text = f"The {what} of optimizer step {self.step} ({phase}) is {self.value}"
        if blocks is None:
            return text
        named = ", ".join(map(str, blocks[:_NAMED_BLOCKS])) + (", …" if len(blocks) > _NAMED_BLOCKS else "")
        return f"{text}; it was computed on blocks {named} of the training data"


class FirstNotFinite:
    """Remembers, on the device, the first of many numbers that is not finite, and when it came."""

    def __init__(self) -> None:
        self._time: Tensor | None = None
        self._value: Tensor | None = None

    def note(self, number: Tensor, time: int) -> None:
        """Look at a number, 0-dim; does not wait for the device.

        Args:
            number (`Tensor`): The number.
            time (`int`): When it came; at least 0, and growing.
        """
        number = number.detach()
        if self._time is None or self._value is None:
            self._time = torch.full((), -1, dtype=torch.int64, device=number.device)
            self._value = torch.zeros((), device=number.device)
        first = ~torch.isfinite(number) & (self._time < 0)
        self._time = self._time.masked_fill(first, time)
        self._value = torch.where(first, number.to(self._value.dtype), self._value)

    def found(self) -> tuple[int, float] | None:
        """When the first came, and what it was; waits for the device."""
        if self._time is None or self._value is None or (time := int(self._time)) < 0:
            return None
        return time, float(self._value)
