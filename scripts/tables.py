"""Write tables between markers of the documents."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_table(output: str, begin: str, end: str, table: str) -> None:
    """Write a table between two markers of a Markdown file, or print it.

    Args:
        output (`str`): The file, from the root of the repository; `"-"` prints.
        begin (`str`), end (`str`): The markers, lines that stay.
        table (`str`): The Markdown in between.
    """
    if output == "-":
        print(table)
        return
    path = ROOT / output
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
