"""Starting a script on two processes, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import PATIENCE

TESTS = Path(__file__).parent.parent
LAUNCHERS = {
    # The rendezvous finds a free port by itself.
    "torchrun": ["torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"],
    # With --cpu accelerate starts a single process; without, it starts all, and the arguments say that they use the CPU.
    "accelerate": [
        "accelerate.commands.launch",
        f"--config_file={TESTS.parent / 'hf_tst/pretraining/accelerate/fsdp2.yaml'}",
        "--mixed_precision=no",
        "--main_process_port=0",
    ],
}


def launch_environment() -> dict[str, str]:
    """What the processes need of the environment, beside what this one has."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def launch(
    launcher: str, script: Path, *args: object, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `processes` processes over gloo; the output of all is in `stdout`."""
    count = {"torchrun": f"--nproc-per-node={processes}", "accelerate": f"--num_processes={processes}"}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], count[launcher], str(script), *map(str, args)]
    return subprocess.run(
        command,
        env=os.environ | launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )


def launch_two(script: Path, out: Path) -> tuple[str, list[Any]]:
    """Run `script` with the folder `out` on two processes; what they print, and what each leaves in `rank<i>.json`."""
    done = launch("torchrun", script, out)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout, [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
