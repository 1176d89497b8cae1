"""`hf-tst compare`, and `hf-tst sweep`, whose arms are the cells of a grid: runs with one configuration and an equal budget."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from transformers.hf_argparser import HfArg

from ..errors import TSTError, check_choice
from ..planning.flops import FORMULA
from ..pretraining.overwrite import holding_folder
from .arms import ARMS, BASELINE, asks_for_superposition, define_arms, setting
from .budget import ArmRun
from .experiment import Experiment, open_experiment
from .options import EVERY_RUN, ExperimentArguments, parse_experiment, parse_list
from .queue import RunRefusedError, run_all
from .report import format_comparison, write_report
from .summary import Comparison, compare_runs
from .time_limit import plan_within_limit

COMPARE = f"""Train arms ({", ".join(ARMS)}) with one configuration and an
equal budget, and compare them.

Takes a recipe and the flags of training. The flags of the comparison are
listed first.
{EVERY_RUN}

  %(prog)s --output_dir runs/compare
  %(prog)s recipe.yaml --arms baseline,tst --seeds 0,1 --budget data
"""
SWEEP = f"""Train a grid of bag sizes s, phase ratios r, weightings and modes, and draw
the losses as heat maps.

Takes a recipe and the flags of training. The flags of the sweep are listed
first. The cells of the grid are the arms of a comparison.
{EVERY_RUN}

  %(prog)s --output_dir runs/sweep --bag_sizes 2,4,6 --phase_ratios 0.2,0.3
  %(prog)s recipe.yaml --weightings uniform,power_law --modes full,output
"""


@dataclass
class CompareArguments(ExperimentArguments):
    """The comparison."""

    command: ClassVar[str] = "compare"
    description: ClassVar[str] = COMPARE
    arms: str = HfArg(
        default="baseline,tst", help=f"Arms to compare: of {', '.join(ARMS)}, and those of more_arms."
    )
    more_arms: str | None = HfArg(
        default=None,
        help="Further arms, as JSON or a mapping in a configuration file: each name has the options of TST and MTP that the arm "
        "changes, and optionally its own seeds.",
    )

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        known = define_arms(values, self.more_arms)
        names = parse_list("arms", self.arms, str)
        for name in names:
            check_choice("arms", name, known)
        return {name: known[name] for name in names}


@dataclass
class SweepArguments(ExperimentArguments):
    """The grid."""

    command: ClassVar[str] = "sweep"
    description: ClassVar[str] = SWEEP
    seeds: str = HfArg(default="0", help="Seeds that every run is repeated with.")
    bag_sizes: str = HfArg(default="2,4,6,8", help="Tokens per bag, s.")
    phase_ratios: str = HfArg(default="0.1,0.2,0.3,0.4", help="Fractions of superposition, r.")
    weightings: str | None = HfArg(default=None, help="Offset weightings; tst_offset_weighting by default.")
    modes: str | None = HfArg(default=None, help="Modes; tst_mode by default.")
    baseline: bool = HfArg(
        default=True, help="Train without superposition, too; --no_baseline leaves that run out."
    )

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        # Where the cells have extra heads, the baseline has them, too.
        heads: dict[str, Any] = {"mtp_num_heads": setting(values, "mtp_num_heads")}
        arms = {BASELINE: {"tst_phase_ratio": 0.0, **heads}} if self.baseline else {}
        for mode, weighting, size, ratio in product(
            parse_list("modes", self.modes or setting(values, "tst_mode"), str),
            parse_list("weightings", self.weightings or setting(values, "tst_offset_weighting"), str),
            parse_list("bag_sizes", self.bag_sizes, int),
            parse_list("phase_ratios", self.phase_ratios, float),
        ):
            name = f"s{size}-r{ratio:g}-{weighting}-{mode}"
            arms[name] = {
                "tst_bag_size": size, "tst_phase_ratio": ratio, "tst_offset_weighting": weighting, "tst_mode": mode, **heads,
            }  # fmt: skip
            if not asks_for_superposition(arms[name]):
                raise TSTError(
                    f"{name} is plain training: leave bag size 1 and ratio 0 out; --baseline trains without superposition."
                )
        return arms


def main(
    argv: Sequence[str], prog: str | None = None, kind: type[ExperimentArguments] = CompareArguments
) -> Comparison:
    """Do the missing runs of a comparison, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Args:
        argv: An optional configuration file, and flags.
        prog: Name of the program in `--help`.
        kind: Class of the options: [`CompareArguments`] or [`SweepArguments`].

    Raises:
        TSTError: For bad input, arms that cannot be equal in the budget, settings that have changed, or a folder in which another
            process works.
        SystemExit: With status 1, if a run failed. The report has the other runs.
    """
    began = time.monotonic()
    values, args = parse_experiment(argv, kind, prog)
    with holding_folder(values["output_dir"]):
        return _compare(values, args, shlex.join(["hf-tst", kind.command, *argv]), began)


def _compare(values: dict[str, Any], args: ExperimentArguments, command: str, began: float) -> Comparison:
    experiment = open_experiment(values, args)
    runs, limit = plan_within_limit(experiment, began)

    def report() -> Comparison:
        facts = {"command": command, **_facts(experiment, runs)}
        if limit is not None:
            facts["time limit"] = limit.fact
        notes = []
        if args.processes > 1:
            notes.append(
                f"{args.processes} runs at the same time share the machine, so their times are not comparable. Use --processes 1 to compare times."
            )
        if args.seconds is not None and any(run.result is None for run in runs):
            notes.append(
                f"A run that would have ended after the limit of {args.seconds:g} s was not started."
            )
        cells = {arm.name: arm.changes for arm in experiment.arms if arm.name != BASELINE}
        comparison = compare_runs(
            args.budget, runs, facts, notes, cells if isinstance(args, SweepArguments) else {}
        )
        print("\n" + format_comparison(comparison) + "\n")
        print(*write_report(comparison, experiment.output_dir), sep="\n")
        return comparison

    until = math.inf if args.seconds is None else began + args.seconds
    try:
        failures = run_all(runs, processes=args.processes, launcher=args.launcher, until=until)
    except RunRefusedError:
        if any(run.result for run in runs):
            report()
        raise
    comparison = report()
    if failures:
        raise SystemExit("\n".join(failures.values()))
    return comparison


def sweep(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """As [`main`], for the arms of a grid."""
    return main(argv, prog, SweepArguments)


def _facts(experiment: Experiment, runs: Sequence[ArmRun]) -> dict[str, str]:
    """Command, hardware, software and settings of the runs."""
    values, results = experiment.values, [(run.arm.name, run.result) for run in runs if run.result]
    facts = {
        "parameters": f"{experiment.shape.parameters:,}",
        "runs at the same time": str(experiment.args.processes),
    }
    for name in ("hardware", "software"):
        found = dict.fromkeys(getattr(result, name) for _, result in results)
        facts[name] = "; ".join(found) or "nothing has run"
    if not isinstance(experiment.args, SweepArguments):  # the names of its arms say it
        if any(asks_for_superposition(arm.values) for arm in experiment.arms):
            size, ratio = setting(values, "tst_bag_size"), setting(values, "tst_phase_ratio")
            facts["superposition"] = f"s = {size}, r = {ratio}"
        for arm in experiment.arms:
            changed = [f"{name}={value}" for name, value in sorted(arm.changes.items()) if name != "seeds"]
            facts |= {} if arm.name in ARMS else {f"arm {arm.name}": ", ".join(changed)}
    steps = {name: f"{name} {result.curve[-1].step:,}" for name, result in results}
    return facts | {"steps": ", ".join(steps.values()), "FLOPs": FORMULA}
