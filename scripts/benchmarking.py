"""What the benchmarks share: alternating measurements, peak memory, and rows of results with their circumstances."""

from __future__ import annotations

import csv
import datetime
import gc
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def measure_alternating(
    candidates: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; within a round every candidate runs once, in random order.

    A candidate runs inside its context in `contexts`, if it has one; entering and leaving that is not timed.

    What slows the machine down for a while slows all candidates of a round, so ratios within a round mean more
    than the seconds themselves (see [`median_ratio`]). The order changes because a candidate leaves caches and memory
    in a state that the next one feels. A first round, not counted, warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            context = (contexts or {}).get(name)
            with nullcontext() if context is None else context():
                if context is not None:
                    candidates[name]()  # what is done once after entering is not timed
                _synchronize(device)
                start = time.perf_counter()
                candidates[name]()
                _synchronize(device)
                elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of a candidate's time divided by the reference's time in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `run` allocates at its peak beyond what was allocated before it."""
    gc.collect()  # what is freed during the run would be taken off
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def append_rows(
    path: str | Path, rows: Sequence[Mapping[str, Any]], device: torch.device | None = None
) -> None:
    """Append rows to a CSV file, each with date, hardware, versions and the command that made it."""
    circumstances = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": _hardware(device or torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "command": shlex.join(["python", *sys.argv]),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [*rows[0], *circumstances]
    is_new = not path.exists()
    if not is_new and (found := path.read_text(encoding="utf-8").splitlines()[0].split(",")) != names:
        raise SystemExit(f"{path} has other columns ({', '.join(found)}): write to another file.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        if is_new:
            writer.writeheader()
        writer.writerows({**row, **circumstances} for row in rows)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table of text, one column a key."""
    cells = [list(rows[0])] + [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        name, cores = torch.cuda.get_device_name(device), f" on {os.cpu_count()} CPU cores"
    else:
        name, cores = f"{platform.machine()} CPU", ""
    return f"{name}, {torch.get_num_threads()} threads{cores}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
