#!/usr/bin/env python
"""Write docs/options.md: what TSTTrainingArguments adds to TrainingArguments, from the arguments themselves.

python scripts/options.py
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from transformers import TrainingArguments

from hf_tst import TSTTrainingArguments

DOCUMENT = Path(__file__).parent.parent / "docs" / "options.md"


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


def render() -> str:
    hints = typing.get_type_hints(TSTTrainingArguments)
    rows = [
        f"| `{field.name}` | {describe_type(hints[field.name])} | `{field.default}` | {field.metadata['help']} |"
        for field in added_fields()
    ]
    head = [
        "# Options",
        "",
        "What `TSTTrainingArguments` adds to `transformers.TrainingArguments`. Written by `python scripts/options.py`.",
        "",
        "| argument | type | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
