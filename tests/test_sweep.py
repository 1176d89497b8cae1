"""hf-tst sweep: the grid, that it is done once, and the tables and heat maps of its losses."""

import json
import shlex
from importlib.metadata import version

import pytest

from hf_tst.cli import main as cli
from hf_tst.experiments.comparison import RateSummary
from hf_tst.experiments.options import open_experiment, parse_experiment
from hf_tst.experiments.sweep import SweepArguments, main, plan_sweep
from hf_tst.experiments.sweep_report import Cell, Sweep, format_sweep, panel_rows, write_sweep


def planned(recipe, *flags):
    values, args = parse_experiment([str(recipe), *flags], SweepArguments, "", None, "runs/sweep")
    return plan_sweep(open_experiment(values), args)


def loss(mean=None, **options):
    return RateSummary(
        "x", 1e-3, {0: mean} if mean else {}, mean, None, **{"diverged": [], "missing": []} | options
    )


def test_the_grid_is_every_combination_and_a_baseline(tiny_recipe):
    grid = planned(tiny_recipe, "--bag_sizes", "2,4", "--phase_ratios", "0.2,0.5", "--weightings", "uniform,power_law",
                   "--modes", "full,output", "--seeds", "3,4")  # fmt: skip
    (baseline, runs), *cells = grid
    assert baseline.name == "baseline"
    assert [run.settings["tst_phase_ratio"] for run in runs] == [0.0, 0.0]
    assert len(cells) == 16
    for cell, runs in cells:
        for run, seed in zip(runs, (3, 4), strict=True):
            settings = run.settings
            assert (settings["tst_bag_size"], settings["tst_phase_ratio"]) == (
                cell.bag_size,
                cell.phase_ratio,
            )
            assert (settings["tst_offset_weighting"], settings["tst_mode"]) == (cell.weighting, cell.mode)
            assert settings["seed"] == seed
            assert settings["max_steps"] == 40
    assert len({run.folder for _, runs in grid for run in runs}) == 34


def test_with_extra_heads_the_baseline_has_them_too(tiny_recipe):
    (_, baseline), (_, cell) = planned(
        tiny_recipe, "--mtp_num_heads", "2", "--bag_sizes", "2", "--phase_ratios", "0.2"
    )
    assert [run.settings["mtp_num_heads"] for run in (*baseline, *cell)] == [2, 2]


def test_a_sweep_is_done_once_and_grows(tiny_recipe, tmp_path, in_process):
    argv = [str(tiny_recipe), "--output_dir", str(tmp_path), "--phase_ratios", "0.2", "--bag_sizes"]
    main([*argv, "2"])
    assert in_process == ["baseline-seed0", "s2-r0.2-uniform-full-seed0"]
    sweep = main([*argv, "2,4"])
    assert in_process[2:] == ["s4-r0.2-uniform-full-seed0"]
    assert all(summary.mean_loss < 6 for summary in sweep.losses.values())
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert [cell["bag_size"] for cell in saved["cells"]] == [None, 2, 4]
    assert saved["facts"]["command"] == "hf-tst sweep " + shlex.join([*argv, "2,4"])
    assert f"torch {version('torch')}" in saved["facts"]["software"]
    report = (tmp_path / "sweep.md").read_text()
    assert "## How it was done" in report
    assert saved["facts"]["hardware"] in report
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_row_a_bag_size_and_a_column_a_ratio(tmp_path):
    losses = {Cell.of_baseline(): loss(3.0)}
    for size in (4, 2):
        for ratio in (0.3, 0.2):
            losses[Cell(size, ratio, "uniform", "full")] = loss(size - ratio)
    losses[Cell(4, 0.2, "uniform", "full")] = loss(diverged=[0])
    losses[Cell(4, 0.3, "uniform", "full")] = loss(missing=[0])
    sweep = Sweep(40, 1e-3, losses)
    assert panel_rows(sweep, "uniform", "full") == [
        ("s \\ r", "0.2", "0.3"),
        ("2", "1.8000", "1.7000"),
        ("4", "diverged", "missing"),
    ]
    text = format_sweep(sweep)
    assert "Without superposition: 3.0000." in text
    assert "Lowest: s2-r0.3-uniform-full, 1.7000." in text
    write_sweep(sweep, tmp_path)
    assert "![" in (tmp_path / "sweep.md").read_text()


def test_the_best_cell_is_one_in_which_most_runs_ended_well():
    cells = {Cell(4, 0.3, "uniform", "full"): {0: 3.0, 1: 3.02}, Cell(8, 0.3, "uniform", "full"): {0: 2.9}}
    losses = {
        cell: RateSummary(
            "x",
            1e-3,
            by_seed,
            sum(by_seed.values()) / len(by_seed),
            None,
            diverged=[1] * (2 - len(by_seed)),
            missing=[],
        )
        for cell, by_seed in cells.items()
    }
    assert Sweep(40, 1e-3, losses).best == Cell(4, 0.3, "uniform", "full")


def test_a_sweep_of_which_nothing_has_run(tmp_path):
    write_sweep(Sweep(40, 1e-3, {Cell(2, 0.3, "uniform", "full"): loss(missing=[0])}), tmp_path)
    assert "missing" in (tmp_path / "sweep.md").read_text()


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
