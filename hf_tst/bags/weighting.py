"""Weights of the tokens of a bag, by their offset in it: of targets in the loss, and of embeddings in the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import TSTError, check_choice
from .phases import check_bag_size

OffsetWeighting = Literal["uniform", "power_law", "fitted_power_law", "exponential", "first_token"]

InputWeighting = Literal["uniform", "linear", "exponential"]

OFFSET_WEIGHTINGS: tuple[OffsetWeighting, ...] = get_args(OffsetWeighting)
INPUT_WEIGHTINGS: tuple[InputWeighting, ...] = get_args(InputWeighting)

# By offset 1 … s, before division by their sum. The fitted power law C0 + a·i^k is the paper's fit to the
# information that an earlier token carries about a later one.
_OFFSET_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "power_law": torch.reciprocal,
    "fitted_power_law": lambda offset: 3.63 + 1.35 * offset**-1.25,
    "exponential": lambda offset: torch.exp(-offset),
    "first_token": lambda offset: (offset == 1).double(),
}
_INPUT_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "linear": torch.clone,
    "exponential": lambda offset: torch.exp(offset - offset[-1]),
}


def offset_weights(weighting: OffsetWeighting, bag_size: int) -> Tensor:
    """Weight of each token in a target bag by its offset i = 1 … s, float32 of shape `(s,)`, summing to 1.

    Args:
        weighting: `"uniform"`, `"power_law"` (1/i), `"fitted_power_law"` (C0 + a·i^k with the paper's fit),
            `"exponential"` (exp(-i)) or `"first_token"` (only i = 1).
        bag_size (`int`): Tokens per bag, s, at least 1.

    Raises:
        TSTError: If `weighting` is unknown, or `bag_size` out of range.
    """
    return _weights(_OFFSET_WEIGHTS, weighting, bag_size)


def input_weights(weighting: InputWeighting, bag_size: int) -> Tensor:
    """Weight of each embedding in the mean of a bag by its offset i = 1 … s, float32 of shape `(s,)`, summing to 1.

    Args:
        weighting: `"uniform"` (the paper's mean), `"linear"` (i) or `"exponential"` (exp(i)): the last token weighs most.
        bag_size (`int`): Tokens per bag, s, at least 1.

    Raises:
        TSTError: If `weighting` is unknown, or `bag_size` out of range.
    """
    return _weights(_INPUT_WEIGHTS, weighting, bag_size)


def _weights(functions: Mapping[str, Callable[[Tensor], Tensor]], weighting: str, bag_size: int) -> Tensor:
    check_choice("weighting", weighting, functions)
    check_bag_size(bag_size)
    weights = functions[weighting](torch.arange(1, bag_size + 1, dtype=torch.float64))
    return (weights / weights.sum()).float()


def resolve_weighting(
    mode: str, weighting: OffsetWeighting, input_weighting: InputWeighting = "uniform", prefix: str = ""
) -> OffsetWeighting:
    """The offset weighting that `mode` trains with: input-only superposition has one target, the first token.

    `prefix` is the prefix of the argument names in messages.

    Raises:
        TSTError: If a weighting is unknown, or has no effect in this `mode`.
    """
    check_choice(f"{prefix}offset_weighting", weighting, OFFSET_WEIGHTINGS)
    check_choice(f"{prefix}input_weighting", input_weighting, INPUT_WEIGHTINGS)
    only_one = {
        "output": ("reads single tokens", "input_weighting", input_weighting),
        "input": ("has a single target token", "offset_weighting", weighting),
    }
    reason, name, value = only_one.get(mode, ("", "", "uniform"))
    if value not in ("uniform", "first_token"):
        raise TSTError(
            f"{prefix}mode={mode!r} {reason}, so {prefix}{name}={value!r} has nothing to weigh: leave it at 'uniform', or use "
            f"{prefix}mode='full'."
        )
    return "first_token" if mode == "input" else weighting
