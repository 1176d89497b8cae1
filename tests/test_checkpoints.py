"""Checkpoints are complete or not there; what damages them is noticed; what has to stay is not rotated away."""

import copy
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_blocks, weights_equal
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_tst import TSTTrainer
from hf_tst.checkpoints import manifest
from hf_tst.checkpoints.folders import (
    UNFINISHED,
    clear_unfinished,
    finish_checkpoint,
    last_complete_checkpoint,
    rotate_checkpoints,
)
from hf_tst.checkpoints.manifest import MANIFEST_FILE, manifest_problem, write_manifest


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


@pytest.fixture
def run(llama, make_args):
    """A finished run with checkpoints at steps 4 and 8, and at the switch, 3."""

    def make(**overrides):
        args = make_args(**{"save_strategy": "steps", "save_steps": 4} | overrides)
        model = copy.deepcopy(llama)
        trainer = TSTTrainer(model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4))
        trainer.train()
        return trainer, Path(args.output_dir)

    return make


def test_every_file_of_a_checkpoint_is_in_its_manifest(run):
    _, folder = run()
    assert steps(folder) == [3, 4, 8, 10]
    assert not (folder / UNFINISHED).exists()
    for step in steps(folder):
        checkpoint = folder / f"checkpoint-{step}"
        files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        assert {*files, MANIFEST_FILE} == {path.name for path in checkpoint.iterdir()}
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "data_position.json"} < set(files)
        assert manifest_problem(checkpoint) is None


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "data_position.json", "trainer_state.json", MANIFEST_FILE]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_refused(run, llama, make_args, file, damage, caplog):
    if (file, damage) == (MANIFEST_FILE, "missing"):
        pytest.skip("a checkpoint without manifest is an ordinary one of Trainer")
    _, folder = run()
    path = folder / "checkpoint-10" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with caplog.at_level("WARNING"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")
    assert str(path.parent) in caplog.text
    assert file == MANIFEST_FILE or f": {file} " in caplog.text
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    with pytest.raises(
        ValueError, match=r"checkpoint-10 is not what was written: .*Resume from another one"
    ) as caught:
        trainer.train(str(path.parent))
    assert len(str(caught.value).splitlines()) == 1
    assert trainer.state.global_step == 0
    trainer.train("last")
    assert trainer.state.global_step == 10


def test_checkpoints_of_the_plain_trainer_are_taken_as_they_are(run, llama, make_args):
    _, folder = run()
    (folder / "checkpoint-10" / MANIFEST_FILE).unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")
    state = folder / "checkpoint-10" / "trainer_state.json"
    of_another_step = json.dumps({**json.loads(state.read_text()), "global_step": 8})
    for content in ("{", of_another_step, "[]"):
        state.write_text(content)
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")
    state.unlink()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")


@pytest.mark.parametrize("requested", ["last", True])
def test_no_checkpoint_to_resume_from(llama, make_args, requested):
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    with pytest.raises(ValueError, match="There is no checkpoint to resume from in"):
        trainer.train(resume_from_checkpoint=requested)
    with pytest.raises(ValueError, match="There is no checkpoint nowhere to resume from"):
        trainer.train(resume_from_checkpoint="nowhere")


def test_a_folder_of_the_same_step_is_replaced_as_a_whole(run):
    trainer, folder = run(max_steps=4)
    (folder / "checkpoint-4" / "stray").write_text("of an earlier run")
    trainer.train()
    assert not (folder / "checkpoint-4" / "stray").exists()
    assert manifest_problem(folder / "checkpoint-4") is None


def test_a_process_that_dies_while_it_replaces_a_checkpoint_leaves_the_old_one(tmp_path):
    """Between the two renamings of `finish_checkpoint`."""
    for folder in (tmp_path / UNFINISHED / "checkpoint-4", tmp_path / UNFINISHED / "replaced-checkpoint-4"):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 4}')
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).touch()
        write_manifest(folder)
    (tmp_path / UNFINISHED / "replaced-checkpoint-4" / "mark").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "mark").exists()
    clear_unfinished(tmp_path)
    assert not (tmp_path / UNFINISHED).exists()


def test_a_complete_checkpoint_is_not_replaced_by_one_that_could_not_be_written(run, monkeypatch):
    trainer, folder = run(max_steps=4)

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(torch, "save", self.refuse)

        def refuse(self, *args):
            raise OSError(28, "No space left on device")

    trainer.add_callback(Fails())
    with pytest.raises(
        RuntimeError, match=r"Writing .*checkpoint-4 failed: .*No space left on device"
    ) as caught:
        trainer.train()
    assert "last" in str(caught.value)
    assert manifest_problem(folder / "checkpoint-4") is None
    assert not list(folder.glob(f"{UNFINISHED}/*"))


def test_plain_training_writes_the_same_weights_and_state_as_trainer(llama, make_args, tmp_path):
    common = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2,
        "metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "learning_rate": 1e-2,
    }  # fmt: skip
    plain = TrainingArguments(output_dir=str(tmp_path / "plain"), **common)
    data = {"train_dataset": make_blocks(200), "eval_dataset": make_blocks(4, seed=1)}
    Trainer(copy.deepcopy(llama), plain, **data).train()
    args = make_args(**common, tst_phase_ratio=0, per_device_train_batch_size=8)
    ours = TSTTrainer(copy.deepcopy(llama), args, **data)
    ours.train()
    folder = Path(args.output_dir)
    assert steps(folder) == steps(tmp_path / "plain")
    for step in steps(folder):
        files = {path.name for path in (folder / f"checkpoint-{step}").iterdir()}
        other = tmp_path / "plain" / f"checkpoint-{step}"
        assert files - {MANIFEST_FILE} == {path.name for path in other.iterdir()}
        for name in ("model.safetensors",):
            assert (folder / f"checkpoint-{step}" / name).read_bytes() == (other / name).read_bytes()
    best = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["best_model_checkpoint"]
    expected = json.loads((tmp_path / "plain/checkpoint-6/trainer_state.json").read_text())
    assert best == expected["best_model_checkpoint"].replace(str(tmp_path / "plain"), str(folder))
    assert Path(best).is_dir()


# Runs that share a folder


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def train(llama, make_args):
    """Trains a copy of one model until a step; a checkpoint every second step, none at the switch."""

    def train(stop, resume=None, **overrides):
        args = make_args(
            **{"save_strategy": "steps", "save_steps": 2, "tst_save_at_switch": False} | overrides
        )
        trainer = TSTTrainer(
            copy.deepcopy(llama), args, train_dataset=make_blocks(200), callbacks=[StopAt(stop)]
        )
        trainer.train(resume)
        return trainer

    return train


@pytest.mark.parametrize("ratio", [0, 0.3])
def test_the_last_checkpoint_is_one_of_the_run_that_started_last(train, ratio, caplog):
    """The older run got further, and would be taken for finished."""
    folder = Path(train(10, tst_phase_ratio=ratio).args.output_dir)
    with caplog.at_level("WARNING"):
        train(5, tst_phase_ratio=ratio, learning_rate=3e-3)
    assert "checkpoint-6, checkpoint-8, checkpoint-10 of another run" in caplog.text
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    resumed = train(10, "last", tst_phase_ratio=ratio, learning_rate=3e-3)
    assert {entry["learning_rate"] for entry in resumed.state.log_history if "loss" in entry} != {1e-2}
    whole = train(10, tst_phase_ratio=ratio, learning_rate=3e-3, output_dir=str(folder / "other"))
    assert weights_equal(resumed.model, whole.model)
    assert steps(folder) == [2, 4, 6, 8, 10]
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")


def test_a_run_without_a_checkpoint_does_not_resume_from_an_older_run(train):
    folder = Path(train(10).args.output_dir)
    train(1)
    with pytest.raises(ValueError, match="There is no checkpoint to resume from"):
        train(10, "last")
    train(10, str(folder / "checkpoint-8"))  # the older run goes on when it is asked for by name
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")


def test_a_run_that_is_resumed_from_an_earlier_checkpoint_leaves_the_later_ones_aside(train):
    folder = Path(train(10).args.output_dir)
    train(5, str(folder / "checkpoint-4"))
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    train(7, "last")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")


def test_a_limit_neither_counts_nor_removes_checkpoints_of_another_run(train):
    folder = Path(train(10).args.output_dir)
    train(5, save_total_limit=1, save_steps=1)
    assert steps(folder) == [5, 6, 8, 10]


def test_the_best_checkpoint_is_none_of_another_run(llama, make_args, train):
    folder = Path(train(10).args.output_dir)
    args = make_args(
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="accuracy", greater_is_better=True, tst_save_at_switch=False,
    )  # fmt: skip
    accuracies = iter(
        (0.5, 0.1, 0.1, 0.1, 0.1)
    )  # the best is that of step 2, of which the older run has a checkpoint
    metrics = {"compute_metrics": lambda prediction: {"accuracy": next(accuracies)}}
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4), **metrics)
    trainer.train()
    assert trainer.state.best_model_checkpoint != str(folder / "checkpoint-2")


@pytest.mark.parametrize("requested", ["last", "checkpoint-10"])
def test_a_checkpoint_without_optimizer_and_schedule_is_not_resumed_from(train, requested):
    """Trainer would begin the schedule at its first step, and say nothing."""
    folder = Path(train(10, save_only_model=True).args.output_dir)
    with pytest.raises(ValueError, match=r"no checkpoint to resume from|save_only_model") as caught:
        train(12, requested if requested == "last" else str(folder / requested))
    assert len(str(caught.value).splitlines()) == 1


# What reaches the disk while training continues


@pytest.fixture
def disk(monkeypatch):
    """Holds up what brings files of the second checkpoint to the disk, until it is told what becomes of them."""

    class Disk:
        reached, may_go_on = threading.Event(), threading.Event()
        error = None

        def flush(self, path):
            if Path(path).name == "optimizer.pt" and Path(path).parent.name == "checkpoint-4":
                self.reached.set()
                assert self.may_go_on.wait(60)
                if self.error:
                    raise self.error

    disk = Disk()
    monkeypatch.setattr(manifest, "flush_to_disk", disk.flush)
    return disk


class AtStep5(TrainerCallback):
    """Calls something at the beginning of the step, one after the other."""

    def __init__(self, *calls):
        self.calls = calls

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            for call in self.calls:
                call()


@pytest.fixture
def train_on(disk, llama, make_args):
    """Trains with a checkpoint every second step, of which one may stay; the disk is held up until step 5 has begun."""

    def train_on(call=lambda: None, resume=None, **overrides):
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 8}
        args = make_args(**options | {"tst_save_at_switch": False} | overrides)
        callbacks = [AtStep5(call, disk.may_go_on.set)]
        trainer = TSTTrainer(copy.deepcopy(llama), args, train_dataset=make_blocks(200), callbacks=callbacks)
        trainer.train(resume)
        return trainer

    return train_on


def test_training_continues_while_files_reach_the_disk_and_the_older_checkpoint_stays(
    disk, train_on, make_args, tmp_path
):
    """The machine stops at step 5: the older checkpoint is taken, and leads to the weights of the whole run."""
    folder = Path(make_args().output_dir)

    def lose_power():
        assert disk.reached.wait(60)
        assert manifest_problem(folder / "checkpoint-4") is None
        shutil.copytree(folder, tmp_path / "after")
        lost = tmp_path / "after" / "checkpoint-4" / "optimizer.pt"
        lost.write_bytes(bytes(lost.stat().st_size))

    whole = train_on(lose_power)
    assert steps(folder) == [8]
    assert steps(tmp_path / "after") == [2, 4]
    assert last_complete_checkpoint(tmp_path / "after") == str(tmp_path / "after" / "checkpoint-2")
    resumed = train_on(resume="last", output_dir=str(tmp_path / "after"))
    assert weights_equal(resumed.model, whole.model)
    assert steps(tmp_path / "after") == [8]


@pytest.mark.parametrize("max_steps", [8, 5])
def test_a_checkpoint_that_does_not_reach_the_disk_stops_the_run(disk, train_on, make_args, max_steps):
    """Before the next checkpoint, or at the end; the older one stays."""
    disk.error = OSError(5, "Input/output error")
    if max_steps == 5:
        disk.may_go_on.set()
    with pytest.raises(RuntimeError, match=r"Writing .*checkpoint-4 failed: .*Input/output error"):
        train_on(max_steps=max_steps)
    assert steps(make_args().output_dir) == [2, 4]


def test_a_callback_may_remove_a_checkpoint_that_is_on_its_way_to_the_disk(disk, train_on, make_args):
    folder = Path(make_args().output_dir)
    train_on(lambda: shutil.rmtree(folder / "checkpoint-4"), save_total_limit=None)
    assert steps(folder) == [2, 6, 8]


# Rotation


def test_rotation_keeps_the_switch_and_the_newest(run):
    _, folder = run(save_steps=1, save_total_limit=2)
    assert steps(folder) == [3, 10]
    _, folder = run(save_steps=1, save_total_limit=1)
    assert steps(folder) == [3, 10]
    _, folder = run(
        save_steps=1, save_total_limit=2, tst_save_at_switch=False, output_dir=str(folder / "other")
    )
    assert steps(folder) == [9, 10]


def test_rotation_keeps_the_best_and_the_newest_also_at_the_end(run):
    """With a limit of 1, Trainer would remove the newest at the end, and so what a stopped run goes on from."""

    class Worsening(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(abs(state.global_step - 4))

    options = {
        "save_total_limit": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True, "tst_phase_ratio": 0.2,
    }  # fmt: skip
    trainer, folder = run(**options, max_steps=5)
    shutil.rmtree(folder)
    trainer.add_callback(Worsening())
    trainer.train()
    assert steps(folder) == [1, 4, 5]
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-4")
    assert trainer.args.save_total_limit == 1


def test_rotation_goes_by_steps_not_by_the_clock(tmp_path):
    for step in (1, 2, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 - step, 10**9 - step))
    rotate_checkpoints(tmp_path, 2, keep={"checkpoint-11"})
    assert steps(tmp_path) == [10, 11]
    rotate_checkpoints(tmp_path, None, keep=())
    assert steps(tmp_path) == [10, 11]


def test_finishing_writes_the_manifest_before_the_name(tmp_path, monkeypatch):
    written = tmp_path / UNFINISHED / "checkpoint-7"
    (written / "shards").mkdir(parents=True)
    (written / "shards" / "0.distcp").write_bytes(b"weights")
    seen = []
    rename = Path.rename

    def note(self, target):
        seen.append((self.name, (self / MANIFEST_FILE).is_file()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", note)
    finish_checkpoint(tmp_path, "checkpoint-7")
    assert seen == [("checkpoint-7", True)]
    assert manifest_problem(tmp_path / "checkpoint-7") is None
    (tmp_path / "checkpoint-7" / "shards" / "0.distcp").write_bytes(b"Weights")
    assert "shards/0.distcp does not hold" in manifest_problem(tmp_path / "checkpoint-7")
