#!/usr/bin/env python
"""Measure how long training waits for a checkpoint: writing, hashing, and what reaches the disk meanwhile.

    python scripts/benchmark_checkpoint.py
    python scripts/benchmark_checkpoint.py --gigabytes 1 10 --rounds 5 --folder /where/checkpoints/go

Files of at most 1 GB, as a sharded checkpoint has. Training waits for `write` and `hash`, together `seconds`; `flush` (fsync) runs
while it continues. `share` is that of the flush in all three. Each round begins when nothing is left to flush. Medians; appends to
benchmarks/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarking import append_rows, format_table

from hf_tst.checkpoints.folders import UNFINISHED, finish_checkpoint
from hf_tst.checkpoints.manifest import flush_folder
from hf_tst.errors import TSTError

NAME = "checkpoint-1"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="sizes of the checkpoint")
    parser.add_argument("--folder", default=".", help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--csv", default="benchmarks/checkpoint.csv", help="file to append to")
    return parser.parse_args()


def measure(folder: Path, files: int, weights: torch.Tensor) -> list[float]:
    """Seconds of writing, hashing and flushing one checkpoint."""
    written = folder / UNFINISHED / NAME
    written.mkdir(parents=True)
    os.sync()
    times = [time.perf_counter()]
    for number in range(files):
        torch.save(weights, written / f"{number}.pt")
    times.append(time.perf_counter())
    finish_checkpoint(folder, NAME)
    times.append(time.perf_counter())
    flush_folder(folder / NAME)
    times.append(time.perf_counter())
    shutil.rmtree(folder / NAME)
    return [end - start for start, end in itertools.pairwise(times)]


def main() -> None:
    options = parse_arguments()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for size in options.gigabytes:
            free = shutil.disk_usage(folder).free / 1e9
            if free < 1.2 * size:
                raise TSTError(
                    f"{options.folder} has room for {free:.1f} GB, which is too little for {size:g} GB. "
                    "Free some, or measure less with --gigabytes."
                )
            files = math.ceil(size)
            weights = torch.randn(int(size * 1e9 / 4 / files))
            measure(Path(folder), 1, weights)  # warms up
            rounds = [measure(Path(folder), files, weights) for _ in range(options.rounds)]
            write, hashing, flush = (statistics.median(times) for times in zip(*rounds, strict=True))
            results.append(
                {
                    "gigabytes": size,
                    "files": files,
                    "seconds": round(write + hashing, 4),
                    "write": round(write, 4),
                    "hash": round(hashing, 4),
                    "flush": round(flush, 4),
                    "share": round(statistics.median(times[2] / sum(times) for times in rounds), 3),
                }
            )
    print(format_table(results))
    append_rows(options.csv, results, torch.device("cpu"))


if __name__ == "__main__":
    main()
