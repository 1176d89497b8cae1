"""Write the table of faults, `docs/faults.md`, from what runs do that are killed, out of disk space, or given damaged files.

Nothing in the table is written by hand: every fault of `tests/faults/fault_catalogue.py` happens to a run in a process of its
own, which is then resumed; the same that `tests/faults` tests.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tables import ROOT, parse, write_table

sys.path.insert(0, str(ROOT / "tests" / "faults"))

from fault_catalogue import COLUMNS, FAULTS, observe


def make_table(rows: list[str]) -> str:
    """Rows under their headings, as Markdown."""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), *rows])


def main() -> None:
    output = parse(__doc__).output or "docs/faults.md"
    with tempfile.TemporaryDirectory() as folder:
        table = make_table([observe(fault, Path(folder)).row for fault in FAULTS])
    write_table(output, "faults", table)


if __name__ == "__main__":
    main()
