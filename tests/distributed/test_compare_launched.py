"""hf-tst compare whose runs are started by a launcher, on two processes each, against runs of one process."""

import shlex
import sys

import pytest
from launching import LAUNCHERS, launch_environment

from hf_tst.experiments.compare import main

FLAGS = (
    "--arms baseline,tst+mtp --seeds 0 --budget data --max_steps 10 --eval_steps 5 --logging_steps 1 "
    '--lr_scheduler_kwargs {"num_decay_steps":2} --per_device_train_batch_size 2 --tokens_per_step 128'
)


def test_two_processes_give_the_table_of_one(tiny_recipe, tmp_path, in_process, monkeypatch):
    flags = [str(tiny_recipe), *FLAGS.split(), "--output_dir"]
    one = main([*flags, str(tmp_path / "one")])
    monkeypatch.undo()
    for name, value in launch_environment().items():
        monkeypatch.setenv(name, value)
    launcher = shlex.join([sys.executable, "-m", *LAUNCHERS["torchrun"], "--nproc-per-node=2"])
    two = main([*flags, str(tmp_path / "two"), "--launcher", launcher])
    assert two.facts["hardware"].startswith("2 x ")
    assert [run.status for run in two.runs] == ["finished"] * 2
    for alone, shared in zip(one.arms, two.arms, strict=True):
        assert alone.arm == shared.arm
        assert len(alone.best.curve) == len(shared.best.curve) > 2
        for before, after in zip(alone.best.curve, shared.best.curve, strict=True):
            assert after.eval_loss == pytest.approx(before.eval_loss, rel=1e-4)
            assert (after.step, after.raw_tokens) == (before.step, before.raw_tokens)
            assert after.flops == before.flops
    assert len({arm.best.mean_final_eval_loss for arm in two.arms}) == 2
