"""`data_position.json`: the data that a checkpoint was trained on, and whether a run may continue from there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..bags.phases import PhaseSchedule
from ..errors import TSTError, bad_input
from .blocks import BlockFacts
from .read_order import BatchLayout

POSITION_FILE = "data_position.json"
POSITION_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DataPosition(PhaseSchedule, BlockFacts):
    """Which data a run has trained on after `step` optimizer steps, and everything that determines it.

    It has the fields of [`PhaseSchedule`] and [`BlockFacts`], and those below. The file also has two values that follow from the
    fields: `rows_per_step` and `consumed`.

    Block i of optimizer step k is a pure function of these fields (see [`DataPlan`]). The position of a stream is in
    `stream_state_<rank>.pt` beside the file.

    Args:
        step (`int`): Optimizer steps done.
        document_boundaries (`str`): See `TSTTrainingArguments.tst_document_boundaries`.
        seed (`int`), shuffle (`bool`): Order of the blocks.
        per_device_batch_size (`int`), accumulation_steps (`int`), world_size (`int`): See [`BatchLayout`].
        split_by_rank (`bool`): Whether each rank reads its own shards of a stream.
        stream_workers (`int`): Loader processes that each read their own shards of a stream.
        tokens_left_out (`int`): Tokens of the blocks read that did not fit into a row of bags.
        offset_weighting (`str`), input_weighting (`str`): See `TSTTrainingArguments`. They do not affect the data,
            but must not change on resume either.
        version (`int`): Version of these fields.
    """

    step: int
    document_boundaries: str
    seed: int
    shuffle: bool
    per_device_batch_size: int
    accumulation_steps: int
    world_size: int
    split_by_rank: bool
    stream_workers: int = 0
    tokens_left_out: int = 0
    offset_weighting: str = "uniform"
    input_weighting: str = "uniform"
    version: int = POSITION_VERSION

    @property
    def schedule(self) -> PhaseSchedule:
        """The phases of the run."""
        return PhaseSchedule(*(getattr(self, field.name) for field in fields(PhaseSchedule)))

    @property
    def layout(self) -> BatchLayout:
        """How rows are distributed over ranks and micro-batches."""
        return BatchLayout(self.per_device_batch_size, self.accumulation_steps, self.world_size)

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step over all ranks: the global batch."""
        return self.layout.rows_per_step

    @property
    def consumed(self) -> dict[str, dict[str, int]]:
        """Blocks and raw tokens trained on, by phase. Tokens left out at document ends are not counted."""
        steps = min(self.step, self.switch_step)
        superposed = steps * self.rows_per_step * self.blocks_per_row
        recovery = (self.step - steps) * self.rows_per_step
        raw_tokens = superposed * self.block_length - self.tokens_left_out
        return {
            "superposition": {"blocks": superposed, "raw_tokens": raw_tokens},
            "recovery": {"blocks": recovery, "raw_tokens": recovery * self.block_length},
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields and the values that follow from them, as in the file."""
        return asdict(self) | {name: getattr(self, name) for name in _DERIVED}

    def save(self, folder: str | Path) -> None:
        """Write `data_position.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / POSITION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DataPosition | None:
        """The position in a checkpoint, or `None` if it has none.

        Raises:
            TSTError: If the file is of another version, or damaged.
        """
        path = Path(folder) / POSITION_FILE
        if not path.is_file():
            return None
        damage = f"Resume from another checkpoint, because the file {path} is damaged: "
        with bad_input(damage, (ValueError, TypeError, AttributeError)):
            values = json.loads(path.read_text(encoding="utf-8"))
            if (version := values.get("version")) != POSITION_VERSION:
                raise TSTError(
                    f"The file {path} has version {version}, but this hf_tst reads version {POSITION_VERSION}: "
                    "resume with the hf_tst that wrote it, or remove the file to continue unchecked."
                )
            return cls(**{name: value for name, value in values.items() if name not in _DERIVED})

    def check_resumable(self, now: DataPosition, counts_batches: bool = False) -> None:
        """Check that a run with the position `now` at its start can continue from this one.

        Args:
            now (`DataPosition`): The position at the start of that run.
            counts_batches (`bool`, *optional*, defaults to `False`): Whether the data is counted in micro-batches, not in rows, so
                that these must keep their size.

        Raises:
            TSTError: If a field differs. The message has both values.
        """
        free = set(_MAY_CHANGE)
        if not self.split_by_rank:
            free.add("world_size")
        if not counts_batches:
            free.add("per_device_batch_size")
        differences = [
            f"{_SHOWN_NAMES.get(name, name)} was {before} and is {after}"
            for (name, before), after in zip(self.to_dict().items(), now.to_dict().values(), strict=True)
            if before != after and name not in free
        ]
        if differences:
            random = (
                ""
                if self.data == now.data
                else " (a data set that draws its rows at random needs its own seed)"
            )
            raise TSTError(
                f"The checkpoint at step {self.step} was trained with other settings ({'; '.join(differences)}): "
                f"resume with the same settings{random}, or set tst_allow_data_change=True and accept that data may be "
                "read twice or never."
            )


# Values in the file that are no fields.
_DERIVED = ("rows_per_step", "consumed")
# Fields that may change between save and resume in any run.
_MAY_CHANGE = {"step", "tokens_left_out", "consumed", "accumulation_steps", "version"}
# The names of fields in messages, if they differ.
_ARGUMENTS = (
    "phase_ratio", "bag_size", "mode", "superposition_rows", "offset_weighting", "input_weighting", "document_boundaries",
)  # fmt: skip
_SHOWN_NAMES = {name: f"tst_{name}" for name in _ARGUMENTS} | {
    "data": "the data's fingerprint",
    "stream_workers": "dataloader_num_workers",
    "per_device_batch_size": "per_device_train_batch_size",
}
