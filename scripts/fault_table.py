"""Write the table of faults, `docs/faults.md`, from what runs do that are killed, out of disk space, or given damaged files.

Nothing in the table is written by hand: every fault of `tests/faults/fault_catalogue.py` happens to a run in a process of its
own, which is then resumed; the same that `tests/faults` tests.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tables import ROOT, write_table
from transformers import HfArgumentParser

sys.path.insert(0, str(ROOT / "tests" / "faults"))

from fault_catalogue import COLUMNS, FAULTS, observe

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass
class TableArguments:
    """Where the table goes."""

    output: str = field(
        default="docs/faults.md",
        metadata={"help": "Markdown file whose table, between two markers, is overwritten. '-' prints it."},
    )


def make_table(rows: list[str]) -> str:
    """Rows under their headings, as Markdown."""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), *rows])


def main() -> None:
    parser = HfArgumentParser(TableArguments, description=(__doc__ or "").split("\n")[0])
    (args,) = parser.parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        table = make_table([observe(fault, Path(folder)).row for fault in FAULTS])
    write_table(args.output, BEGIN, END, table)


if __name__ == "__main__":
    main()
