"""hf-tst sweep: the grid, that it is done once, and the tables and heat maps of its losses."""

import json
import shlex
from importlib.metadata import version

import pytest

from hf_tst.bags.phases import PhaseSchedule
from hf_tst.cli import main as cli
from hf_tst.experiments.budget import StepCost
from hf_tst.experiments.compare import plan_comparison
from hf_tst.experiments.comparison import ArmPlan, GridPoint, Outcome, compare_outcomes
from hf_tst.experiments.options import open_experiment, parse_experiment
from hf_tst.experiments.report import format_comparison, grid_tables, write_report
from hf_tst.experiments.result import CurvePoint, RunResult
from hf_tst.experiments.sweep import SweepArguments, main, make_grid


def planned(recipe, *flags):
    values, args = parse_experiment([str(recipe), *flags], SweepArguments, "", None, "runs/sweep")
    arms, grid = make_grid(args, values)
    return grid, plan_comparison(open_experiment(values), args, arms)[1]


def test_the_grid_is_every_combination_and_a_baseline(tiny_recipe):
    grid, runs = planned(tiny_recipe, "--bag_sizes", "2,4", "--phase_ratios", "0.2,0.5", "--weightings",
                         "uniform,power_law", "--modes", "full,output", "--seeds", "3,4")  # fmt: skip
    assert len(grid) == 16
    found = set()
    for run, plan in runs:
        settings = plan.settings
        assert settings["seed"] == run.seed
        assert settings["max_steps"] == 40
        if run.arm == "baseline":
            assert settings["tst_phase_ratio"] == 0
            continue
        size, ratio = settings["tst_bag_size"], settings["tst_phase_ratio"]
        weighting, mode = settings["tst_offset_weighting"], settings["tst_mode"]
        assert grid[run.arm] == GridPoint(f"{weighting}, {mode}", size, ratio)
        found.add((size, ratio, weighting, mode, run.seed))
    assert len(found) == 32
    assert len({plan.folder for _, plan in runs}) == 34


def test_with_extra_heads_the_baseline_has_them_too(tiny_recipe):
    flags = ("--mtp_num_heads", "2", "--bag_sizes", "2", "--phase_ratios", "0.2", "--max_steps", "100")
    _, runs = planned(tiny_recipe, *flags)
    assert [plan.settings["mtp_num_heads"] for _, plan in runs] == [2, 2]


def test_a_sweep_is_done_once_and_grows(tiny_recipe, tmp_path, in_process):
    argv = [str(tiny_recipe), "--output_dir", str(tmp_path), "--phase_ratios", "0.2", "--bag_sizes"]
    main([*argv, "2"])
    first = list(in_process)
    assert [name.split("-lr")[0] for name in first] == ["baseline", "s2-r0.2-uniform-full"]
    comparison = main([*argv, "2,4"])
    assert [name.split("-lr")[0] for name in in_process[2:]] == ["s4-r0.2-uniform-full"]
    assert all(arm.best.mean_loss < 6 for arm in comparison.arms)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert [cell["bag_size"] for cell in saved["grid"].values()] == [2, 4]
    assert saved["facts"]["command"] == "hf-tst sweep " + shlex.join([*argv, "2,4"])
    assert f"torch {version('torch')}" in saved["facts"]["software"]
    report = (tmp_path / "comparison.md").read_text()
    assert "## uniform, full" in report
    assert "## How it was done" in report
    assert saved["facts"]["hardware"] in report
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "uniform, full" in (tmp_path / "comparison.html").read_text()


def compared(losses):
    """The comparison of a grid of bag sizes and ratios, from the final losses of each by seed; a word is what became of it."""
    plan = ArmPlan(PhaseSchedule(40, 0.3, 4), StepCost(1.0, 1.0))
    plans, outcomes, grid = {}, [], {}
    for (size, ratio), seeds in losses.items():
        name = "baseline" if size is None else f"s{size}-r{ratio:g}"
        plans[name] = plan
        if size is not None:
            grid[name] = GridPoint("uniform, full", size, ratio)
        for seed, loss in enumerate(seeds):
            result = None
            if loss != "missing":
                curve = [
                    CurvePoint(step, 0, 0, 0.0, end)
                    for step, end in ((0, 9.0), (40, loss if loss != "diverged" else None))
                ]
                result = RunResult(40, 0, 0, 0.0, curve, {}, None, "", 1, "", "")
            outcomes.append(Outcome(f"{name}-{seed}", name, 1e-3, seed, result))
    return compare_outcomes("flops", plans, outcomes, grid=grid)


def test_the_table_has_a_row_per_bag_size_and_a_column_per_ratio(tmp_path):
    cells = {
        (None, 0.0): [3.0],
        (4, 0.3): ["missing"],
        (4, 0.2): ["diverged"],
        (2, 0.3): [1.7],
        (2, 0.2): [1.8],
    }
    comparison = compared(cells)
    assert grid_tables(comparison) == {
        "uniform, full": [("s \\ r", "0.2", "0.3"), ("2", "1.8000", "1.7000"), ("4", "diverged", "missing")]
    }
    assert "Lowest of the grid: s2-r0.3, 1.7000." in format_comparison(comparison)
    write_report(comparison, tmp_path)
    assert "![" in (tmp_path / "comparison.md").read_text()


def test_the_best_cell_is_one_in_which_most_runs_ended_well():
    comparison = compared({(4, 0.3): [3.0, 3.02], (8, 0.3): [2.9, "diverged"]})
    assert comparison.best_of_grid.arm == "s4-r0.3"


def test_a_sweep_of_which_nothing_has_run(tmp_path):
    write_report(compared({(2, 0.3): ["missing"]}), tmp_path)
    assert "missing" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bag_sizes", "1,2"], "s1-r0.1-uniform-full is plain training"),
        (["--bag_sizes", "x"], "bag_sizes must be values of the kind int"),
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
