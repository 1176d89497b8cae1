"""The driver that records evidence on a device: its limits, what it does anew, and every step of it in small."""

import json
import lzma
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import gpu_evidence
import numpy as np
import psutil
import pytest
from benchmark_trainer import split_time
from gpu_evidence import Step

SCRIPT = Path(gpu_evidence.__file__)


def python(name, code, limit=20.0):
    return Step(name, ["python", "-c", code], limit)


@pytest.fixture
def run_steps(monkeypatch, tmp_path):
    """Run a slice of the given steps; the results on record after it."""

    def run(*steps, seconds=60):
        monkeypatch.setitem(gpu_evidence.SLICES, "a", lambda args: list(steps))
        flags = ["--slice", "a", "--output_dir", str(tmp_path), "--device", "cpu", "--seconds", str(seconds)]
        gpu_evidence.main(flags)
        (record,) = json.loads((tmp_path / "results.json").read_text()).values()
        return record["steps"]

    monkeypatch.setattr(gpu_evidence, "DEVICE", "pass")
    return run


def test_a_failing_step_is_recorded_and_the_next_one_runs(run_steps, tmp_path):
    results = run_steps(
        python("bad", "print('so far'); raise SystemExit('too bad')"),
        python("slow", "import time; print('begun', flush=True); time.sleep(600)", limit=1),
        python("good", "import hf_tst; open('OUT/rows.csv', 'w').write(hf_tst.__file__)"),
    )
    assert [result["status"] for result in results.values()] == [
        "passed", "failed, exit status 1", "failed, not done in 4 s", "passed",
    ]  # fmt: skip
    assert "so far" in results["bad"]["output"]
    assert "too bad" in results["bad"]["output"]
    assert "begun" in results["slow"]["output"]
    assert Path((tmp_path / "rows.csv").read_text()).parents[1] == SCRIPT.parents[1]
    page = (tmp_path / "results.md").read_text()
    assert "| bad | failed, exit status 1 |" in page
    assert "too bad" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "results.md",
        "output.log",
        "rows.csv",
    }


def test_what_has_passed_is_not_done_again(run_steps, tmp_path):
    steps = [
        python("counted", "open('OUT/runs', 'a').write('x')"),
        python("needs more", "open('OUT/mended')"),
    ]
    assert run_steps(*steps)["needs more"]["status"] == "failed, exit status 1"
    (tmp_path / "mended").touch()
    results = run_steps(*steps)
    assert {result["status"] for result in results.values()} == {"passed"}
    assert (tmp_path / "runs").read_text() == "x"


def test_the_time_of_the_whole_ends_it(run_steps):
    steps = [python("long", "import time; time.sleep(600)"), python("last", "pass")]
    results = run_steps(*steps, seconds=8)
    assert results["device"]["status"] == "passed"
    assert results["long"]["status"] == results["last"]["status"] == "not reached"
    quick = [python("long", "pass"), steps[1]]
    assert run_steps(*quick)["last"]["status"] == "passed"


@pytest.mark.parametrize("is_cut", [False, True])
def test_processes_of_a_step_are_ended_with_it(run_steps, tmp_path, is_cut):
    # Launchers give their processes a session, and end them unless they are killed.
    child = f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session={is_cut})"
    code = f"import subprocess, sys, time; open('OUT/child', 'w').write(str({child}.pid)); time.sleep({600 * is_cut})"
    run_steps(python("parent", code, limit=1 if is_cut else 20))
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "child").read_text())).wait(60)


def test_time_is_split_by_kind_of_kernel():
    kernels = [
        ("sm90_xmma_gemm_bf16", 0, 10),
        ("multi_hot_kernel", 12, 15),
        ("elementwise_kernel", 14, 18),  # beside the one before
        ("pytorch_flash::flash_fwd_kernel", 20, 25),
        ("Memcpy HtoD", 21, 22),  # within the one before
        ("nvjet_tst_128x64", 25, 26),
    ]
    expected = {"products": 11, "our_kernel": 3, "attention": 5, "other": 5, "gaps": 4}
    assert split_time(reversed(kernels)) == expected


def write_corpus(folder):
    """Documents of random token ids, each ended by id 0, packed by xz as two parts and a held-out file."""
    random = np.random.default_rng(0)
    for name, documents in (("part0.u16.xz", 300), ("part1.u16.xz", 300), ("valid.u16.xz", 20)):
        ids = random.integers(1, 500, (documents, 50), dtype=np.uint16)
        ids[:, -1] = 0
        (folder / name).write_bytes(lzma.compress(ids.astype("<u2").tobytes()))


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_step_runs_in_small_on_the_cpu(tmp_path, name):
    write_corpus(tmp_path)
    out = tmp_path / "out"
    flags = ["--slice", name, "--output_dir", out, "--corpus", tmp_path, "--work_dir", tmp_path / "work"]
    command = [sys.executable, SCRIPT, *flags, "--device", "cpu", "--tiny", "--seconds", "3600"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((out / "results.json").read_text()).values()
    failed = {step: result for step, result in record["steps"].items() if result["status"] != "passed"}
    assert not failed
    files = list(out.iterdir())
    assert {"results.json", "results.md"} < {path.name for path in files}
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size < 2**24 for path in files)
    assert any(path.name == ("step.csv" if name == "a" else "comparison.json") for path in files)
