#!/usr/bin/env python
"""Write docs/options.md, and the table in README: what TSTTrainingArguments adds, from the arguments themselves.

python scripts/options.py
"""

from __future__ import annotations

import dataclasses
import typing

from tables import ROOT, write_table
from transformers import TrainingArguments

from hf_tst import TSTTrainingArguments

DOCUMENT = ROOT / "docs" / "options.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"


def added_fields() -> list[dataclasses.Field]:
    """The fields that TrainingArguments does not have."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [field for field in dataclasses.fields(TSTTrainingArguments) if field.name not in known]


def describe_type(hint: object) -> str:
    """A type as the table has it: the choices of a literal, or the names of types."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    names = [kind.__name__ for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return " or ".join(names)


def make_table() -> str:
    """A row for each argument, as Markdown."""
    hints = typing.get_type_hints(TSTTrainingArguments)
    rows = [
        f"| `{field.name}` | {describe_type(hints[field.name])} | `{field.default}` | {field.metadata['help']} |"
        for field in added_fields()
    ]
    return "\n".join(["| argument | type | default | meaning |", "|---|---|---|---|", *rows])


def render() -> str:
    head = [
        "# Options",
        "",
        "What `TSTTrainingArguments` adds to `transformers.TrainingArguments`. Written by `python scripts/options.py`.",
        "",
    ]
    return "\n".join([*head, make_table()]) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
    write_table("README.md", BEGIN, END, make_table())
