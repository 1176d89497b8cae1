"""hf-tst sweep: a comparison whose arms are the cells of a grid, with tables and heat maps of their losses."""

import json
import shlex

import pytest
from test_comparison import outcome

from hf_tst.cli import main as cli
from hf_tst.experiments.arms import Arm, StepCost
from hf_tst.experiments.budget import plan_comparison
from hf_tst.experiments.compare import SweepArguments
from hf_tst.experiments.compare import sweep as main
from hf_tst.experiments.experiment import open_experiment
from hf_tst.experiments.options import parse_experiment
from hf_tst.experiments.pictures import pictures
from hf_tst.experiments.report import format_comparison, write_report
from hf_tst.experiments.summary import compare_runs
from hf_tst.experiments.tables import tables


def planned(recipe, *flags):
    return plan_comparison(open_experiment(*parse_experiment([str(recipe), *flags], SweepArguments)))


def sweep(losses, *seeds):
    """A sweep with final losses by bag size and ratio, one for each seed; no bag size is the baseline."""
    grid = {
        f"s{size}-r{ratio:g}": {
            "tst_bag_size": size, "tst_phase_ratio": ratio, "tst_offset_weighting": "uniform", "tst_mode": "full",
        }
        for size, ratio in losses if size
    }  # fmt: skip
    names = ["baseline"] * ((None, 0) in losses) + [*grid]
    values = {"max_steps": 100, "tst_phase_ratio": 0.5, "tst_bag_size": 4}
    runs = [
        outcome(name, seed, loss, arm=Arm(name, {}, values, StepCost(6, 6)))
        for name, of_seeds in zip(names, losses.values(), strict=True)
        for seed, loss in enumerate(of_seeds)
    ]
    return compare_runs("flops", runs, grid=grid)


def test_the_grid_is_every_combination_and_a_baseline(tiny_recipe):
    runs = planned(tiny_recipe, "--bag_sizes", "2,4", "--phase_ratios", "0.2,0.5", "--weightings", "uniform,power_law",
                   "--modes", "full,output", "--seeds", "3,4")  # fmt: skip
    names = ("tst_bag_size", "tst_phase_ratio", "tst_offset_weighting", "tst_mode")
    cells = {tuple(run.settings[name] for name in names) for run in runs if run.arm.name != "baseline"}
    assert cells == {
        (s, r, w, m) for s in (2, 4) for r in (0.2, 0.5) for w in ("uniform", "power_law") for m in ("full", "output")
    }  # fmt: skip
    assert len({run.folder for run in runs}) == len(runs) == 34
    assert {run.settings["seed"] for run in runs} == {3, 4}
    assert {run.settings["max_steps"] for run in runs} == {40}
    assert [run.settings["tst_phase_ratio"] for run in runs if run.arm.name == "baseline"] == [0.0, 0.0]
    assert "s4-r0.5-power_law-output" in {run.arm.name for run in runs}


def test_with_extra_heads_the_baseline_has_them_too(tiny_recipe):
    baseline, cell = planned(
        tiny_recipe, "--mtp_num_heads", "2", "--max_steps", "200", "--bag_sizes", "2", "--phase_ratios", "0.2"
    )
    assert [run.settings["mtp_num_heads"] for run in (baseline, cell)] == [2, 2]
    # Heads train in recovery alone, so equal FLOPs are more steps.
    assert cell.settings["max_steps"] > baseline.settings["max_steps"] == 200


def test_a_sweep_is_done_once_and_grows(tiny_recipe, tmp_path, in_process):
    argv = [str(tiny_recipe), "--output_dir", str(tmp_path), "--phase_ratios", "0.2", "--bag_sizes"]
    main([*argv, "2"])
    assert in_process == ["baseline-lr0.01-seed0", "s2-r0.2-uniform-full-lr0.01-seed0"]
    made = main([*argv, "2,4"])
    assert in_process[2:] == ["s4-r0.2-uniform-full-lr0.01-seed0"]
    assert all(arm.best.mean_final_eval_loss < 6 for arm in made.arms)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [cell["tst_bag_size"] for cell in saved["grid"].values()] == [2, 4]
    assert saved["facts"]["command"] == "hf-tst sweep " + shlex.join([*argv, "2,4"])
    report = (tmp_path / "comparison.md").read_text()
    assert "| s \\\\ r | 0.2 |" in report
    assert saved["facts"]["hardware"] in report
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_per_bag_size_and_a_column_per_ratio(tmp_path):
    made = sweep({
        (None, 0): [3.0], (4, 0.3): ["missing"], (4, 0.2): [None], (2, 0.3): [1.7], (2, 0.2): [1.8],
    })  # fmt: skip
    assert tables(made)["uniform, full"] == [
        ("s \\ r", "0.2", "0.3"),
        ("2", "1.8000", "1.7000"),
        ("4", "diverged", "missing"),
    ]
    text = format_comparison(made)
    assert "Without superposition: 3.0000." in text
    assert "Lowest: s2-r0.3, 1.7000, of one seed." in text
    write_report(made, tmp_path)
    assert "![Loss by bag size and phase ratio" in (tmp_path / "comparison.md").read_text()
    assert '<td data-label="0.3">1.7000</td>' in (tmp_path / "comparison.html").read_text()
    assert len(pictures(made)) == 1


def test_the_best_cell_is_one_in_which_most_runs_ended_well():
    text = format_comparison(sweep({(4, 0.3): [3.0, 3.02], (8, 0.3): [2.9, None]}))
    assert "Lowest: s4-r0.3, 3.0100 ± 0.0141." in text
    assert "2.9000 (1 diverged)" in text


def test_a_sweep_of_which_nothing_has_run(tmp_path):
    write_report(sweep({(2, 0.3): ["missing"]}), tmp_path)
    assert "| 2 | missing |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bag_sizes", "1,2"], "s1-r0.1-uniform-full is plain training"),
        (["--bag_sizes", "x"], "bag_sizes must be a comma-separated list of int"),
        (["--phase_ratios", "1.5"], "tst_phase_ratio must be from 0 to 1"),
        (["--modes", "half"], "tst_mode must be one of"),
        (["--weightings", "even"], "even"),
        (["--bag_sizes", "64", "--phase_ratios", "0.5"], "s64-r0.5-uniform-full reads 5,200 blocks"),
    ],
)
def test_bad_input_is_one_sentence_before_any_run(tiny_recipe, tmp_path, in_process, capsys, flags, message):
    assert cli.main(["sweep", str(tiny_recipe), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hf-tst sweep: ")
    assert message in line
    assert not in_process
