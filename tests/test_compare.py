"""hf-tst compare: what it plans, that runs are done once and go on where they stopped, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import DENSE, Ended
from processes import PATIENCE, run_script, start_process
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerState

from hf_tst import TSTTrainingArguments
from hf_tst.cli import main as cli
from hf_tst.errors import TSTError
from hf_tst.experiments import budget, time_limit
from hf_tst.experiments import queue as run_queue
from hf_tst.experiments.budget import plan_comparison
from hf_tst.experiments.compare import CompareArguments, main
from hf_tst.experiments.experiment import open_experiment
from hf_tst.experiments.options import parse_experiment, parse_list
from hf_tst.experiments.queue import PlannedRun, run_all
from hf_tst.experiments.result import CurvePoint, RunResult
from hf_tst.experiments.run import _check_launch
from hf_tst.experiments.time_limit import TimeLimit
from hf_tst.pretraining import pretrain
from hf_tst.pretraining.options import pick
from hf_tst.pretraining.overwrite import holding_folder


def planned(recipe, *flags):
    return plan_comparison(open_experiment(*parse_experiment([str(recipe), *flags], CompareArguments)))


def differences(runs, arm):
    """Names of the settings, those of model and data included, that differ between an arm and the baseline, at one rate and
    seed: as they are given to a run, and as its training arguments come out of them."""
    first = {
        run.arm.name: run.settings | pick(run.settings, TSTTrainingArguments).to_dict()
        for run in runs
        if run.settings["seed"] == 0
    }
    names = first[arm].keys() | first["baseline"].keys()
    return {name for name in names if first[arm].get(name) != first["baseline"].get(name)}


def test_arms_differ_in_what_the_table_says_and_in_nothing_else(tiny_recipe):
    runs = planned(tiny_recipe)
    plain = {"tst_phase_ratio", "tst_fused_loss"}
    assert differences(runs, "tst") == plain
    runs = planned(tiny_recipe, "--arms", "baseline,tst,mtp,tst+mtp")
    steps = {"max_steps", "warmup_steps", "lr_scheduler_kwargs"}  # an extra head costs operations
    assert differences(runs, "tst") == plain
    assert differences(runs, "mtp") - steps == {"mtp_num_heads"}
    assert differences(runs, "tst+mtp") - steps == {"mtp_num_heads", *plain}
    runs = planned(tiny_recipe, "--budget", "data")
    assert differences(runs, "tst") == {
        *plain,
        "max_steps",
        "warmup_steps",
        "lr_scheduler_kwargs",
    }
    settings = {run.arm.name: run.settings for run in runs}
    # 12 steps on bags of 4, and 28 more.
    assert settings["baseline"]["max_steps"] == 12 * 4 + 28
    assert settings["baseline"]["warmup_steps"] == round(4 * 76 / 40)
    assert settings["baseline"]["lr_scheduler_kwargs"] == {"num_decay_steps": round(8 * 76 / 40)}


def test_an_arm_with_extra_heads_takes_fewer_steps(tiny_recipe):
    steps = {
        run.arm.name: run.arm.schedule.max_steps
        for run in planned(tiny_recipe, "--arms", "baseline,mtp", "--max_steps", "200")
    }
    assert steps["mtp"] < steps["baseline"]


def test_arms_with_extra_heads_train(tiny_recipe, tmp_path, in_process):
    flags = ["--arms", "baseline,mtp,tst+mtp", "--budget", "data", "--seeds", "0"]
    comparison = main([str(tiny_recipe), *flags, "--output_dir", str(tmp_path)])
    assert [run.status for run in comparison.runs] == ["finished"] * 3
    assert len({arm.best.curve[-1].raw_tokens for arm in comparison.arms}) == 1
    flops = {arm.arm: arm.best.curve[-1].flops for arm in comparison.arms}
    assert flops["mtp"] > flops["baseline"]
    for name in ("baseline", "mtp"):
        log = (tmp_path / f"{name}-lr0.01-seed0" / "arguments.yaml").read_text()
        assert yaml.safe_load(log)["tst_fused_loss"] == "on"


MORE_ARMS = {
    "tst-s2": {"tst_bag_size": 2, "tst_phase_ratio": 0.2, "seeds": 3},
    "mtp-0.1": {"mtp_num_heads": 2, "mtp_loss_weight": 0.1, "tst_phase_ratio": 0.0},
}


def test_further_arms_are_changes_of_options(tiny_recipe, tmp_path, in_process):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            yaml.safe_load(tiny_recipe.read_text())
            | {"more_arms": MORE_ARMS, "arms": "baseline,tst,tst-s2,mtp-0.1", "seeds": "0,1", "max_steps": 80}
        )
    )
    runs = planned(recipe)
    assert [(run.arm.name, run.settings["seed"]) for run in runs] == [
        ("baseline", 0), ("tst", 0), ("tst-s2", 3), ("mtp-0.1", 0), ("baseline", 1), ("tst", 1), ("mtp-0.1", 1),
    ]  # fmt: skip
    settings = {run.arm.name: run.settings for run in runs}
    changed = {"tst_phase_ratio", "tst_bag_size", "seed"}
    names = settings["tst"].keys() | settings["tst-s2"].keys()
    assert {n for n in names if settings["tst"].get(n) != settings["tst-s2"].get(n)} == changed
    assert (settings["tst-s2"]["tst_bag_size"], settings["tst-s2"]["tst_phase_ratio"]) == (2, 0.2)
    # As of a built-in arm without superposition: fused, and as many operations in fewer steps.
    assert settings["mtp-0.1"]["tst_fused_loss"] == "on"
    assert (settings["mtp-0.1"]["mtp_num_heads"], settings["mtp-0.1"]["mtp_loss_weight"]) == (2, 0.1)
    assert settings["mtp-0.1"]["max_steps"] < 80 == settings["tst-s2"]["max_steps"]
    flags = ["--arms", "baseline,tst-s2", "--seeds", "3", "--output_dir", str(tmp_path / "out")]
    comparison = main([str(recipe), *flags])
    assert comparison.facts["arm tst-s2"] == "tst_bag_size=2, tst_phase_ratio=0.2"
    assert comparison.arms[1].best.curve[-1].raw_tokens == (16 * 2 + 64) * 64
    assert comparison.arms[1].difference_to_baseline is not None


def test_all_arms_are_shortened_alike_to_a_limit_of_seconds(tiny_recipe, tmp_path, in_process, monkeypatch):
    """On a machine on which a step takes a second, by the short run."""
    flags = [
        str(tiny_recipe), "--max_steps", "4000", "--tst_bag_size", "2", "--eval_steps", "0.25", "--save_strategy", "no",
        "--arms", "baseline,tst", "--output_dir", str(tmp_path), "--seeds",
    ]  # fmt: skip

    def paced(experiment, runs):
        return TimeLimit(4000, 4000, experiment.args.seconds, 10.0, 2.0, 1.0, 1.0, runs[0].arm.flops.recovery)

    monkeypatch.setattr(time_limit, "time_short_run", paced)
    comparison = main([*flags, "0,1", "--seconds", "1000"])
    chosen = json.loads((tmp_path / "time_limit.json").read_text())["max_steps"]
    # Four runs of a start, six evaluations (before it, four, and after it) and the steps.
    assert 900 < 4 * (10 + 6 * 2 + chosen) <= 950
    assert len(in_process) == 4
    for run in in_process:
        settings = yaml.safe_load((tmp_path / run / "arguments.yaml").read_text())
        assert settings["max_steps"] == chosen
        assert settings["lr_scheduler_kwargs"] == {"num_decay_steps": max(1, round(8 * chosen / 4000))}
    assert f"max_steps {chosen:,} of the configured 4,000," in comparison.facts["time limit"]
    # What is added later takes as many steps, with or without a limit; what is done is not done again.
    again = main([*flags, "0,1,2"])
    assert in_process[4:] == ["baseline-lr0.01-seed2", "tst-lr0.01-seed2"]
    assert {arm.best.curve[-1].step for arm in again.arms} == {chosen}
    # A run that would end too late is not started, and the report is there.
    late = main([*flags, "0,9", "--seconds", "100"])
    assert [run.status for run in late.runs] == ["finished", "finished", "missing", "missing"]
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Of three runs, two at a time, one place has two, each with less than half of the time.
    three = [*flags, "0,1,2", "--arms", "tst", "--seconds", "500", "--processes", "2"]
    experiment = open_experiment(*parse_experiment(three, CompareArguments))
    runs, limit = time_limit.plan_within_limit(experiment, time.monotonic())
    assert 450 < 2 * (10 + 6 * 2 + limit.max_steps) <= 475
    assert len(runs) == 3
    shutil.rmtree(tmp_path)
    with pytest.raises(TSTError, match=r"too little for 4 runs: \d+ s have passed, and the runs need 88 s"):
        main([*flags, "0,1", "--seconds", "80"])


@pytest.mark.parametrize(
    "intervals",
    [
        ["--eval_strategy", "no", "--logging_strategy", "epoch"],
        ["--eval_strategy", "no"],
    ],
)
def test_intervals_that_are_chosen_for_the_user_are_shares_of_the_lowered_steps(
    tiny_recipe, tmp_path, intervals
):
    recipe = {**yaml.safe_load(tiny_recipe.read_text()), "max_steps": 20_000}
    del recipe["logging_steps"]  # 500 by default, which is often enough for 20,000 steps
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = [str(tmp_path / "recipe.yaml"), *intervals, "--arms", "tst", "--tst_bag_size", "2"]
    flags += ["--seeds", "0", "--train_file", str(tiny_recipe.parent / "corpus.txt"), "--seconds", "300"]
    experiment = open_experiment(*parse_experiment(flags, CompareArguments))
    (run,) = plan_comparison(replace(experiment, blocks=None), max_steps=900)
    state, args = TrainerState(), pick(run.settings, TSTTrainingArguments)
    state.compute_steps(args, run.settings["max_steps"])
    assert (state.eval_steps, state.logging_steps) == (45, 45)


@pytest.mark.parametrize(
    "intervals", [["steps", "--eval_steps", "7"], ["steps", "--eval_steps", "0.3"], ["epoch"]]
)
def test_a_limit_counts_the_evaluations_of_a_run(tiny_recipe, tmp_path, in_process, monkeypatch, intervals):
    counted = []

    class Counting(pretrain.TSTTrainer):
        def evaluate(self, *args, **kwargs):
            counted.append(self.state.global_step)
            return super().evaluate(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", Counting)
    flags = ["--max_steps", "20", "--eval_strategy", *intervals, "--arms", "tst", "--seeds", "0"]
    comparison = main([str(tiny_recipe), *flags, "--output_dir", str(tmp_path)])
    limit = TimeLimit(
        20, 20, 9.0, start_seconds=0, evaluation_seconds=1, superposition_seconds=0, recovery_seconds=0, flops_per_latent_token=1,
    )  # fmt: skip
    assert limit.seconds_of(comparison.runs[0]) == (len(counted), 0)


def test_a_limit_that_nothing_needs_changes_nothing(tiny_recipe, tmp_path, in_process):
    flags = ["--arms", "tst", "--seeds", "0", "--seconds", "10000", "--output_dir", str(tmp_path)]
    (arm,) = main([str(tiny_recipe), *flags]).arms
    assert arm.best.curve[-1].step == 40
    assert in_process == ["calibration", "tst-lr0.01-seed0"]


def test_the_limit_of_runs_at_the_same_time_is_that_of_the_slowest_place(
    tiny_recipe, tmp_path, in_process, monkeypatch
):
    flags = [
        "--arms",
        "tst",
        "--seeds",
        "0,1,2",
        "--seconds",
        "10000",
        "--processes",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    comparison = main([str(tiny_recipe), *flags])
    assert {*in_process[:2]} == {"calibration", "calibration-copy1"}
    assert [run.status for run in comparison.runs] == ["finished"] * 3


def test_a_limit_keeps_what_was_timed_for_an_equal_time(tiny_recipe, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(budget, "TOLERANCE", math.inf)  # what is measured is noise here
    flags = [
        str(tiny_recipe), "--arms", "tst", "--seeds", "0", "--budget", "time", "--calibration_steps", "8",
        "--seconds", "10000", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    time_limit.plan_within_limit(
        open_experiment(*parse_experiment(flags, CompareArguments)), time.monotonic()
    )
    assert in_process == ["calibration-tst", "calibration"]


def test_every_arm_has_every_rate_and_seed_and_pairs_come_first(tiny_recipe):
    runs = planned(tiny_recipe, "--learning_rates", "1e-3,2e-3", "--seeds", "5,7")
    names = [run.name for run in runs]
    assert names[:4] == [f"{arm}-lr{rate}-seed5" for arm in ("baseline", "tst") for rate in (0.001, 0.002)]
    assert len(names) == 8
    for run in runs:
        settings = run.settings
        assert (
            run.name
            == f"{run.arm.name}-lr{settings['learning_rate']:g}-seed{settings['seed']}"
            == run.folder.name
        )


def test_runs_are_done_once_and_the_report_follows(tiny_recipe, tmp_path, in_process, capsys):
    argv = [str(tiny_recipe), "--seeds", "0", "--output_dir", str(tmp_path)]
    comparison = main(argv)
    assert in_process == ["baseline-lr0.01-seed0", "tst-lr0.01-seed0"]
    baseline, tst = comparison.arms
    assert baseline.best.mean_final_eval_loss < 5 < baseline.best.curve[0].eval_loss
    assert [point.step for point in tst.best.curve] == [0, 10, 20, 30, 40]
    assert tst.best.curve[-1].raw_tokens == (12 * 4 + 28) * 64
    assert tst.best.curve[-1].latent_tokens == baseline.best.curve[-1].raw_tokens == 40 * 64
    assert tst.best.curve[-1].flops == baseline.best.curve[-1].flops
    assert tst.best.peak_memory_bytes > 2**20
    assert f"{baseline.best.mean_final_eval_loss:.4f}" in capsys.readouterr().out
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["facts"]["command"].startswith("hf-tst compare ")
    assert (tmp_path / "tst-lr0.01-seed0" / "model.safetensors").is_file()
    # The ten means of the saved model, weighed by their numbers of positions, give the loss that Trainer has found.
    result = RunResult.load(tmp_path / "tst-lr0.01-seed0")
    sizes = Counter(int((place + 0.5) / 15 * 10) for place in range(15))
    mean_loss = sum(sizes[tenth] * loss for tenth, loss in enumerate(result.loss_by_position)) / 15
    assert mean_loss == pytest.approx(result.final_eval_loss, rel=1e-3)
    again = main([*argv[:2], "0,1", *argv[3:], "--arms", "tst"])
    assert in_process[2:] == ["tst-lr0.01-seed1"]
    assert again.arms[0].best.final_eval_losses[0] == tst.best.final_eval_losses[0]


def test_a_model_with_code_of_its_own_is_compared(tiny_recipe, tmp_path, in_process):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = LlamaConfig(**DENSE).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    flags = [
        "--config_name",
        str(folder),
        "--model_type",
        "",
        "--config_overrides",
        "{}",
        "--trust_remote_code",
    ]
    argv = [str(tiny_recipe), *flags, "--max_steps", "4", "--arms", "tst", "--seeds", "0"]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    assert RunResult.load(tmp_path / "out" / "tst-lr0.01-seed0").loss_by_position


def test_an_adapter_of_a_revision_is_compared(tiny_recipe, tmp_path, in_process):
    cached = tmp_path / "models--org--base"
    config = LlamaConfig(**DENSE | {"vocab_size": 512, "max_position_embeddings": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "v2").write_text("0" * 40)
    tokenizer = yaml.safe_load(tiny_recipe.read_text())["tokenizer_name"]
    flags = ["--model_name_or_path", "org/base", "--model_revision", "v2", "--cache_dir", str(tmp_path)]
    flags += ["--tokenizer_name", tokenizer, "--lora_rank", "2", "--model_type", "", "--config_overrides", ""]
    argv = [str(tiny_recipe), *flags, "--max_steps", "4", "--arms", "tst", "--seeds", "0"]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    assert RunResult.load(tmp_path / "out" / "tst-lr0.01-seed0").loss_by_position


def test_half_a_run_goes_on_from_its_last_whole_checkpoint(tiny_recipe, tmp_path, in_process, monkeypatch):
    argv = [str(tiny_recipe), "--seeds", "0", "--arms", "tst", "--output_dir"]
    whole = main([*argv, str(tmp_path / "whole")])
    steps = []

    class Stopped(pretrain.TSTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 25 and 25 not in steps:
                steps.append(25)
                raise RuntimeError("the machine went away")
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", Stopped)
    with pytest.raises(
        SystemExit, match=r"tst-lr0.01-seed0 failed: the machine went away \(.*log.txt\)"
    ) as end:
        main([*argv, str(tmp_path / "half")])
    assert isinstance(end.value.code, str)  # status 1
    assert "| missing |" in (tmp_path / "half" / "comparison.md").read_text()
    resumed = main([*argv, str(tmp_path / "half")])
    assert steps == [*range(26), *range(20, 40)]
    assert resumed.arms[0].best.final_eval_losses == whole.arms[0].best.final_eval_losses
    losses = [[point.eval_loss for point in made.arms[0].best.curve] for made in (whole, resumed)]
    assert losses[0] == losses[1]
    assert resumed.arms[0].best.curve[-1].raw_tokens == whole.arms[0].best.curve[-1].raw_tokens


def test_a_run_whose_result_was_not_written_takes_no_step_more(tiny_recipe, tmp_path, in_process):
    argv = [str(tiny_recipe), "--seeds", "0", "--output_dir", str(tmp_path)]
    first = main(argv)
    for path in tmp_path.glob("*/result.json"):
        path.unlink()
    again = main(argv)
    assert len(in_process) == 4
    for before, after in zip(first.arms, again.arms, strict=True):
        assert after.best.final_eval_losses == before.best.final_eval_losses
        assert [(p.step, p.eval_loss) for p in after.best.curve] == [
            (p.step, p.eval_loss) for p in before.best.curve
        ]


def test_changed_settings_are_refused_with_both_values(tiny_recipe, tmp_path, in_process, capsys):
    folder = tmp_path / "tst-lr0.01-seed0"
    folder.mkdir()
    runs = planned(tiny_recipe)
    (settings,) = [run.settings for run in runs if run.name == folder.name]
    (folder / "arguments.yaml").write_text(yaml.safe_dump(settings | {"weight_decay": 0.25}))
    assert cli.main(["compare", str(tiny_recipe), "--output_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "was started with weight_decay=0.25, but now has weight_decay=0.0" in message
    assert not in_process


def test_changed_data_is_refused(tiny_recipe, tmp_path, in_process, capsys):
    corpus = tmp_path / "corpus.txt"
    shutil.copy(tiny_recipe.parent / "corpus.txt", corpus)
    argv = [
        str(tiny_recipe), "--train_file", str(corpus), "--arms", "baseline", "--output_dir", str(tmp_path / "out"), "--seeds",
    ]  # fmt: skip
    main([*argv, "0"])
    corpus.write_text(corpus.read_text()[:-100])
    assert cli.main(["compare", *argv, "0,1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "The run baseline-lr0.01-seed0 in" in message
    assert "was started with training data=" in message
    assert in_process == ["baseline-lr0.01-seed0"]


def test_another_architecture_in_the_same_folder_is_refused(tiny_recipe, tmp_path, in_process, capsys):
    """Also one with as many parameters."""
    config = LlamaConfig(**DENSE)
    config.save_pretrained(tmp_path / "model")
    flags = ["--config_name", str(tmp_path / "model"), "--model_type", "", "--config_overrides", "{}"]
    argv = [
        str(tiny_recipe),
        *flags,
        "--max_steps",
        "4",
        "--arms",
        "tst",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    main([*argv, "--seeds", "0"])
    main([*argv, "--seeds", "0"])
    config.rms_norm_eps = 0.25
    config.save_pretrained(tmp_path / "model")
    assert cli.main(["compare", *argv, "--seeds", "0,1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "was started with model rms_norm_eps=1e-06, but now has model rms_norm_eps=0.25: " in message
    assert in_process == ["tst-lr0.01-seed0"]


def test_other_weights_in_the_same_folder_are_refused(tiny_recipe, tmp_path, in_process, capsys):
    def save(seed):
        torch.manual_seed(seed)
        config = LlamaConfig(**DENSE | {"vocab_size": 512, "max_position_embeddings": 64})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")

    tokenizer = yaml.safe_load(tiny_recipe.read_text())["tokenizer_name"]
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--tokenizer_name", tokenizer]
    flags += ["--model_type", "", "--config_overrides", "", "--output_dir", str(tmp_path / "out")]
    argv = [str(tiny_recipe), *flags, "--max_steps", "4", "--arms", "tst"]
    save(0)
    main([*argv, "--seeds", "0"])
    save(0)
    main([*argv, "--seeds", "0"])
    save(1)
    assert cli.main(["compare", *argv, "--seeds", "0,1"]) == 2
    assert "was started with model weights=" in capsys.readouterr().err.splitlines()[-1]
    assert in_process == ["tst-lr0.01-seed0"]


@pytest.mark.parametrize(
    ("name", "variable", "before", "after"),
    [("world size", "WORLD_SIZE", "1", "2"), ("mixed precision", "ACCELERATE_MIXED_PRECISION", "no", "bf16")],
)
def test_another_launch_is_refused(tmp_path, monkeypatch, name, variable, before, after):
    """The size of its steps, or of its numbers, is in no setting."""

    def launch(value, settings):
        if value != before:
            monkeypatch.setenv(variable, value)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "arguments.yaml").write_text(yaml.safe_dump(settings))
        _check_launch(run / "arguments.yaml")

    settings = {"max_steps": 4}
    launch(before, settings)
    launch(before, settings)
    with pytest.raises(TSTError, match=rf"{tmp_path} were started with a {name} of {before}, but .* {after}"):
        launch(after, settings)
    if name == "world size":  # the same step on as many processes as there are
        launch(after, settings | {"tokens_per_step": 64})


def test_a_refused_launch_takes_no_step(tiny_recipe, tmp_path, in_process, capsys, monkeypatch):
    argv = [str(tiny_recipe), "--max_steps", "4", "--arms", "tst", "--output_dir", str(tmp_path), "--seeds"]
    main([*argv, "0"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert cli.main(["compare", *argv, "0,1"]) == 2
    assert "mixed precision" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "tst-lr0.01-seed1" / "trainer_state.json").exists()


def test_another_batch_is_refused_by_its_name(tiny_recipe, tmp_path, in_process, capsys):
    argv = ["compare", str(tiny_recipe), "--arms", "baseline", "--output_dir", str(tmp_path), "--seeds", "0"]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--per_device_train_batch_size", "8"]) == 2
    assert "was started with per_device_train_batch_size=4, but" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "max_steps: [", "- 1"])
def test_a_damaged_file_of_settings_is_named(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"arguments.yaml is damaged, so remove its folder or name another output_dir: "
    ):
        PlannedRun("a", tmp_path, {"max_steps": 4}).check_settings()


def test_a_run_that_diverges_is_told_and_not_averaged(tiny_recipe, tmp_path, in_process):
    comparison = main([
        str(tiny_recipe), "--seeds", "0", "--arms", "baseline", "--learning_rates", "1e-2,1e9", "--output_dir", str(tmp_path),
    ])  # fmt: skip
    (arm,) = comparison.arms
    assert arm.best.learning_rate == 1e-2
    assert [run.status for run in comparison.runs] == ["finished", "diverged"]
    assert arm.learning_rates[1].mean_final_eval_loss is None
    assert "Left out of the means, because diverged: baseline-lr1e+09-seed0." in comparison.notes


def test_equal_time_is_measured_once(tiny_recipe, tmp_path, in_process, monkeypatch):
    flags = ("--budget", "time", "--calibration_steps", "8", "--output_dir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(budget, "TOLERANCE", math.inf)  # what is measured is noise here
        planned(tiny_recipe, *flags)
    assert in_process == ["calibration-baseline", "calibration-tst"]
    paces = {"baseline": {"recovery": 0.01}, "tst": {"superposition": 0.0125, "recovery": 0.01}}
    for arm, seconds in paces.items():
        path = tmp_path / f"calibration-{arm}" / "result.json"
        result = json.loads(path.read_text())
        assert result["seconds_per_step"].keys() == seconds.keys()
        path.write_text(json.dumps(result | {"seconds_per_step": seconds}))
    steps = {run.arm.name: run.settings["max_steps"] for run in planned(tiny_recipe, *flags)}
    # 11 steps of 12.5 ms and 26 of 10 ms are 397.5 ms.
    assert steps == {"baseline": 40, "tst": 37}
    assert len(in_process) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "baseline,tts"], "arms must be one of baseline, tst, mtp, tst+mtp, but is 'tts'"),
        (["--arms", "tst,tst"], "arms must have at least one value, and each only once"),
        (["--seeds", "a"], "seeds must be a comma-separated list of int"),
        (["--budget", "money"], "invalid choice: 'money'"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--tst_phase_ratio", "0"], "The arm tst needs superposition"),
        (["--max_steps", "100000"], "The arm baseline reads 400,000 blocks of 16 tokens in 100000 steps, but the data has"),
        (["--budget", "data", "--max_train_samples", "300"], "The arm tst reads 304 blocks"),
        (["--max_steps", "-1"], "max_steps is -1: set it"),
        (["--validation_split_percentage", "0"], "no data to evaluate on"),
        (["--lr_scheduler_kwargs", "num_decay_steps=8"], "lr_scheduler_kwargs is not JSON: Expecting value"),
        (["--push_to_hub"], "push_to_hub is not possible in a comparison"),
        (["--auto_find_batch_size"], "auto_find_batch_size is not possible in a comparison"),
        (["--learning_rate_s", "1"], "did you mean 'learning_rates'?"),
        (["--output_dir", "file/out"], "Cannot make output_dir=file/out: "),
        (["--lr_scheduler_kwargs", "5"], "lr_scheduler_kwargs must be a mapping, but is 5"),
        (["--deepspeed", "ds.json"], "The arguments cannot be used: "),
        (["--launcher", " "], "launcher=' ' cannot be started"),
        (["--seconds", "0"], "seconds must be more than 0, but is 0"),
        (["--more_arms", "{a"], "more_arms is not JSON"),
        (["--more_arms", '{"a": 1}'], "more_arms must have the options of each arm"),
        (["--more_arms", '{"tst": {}}'], "more_arms names an arm 'tst'"),
        (["--more_arms", '{"a/b": {}}'], "more_arms names an arm 'a/b'"),
        (["--more_arms", '{"a": {"max_steps": 5}}'], "An arm changes options of TST and MTP, but a has 'max_steps'"),
        (["--more_arms", '{"a": {"tst_bag_sise": 5}}'], "did you mean 'tst_bag_size'?"),
        (["--more_arms", '{"a": {"tst_bag_size": 0}}', "--arms", "a"], "tst_bag_size must be a whole number of at least 1, but is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_any_run(
    tiny_recipe, tmp_path, in_process, capsys, flags, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["compare", str(tiny_recipe), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hf-tst compare: ")
    assert message in line
    assert not in_process


def test_a_refused_run_ends_the_comparison(tiny_recipe, tmp_path, in_process, monkeypatch):
    def refuse(*args, **kwargs):
        raise TSTError("no such thing")

    monkeypatch.setattr(pretrain.TSTTrainer, "__init__", refuse)
    with pytest.raises(ValueError, match=r"The run baseline-lr0.01-seed0 was refused: no such thing"):
        main([str(tiny_recipe), "--output_dir", str(tmp_path)])
    assert in_process == ["baseline-lr0.01-seed0"]


def test_a_refusal_is_told_whatever_the_launcher_ends_with(tmp_path):
    """As torchrun does, which ends with status 1 and a line of its own."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]])\n"
        "print('=' * 60, flush=True)\n"
        "sys.exit(1)\n"
    )
    run = PlannedRun("one", tmp_path / "one", {"max_steps": 4, "tst_phase_ratio": 2.0})
    with pytest.raises(ValueError, match=r"The run one was refused: .*tst_phase_ratio"):
        run_all([run], launcher=f"{sys.executable} {launcher}")


def test_ctrl_c_ends_what_runs_and_says_how_to_continue(tiny_recipe, tmp_path, monkeypatch, capsys):
    started = []

    def start(command, **options):
        started.append(subprocess.Popen(["sleep", "600"], **options))
        signal.raise_signal(signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(run_queue, "Popen", start)
    # A shell starts what it runs in the background with this signal ignored, the tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["compare", str(tiny_recipe), "--output_dir", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hf-tst compare: interrupted: finished runs are kept")
    assert [child.poll() for child in started] == [-signal.SIGTERM]


def test_lists():
    assert parse_list("seeds", "[0, 1]", int) == [0, 1]
    with pytest.raises(ValueError, match="at least one"):
        parse_list("seeds", "", int)


def test_runs_share_cores_and_have_gpus_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    seen = []

    def run(command, env, **_):
        seen.append((command[1], env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]))
        return Ended(1)

    monkeypatch.setattr(run_queue, "Popen", run)
    runs = [PlannedRun(name, tmp_path / name, {}) for name in "abcd"]
    failures = run_all(runs, processes=2)
    assert {place[1] for place in seen} <= {"3", "5"}
    assert {(command, cores) for command, _, cores in seen} == {("-m", "6")}
    assert failures["a"].startswith("a failed: it left no message (")
    seen.clear()
    run_all(runs, launcher=f"{sys.executable} launch.py --num_processes 2")
    assert seen == [("launch.py", "3,5", "12")] * 4


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_what_arms_cannot_have_is_refused_before_any_run(tiny_recipe, tmp_path, in_process, capsys, command):
    argv = [command, str(tiny_recipe), "--output_dir", str(tmp_path)]
    assert cli.main([*argv, "--tst_document_boundaries", "respect"]) == 2
    assert (
        "baseline has no superposition, so it would ignore tst_document_boundaries='respect'"
        in capsys.readouterr().err
    )
    if command == "compare":
        gpt_neo = json.dumps(
            {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global"], 2]],
                "max_position_embeddings": 64,
            }
        )
        flags = ["--arms", "baseline,mtp", "--model_type", "gpt_neo", "--config_overrides", gpt_neo]
        assert cli.main([*argv, *flags]) == 2
        assert "it cannot make a GPTNeoBlock" in capsys.readouterr().err
    assert in_process == []


def test_logs_are_there_though_they_were_switched_off(tiny_recipe, tmp_path, in_process):
    flags = ["--arms", "baseline", "--seeds", "0", "--logging_strategy", "no", "--output_dir", str(tmp_path)]
    assert main([str(tiny_recipe), *flags]).arms[0].best.curve[-1].seconds > 0


@pytest.mark.parametrize("max_eval_samples", [None, 5])
def test_a_stream_with_a_validation_split_is_compared(
    tiny_recipe, tmp_path, in_process, monkeypatch, max_eval_samples
):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        rows = [{"text": line} for line in (tiny_recipe.parent / "corpus.txt").read_text().splitlines(True)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(tiny_recipe.read_text()) | {
        "dataset_name": str(tmp_path / "data"),
        "streaming": True,
        "eval_steps": 40,
        "max_eval_samples": max_eval_samples,
    }
    del recipe["train_file"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--arms", "tst", "--seeds", "0", "--output_dir", str(tmp_path / "out")]
    (arm,) = main([str(tmp_path / "recipe.yaml"), *flags]).arms
    assert arm.best.curve[-1].latent_tokens == 40 * 64
    monkeypatch.setattr(budget, "TOLERANCE", math.inf)  # times are noise here
    flags[-1] = str(tmp_path / "time")
    (arm,) = main(
        [str(tmp_path / "recipe.yaml"), *flags, "--budget", "time", "--calibration_steps", "4"]
    ).arms
    assert arm.best.mean_final_eval_loss is not None


def test_a_launcher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"launcher='acelerate launch' cannot be started: there is no command 'acelerate'"
    ):
        run_all([PlannedRun("a", tmp_path / "a", {})], launcher="acelerate launch")


def test_a_report_shows_what_is_finished_when_a_run_is_refused(
    tiny_recipe, tmp_path, in_process, monkeypatch
):
    argv = [str(tiny_recipe), "--seeds", "0", "--output_dir", str(tmp_path)]

    class Refusing(pretrain.TSTTrainer):
        def train(self, *args, **kwargs):
            if self.args.tst_enabled:
                raise TSTError("no bags today")
            return super().train(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", Refusing)
    with pytest.raises(ValueError, match=r"The run tst-lr0.01-seed0 was refused: no bags today"):
        main(argv)
    table = (tmp_path / "comparison.md").read_text()
    assert "| baseline | 0.01 | 0 |" in table
    assert "| missing |" in table


def test_an_error_of_another_kind_is_a_failure_and_the_others_run(
    tiny_recipe, tmp_path, in_process, monkeypatch
):
    class Failing(pretrain.TSTTrainer):
        def training_step(self, *args, **kwargs):
            if self.args.seed == 0 and self.state.global_step == 2:
                raise ValueError("of a library")
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", Failing)
    with pytest.raises(SystemExit, match=r"tst-lr0.01-seed0 failed: of a library"):
        main([str(tiny_recipe), "--seeds", "0,1", "--arms", "tst", "--output_dir", str(tmp_path)])
    assert (tmp_path / "tst-lr0.01-seed1" / "result.json").is_file()


def hold_folder(folder, held, ends):
    with holding_folder(folder):
        Path(held).touch()
        while not Path(ends).exists():
            time.sleep(0.05)


def test_two_processes_do_not_do_the_same_run(tiny_recipe, tmp_path, in_process):
    """One may be left over from a comparison that was killed."""
    flags = [str(tiny_recipe), "--seeds", "0", "--arms", "tst", "--output_dir", str(tmp_path / "out")]
    held, ends = tmp_path / "held", tmp_path / "ends"
    other = start_process(hold_folder, str(tmp_path / "out" / "tst-lr0.01-seed0"), str(held), str(ends))
    try:
        while not held.exists():
            assert other.is_alive()
            time.sleep(0.05)
        with pytest.raises(TSTError, match=r"tst-lr0.01-seed0 was refused: Another process works in"):
            main(flags)
    finally:
        ends.touch()
        other.join(PATIENCE)
    main(flags)


def test_the_same_command_while_it_runs_does_not_touch_its_runs(tiny_recipe, tmp_path, monkeypatch):
    flags = [str(tiny_recipe), "--seeds", "0,1", "--arms", "tst", "--output_dir", str(tmp_path)]
    started = []

    def run(command, **_):
        folder = Path(command[-1]).parent
        if not started:
            second = run_script("hf_tst", "compare", *flags)
            assert second.returncode == 2
            assert f"Another process works in {tmp_path}: wait" in second.stderr.splitlines()[-1]
        started.append(folder.name)
        point = {"step": 1, "raw_tokens": 1, "latent_tokens": 1, "seconds": 1.0, "eval_loss": 1.0}
        RunResult(
            curve=[CurvePoint(**point)], seconds_per_step={}, peak_memory_bytes=1, memory_of="process", parameters=1,
            hardware="", software="",
        ).save(folder)  # fmt: skip
        return Ended(0)

    monkeypatch.setattr(run_queue, "Popen", run)
    made = main(flags)
    assert started == ["tst-lr0.01-seed0", "tst-lr0.01-seed1"]
    assert [done.status for done in made.runs] == ["finished", "finished"]
    assert not (tmp_path / "_lock").exists()


# Starts what it is given and passes no signal on, as `accelerate launch` does with one process.
DEAF_LAUNCHER = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"
# Is refused for the first run, and else goes on for long.
SLOW_RUN = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[-1]).parent
if folder.name == "refused":
    while not (folder.parent / "slow" / "log.txt").is_file():
        time.sleep(0.1)
    (folder / "refused.txt").write_text("no")
    sys.exit(2)
print("started", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("number", "names", "deaf"),
    [
        (signal.SIGTERM, ["slow"], False),
        (signal.SIGTERM, ["slow"], True),
        (signal.SIGHUP, ["slow"], True),
        (signal.SIGINT, ["slow"], True),
        (signal.SIGINT, ["refused", "slow"], False),
    ],
)
def test_a_signal_ends_what_was_started(tmp_path, number, names, deaf):
    (tmp_path / "slow_run.py").write_text(SLOW_RUN)
    (tmp_path / "launcher.py").write_text(DEAF_LAUNCHER)
    launcher = f"{tmp_path / 'launcher.py'} " if deaf else ""
    code = (
        "from pathlib import Path; import signal, sys; from hf_tst.experiments.queue import PlannedRun, run_all\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"runs = [PlannedRun(name, Path({str(tmp_path)!r}) / name, {{}}) for name in {names}]\n"
        f"run_all(runs, processes=2, launcher=f'{{sys.executable}} {launcher}{tmp_path / 'slow_run.py'}')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)

    def wait_for(condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.1)

    log = tmp_path / "slow" / "log.txt"
    wait_for(lambda: log.is_file() and "started" in log.read_text())
    wait_for(lambda: len(psutil.Process(parent.pid).children(recursive=True)) == 1 + deaf)
    children = psutil.Process(parent.pid).children(recursive=True)
    time.sleep(0.3)  # for the refusal to be seen
    parent.send_signal(number)
    assert parent.wait(PATIENCE) in (128 + number, -number, 1)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive


def test_runs_are_processes(tiny_recipe, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--seeds", "0", "--arms", "tst", "--processes", "2"]
    main([str(tiny_recipe), *flags])
    out = capsys.readouterr().out
    assert "1/1  tst-lr0.01-seed0 is done" in out
    assert "2 runs at the same time share the machine" in out
    assert (tmp_path / "comparison.html").is_file()
    assert "final evaluation loss" in (tmp_path / "tst-lr0.01-seed0" / "log.txt").read_text()
