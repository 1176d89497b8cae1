"""Runs of a comparison or a sweep: each a process with a folder of its own, some at a time, done once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import IO, Any

import yaml

from .errors import TSTError
from .run_result import RunResult

SETTINGS_FILE = "arguments.yaml"
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
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]

    @property
    def result(self) -> RunResult | None:
        """What came of it; `None` until it is finished."""
        return RunResult.load(self.folder)

    def check_settings(self) -> None:
        """Check that what is in the folder already was begun with the same settings.

        Raises:
            TSTError: If not, with the setting and both values.
        """
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            return
        begun = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name in sorted((begun.keys() | self.settings.keys()) - FREE_SETTINGS):
            before, now = begun.get(name), self.settings.get(name)
            if before != now:
                raise TSTError(
                    f"The run {self.name} in {self.folder} was begun with {name}={before!r}, but is to go on with "
                    f"{name}={now!r}: set it back, or name another output_dir."
                )


def run_all(runs: Sequence[PlannedRun], *, processes: int = 1, launcher: str | None = None) -> dict[str, str]:
    """Do the runs that are not finished; those half done go on from their last complete checkpoint.

    Args:
        runs: The runs.
        processes (`int`, defaults to 1): How many at the same time. They share the processor's cores, and each has a GPU
            of its own, in turn, where there are several and no `launcher`.
        launcher (`str`, *optional*): What starts a run in the place of this Python, for example
            `"accelerate launch --num_processes 8"`.

    Returns:
        What went wrong, by name of the run, in a sentence; a run that failed does not stop the others.

    However this ends, by SIGTERM, too, no run goes on without it.

    Raises:
        TSTError: If the settings of one were others before, or there is no such launcher.
        RunRefusedError: If the input of one is refused.
    """
    for run in runs:
        run.check_settings()
    if launcher and not shutil.which(shlex.split(launcher)[0]):
        raise TSTError(
            f"launcher={launcher!r} cannot be started: there is no command {shlex.split(launcher)[0]!r}."
        )
    failures: dict[str, str] = {}
    places, stopped, children = _places(processes, launcher), Event(), set[subprocess.Popen[bytes]]()

    def do(run: PlannedRun) -> int | None:
        if stopped.is_set():
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

    with _sigterm_raises(), ThreadPoolExecutor(processes) as pool:
        started = {pool.submit(do, run): run for run in runs if run.result is None}
        try:
            for number, future in enumerate(as_completed(started), 1):
                run, status = started[future], future.result()
                if status is None:  # not started
                    continue
                if status == 2:
                    raise RunRefusedError(f"The run {run.name} was refused: {_last_line(run)}")
                if status or run.result is None:
                    failures[run.name] = f"{run.name} failed: {_last_line(run)} ({run.folder / LOG_FILE})"
                print(f"{number}/{len(started)}  {failures.get(run.name, f'{run.name} is done')}", flush=True)
        except RunRefusedError:  # those under way are let finish
            raise
        except BaseException:
            stopped.set()
            while wait(started, timeout=0.2).not_done:
                for child in list(children):
                    child.terminate()
            raise
        finally:
            stopped.set()  # nothing further is started
    return failures


def run_all_shown(
    runs: Sequence[PlannedRun], *, processes: int = 1, launcher: str | None = None
) -> tuple[dict[str, str], RunRefusedError | None]:
    """As [`run_all`], but a refusal is returned where other runs are finished, which a report can show before it is raised."""
    try:
        return run_all(runs, processes=processes, launcher=launcher), None
    except RunRefusedError as error:
        if all(run.result is None for run in runs):
            raise
        return {}, error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises `SystemExit` with status 143, so that what was started is ended."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # signals can be caught there only
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    start = shlex.split(launcher) if launcher else [sys.executable]
    command = [*start, "-m", "hf_tst.run_worker", str(path)]
    with open(run.folder / LOG_FILE, "ab") as log:
        status = run_process(command, log, {**os.environ, **environment}, children)
    return 2 if refusal.is_file() else status


def run_process(
    command: Sequence[str],
    log: IO[bytes],
    environment: Mapping[str, str],
    children: set[subprocess.Popen[bytes]],
) -> int:
    """Run a command, which writes into `log` and is among `children` as long as it lives; its exit status."""
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as child:
        children.add(child)
        try:
            return child.wait()
        finally:
            children.discard(child)


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


def _last_line(run: PlannedRun) -> str:
    refusal = run.folder / REFUSAL_FILE
    path = refusal if refusal.is_file() else run.folder / LOG_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
