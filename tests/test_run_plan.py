"""The plan of a run: the paper's budgets, what is published and what is computed, what does not fit."""

import json
import re
from pathlib import Path

import pytest
from processes import run_script

from hf_tst import TSTError
from hf_tst.cli.plan import format_plan, main, plan_from_arguments, plot_plan
from hf_tst.planning.estimate import GIB
from hf_tst.planning.reference import ACCELERATORS, PUBLISHED

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "hf_tst" / "pretraining" / "recipes"


def plan(recipe, *flags):
    return plan_from_arguments([str(RECIPES / recipe), *map(str, flags)])[0]


def alternatives(made):
    return {other.name: other for other in made.comparison}


def test_the_budgets_of_the_papers_270m_run():
    made = plan("270m-20k-tst.yaml", "--num_gpus", 8)
    others = alternatives(made)
    assert made.raw_tokens == pytest.approx(105e9, rel=0.005)
    assert made.latent_tokens == pytest.approx(42e9, rel=0.005)
    assert others["baseline, equal FLOPs"].raw_tokens == made.latent_tokens
    assert others["baseline, equal FLOPs"].flops == made.flops
    assert others["baseline, equal data"].raw_tokens == made.raw_tokens
    assert others["baseline, equal data"].steps == 50_000
    equal_loss = others["baseline, equal loss"]
    assert (equal_loss.raw_tokens, equal_loss.loss) == (made.raw_tokens, 3.142)
    assert made.phases[0].raw_tokens == 6 * made.phases[0].latent_tokens
    assert made.blocks * 2048 == made.raw_tokens


def test_the_gpu_hours_of_the_papers_mixture_as_a_ratio():
    tst = plan("10b-a1b-tst.yaml", "--num_gpus", 64, "--gpu", "b200")
    baseline = plan("10b-a1b-baseline.yaml", "--num_gpus", 64, "--gpu", "b200")
    assert tst.gpu_hours / baseline.gpu_hours == pytest.approx(4768 / 12_311, rel=0.04)
    assert tst.raw_tokens == pytest.approx(2e12, rel=0.01)
    assert baseline.raw_tokens == pytest.approx(1.05e12, rel=0.01)
    assert alternatives(tst)["baseline, equal loss"].gpu_hours == baseline.gpu_hours
    assert any("4,768 B200-hours" in note for note in tst.notes)


def test_the_published_figures_are_the_papers():
    losses = {(run.name, run.steps): (run.baseline_loss, run.loss) for run in PUBLISHED}
    assert losses == {
        ("270M", 20_000): (3.212, 3.142),
        ("270M", 100_000): (3.092, 3.048),
        ("600M", 20_000): (3.019, 2.943),
        ("3B", 20_000): (2.808, 2.676),
        ("10B-A1B", 49_983): (None, 2.236),
    }
    equal = {run.name: (run.equal_loss_steps, run.equal_loss) for run in PUBLISHED if run.equal_loss}
    assert equal == {"270M": (50_000, 3.142), "3B": (36_000, 2.677), "10B-A1B": (125_000, 2.252)}


@pytest.mark.parametrize(
    "flags",
    [
        ["--tst_bag_size", "8"],
        ["--tst_phase_ratio", "0.4"],
        ["--max_steps", "30000"],
        ["--tokens_per_step", "1048576"],
        ["--config_overrides", "hidden_size=576,num_hidden_layers=30,num_attention_heads=9,vocab_size=50000"],
        ["--tst_mode", "output"],
        ["--tst_mode", "input"],
        ["--tst_offset_weighting", "exponential"],
        ["--tst_input_weighting", "linear"],
        ["--tst_document_boundaries", "respect"],
        ["--block_size", "1024"],
        ["--mtp_num_heads", "2"],
    ],
)
def test_no_loss_is_said_of_a_run_that_was_not_published(flags):
    made = plan("270m-20k-tst.yaml", "--num_gpus", 8, *flags)
    assert all(other.loss is None for other in made.comparison)
    assert alternatives(made)["baseline, equal loss"].source == "no published figure"
    assert alternatives(made)["baseline, equal loss"].steps is None
    text = format_plan(made)
    assert "no loss is predicted" in text
    assert "3.142" not in text


def test_the_picture_makes_its_folder_or_says_why_not(tmp_path, capsys):
    recipe = [str(RECIPES / "270m-20k-tst.yaml"), "--num_gpus", "8", "--plot"]
    main([*recipe, str(tmp_path / "new" / "folder" / "plan.png")])
    assert (tmp_path / "new" / "folder" / "plan.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(TSTError, match=r"plot=.*file/plan.png"):
        main([*recipe, str(tmp_path / "file" / "plan.png")])
    assert "comparison" in capsys.readouterr().out


def test_rows_of_single_blocks_are_not_the_papers():
    recipe = ("10b-a1b-tst.yaml", "--num_gpus", 64)
    assert alternatives(plan(*recipe))["TST, this run"].loss == 2.236
    assert alternatives(plan(*recipe, "--tst_superposition_rows", "more"))["TST, this run"].loss is None


def test_hours_follow_from_peak_and_utilisation():
    made = plan("100m-one-gpu-tst.yaml", "--gpu", "h100", "--mfu", 0.4)
    per_token = 6 * made.model.active_parameters + 12 * 14 * 512 * 1024
    assert made.flops == 5000 * 262_144 * per_token
    assert made.gpu_hours == pytest.approx(made.flops / (989e12 * 0.4) / 3600)
    assert made.gpu_hours < 1
    half = plan("100m-one-gpu-tst.yaml", "--tst_peak_tflops", 989, "--mfu", 0.2)
    assert half.gpu_hours == pytest.approx(2 * made.gpu_hours)
    assert sum(phase.gpu_hours for phase in made.phases) == pytest.approx(made.gpu_hours)


def test_impossible_memory_is_said_with_by_how_much(capsys):
    gpus = ["--gpu", "l4", "--num_gpus", "8"]
    flags = [*gpus, "--gradient_checkpointing", "False"]
    made = plan("3b-20k-tst.yaml", *flags)
    lacking = made.memory_bytes["peak"] / GIB - 23 * 0.94
    with pytest.raises(ValueError, match=re.escape(f"{lacking:.1f} GiB more than")):
        main([str(RECIPES / "3b-20k-tst.yaml"), *flags])
    assert "memory" in capsys.readouterr().out  # the plan comes first
    made = plan("3b-20k-tst.yaml", *gpus, "--per_device_train_batch_size", 1)
    made.check_memory()


def test_more_gpus_hold_less_each_and_ddp_holds_all():
    sizes = [plan("3b-20k-tst.yaml", "--num_gpus", n).memory_bytes["state"] for n in (1, 8, 64)]
    assert sizes[0] == pytest.approx(8 * sizes[1], rel=1e-6)
    assert sizes[1] == pytest.approx(8 * sizes[2], rel=1e-6)
    ddp = plan("3b-20k-tst.yaml", "--num_gpus", 8, "--shard_size", 1)
    assert ddp.memory_bytes["state"] == sizes[0]
    assert ddp.communication_bytes_per_step["gather"] == 0 < ddp.communication_bytes_per_step["replicate"]


def test_superposition_alters_neither_flops_nor_peak_of_memory():
    tst, baseline = plan("270m-20k-tst.yaml"), plan("270m-20k-baseline.yaml")
    assert tst.flops == baseline.flops
    assert tst.memory_bytes["peak"] == baseline.memory_bytes["peak"]
    assert not baseline.comparison


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h10"], "not 'h10': did you mean 'h100'?"),
        (["--mfu", "1.5"], "mfu must be more than 0 and at most 1, but is 1.5"),
        (["--num_gpus", "0"], "must be at least 1"),
        (["--num_gpus", "8", "--shard_size", "3"], "shard_size=3 must divide num_gpus=8"),
        (["--num_gpus", "3"], "is not a multiple of the 98304 tokens of a micro-batch"),
        (["--max_steps", "-1"], "max_steps is -1, and a plan reads no data"),
        (["--tst_phase_ratio", "2"], "tst_phase_ratio must be from 0 to 1"),
        (["--tst_bag_size", "0"], "tst_bag_size must be a whole number"),
        (["--block_size", "4096"], "more than the model's context of 2048"),
        (["--tst_peak_tflops", "0"], "must be more than 0"),
        (["--max_stepz", "3"], "There is no flag 'max_stepz': did you mean 'max_steps'?"),
        (["--config_overrides", "num_hidden_layers=2"], "0"),
    ],
)
def test_bad_input_is_one_sentence(flags, message):
    if flags[0] == "--config_overrides":
        flags = [*flags, "--tokenizer_name", "nowhere"]
        message = "Cannot load nowhere"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        main([str(RECIPES / "270m-20k-tst.yaml"), *flags])
    assert "\n" not in str(error.value)


def test_the_script_prints_json_and_draws(tmp_path):
    command = [ROOT / "scripts" / "plan.py", RECIPES / "270m-20k-tst.yaml"]
    result = run_script(*command, "--num_gpus", 8, "--json", "--plot", tmp_path / "plan.png")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["switch_step"] == 6000
    assert values["phases"][0]["latent_tokens"] == 6000 * 2**21
    assert values["memory_bytes"]["peak"] < values["usable_memory_bytes"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    result = run_script(*command, "--gpu", "abacus")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("plan.py: gpu must be one of a100-40gb")


def test_pictures_differ_with_the_plan(tmp_path):
    one, two = plan("270m-20k-tst.yaml"), plan("270m-20k-tst.yaml", "--tst_bag_size", 8)
    assert plot_plan(one, tmp_path / "a.png").read_bytes() != plot_plan(two, tmp_path / "b.png").read_bytes()


def test_accelerators_have_the_makers_figures():
    assert {name: gpu.tflops for name, gpu in ACCELERATORS.items()}["b200"] == 2250
    assert all(gpu.memory_gib > 0 for gpu in ACCELERATORS.values())


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_extra_heads_cost_in_recovery_only(kind):
    recipe, flags = "270m-20k-tst.yaml", ("--num_gpus", 8)
    plain = plan(recipe, *flags)
    made = plan(recipe, *flags, "--mtp_num_heads", 3, "--mtp_kind", kind)
    superposition, recovery = made.phases
    assert superposition == plain.phases[0]
    d, layer, head = 576, plain.model.layer_parameters, 128_256 * 576
    joined = 2 * d * d + 2 * d if kind == "sequential" else 0
    per_position = 6 * (layer + head + joined) + 12 * d * plain.layout.length
    assert recovery.flops == plain.phases[1].flops + 2 * per_position * recovery.latent_tokens
    assert made.mtp_parameters == 2 * (layer + joined)
    assert made.checkpoint_bytes["model"] == plain.checkpoint_bytes["model"]
    assert (
        made.checkpoint_bytes["checkpoint"] == plain.checkpoint_bytes["checkpoint"] + 12 * made.mtp_parameters
    )
    assert made.memory_bytes["state"] == plain.memory_bytes["state"] + 2 * made.mtp_parameters
    others = alternatives(made)
    assert others["TST and MTP, this run"].flops == made.flops
    assert others["baseline, equal FLOPs"].flops == pytest.approx(made.flops, rel=1e-4)
    assert others["baseline, equal data"].steps == 50_000
    assert all(other.loss is None for other in made.comparison)  # the paper has no such run
    assert f"{made.mtp_parameters:,} more in extra heads" in format_plan(made)
    assert "extra heads" not in format_plan(plain)
