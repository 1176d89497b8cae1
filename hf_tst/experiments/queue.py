"""Runs of a comparison: each a process with a folder of its own, some at a time, done once."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from ..errors import TSTError, one_line
from .result import RunResult, write_whole

SETTINGS_FILE = "arguments.yaml"
DATA_FILE = "data.yaml"
LOG_FILE = "log.txt"
REFUSAL_FILE = "refused.txt"  # why a run's input was refused, in a sentence


class RunRefusedError(TSTError):
    """A run whose input was refused, after which no further one was started."""


@dataclass(frozen=True)
class PlannedRun:
    """A run to be done.

    Args:
        name (`str`): Its own among all runs.
        folder (`Path`): Where it is kept.
        settings (`dict`): Its arguments, as a configuration file holds them.
        data (`dict`): Fingerprints of its data by what it is for, as far as they are known.
        seconds (`float`): How long it takes, as far as that is known.
        arm (`str`): The arm that it is a run of.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    arm: str = ""

    @property
    def result(self) -> RunResult | None:
        """What came of it; `None` until it is finished."""
        return RunResult.load(self.folder)

    def check_settings(self) -> None:
        """Check that what is in the folder already was begun with the same settings, on the same data.

        Raises:
            TSTError: If not, with the setting and both values, or a file is damaged.
        """
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            return
        begun = read_settings(path)
        for name in sorted((begun.keys() | self.settings.keys()) - {"output_dir"}):
            before, now = begun.get(name), self.settings.get(name)
            if before != now:
                raise TSTError(
                    f"The run {self.name} in {self.folder} was begun with {name}={before!r}, but is to go on with "
                    f"{name}={now!r}: set it back, or name another output_dir."
                )
        path = self.folder / DATA_FILE
        for name, before in (read_settings(path) if path.is_file() else {}).items():
            if before != self.data.get(name, before):
                raise TSTError(
                    f"The run {self.name} in {self.folder} was begun on other {name} data, by its fingerprint {before}, "
                    f"which is {self.data[name]} now: set the data back, or name another output_dir."
                )


def run_all(
    runs: Sequence[PlannedRun],
    *,
    processes: int = 1,
    launcher: str | None = None,
    until: float = math.inf,
) -> dict[str, str]:
    """Do the runs that are not finished. An interrupted run continues from its last complete checkpoint.

    However this ends, by SIGTERM or SIGHUP too, no run continues without it.

    Args:
        runs: The runs.
        processes (`int`, defaults to 1): How many at the same time. They share the processor's cores. Where there are several
            GPUs and no `launcher`, each run has one of them, in turn.
        launcher (`str`, *optional*): What starts a run in the place of this Python, for example
            `"accelerate launch --num_processes 8"`.
        until (`float`, *optional*): A time of `time.monotonic`. A run that would end later is not started.

    Returns:
        What went wrong, by name of the run, in a sentence. A run that failed does not stop the others.

    Raises:
        TSTError: If a run was begun with other settings, or there is no such launcher.
        RunRefusedError: If the input of a run is refused. The runs under way end first.
    """
    for run in runs:
        run.check_settings()
    command = _start_command(launcher)
    waiting = [run for run in runs if run.result is None]
    count, done = len(waiting), 0
    failures: dict[str, str] = {}
    refusal: RunRefusedError | None = None
    places = _places(processes, launcher)
    active: dict[subprocess.Popen[bytes], tuple[PlannedRun, dict[str, str]]] = {}
    with _noted_signals() as signals:
        try:
            while waiting or active:
                if signals:
                    raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
                while waiting and places:
                    run = waiting.pop(0)
                    if time.monotonic() + run.seconds <= until:
                        place = places.pop(0)
                        active[_start(run, command, place)] = run, place
                ended = [child for child in active if child.poll() is not None]
                if not ended:
                    time.sleep(0.1)
                for child in ended:
                    run, place = active.pop(child)
                    places.append(place)
                    done += 1
                    if child.poll() == 2 or (run.folder / REFUSAL_FILE).is_file():
                        waiting.clear()  # the others would be refused as well
                        refusal = refusal or RunRefusedError(
                            f"The run {run.name} was refused: {_last_line(run)}"
                        )
                        continue
                    if child.poll() or run.result is None:
                        failures[run.name] = f"{run.name} failed: {_last_line(run)} ({run.folder / LOG_FILE})"
                    print(f"{done}/{count}  {failures.get(run.name, f'{run.name} is done')}", flush=True)
        finally:
            for child in active:
                _terminate(child)
            for child in active:
                child.wait()
    if refusal is not None:
        raise refusal
    return failures


def _start_command(launcher: str | None) -> list[str]:
    """The words that start a run, checked."""
    if launcher is None:
        return [sys.executable]
    try:
        command = shlex.split(launcher)
    except ValueError as error:  # a quotation that is not closed
        raise TSTError(f"launcher={launcher!r} cannot be read: {one_line(error)}.") from error
    if not command:
        raise TSTError(f"launcher={launcher!r} names no command: leave it out, or name one.")
    if not shutil.which(command[0]):
        raise TSTError(f"launcher={launcher!r} cannot be started: there is no command {command[0]!r}.")
    return command


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Context in which SIGINT, SIGTERM and SIGHUP are noted in the list it gives, unless they are ignored.

    A signal that raises could do so after a process was started, and before it is known to be there.
    """
    noted: list[int] = []
    caught = {}
    if threading.current_thread() is threading.main_thread():  # signals can be caught there only
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                caught[number] = signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def _start(
    run: PlannedRun, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / REFUSAL_FILE).unlink(missing_ok=True)
    path = run.folder / SETTINGS_FILE
    write_whole(path, yaml.safe_dump({**run.settings, "output_dir": str(run.folder)}))
    write_whole(run.folder / DATA_FILE, yaml.safe_dump(dict(run.data)))
    with open(run.folder / LOG_FILE, "ab") as log:
        return start_process(
            [*command, "-m", "hf_tst.experiments.worker", str(path)], log, {**os.environ, **environment}
        )


def start_process(
    command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command that writes into `log`, in a process group of its own.

    By the group [`_terminate`] reaches what a launcher has started, too.
    """
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """Terminate a process and those that it started: not every launcher passes a signal on."""
    if not hasattr(os, "killpg"):  # Windows
        child.terminate()
    elif child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)


def _places(processes: int, launcher: str | None) -> list[dict[str, str]]:
    """What is added to the environment of a run, for as many as run at the same time."""
    cores = str(max(1, (os.cpu_count() or 1) // processes))
    common = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    gpus = [] if launcher else _visible_gpus()
    if len(gpus) < 2:
        return [common] * processes
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(processes)]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def read_settings(path: Path) -> dict[str, Any]:
    """The names and values in a run's file.

    Raises:
        TSTError: If it is damaged.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise TSTError(
            f"The file {path} is damaged: name another output_dir, or remove its folder to have the run done again."
        )
    return values


def _last_line(run: PlannedRun) -> str:
    refusal = run.folder / REFUSAL_FILE
    path = refusal if refusal.is_file() else run.folder / LOG_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
