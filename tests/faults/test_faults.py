"""Runs that are killed, starved and lied to go on from the newest complete checkpoint to the uninterrupted run's weights."""

import json
import random

import pytest
from fault_catalogue import FAULTS, kept_checkpoints, observe, run, start, uninterrupted
from fault_table import make_table
from tables import read_table

from hf_tst.checkpoints.folders import last_complete_checkpoint
from hf_tst.checkpoints.manifest import manifest_problem

TABLE = read_table("docs/faults.md", "faults")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where all runs leave their files, so that a run to compare with is made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_resumed_run_is_the_uninterrupted_one(root, fault):
    outcome = observe(fault, root)
    assert outcome.same
    assert outcome.ending != "status 0"
    assert outcome.row in TABLE.splitlines()


def test_the_table_has_a_row_for_every_fault():
    rows = TABLE.splitlines()[2:]
    assert make_table(rows) == TABLE
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [fault.name for fault in FAULTS]


@pytest.mark.parametrize(("data", "seed"), [("blocks", 0), ("blocks", 1), ("stream", 2)])
def test_killed_at_random_moments_until_it_gets_through(root, data, seed):
    """Whenever it is killed, all checkpoints that are there are complete, and none is lost."""
    folder = root / f"random-{data}-{seed}"
    draw = random.Random(seed)
    options = {"data": data, "save_steps": 1}
    newest = 0
    for _ in range(8):
        process = start(folder, **options, **({"resume": "last"} if newest else {}))
        process.join(timeout=draw.uniform(0.1, 2.5))
        process.kill()
        process.join()
        kept = kept_checkpoints(folder)
        assert not [step for step in kept if manifest_problem(folder / f"checkpoint-{step}")]
        assert max(kept, default=0) >= newest
        newest = max(kept, default=0)
        assert not newest or last_complete_checkpoint(folder) == str(folder / f"checkpoint-{newest}")
    assert run(folder, **options, **({"resume": "last"} if newest else {})) == "status 0"
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == uninterrupted(root, json.dumps(options))


def test_the_same_seed_gives_the_same_weights(root):
    """Of two processes; and other seeds give others."""
    weights = []
    for name, seed in (("one", 42), ("two", 42), ("three", 43)):
        assert run(root / name, seed=seed) == "status 0"
        weights.append((root / name / "checkpoint-10" / "model.safetensors").read_bytes())
        weights.append((root / name / "checkpoint-10" / "optimizer.pt").read_bytes())
    assert weights[:2] == weights[2:4]
    assert weights[0] != weights[4]


def test_a_step_that_is_skipped_leaves_weights_and_moments_alone(root):
    """A NaN once in ten steps: the others train, and the run gets to its end without it."""
    skipped = {
        "fault": "nan gradient",
        "at": 5,
        "tst_nonfinite_loss": "skip",
        "logging_steps": 1,
        "save_steps": 1,
    }
    assert run(root / "skip", **skipped) == "status 0"
    read = {
        step: (root / "skip" / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        for step in range(3, 11)
    }
    assert read[5] == read[6]
    assert len({read[step] for step in (3, 4, 5, 7, 8, 9, 10)}) == 7
    log = (root / "skip.log").read_text()
    assert (
        "The gradient of optimizer step 5 (recovery) is nan; it was computed on blocks 168, 155, 71, 99"
        in log
    )
    assert "the step is skipped" in log
    history = json.loads((root / "skip" / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("tst_skipped_steps") for entry in history if "loss" in entry] == [None] * 5 + [1] * 5
    assert run(root / "ignored", **{**skipped, "tst_nonfinite_loss": "ignore"}) == "status 0"
    assert (root / "ignored" / "checkpoint-10" / "model.safetensors").read_bytes().count(
        b"\x00\x00\xc0\x7f"
    ) > 100
