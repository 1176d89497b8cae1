"""A run of thousands of steps holds on to neither memory nor files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("soak_run.py")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read from /proc")
def test_memory_and_open_files_stay_flat(tmp_path):
    done = subprocess.run([sys.executable, str(RUN), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]
    assert [sample["step"] for sample in samples] == list(range(100, 3001, 100))
    memory, files = ({sample["step"]: sample[name] for sample in samples} for name in ("memory", "files"))
    # Both phases have saved and evaluated by step 1 000; the resume, at 1 500, makes another trainer and optimizer.
    for before, after in ((1000, 1500), (1600, 3000), (1000, 3000)):
        assert memory[after] - memory[before] < 2 * 2**20
    assert max(files.values()) <= files[1000] + 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3000",
        "checkpoint-900",
    ]
