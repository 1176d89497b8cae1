#!/usr/bin/env python
"""Write docs/options.md: what TSTTrainingArguments adds, from the arguments themselves.

python scripts/options.py
"""

from __future__ import annotations

import dataclasses
import typing

from tables import ROOT
from transformers import TrainingArguments

from hf_tst import TSTTrainingArguments

DOCUMENT = ROOT / "docs" / "options.md"
HEAD = """# Options

What `TSTTrainingArguments` adds to `transformers.TrainingArguments`, in a script and as flags of `hf-tst train`
(`--tst_bag_size 4`). Written by `python scripts/options.py`.
"""


def added_fields() -> list[dataclasses.Field]:
    """The fields that TrainingArguments does not have."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    return [field for field in dataclasses.fields(TSTTrainingArguments) if field.name not in known]


def describe_type(hint: object) -> str:
    """A type for readers: the choices of a literal, or the names of types."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    names = [kind.__name__ for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    return " or ".join(names)


def render() -> str:
    """The page: a definition list, which phones show as well as screens."""
    hints = typing.get_type_hints(TSTTrainingArguments)
    entries = [
        f"`{field.name}` ({describe_type(hints[field.name])}, defaults to `{field.default}`)\n"
        f": {field.metadata['help']}\n"
        for field in added_fields()
    ]
    return "\n".join([HEAD, *entries])


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
