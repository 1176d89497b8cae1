"""Runs of a comparison or a sweep: each a process with a folder of its own, some at a time, done once."""

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
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import IO, Any

import yaml

from ..errors import TSTError, one_line
from .result import RunResult, write_whole

SETTINGS_FILE = "arguments.yaml"
DATA_FILE = "data.yaml"
LOG_FILE = "log.txt"
REFUSAL_FILE = "refused.txt"  # why a run's input was refused, in a sentence
# What may change before a run goes on: where it lies.
FREE_SETTINGS = {"output_dir"}


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
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

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
        for name in sorted((begun.keys() | self.settings.keys()) - FREE_SETTINGS):
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
    """Do the runs that are not finished; those half done go on from their last complete checkpoint.

    Args:
        runs: The runs.
        processes (`int`, defaults to 1): How many at the same time. They share the processor's cores, and each has a GPU
            of its own, in turn, where there are several and no `launcher`.
        launcher (`str`, *optional*): What starts a run in the place of this Python, for example
            `"accelerate launch --num_processes 8"`.
        until (`float`, *optional*): A time of `time.monotonic`; a run that would end later is not started.

    Returns:
        What went wrong, by name of the run, in a sentence; a run that failed does not stop the others.

    However this ends, by SIGTERM or SIGHUP, too, no run goes on without it.

    Raises:
        TSTError: If the settings of one were others before, or there is no such launcher.
        RunRefusedError: If the input of one is refused.
    """
    for run in runs:
        run.check_settings()
    if launcher is not None:
        _check_launcher(launcher)
    failures: dict[str, str] = {}
    refusal: RunRefusedError | None = None
    places, stopped, children = _places(processes, launcher), Event(), set[subprocess.Popen[bytes]]()

    def do(run: PlannedRun) -> int | None:
        if stopped.is_set() or time.monotonic() + run.seconds > until:
            return None
        environment = places.get()
        status = 2
        try:
            status = launch(run, launcher, environment, children)
        finally:
            places.put(environment)
            if status == 2:  # the others would be refused as well
                stopped.set()
        return status

    with _signals_raise(), ThreadPoolExecutor(processes) as pool:
        started = {pool.submit(do, run): run for run in runs if run.result is None}
        try:
            for number, future in enumerate(as_completed(started), 1):
                run, status = started[future], future.result()
                if status is None:  # not started
                    continue
                if status == 2:  # no further one is started, and those under way are let finish
                    refusal = refusal or RunRefusedError(f"The run {run.name} was refused: {_last_line(run)}")
                    continue
                if status or run.result is None:
                    failures[run.name] = f"{run.name} failed: {_last_line(run)} ({run.folder / LOG_FILE})"
                print(f"{number}/{len(started)}  {failures.get(run.name, f'{run.name} is done')}", flush=True)
        except BaseException:
            stopped.set()
            while wait(started, timeout=0.2).not_done:
                for child in list(children):
                    _terminate(child)
            raise
        finally:
            stopped.set()  # nothing further is started
    if refusal is not None:
        raise refusal
    return failures


def _check_launcher(launcher: str) -> None:
    try:
        command = shlex.split(launcher)
    except ValueError as error:  # a quotation that is not closed
        raise TSTError(f"launcher={launcher!r} cannot be read: {one_line(error)}.") from error
    if not command:
        raise TSTError(f"launcher={launcher!r} names no command: leave it out, or name one.")
    if not shutil.which(command[0]):
        raise TSTError(f"launcher={launcher!r} cannot be started: there is no command {command[0]!r}.")


def run_all_shown(
    runs: Sequence[PlannedRun], **options: Any
) -> tuple[dict[str, str], RunRefusedError | None]:
    """As [`run_all`], but a refusal is returned where other runs are finished, which a report can show before it is raised."""
    try:
        return run_all(runs, **options), None
    except RunRefusedError as error:
        if all(run.result is None for run in runs):
            raise
        return {}, error


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Context in which SIGTERM, and SIGHUP unless it is ignored, raise `SystemExit`, so that what was started is ended."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals can be caught there only
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has the first
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    caught = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def launch(
    run: PlannedRun,
    launcher: str | None,
    environment: Mapping[str, str],
    children: set[subprocess.Popen[bytes]],
) -> int:
    """Start a run, wait for its end, and return its exit status, also where `launcher` ends with one of its own."""
    run.folder.mkdir(parents=True, exist_ok=True)
    refusal = run.folder / REFUSAL_FILE
    refusal.unlink(missing_ok=True)
    settings = {**run.settings, "output_dir": str(run.folder)}
    path = run.folder / SETTINGS_FILE
    write_whole(path, yaml.safe_dump(settings))
    write_whole(run.folder / DATA_FILE, yaml.safe_dump(dict(run.data)))
    start = shlex.split(launcher) if launcher else [sys.executable]
    command = [*start, "-m", "hf_tst.experiments.worker", str(path)]
    with open(run.folder / LOG_FILE, "ab") as log:
        status = run_process(command, log, {**os.environ, **environment}, children)
    return 2 if refusal.is_file() else status


def run_process(
    command: Sequence[str],
    log: IO[bytes],
    environment: Mapping[str, str],
    children: set[subprocess.Popen[bytes]],
) -> int:
    """Run a command, which writes into `log` and is among `children` as long as it lives; its exit status.

    It has a process group of its own, by which [`_terminate`] reaches what a launcher has started, too.
    """
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    ) as child:
        children.add(child)
        try:
            return child.wait()
        finally:
            children.discard(child)


def _terminate(child: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: not every launcher passes a signal on."""
    if not hasattr(os, "killpg"):  # Windows
        child.terminate()
    elif child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)


def _places(processes: int, launcher: str | None) -> SimpleQueue[dict[str, str]]:
    """What the environment of a run holds, for as many as run at the same time."""
    cores = str(max(1, (os.cpu_count() or 1) // processes))
    common = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    gpus = [] if launcher else _visible_gpus()
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in range(processes):
        places.put(common | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if len(gpus) > 1 else {}))
    return places


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
