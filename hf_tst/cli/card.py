"""`hf-tst card`: rewrite the model card of a finished run from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..pretraining.parser import ArgumentParser
from ..records.card import write_model_card
from ..records.run_record import RunRecord

DESCRIPTION = """Write README.md and loss_curve.png into the folder of a finished run, from its
trainer_state.json.

  hf-tst card runs/quickstart --license apache-2.0 --tags code
"""


@dataclass
class CardArguments:
    """Metadata that the record of a run does not have."""

    repo_id: str | None = HfArg(default=None, help="Name on the Hub; by default the folder's.")
    license: str | None = HfArg(default=None, help="License of the model, such as apache-2.0.")
    language: list[str] = HfArg(default_factory=list, help="Languages, such as en.")
    datasets: list[str] = HfArg(default_factory=list, help="Hub ids of the training data.")
    base_model: str | None = HfArg(
        default=None, help="Hub id of the model that training started from, if the record has none."
    )
    tags: list[str] = HfArg(default_factory=list, help="Further tags.")


def main(argv: Sequence[str], prog: str | None = None) -> Path:
    """Write the card of the folder that `argv` names.

    Raises:
        TSTError: If the folder has no record of a run, or has a card that no trainer wrote or that was edited.
    """
    parser = ArgumentParser(
        [CardArguments], "%(prog)s folder [--flag value ...]", description=DESCRIPTION, prog=prog
    )
    parser.add_argument("folder", help="Output folder of the run, or one of its checkpoints.")
    metadata = vars(parser.parse_flags(argv))
    folder = Path(metadata.pop("folder"))
    path = write_model_card(folder, RunRecord.from_folder(folder), **metadata)
    print(path)
    return path
