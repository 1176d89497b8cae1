"""Checks of a command line before torch is imported: whether its flags exist, and what will be trained.

The names of flags are read from the source of the dataclasses that hold them, which takes a twentieth of a second; importing
Transformers takes some. All values are parsed and checked later: this module does not affect the run.
"""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import check_names
from .overwrite import check_no_run_in
from .recipes import quick_start, read_config, replaced_names, split_recipe

PACKAGE = Path(__file__).parent.parent
# By command, the files whose classes `...Arguments` hold its flags.
TRAINING = ("pretraining/options.py", "training/arguments.py", "transformers")
SOURCES = {
    "train": TRAINING,
    "plan": ("cli/plan.py", *TRAINING),
    "compare": ("experiments/options.py", "experiments/compare.py", *TRAINING),
    "sweep": ("experiments/options.py", "experiments/compare.py", *TRAINING),
    "card": ("cli/card.py",),
}
# The commands that train.
RUNS = ("train", "compare", "sweep")


def announce(command: str, argv: Sequence[str]) -> None:
    """Check the flags of `command`, and print what it will train, if it does.

    Raises:
        TSTError: As [`check_flags`]; and for `train`, if the output folder has a run and no flag resumes or overwrites it.
    """
    values = check_flags(command, argv)
    if values is None or command not in RUNS:
        return
    if command == "train" and not any(
        values.get(name) for name in ("resume_from_checkpoint", "overwrite_output_dir", "dry_run")
    ):
        check_no_run_in(str(values["output_dir"]), f"hf-tst train {shlex.join(argv)}".rstrip())
    if os.environ.get("RANK", "0") == "0":
        print(describe(values), flush=True)


def check_flags(command: str, argv: Sequence[str]) -> dict[str, Any] | None:
    """Check the flags of a command. Return the values from its command line and configuration file, as far as they are known
    here; `None` if it only asks for help.

    Raises:
        TSTError: For an unknown flag (the message names the closest known one), and for a file that cannot be read.
    """
    if command not in SOURCES or any(word in ("-h", "--help", "--help_all", "--help-all") for word in argv):
        return None
    file, words = (None, list(argv)) if command == "card" else split_recipe(list(argv))
    of_flags = flag_values(words)
    of_file = read_config(file) if file else {}
    given = {name: of_file[name] for name in of_file.keys() - replaced_names(of_flags)} | of_flags
    defaults = declared_arguments(SOURCES[command])
    known = {*defaults, *(f"no_{name}" for name in defaults), "debug", "dry_run"}
    check_names(given, known, "There is no flag")
    own: dict[str, Any] = {} if given.get("train_file") or given.get("dataset_name") else quick_start()
    if command in ("compare", "sweep"):
        own = own | {"output_dir": f"runs/{command}"}
    # Transformers' default, which its arguments set when they are made.
    return defaults | {"output_dir": "trainer_output"} | own | given


def flag_values(words: Sequence[str]) -> dict[str, Any]:
    """The values of the flags on a command line, as text; `True` for a flag without one."""
    values: dict[str, Any] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            following = words[place + 1] if place + 1 < len(words) else "--"
            values[name.replace("-", "_")] = (
                value if has_value else following if following[:2] != "--" else True
            )
    return values


def declared_arguments(sources: Iterable[str]) -> dict[str, Any]:
    """The fields of the classes `...Arguments` in source files, with their defaults if these are constants."""
    fields: dict[str, Any] = {}
    for source in sources:
        path = PACKAGE / source
        if source == "transformers":
            spec = find_spec("transformers")
            path = Path(spec.submodule_search_locations[0], "training_args.py")  # type: ignore[union-attr,index]
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
                for entry in node.body:
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                        keywords = entry.value.keywords if isinstance(entry.value, ast.Call) else []
                        values = {word.arg: word.value for word in keywords}
                        default = values.get("default", entry.value)
                        fields[entry.target.id] = default.value if isinstance(default, ast.Constant) else None
    return fields


def describe(values: Mapping[str, Any]) -> str:
    """Model, data, number of steps and output folder of the run, in two lines."""
    trained = values.get("model_name_or_path")
    new = values.get("config_name") or values.get("model_type") or "model"
    model = f"{trained}, continued" if trained else f"a new {new}"
    if resumed := values.get("resume_from_checkpoint"):
        name = "its last checkpoint" if resumed == "last" else Path(str(resumed)).name
        model = f"the run in {values['output_dir']}, resumed from {name}"
    data = values.get("train_file") or values.get("dataset_name") or "Python's standard library"
    length = ""
    steps, ratio, size = (
        _number(values.get(name)) for name in ("max_steps", "tst_phase_ratio", "tst_bag_size")
    )
    if steps > 0 and 0 <= ratio <= 1 and size >= 1 and size.is_integer():  # other values are refused soon
        on_bags = round(ratio * steps) if size > 1 else 0
        phases = f", the first {on_bags:,} on bags of {size:g} tokens" if on_bags else ", none on bags"
        length = f"{steps:,.0f} steps{phases}, "
    return f"{model}, on {data}\n{length}into {values['output_dir']}"


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
