"""Tables of Markdown between markers of the documents, and the command line of the scripts that write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).parent.parent


@dataclass
class TableArguments:
    """Where the tables go."""

    output: str | None = HfArg(
        default=None,
        help="Markdown file whose tables, between markers, are overwritten, instead of the script's own page. '-' prints them.",
    )


def parse(description: str | None, kind: Any = TableArguments) -> Any:
    """The arguments of a script, of a dataclass; its docstring is the description."""
    parser = HfArgumentParser(kind, description=(description or "").split("\n")[0])
    return parser.parse_args_into_dataclasses()[0]


def read_table(page: str, name: str) -> str:
    """The table of this name in a page, a path from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def write_table(output: str, name: str, table: str) -> None:
    """Write a table between the markers of its name in a Markdown file, or print it.

    Args:
        output (`str`): The file, from the root of the repository; `"-"` prints.
        name (`str`): The name in both markers, lines that stay.
        table (`str`): The Markdown in between.
    """
    if output == "-":
        print(table)
        return
    begin, end = (f"<!-- {name}: {marker} -->" for marker in ("begin", "end"))
    path = ROOT / output
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
