"""Transformers' own tests of Trainer, run with TSTTrainer in its place; what differs must be on a list.

    python tests/conformance/run_trainer_tests.py CHECKOUT [--modules test_trainer.py ...] [--report differences.json]

CHECKOUT is a checkout of Transformers, best of the version that is installed. Its tests are copied, and in the text of a copy the
names `Trainer` and `TrainingArguments` are bound to ours after each import of them. Each copy runs in a process of its own: as it
is, and with the names replaced, without superposition and with r = 0.5, s = 2. A difference is a test that passes as it is and not
with the names replaced. Those that are expected are in `expected_differences.yaml`, each with its reason; any other ends in status 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = ("Trainer", "TrainingArguments")
# The tests as they are, and by the name that the list of differences has for it, r and s.
AS_IT_IS = "Trainer"
MODES: dict[str, tuple[float, int]] = {"r=0": (0.0, 2), "r=0.5": (0.5, 2)}
# Bound in the copies in the place of Transformers' names; the defaults are those of the mode.
REPLACEMENTS = """
from dataclasses import dataclass
from hf_tst import TSTTrainer, TSTTrainingArguments

@dataclass
class TrainingArguments(TSTTrainingArguments):
    tst_phase_ratio: float = {ratio}
    tst_bag_size: int = {bag_size}

class Trainer(TSTTrainer):
    def __init__(self, model=None, args=None, *positional, **kwargs):
        super().__init__(model, args or TrainingArguments("tmp_trainer"), *positional, **kwargs)
"""
# A plugin of pytest that ends a test after its time, and leaves the others theirs.
TIME_LIMIT = """
import signal
import pytest

def stop(*_):
    raise TimeoutError("the test took longer than {seconds} s")

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm({seconds})
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
"""


def with_names_replaced(source: str) -> str:
    """The text of a module in which each import of `NAMES` from Transformers is followed by one from the replacements."""
    lines = source.splitlines(keepends=True)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        found = [alias for alias in node.names if alias.name in NAMES]
        if found and (node.module or "").split(".")[0] == "transformers":
            bound = ", ".join(f"{alias.name} as {alias.asname or alias.name}" for alias in found)
            lines.insert(
                node.end_lineno or 0, f"{' ' * node.col_offset}from names_under_test import {bound}\n"
            )
    return "".join(lines)


def copy_tests(checkout: Path, copy: Path, mode: str, seconds: int) -> None:
    """Copy what the tests of Trainer need of a checkout, with the names replaced if `mode` says so."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("trainer", "fixtures"):
        if (checkout / "tests" / part).is_dir():
            shutil.copytree(checkout / "tests" / part, copy / "tests" / part, ignore=ignored)
    for part in ("tests/__init__.py", "conftest.py"):
        if (checkout / part).is_file():
            shutil.copy2(checkout / part, copy / part)
    (copy / "time_limit.py").write_text(TIME_LIMIT.format(seconds=seconds), encoding="utf-8")
    if mode == AS_IT_IS:
        return
    ratio, bag_size = MODES[mode]
    names = REPLACEMENTS.format(ratio=ratio, bag_size=bag_size)
    (copy / "names_under_test.py").write_text(names, encoding="utf-8")
    for path in (copy / "tests" / "trainer").rglob("*.py"):
        path.write_text(with_names_replaced(path.read_text(encoding="utf-8")), encoding="utf-8")


def run_tests(copy: Path, modules: list[str], pytest_args: list[str]) -> dict[str, str | None]:
    """By its name, the message of each test that failed, and `None` of one that passed; skipped ones are left out."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(copy), str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning",
    }  # fmt: skip
    report = copy / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "time_limit", "--rootdir", str(copy), "-c", os.devnull,
        f"--junitxml={report}", *pytest_args, *(f"tests/trainer/{module}" for module in modules),
    ]  # fmt: skip
    with (copy / "output.txt").open("w") as output:
        subprocess.run(command, cwd=copy, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if not report.is_file():
        sys.exit(f"The tests do not run:\n{(copy / 'output.txt').read_text()[-3000:]}")
    return read_report(report)


def read_report(path: Path) -> dict[str, str | None]:
    """The outcomes in a report that pytest has written."""
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        name = f"{case.get('classname', '').split('.')[-1]}.{case.get('name')}"
        failures = [node for node in case if node.tag in ("failure", "error")]
        found[name] = failures[0].get("message", "") if failures else None
    return found


def differences(plain: dict[str, str | None], ours: dict[str, str | None]) -> dict[str, str]:
    """The tests that pass with Trainer alone, and how they fail with ours."""
    passed = [name for name, message in plain.items() if message is None]
    failed = {name: ours.get(name, "it was not run") for name in passed}
    return {name: message for name, message in failed.items() if message is not None}


def is_expected(mode: str, name: str, message: str, rules: list[dict[str, Any]]) -> bool:
    """Whether a rule of the list is about a difference: by the names of tests, or by the sentence of a refusal."""
    return any(
        mode in rule.get("modes", MODES)
        and (
            name.split(".")[-1] in rule.get("tests", ())
            or ("refusal" in rule and re.search(rule["refusal"], message))
        )
        for rule in rules
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path, help="a checkout of Transformers")
    parser.add_argument(
        "--modules",
        nargs="+",
        help="files of tests/trainer; all that are not of several processes by default",
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seconds", type=int, default=120, help="limit of one test")
    parser.add_argument("--report", type=Path, help="where to write all differences, with their messages")
    parser.add_argument("--expected", type=Path, default=HERE / "expected_differences.yaml", help="the list")
    parser.add_argument("--pytest_args", nargs="+", default=[], help="such as --pytest_args='-k checkpoint'")
    args = parser.parse_args(argv)
    folder = args.checkout / "tests" / "trainer"
    if not folder.is_dir():
        parser.error(f"{args.checkout} is no checkout of Transformers: it has no folder tests/trainer.")
    if args.modules is None:
        args.modules = [
            path.name for path in sorted(folder.glob("test_*.py")) if "distributed" not in path.name
        ]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the tests; returns 1 if a difference is not on the list."""
    args = parse(argv)
    rules = yaml.safe_load(args.expected.read_text(encoding="utf-8"))
    outcomes = {}
    for mode in (AS_IT_IS, *args.modes):
        with tempfile.TemporaryDirectory() as folder:
            copy_tests(args.checkout, Path(folder), mode, args.seconds)
            outcomes[mode] = run_tests(Path(folder), args.modules, args.pytest_args)
        passed = sum(message is None for message in outcomes[mode].values())
        if mode == AS_IT_IS and not passed:
            sys.exit(
                "No test passes as it is: give a checkout of the Transformers that is installed, and install what its tests need."
            )
        print(f"{mode}: {passed} of {len(outcomes[mode])} tests pass", flush=True)
    found = {mode: differences(outcomes[AS_IT_IS], outcomes[mode]) for mode in args.modes}
    if args.report:
        args.report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    new = [
        f"{mode}: {name}: {message}"
        for mode, tests in found.items()
        for name, message in tests.items()
        if not is_expected(mode, name, message, rules)
    ]
    print(*new, sep="\n")
    print(f"{sum(map(len, found.values()))} tests differ, {len(new)} of them are not on the list.")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
