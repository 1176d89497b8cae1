"""A seeded shuffle of `0 … n - 1` that needs no memory: any position can be asked for on its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Permutation:
    """A pseudo-random permutation of `range(size)`, a pure function of `(size, seed)`.

    A Feistel network over the smallest square power-of-two domain that holds `size`; values that fall outside
    `size` are sent through again until they fall inside (cycle walking), which keeps it a bijection. A
    shuffled index of a trillion blocks would not fit into memory; this holds eight keys.

    Args:
        size (`int`): Number of elements.
        seed (`Sequence[int]`): Non-negative integers that name this permutation.
    """

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: Indices) -> Indices:
        """Elements at `positions`, an int64 array of any shape with values in `[0, size)`."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
