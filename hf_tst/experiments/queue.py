"""Runs of a comparison as processes, several at a time, each in its own folder, each done once."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from ..errors import TSTError, bad_input
from ..records.run_record import write_atomically
from .result import REFUSAL_FILE, RunResult, read_settings

SETTINGS_FILE = "arguments.yaml"
INPUTS_FILE = "inputs.yaml"
LOG_FILE = "log.txt"
# Seconds between two lines of progress, if there is no terminal for a bar.
PROGRESS_EVERY = 60.0
CONTINUE = "finished runs are kept, and the same command does the missing ones"


class RunRefusedError(TSTError):
    """The input of a run was refused, and no further run was started."""


@dataclass
class PlannedRun:
    """A run to do, and its result.

    Args:
        name (`str`): Its unique name.
        folder (`Path`): Its folder.
        settings (`dict`): Its arguments, as in a configuration file.
        inputs (`dict`): Its data and its model, as in [`Experiment`].
        expected_seconds (`float`): Of the whole run, if known.
        result (`RunResult`, *optional*): `None` until it is finished; [`run_all`] sets it.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    expected_seconds: float = 0.0
    result: RunResult | None = None

    @property
    def status(self) -> str:
        """`"finished"`, `"diverged"` or `"missing"`."""
        if self.result is None:
            return "missing"
        return "diverged" if self.result.has_diverged else "finished"

    def check_settings(self) -> None:
        """Check that a run in the folder was started with the same settings, data and model.

        Raises:
            TSTError: If not (the message has the setting and both values), or if a file is damaged.
        """
        begun = read_settings(self.folder / SETTINGS_FILE)
        if begun is None:
            return
        inputs = read_settings(self.folder / INPUTS_FILE) or {}
        now = {**self.settings, **{name: self.inputs.get(name, value) for name, value in inputs.items()}}
        begun |= inputs
        for name in sorted((begun.keys() | now.keys()) - {"output_dir"}):
            if begun.get(name) != now.get(name):
                raise TSTError(
                    f"The run {self.name} in {self.folder} was started with {name}={begun.get(name)!r}, but now has "
                    f"{name}={now.get(name)!r}: set it back, or name another output_dir."
                )


def run_all(
    runs: Sequence[PlannedRun],
    *,
    processes: int = 1,
    launcher: str | None = None,
    until: float = math.inf,
) -> dict[str, str]:
    """Do the unfinished runs. An interrupted run continues from its last complete checkpoint.

    Child processes are always terminated on exit, also on SIGTERM and SIGHUP.

    Args:
        runs: The runs.
        processes (`int`, *optional*, defaults to 1): Number of runs at the same time. They share the CPU cores. With several GPUs
            and no `launcher`, each run gets one GPU, in turn.
        launcher (`str`, *optional*): Command that starts a run instead of this Python, for example
            `"accelerate launch --num_processes 8"`.
        until (`float`, *optional*): A time of `time.monotonic`. A run that would end later is not started.

    Returns:
        One sentence per failed run, by its name. A failed run does not stop the others.

    Raises:
        TSTError: If a run was started with other settings, or there is no such launcher.
        RunRefusedError: If the input of a run is refused. Running processes finish first.
    """
    for run in runs:
        run.check_settings()
        run.result = RunResult.load(run.folder)
    command = _start_command(launcher)
    waiting = [run for run in runs if run.result is None]
    failures: dict[str, str] = {}
    refusal: RunRefusedError | None = None
    places = _places(processes, launcher)
    active: dict[Popen[bytes], tuple[PlannedRun, dict[str, str]]] = {}
    with _noted_signals() as signals, _terminated(active), _Progress(len(waiting)) as progress:
        while waiting or active:
            if signals:
                interrupted = signals[0] == signal.SIGINT
                raise KeyboardInterrupt(CONTINUE) if interrupted else SystemExit(128 + signals[0])
            while waiting and places:
                run = waiting.pop(0)
                if time.monotonic() + run.expected_seconds <= until:
                    place = places.pop(0)
                    active[_start(run, command, place)] = run, place
            ended = [child for child in active if child.poll() is not None]
            if not ended:
                time.sleep(0.1)
                progress.show([run for run, _ in active.values()])
            for child in ended:
                run, place = active.pop(child)
                places.append(place)
                run.result = RunResult.load(run.folder)
                if child.poll() == 2 or (run.folder / REFUSAL_FILE).is_file():
                    waiting.clear()  # the others would be refused as well
                    refusal = refusal or RunRefusedError(f"The run {run.name} was refused: {_last_line(run)}")
                    continue
                if child.poll() or run.result is None:
                    failures[run.name] = f"{run.name} failed: {_last_line(run)} ({run.folder / LOG_FILE})"
                progress.note_end(failures.get(run.name) or _describe_result(run))
    if refusal is not None:
        raise refusal
    return failures


@contextmanager
def _terminated(active: Mapping[Popen[bytes], Any]) -> Iterator[None]:
    """Context at whose end the processes that are still active are terminated, with their children: not every launcher forwards signals."""
    try:
        yield
    finally:
        for child in active:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for child in active:
            child.wait()


class _Progress:
    """What is shown while runs are done: a line for each that ends, and how far the others are, as a bar or, without a terminal, as text.

    Args:
        count (`int`): Runs to do.
    """

    def __init__(self, count: int) -> None:
        self._bar = tqdm(
            total=count, disable=None, leave=False, dynamic_ncols=True, bar_format="{n}/{total}  {desc}"
        )
        self._count, self._done = count, 0
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, runs: Sequence[PlannedRun]) -> None:
        """Show the last steps of the active runs, if the last time is long enough ago."""
        if time.monotonic() - self._shown <= (PROGRESS_EVERY if self._bar.disable else 1):
            return
        self._shown = time.monotonic()
        lines = [f"{run.name}  {_last_step(run)}" for run in runs]
        if self._bar.disable:
            print(*lines, sep="\n", flush=True)
        else:
            self._bar.set_description_str(" | ".join(lines))

    def note_end(self, outcome: str) -> None:
        """Print the outcome of a run, and the time that the others will take."""
        self._done += 1
        passed = time.monotonic() - self._began
        left = tqdm.format_interval(passed / self._done * (self._count - self._done))
        tqdm.write(f"{self._done}/{self._count}  {outcome}  {left} left")
        sys.stdout.flush()
        self._bar.update()


def _start_command(launcher: str | None) -> list[str]:
    """The command that starts a run, as a list of words."""
    if launcher is None:
        return [sys.executable]
    with bad_input(f"launcher={launcher!r} cannot be read: "):  # a quotation that is not closed
        command = shlex.split(launcher)
    program = "".join(command[:1])
    if not shutil.which(program):
        raise TSTError(f"launcher={launcher!r} cannot be started: there is no command {program!r}.")
    return command


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Context that appends SIGINT, SIGTERM and SIGHUP to the list that it yields, unless they are ignored.

    A handler that raises could do so after a process has started and before it is in the list of active processes.
    """
    noted: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # signals can be caught there only
    caught = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if is_main and signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield noted
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def _start(run: PlannedRun, command: Sequence[str], environment: Mapping[str, str]) -> Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / REFUSAL_FILE).unlink(missing_ok=True)
    path = run.folder / SETTINGS_FILE
    write_atomically(path, yaml.safe_dump({**run.settings, "output_dir": str(run.folder)}))
    write_atomically(run.folder / INPUTS_FILE, yaml.safe_dump(dict(run.inputs)))
    with open(run.folder / LOG_FILE, "ab") as log:
        # In its own process group, with everything that a launcher starts.
        return Popen(
            [*command, "-m", "hf_tst.experiments.run", str(path)], stdout=log, stderr=STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True,
        )  # fmt: skip


def _places(processes: int, launcher: str | None) -> list[dict[str, str]]:
    """Environment variables of the runs that run at the same time, one mapping for each."""
    cores = str(max(1, len(os.sched_getaffinity(0)) // processes))
    common = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": cores}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [*map(str, range(torch.cuda.device_count()))] if named is None else named.replace(",", " ").split()
    if launcher or len(gpus) < 2:
        return [common] * processes
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(processes)]


def _last_step(run: PlannedRun) -> str:
    """The last line of a run's log that shows a step, or "starts"."""
    with open(run.folder / LOG_FILE, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("step ")), "starts")


def _describe_result(run: PlannedRun) -> str:
    assert run.result is not None
    loss = run.result.final_eval_loss
    text = "not finite" if loss is None else f"{loss:.4f}"
    return f"{run.name} is done: evaluation loss {text}"


def _last_line(run: PlannedRun) -> str:
    refusal = run.folder / REFUSAL_FILE
    path = refusal if refusal.is_file() else run.folder / LOG_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
