"""Command lines of the documentation: the program that each calls has its flags, and its files exist. Nothing is trained."""

from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from code_blocks import ROOT
from sphinx.cmd.build import get_parser as sphinx_parser

from hf_tst.cli import main as cli
from hf_tst.experiments.compare import CompareArguments, SweepArguments
from hf_tst.experiments.options import parse_experiment, parse_list
from hf_tst.pretraining.options import parse_arguments

# Programs of others, which set an environment up, get text or look at the code.
OTHERS = {
    ".", ".ci/run", "apt-get", "axolotl", "cp", "dpkg-deb", "export", "mypy", "pip", "pre-commit", "python3", "ruff",
}  # fmt: skip
COMPARISONS: dict[str, type[Any]] = {"compare": CompareArguments, "sweep": SweepArguments}


class UnknownCommandError(Exception):
    """No rule says how a command of the documentation is checked."""


def check(words: Sequence[str]) -> None:
    """Check a command as if it ran in the current folder.

    Raises:
        UnknownCommandError: If no rule knows it.
        TSTError, AssertionError, SystemExit: If its program would refuse a flag.
    """
    if any(set(word) <= set("();<>|&") for word in words):
        raise UnknownCommandError(f"{' '.join(words)}: one command a line, please")
    match list(words):
        case ["hf-tst", "train", *flags] | ["python", "scripts/run_clm_tst.py", *flags]:
            parse_arguments([*with_files(flags), "--use_cpu", "True"])
        case ["hf-tst", ("compare" | "sweep") as command, *flags]:
            # Placeholders in the text, such as recipe.yaml, do not say how long runs are.
            argv = [*with_files(flags), *([] if "--max_steps" in flags else ["--max_steps", "100"])]
            values, args = parse_experiment([*argv, "--use_cpu", "True"], COMPARISONS[command])
            args.select_arms(values)
            parse_list("learning_rates", args.learning_rates or "1", float)
            parse_list("seeds", args.seeds, int)
        case ["hf-tst", "plan", *flags]:
            run_plan(flags)
        case ["hf-tst", command, *flags]:
            check_flags(flags, lambda: cli.main([command, "--help"]))
        case ["python", script, *flags] if (ROOT / script).is_file():
            check_flags(flags, lambda: run_script(script, ["--help"]))
        case ["accelerate", "launch", *flags]:
            args = launch_command_parser().parse_args(flags)
            if args.config_file:
                load_config_from_file(str(ROOT / args.config_file))
            check(["python", args.training_script, *args.training_script_args])
        case ["python", "-m", "pytest", *flags]:
            paths = [flag.split("::")[0] for flag in flags if flag.startswith("tests")]
            assert all((ROOT / path).exists() for path in paths), paths
            command = [sys.executable, "-m", "pytest", *flags, "--markers"]
            assert subprocess.run(command, capture_output=True, timeout=100).returncode == 0
        case ["python", "-c", code]:
            exec(code, {})
        case ["sphinx-build", *flags]:  # tests/test_docs.py builds the site
            sphinx_parser().parse_args(flags)
        case [program, *_] if program in OTHERS:
            pass
        case _:
            raise UnknownCommandError(
                f"{' '.join(words)}: say in tests/documented_commands.py how it is checked"
            )


def run_plan(flags: Sequence[str]) -> str:
    """What `hf-tst plan` prints. It trains and downloads nothing."""
    return printed(lambda: cli.main(["plan", *with_files(flags)]))


def with_files(flags: Sequence[str]) -> list[str]:
    """Flags whose first, a file of arguments, is found in the checkout if it is one of ours."""
    return [str(ROOT / flag) if flag.startswith("scripts/") else flag for flag in flags]


def check_flags(flags: Sequence[str], show_help: Callable[[], Any]) -> None:
    known = set(re.findall(r"--[\w-]+", printed(show_help)))
    unknown = {flag for flag in flags if flag.startswith("--")} - known
    assert not unknown, f"{unknown} are not among {sorted(known)}"


def run_script(path: str, flags: Sequence[str]) -> None:
    before, sys.argv = sys.argv, [path, *flags]
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        sys.argv = before


def printed(function: Callable[[], Any]) -> str:
    """What a function prints; it may end with `sys.exit(0)`."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = function()
        except SystemExit as end:
            status = end.code
    assert not isinstance(status, (int, str)) or status == 0, f"{status}\n{err.getvalue()[-2000:]}"
    return out.getvalue()
