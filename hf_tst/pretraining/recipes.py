"""Configuration files: the recipes of the package, and those of users. Imports nothing slow."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import TSTError, bad_input, check_names, whole_message

RECIPES = Path(__file__).with_name("recipes")
# Configurations of `accelerate launch`, for one GPU and for many.
ACCELERATE = Path(__file__).with_name("accelerate")
ENDINGS = (".yaml", ".yml", ".json")
# Ways to name the data, and ways to name the model: the argument of each, and others that belong to it. The sizes of a new model are
# those of its `model_type`, and also fit another one; a named configuration has its own.
ALTERNATIVES = (
    (("train_file",), ("dataset_name", "dataset_config_name")),
    (("model_name_or_path",), ("config_name",), ("model_type", "config_overrides")),
)


def recipe_names() -> list[str]:
    """The names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def split_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file of arguments named by the first word of a command line, if that is not a flag, and the other words.

    Raises:
        TSTError: If the word is neither a path with the ending of such files nor the name of a recipe.
    """
    if not argv or argv[0].startswith("-"):
        return None, argv
    word = argv[0]
    if not word.endswith(ENDINGS):
        check_names([word], recipe_names(), "There is no recipe", otherwise="`hf-tst recipes` lists them.")
        word = str(RECIPES / f"{word}.yaml")
    return word, argv[1:]


def replaced_names(given: Collection[str]) -> set[str]:
    """The arguments of a file that flags replace by another way to name data or a model; `given` has the names of the flags."""
    replaced: set[str] = set()
    for ways in ALTERNATIVES:
        if any(way[0] in given for way in ways):
            replaced |= {name for way in ways if way[0] not in given for name in way}
    return replaced


class _NumberLoader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as in JSON and YAML 1.2. PyYAML reads it as text, which works for flags, but not inside mappings."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: str) -> dict[str, Any]:
    """Names and values of a YAML or JSON file. A mapping inside becomes JSON, as in a flag."""
    if not Path(path).is_file():
        raise TSTError(f"There is no configuration file {path}.")
    errors = (yaml.YAMLError, UnicodeDecodeError)
    with bad_input(f"The configuration file {path} is not YAML: ", errors, whole_message):
        text = Path(path).read_text(encoding="utf-8")
        values, typed = yaml.safe_load(text), _NumberLoader(text).get_single_data()  # JSON is YAML
    if not isinstance(values, dict):
        raise TSTError(f"The configuration file {path} must hold a mapping of arguments to values.")
    return {str(k): json.dumps(typed[k]) if isinstance(v, dict) else v for k, v in values.items()}


@cache
def quick_start() -> dict[str, Any]:
    """Names and values of the recipe that runs without data."""
    return read_config(str(Path(__file__).with_name("quick_start.yaml")))
