"""Rows of cells as text in columns and as Markdown, and numbers in them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def format_columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of Markdown, the header first."""
    header, *body = rows
    return "\n".join(
        f"| {' | '.join(map(escape_markdown, line))} |" for line in [header, ["---"] * len(header), *body]
    )


def escape_markdown(text: str) -> str:
    """Text with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\|*])", r"\\\1", text).replace("<", "&lt;")


def format_bytes(count: float) -> str:
    """A number of bytes in GiB, or in MiB if it is small."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
