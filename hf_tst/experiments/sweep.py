"""A grid over bag size, phase ratio, weighting and mode: what `hf-tst sweep` and `scripts/sweep.py` run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TSTError
from .arms import arm_schedule, arm_values, check_arms, define_arms, is_superposed, setting
from .comparison import BASELINE, Outcome, summarize_rate
from .options import (
    EVERY_RUN,
    Experiment,
    ExperimentArguments,
    describe_runs,
    open_experiment,
    parse_experiment,
    parse_list,
    training_arguments,
)
from .queue import PlannedRun, run_all_shown
from .sweep_report import Cell, Sweep, format_sweep, write_sweep

DESCRIPTION = f"""Train over a grid of bag sizes s, phase ratios r, weightings and modes, and draw the losses as heat maps.

Takes a recipe and the flags of training, and those of the sweep, which are listed first. All runs take the same number of
steps, hence of operations (with mtp_num_heads, whose heads train in recovery alone, more the smaller r is). Every run is a process with a folder of its own in output_dir. Started again, it does what is
missing; half a run goes on from its last checkpoint. {EVERY_RUN}

  %(prog)s --output_dir runs/sweep --bag_sizes 2,4,6 --phase_ratios 0.2,0.3
  %(prog)s recipe.yaml --weightings uniform,power_law --modes full,output --seeds 0,1
"""


@dataclass
class SweepArguments(ExperimentArguments):
    """The grid."""

    seeds: str = field(default="0", metadata={"help": "Seeds that every run is repeated with."})
    bag_sizes: str = field(default="2,4,6,8", metadata={"help": "Tokens a bag, s."})
    phase_ratios: str = field(default="0.1,0.2,0.3,0.4", metadata={"help": "Fractions of superposition, r."})
    weightings: str | None = field(
        default=None, metadata={"help": "Offset weightings; tst_offset_weighting by default."}
    )
    modes: str | None = field(default=None, metadata={"help": "Modes; tst_mode by default."})
    baseline: bool = field(
        default=True,
        metadata={"help": "Train without superposition, too; --no_baseline leaves that run out."},
    )


def plan_sweep(experiment: Experiment, args: SweepArguments) -> list[tuple[Cell, list[PlannedRun]]]:
    """The cells of the grid with their runs, one a seed; the baseline first.

    Raises:
        TSTError: If a cell is no superposition, its values cannot go together, or the data is too short for it.
    """
    values = experiment.values
    seeds = parse_list("seeds", args.seeds, int)
    cells: list[tuple[Cell, dict[str, Any]]] = []
    for mode in parse_list("modes", args.modes or setting(values, "tst_mode"), str):
        for weighting in parse_list(
            "weightings", args.weightings or setting(values, "tst_offset_weighting"), str
        ):
            for size in parse_list("bag_sizes", args.bag_sizes, int):
                for ratio in parse_list("phase_ratios", args.phase_ratios, float):
                    changes = {
                        "tst_bag_size": size, "tst_phase_ratio": ratio, "tst_offset_weighting": weighting, "tst_mode": mode,
                    }  # fmt: skip
                    cells.append((Cell(size, ratio, weighting, mode), {**values, **changes}))
    for cell, settings in cells:
        training_arguments(settings)
        if not is_superposed(settings):
            raise TSTError(
                f"{cell.name} is plain training: leave bag size 1 and ratio 0 out; --baseline trains without superposition."
            )
    if args.baseline:
        arms = define_arms(values)
        check_arms([BASELINE], arms, values)
        # Where the cells have extra heads, so has what they are compared with.
        arm = "mtp" if setting(values, "mtp_num_heads") > 1 else BASELINE
        cells.insert(0, (Cell.of_baseline(), arm_values(arms[arm], values, fusable=experiment.fusable)))
    planned = []
    for cell, settings in cells:
        experiment.check_data(cell.name, arm_schedule(settings, values["max_steps"]))
        runs = []
        for seed in seeds:
            name = f"{cell.name}-seed{seed}"
            runs.append(
                PlannedRun(name, experiment.output_dir / name, {**settings, "seed": seed}, experiment.data)
            )
        planned.append((cell, runs))
    return planned


def main(argv: Sequence[str], prog: str | None = None) -> Sweep:
    """Do what is missing of a sweep, and write `sweep.json`, `.md` and `.png` into its folder.

    Raises:
        TSTError: For bad input, or settings that have changed.
        SystemExit: With status 1, if a run failed; the report is written with what there is.
    """
    values, args = parse_experiment(argv, SweepArguments, DESCRIPTION, prog, "runs/sweep")
    extra_heads = setting(values, "mtp_num_heads") > 1
    experiment = open_experiment(values, args.launcher, extra_heads=extra_heads)
    planned = plan_sweep(experiment, args)
    queue = [run for _, runs in planned for run in runs]
    failures, refusal = run_all_shown(queue, processes=args.processes, launcher=args.launcher)
    rate = setting(values, "learning_rate")
    outcomes = {
        cell: [Outcome(run.name, cell.name, rate, run.settings["seed"], result=run.result) for run in runs]
        for cell, runs in planned
    }
    losses = {cell: summarize_rate(runs) for cell, runs in outcomes.items()}
    results = [run.result for runs in outcomes.values() for run in runs]
    facts = describe_runs(["hf-tst", "sweep", *argv], experiment, args.processes, results)
    sweep = Sweep(values["max_steps"], rate, losses, facts)
    print("\n" + format_sweep(sweep) + "\n")
    for path in write_sweep(sweep, experiment.output_dir):
        print(path)
    if refusal is not None:
        raise refusal
    if failures:
        raise SystemExit("\n".join(failures.values()))
    return sweep
