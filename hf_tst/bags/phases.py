"""Which optimizer step belongs to which phase, and how much data a schedule reads. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import TSTError, check_at_least, check_choice

Phase = Literal["superposition", "recovery"]
TSTMode = Literal["full", "input", "output"]
SuperpositionRows = Literal["longer", "more"]


def superposes(phase_ratio: float, bag_size: int) -> bool:
    """Whether settings ask for superposition: r > 0 and s > 1."""
    return phase_ratio > 0 and bag_size > 1


@dataclass(frozen=True)
class PhaseSchedule:
    """The two phases of one training run.

    Steps `0 … switch_step - 1` are superposition, steps `switch_step … max_steps - 1` are recovery.
    A *block* is a row of the data set: L tokens, the model's ordinary sequence length.

    Args:
        max_steps (`int`): Optimizer steps of the whole run, N.
        phase_ratio (`float`): Fraction r of the steps that is superposition, in [0, 1].
        bag_size (`int`): Tokens per bag, s.
        mode (`"full" | "input" | "output"`, *optional*, defaults to `"full"`): See `TSTTrainingArguments.tst_mode`.
        superposition_rows (`"longer" | "more"`, *optional*, defaults to `"longer"`): See
            `TSTTrainingArguments.tst_superposition_rows`.

    Raises:
        TSTError: If an argument is outside its range.

    Source: "Efficient Pre-Training with Token Superposition" (arXiv 2605.06546), section 3.

    Example:
        >>> schedule = PhaseSchedule(max_steps=100, phase_ratio=0.3, bag_size=4)
        >>> schedule.switch_step, schedule.phase(29), schedule.phase(30)
        (30, 'superposition', 'recovery')
        >>> schedule.blocks_needed(rows_per_step=8)
        1520
    """

    max_steps: int
    phase_ratio: float
    bag_size: int
    mode: TSTMode = "full"
    superposition_rows: SuperpositionRows = "longer"

    def __post_init__(self) -> None:
        check_at_least(1, max_steps=self.max_steps)
        check_phase_ratio(self.phase_ratio)
        check_bag_size(self.bag_size)
        check_choice("mode", self.mode, TSTMode)
        check_choice("superposition_rows", self.superposition_rows, SuperpositionRows)

    @property
    def switch_step(self) -> int:
        """First step of the recovery phase, round(r·N)."""
        return round(self.phase_ratio * self.max_steps)

    @property
    def blocks_per_row(self) -> int:
        """Blocks that one row of a superposition batch reads, s; 1 where the input stays plain tokens."""
        return 1 if self.mode == "output" else self.bag_size

    def phase(self, step: int) -> Phase:
        """Phase of optimizer step `step` (`int`, counted from 0): `"superposition"` or `"recovery"`."""
        return "superposition" if step < self.switch_step else "recovery"

    def positions_per_row(self, phase: Phase, block_length: int) -> int:
        """Latent positions per row that the model sees in `phase`: L, or L/s in the rows of single blocks of `"more"`.

        Raises:
            TSTError: If single blocks are folded and `block_length` is not a multiple of the bag size.
        """
        folds = phase == "superposition" and folds_single_blocks(
            self.bag_size, self.mode, self.superposition_rows
        )
        return folded_length(block_length, self.bag_size) if folds else block_length

    def blocks_needed(self, rows_per_step: int) -> int:
        """Blocks that the whole run reads.

        Args:
            rows_per_step (`int`): Rows per optimizer step, over all devices and micro-batches.
        """
        return self.amount_read(self.max_steps, rows_per_step)

    def amount_read(self, step: int, per_recovery_step: int) -> int:
        """The amount of data read after `step` optimizer steps, in the unit of `per_recovery_step`: tokens, blocks or batches.

        Args:
            step (`int`): Optimizer steps done.
            per_recovery_step (`int`): What a step of recovery reads. A step of superposition reads `blocks_per_row` times as
                much, in as many latent tokens.
        """
        superposition = min(step, self.switch_step)
        recovery = max(0, step - self.switch_step)
        return per_recovery_step * (superposition * self.blocks_per_row + recovery)


def check_phase_ratio(phase_ratio: float, name: str = "phase_ratio") -> None:
    """Raise `TSTError` unless the argument `name` is a number in [0, 1]."""
    is_number = isinstance(phase_ratio, (int, float)) and not isinstance(phase_ratio, bool)
    if not is_number or not 0 <= phase_ratio <= 1:  # also rejects NaN, for which every comparison is false
        raise TSTError(f"{name} must be from 0 to 1, but is {phase_ratio!r}.")


def check_bag_size(bag_size: int, name: str = "bag_size") -> None:
    """Raise `TSTError` unless the argument `name` is an integer of at least 1."""
    if isinstance(bag_size, bool) or not isinstance(bag_size, int) or bag_size < 1:
        raise TSTError(f"{name} must be a whole number of at least 1, but is {bag_size!r}.")


def folds_single_blocks(bag_size: int, mode: str, superposition_rows: str) -> bool:
    """Whether superposition folds each block into bags by itself, and does not join blocks to a row."""
    return bag_size > 1 and mode != "output" and superposition_rows == "more"


def folded_length(block_length: int, bag_size: int) -> int:
    """Bags that a block of `block_length` tokens makes by itself.

    Raises:
        TSTError: If it does not divide into bags.
    """
    if block_length % bag_size:
        raise TSTError(
            f"superposition_rows='more' folds each block into bags by itself, but {block_length} tokens per block are no "
            f"multiple of the bag size {bag_size}: change block_size or tst_bag_size, or use 'longer'."
        )
    return block_length // bag_size
