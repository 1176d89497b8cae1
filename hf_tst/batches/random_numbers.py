"""Random numbers of a user's loader or stream, separate from those of training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class DataRandomNumbers:
    """Keeps the random numbers that a loader or stream draws apart from those of training, and seeds them for each pass.

    A sampler or stream may draw its order from the global generators of torch (CPU), NumPy or Python. A resumed run makes its
    first batch at another point of their sequence than the uninterrupted run, so it would get another order.

    Args:
        seed (`int`): The seed of the order of the data.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: Any = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Context in which the global generators are those of the data."""
        outside = _get_states()
        if self._states is not None:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = _get_states()
            _set_states(outside)

    def start_pass(self, data_pass: int) -> None:
        """Seed the generators for a pass over the data, counted from 0. Call it inside of [`drawn`]."""
        seeds = np.random.SeedSequence([self._seed, data_pass]).generate_state(3)
        # Not torch.manual_seed, which also seeds the generators of the devices.
        torch.default_generator.manual_seed(int(seeds[0]))
        np.random.seed(seeds[1])
        random.seed(int(seeds[2]))


def _get_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, ...]) -> None:
    of_torch, of_numpy, of_python = states
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
