"""The card of a finished run, written again from what is on record of it: what `hf-tst card` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..errors import TSTError
from ..pretraining.options import ArgumentParser, HelpFormatter, check_names
from ..records.card import write_model_card
from ..records.run_record import RunRecord

DESCRIPTION = """Write README.md and loss_curve.png of a finished run into its folder, from trainer_state.json.

  hf-tst card runs/quickstart --license apache-2.0 --datasets HuggingFaceFW/fineweb-edu
"""


@dataclass
class CardArguments:
    """What the record of a run does not tell."""

    repo_id: str | None = field(default=None, metadata={"help": "Name on the Hub; the folder's by default."})
    license: str | None = field(default=None, metadata={"help": "Licence of the model, such as apache-2.0."})
    language: list[str] = field(default_factory=list, metadata={"help": "Languages, such as en."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the training data."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the model that training started from, if it is not on record."},
    )
    tags: list[str] = field(default_factory=list, metadata={"help": "Further tags."})


def main(argv: Sequence[str], prog: str | None = None) -> Path:
    """Write the card of the folder that `argv` names first.

    Raises:
        TSTError: If there is no run on record there, or a card that no trainer wrote.
    """
    parser = ArgumentParser(
        [CardArguments],
        description=DESCRIPTION,
        prog=prog,
        usage="%(prog)s folder [--flag value ...]",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", help="Output folder of the run, or one of its checkpoints.")
    args, rest = parser.parse_known_args(list(argv))
    known = vars(args)
    check_names(
        [flag.lstrip("-").split("=")[0].replace("-", "_") for flag in rest], known, "There is no flag"
    )
    folder = Path(args.folder)
    record = RunRecord.from_folder(folder)
    metadata = {entry.name: getattr(args, entry.name) for entry in fields(CardArguments)}
    path = write_model_card(folder, record, **metadata)
    if path is None:
        raise TSTError(
            f"{folder / 'README.md'} is a card of your own and stays as it is: move it away first."
        )
    print(path)
    return path
