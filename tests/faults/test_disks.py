"""Disks that are full or read-only, made in a mount namespace of its own, where the machine allows that."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = "import faulty_run, sys, json; faulty_run.main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))"


def in_namespace(script, *arguments):
    """Run a shell script that may mount what it likes."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespaces to users")
    python = f"{sys.executable} -c '{RUN}'"
    command = [
        "unshare",
        "-rm",
        "bash",
        "-c",
        f'run() {{ {python} "$@"; }}\n{script}',
        "bash",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE)


def test_a_disk_that_fills_up_and_is_given_room_again(tmp_path):
    """Three checkpoints fit; the fourth does not, and what is half written makes room again."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    done = in_namespace(
        """
        mount -t tmpfs -o size=620k tmpfs $1
        run $1/run $2/log '{"logging_steps": 100}'; echo first $?
        ls $1/run; du -sk $1/run
        mount -o remount,size=50m $1
        run $1/run $2/log2 '{"logging_steps": 100, "resume": "last"}'; echo second $?
        ls $1/run
        cp $1/run/model.safetensors $2
        run $2/whole $2/log3 '{"logging_steps": 100}'; echo third $?
        """,
        disk, kept,
    )  # fmt: skip
    lines = done.stdout.split()
    assert lines[lines.index("first") + 1] == "1"
    last = (kept / "log").read_text().splitlines()[-1]
    assert "failed: " in last
    assert "(0.00 GB are free there)" in last or "No space left" in last
    assert "_unfinished" not in lines
    assert lines[lines.index("second") + 1] == lines[lines.index("third") + 1] == "0"
    assert (kept / "model.safetensors").read_bytes() == (kept / "whole" / "model.safetensors").read_bytes()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    done = in_namespace(
        """
        mkdir $1/run && mount -t tmpfs -o ro tmpfs $1/run
        run $1/run $1/log '{}'; echo status $?
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["status", "2"]
    message = f"run: Cannot write to output_dir={tmp_path}/run (Read-only file system): choose another folder, or change its permissions."
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1] == message
    assert "Traceback" not in log
