"""The real client of the Hub: scripts, in processes that have the address of a Hub in their environment.

    python client.py < jobs

Each line of `jobs` is a JSON list: a command of a script and its arguments, the folder that it runs in, what its environment has
beside this one's, and the files for what it prints. Its process is forked from this one, whose imports take seconds; a line with
its exit status says that it is over. (`processes.py` cannot serve here: its processes know no Hub.)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot  # noqa: F401  every run draws a curve
import pushing_run  # noqa: F401  for its imports
from processes import run_here


def fork(command: list[str], folder: str, environment: dict[str, str], printed: list[str]) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    run_here(command, folder, {**os.environ, **environment}, printed)
    sys.exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        print(fork(*json.loads(line)), flush=True)
