"""What goes wrong on several processes is seen: a rank that dies, FSDP that accelerate did not turn on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_blocks, make_model
from launching import TESTS, launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tst import TSTTrainer
from hf_tst.checkpoints.folders import last_complete_checkpoint
from hf_tst.training.audit import audit_step, plan_of_arguments


@pytest.mark.parametrize(
    ("launcher", "when", "left"),
    [
        ("accelerate", "after a step", ["checkpoint-2"]),
        ("torchrun", "while saving", ["checkpoint-2"]),
    ],
)
def test_a_rank_that_dies_takes_the_job_down(tmp_path, make_args, launcher, when, left):
    done = launch(launcher, TESTS / "distributed" / "dying_run.py", tmp_path / "run", when)
    assert done.returncode != 0
    assert "Traceback" in done.stdout or "exitcode" in done.stdout
    # FSDP, asked for by the launcher or by the arguments, became DDP.
    assert done.stdout.count("fsdp is set, but accelerate runs MULTI_CPU on cpu") == 1
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == left
    checkpoint = last_complete_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / "checkpoint-2")  # a half-written one has another name
    AutoModelForCausalLM.from_pretrained(checkpoint)
    args = make_args(max_steps=8, tst_phase_ratio=0.25, gradient_accumulation_steps=2)
    resumed = TSTTrainer(make_model("llama"), args, train_dataset=make_blocks(200))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 8


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_one_process_that_is_told_to_end_stops_all_at_the_same_step(tmp_path):
    """And the run goes on to the weights of the uninterrupted one, on two processes, with the files of both."""
    script = TESTS / "distributed" / "interrupted_run.py"
    stopped = launch("torchrun", script, tmp_path / "run", "sigterm", "")
    assert stopped.returncode == 0, stopped.stdout
    for rank in (0, 1):
        assert f'{{"rank": {rank}, "step": 5, "preempted": true}}' in stopped.stdout
    assert steps(tmp_path / "run") == [2, 5]  # of two that may stay, the switch is one
    files = json.loads((tmp_path / "run" / "checkpoint-5" / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(files)
    for name, resume in (("run", "last"), ("whole", "")):
        done = launch("torchrun", script, tmp_path / name, "nothing", resume)
        assert done.returncode == 0, done.stdout
    ours, whole = (tmp_path / name / "checkpoint-8" / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == whole.read_bytes()
    damaged = tmp_path / "run" / "checkpoint-8" / "rng_state_1.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    refused = launch("torchrun", script, tmp_path / "run", "nothing", str(damaged.parent))
    for rank in (0, 1):  # though only one of them has looked
        assert (
            f"rank {rank}: The checkpoint {damaged.parent} is not what was written: rng_state_1.pth has"
            in refused.stdout
        )


def test_a_loss_that_is_not_finite_on_one_process_is_told_by_all(tmp_path, make_args):
    """With the blocks that the process had read, not those of the others."""
    done = launch("torchrun", TESTS / "distributed" / "interrupted_run.py", tmp_path / "run", "nan", "")
    assert done.returncode != 0
    args = make_args(max_steps=8, tst_phase_ratio=0.25)
    plan, layout = plan_of_arguments(args, 200, 2)
    layout = replace(layout, accumulation_steps=2)
    plan = replace(plan, rows_per_step=layout.rows_per_step)
    (blocks,) = [audit_step(plan, layout, 4, 12)["blocks"][1][0]]
    named = ", ".join(str(block) for row in blocks for block in row)
    for rank in (0, 1):
        assert (
            f"rank {rank}: The loss of optimizer step 4 (recovery) is nan; it was computed on blocks {named} of"
            in done.stdout
        )
    assert steps(tmp_path / "run") == [2, 3]


@pytest.mark.parametrize("what", ["full on 0", "full on 1", "full at the end"])
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_stops_all(tmp_path, what):
    """Each says so, with nobody left waiting, and nothing half written is left."""
    done = launch("torchrun", TESTS / "distributed" / "interrupted_run.py", tmp_path / "run", what, "")
    assert done.returncode != 0
    for rank in (0, 1):
        message = (
            f"rank {rank}: Writing {tmp_path}/run/checkpoint-6 failed: [Errno 28] No space left on device ("
        )
        assert message in done.stdout
    assert steps(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "_unfinished").exists()
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")


def test_a_checkpoint_that_does_not_reach_the_disk_stops_all(tmp_path):
    """At the next checkpoint, though only the first process brings it there."""
    done = launch("torchrun", TESTS / "distributed" / "interrupted_run.py", tmp_path / "run", "lost", "")
    assert done.returncode != 0
    for rank in (0, 1):
        message = f"rank {rank}: Writing {tmp_path}/run/checkpoint-3 failed: [Errno 5] Input/output error ("
        assert message in done.stdout
    assert steps(tmp_path / "run") == [2, 3]


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    states = {5: '{"global_step": 5}', 20: '{"global_step": 20}', 30: '{"global_step": 2', 40: None, 50: "[]"}
    for step, state in states.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_model_is_saved_whole_and_its_checkpoints_are_left_to_trainer(
    make_args, tmp_path, monkeypatch, kind
):
    """The branch that accelerate reaches on accelerators only; `tests/gpu` has the real thing."""
    model = make_model("llama", tie_word_embeddings=True)
    trainer = TSTTrainer(model, make_args(), train_dataset=make_blocks(200))
    gathered = {name: weight.clone() for name, weight in model.state_dict().items()}  # no two share memory
    assert "lm_head.weight" in gathered
    plugin = SimpleNamespace(state_dict_type=kind, fsdp_version=2)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    monkeypatch.setattr(trainer.accelerator, "get_state_dict", lambda _: dict(gathered))
    trainer.save_model(tmp_path / "final")
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert set(saved) == set(gathered) - {"lm_head.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(weight, gathered[name]) for name, weight in loaded.state_dict().items())
    trainer.save_model(tmp_path / "checkpoint", _internal_call=True)
    assert (tmp_path / "checkpoint" / "model.safetensors").exists() == (kind == "FULL_STATE_DICT")
