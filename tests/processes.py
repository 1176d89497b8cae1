"""Processes of their own for scripts and functions. They are forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# Seconds after which a process is taken to hang, however busy the machine is.
PATIENCE = 1800.0
PRELOADED = ["conftest", "datasets", "matplotlib.pyplot", "hf_tst.pretraining.pretrain"]


def start_process(function: Callable[..., object], *arguments: object) -> Any:
    """A process of `multiprocessing` that runs a function; it starts at once, and is real to kill."""
    process = _fork_server().Process(target=_call, args=(function, arguments))
    process.start()
    return process


def _call(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    multiprocessing.set_start_method(None, force=True)  # else its own processes come from such a server, too
    function(*arguments)


@cache
def _fork_server() -> Any:
    folders = [TESTS, TESTS.parent, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Script:
    """`python script ...` or, of the name of a module, `python -m module ...`, running; its imports are there already."""

    def __init__(
        self, script: Path | str, *arguments: object, cwd: Path | None = None, **environment: str
    ) -> None:
        self.command = [str(script), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **environment}
        self.process = start_process(run_here, self.command, cwd or Path.cwd(), environment, self._printed)

    def finish(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Wait for its end; what it printed, and its status."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        printed = [path.read_text(encoding="utf-8") for path in self._printed if path.exists()]
        self._folder.cleanup()
        assert status is not None, f"{self.command} hangs; it printed {printed}"
        return subprocess.CompletedProcess(self.command, status, *printed)


def run_script(script: Path | str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a `Script` to its end."""
    return Script(script, *arguments, **options).finish()


def run_here(
    command: Sequence[str], cwd: Path | str, environment: Mapping[str, str], printed: Sequence[Path | str]
) -> None:
    """Make this process that of a script: its arguments, folder and environment, and the files for what it prints."""
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = list(command)
    if command[0].endswith(".py"):
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
