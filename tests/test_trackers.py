"""Phases as metrics: in TensorBoard's own files, and in what W&B and Trackio are given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STAND_INS = Path(__file__).parent / "stand_ins"
RUN = """
import json, sys
from conftest import make_blocks, make_model
from hf_tst import TSTTrainer, TSTTrainingArguments
args = TSTTrainingArguments(**json.loads(sys.argv[1]))
TSTTrainer(make_model("llama"), args, train_dataset=make_blocks(200)).train()
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run of 2 + 4 steps that reports to three trackers."""
    folder = tmp_path_factory.mktemp("tracked")
    options = {
        "output_dir": str(folder / "out"), "max_steps": 6, "tst_bag_size": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": ["tensorboard", "wandb", "trackio"], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "run_name": "run", "project": "tests",
    }  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(STAND_INS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "STAND_IN_FOLDER": str(folder),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
    }
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(options)], cwd=Path(__file__).parent, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_tensorboard_shows_the_phases_as_numbers(tracked):
    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("train/tst_current_bag_size")]
    assert points[:6] == [(1, 4), (2, 4), (3, 1), (4, 1), (5, 1), (6, 1)]
    raw = [point.value for point in events.Scalars("train/tst_raw_tokens")][:6]
    assert raw == [96, 192, 216, 240, 264, 288]
    assert len(events.Scalars("train/tst_raw_tokens_per_second")) == 6


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_are_given_numbers(tracked, tracker):
    lines = [json.loads(line) for line in (tracked / f"{tracker}.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["train/tst_current_bag_size"] for line in steps] == [4, 4, 1, 1, 1, 1]
    assert not [name for line in lines for name in line if "tst_run" in name]
