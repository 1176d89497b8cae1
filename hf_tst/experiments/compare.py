"""Baseline, TST and other arms on one configuration and one budget: what `hf-tst compare` and `scripts/compare.py` run."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import TSTError
from ..planning.flops import FORMULA
from .arms import ARMS, arm_schedule, arm_values, check_arms, define_arms, is_superposed, setting
from .budget import StepCost, flops_per_step, raw_tokens_per_step, steps_within_budget, with_steps
from .comparison import BASELINE, ArmPlan, Comparison, Outcome, compare_outcomes
from .options import (
    EVERY_RUN,
    Experiment,
    ExperimentArguments,
    open_experiment,
    parse_experiment,
    parse_list,
    training_arguments,
)
from .queue import PlannedRun, RunRefusedError, run_all
from .report import format_comparison, write_report
from .timing import TimeLimit, calibrate, time_short_run

DESCRIPTION = f"""Train arms ({", ".join(ARMS)}) on one configuration and one budget, and compare them.

Takes a recipe and the flags of training, and those of the comparison, which are listed first. {EVERY_RUN}

  %(prog)s --output_dir runs/compare
  %(prog)s recipe.yaml --arms baseline,tst --seeds 0,1,2 --learning_rates 1e-3,2e-3 --budget data
"""


@dataclass
class CompareArguments(ExperimentArguments):
    """What is compared."""

    arms: str = field(
        default="baseline,tst", metadata={"help": f"Arms, of {', '.join(ARMS)} and those of more_arms."}
    )
    more_arms: str | None = field(
        default=None,
        metadata={
            "help": "Further arms, a mapping in a file or JSON: names, each with the options of TST and MTP that it changes, "
            "and its seeds where they are others."
        },
    )

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        known = define_arms(values, self.more_arms)
        names = parse_list("arms", self.arms, str)
        for name in names:
            if name not in known:
                raise TSTError(f"arms must be of {', '.join(known)}, but one is {name!r}.")
        arms = {name: known[name] for name in names}
        check_arms(arms, values)
        return arms


def main(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """Do what is missing of a comparison, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Raises:
        TSTError: For bad input, arms that cannot be equal in the budget, or settings that have changed.
        SystemExit: With status 1, if a run failed; the report is written with what there is.
    """
    return run_comparison("compare", CompareArguments, DESCRIPTION, argv, prog)


def run_comparison(
    command: str, kind: type[ExperimentArguments], description: str, argv: Sequence[str], prog: str | None
) -> Comparison:
    """As [`main`], for the arms that the options of kind `kind` select. `command` names the default folder, too."""
    began = time.monotonic()
    values, args = parse_experiment(argv, kind, description, prog, f"runs/{command}")
    arms = args.select_arms(values)
    extra_heads = any(changes.get("mtp_num_heads", 1) > 1 for changes in arms.values())
    experiment = open_experiment(values, args.launcher, extra_heads=extra_heads)
    plans, runs, limit = _plan_within_limit(experiment, args, began)
    until = math.inf if args.seconds is None else began + args.seconds
    failures, refusal = {}, None
    try:
        failures = run_all(runs, processes=args.processes, launcher=args.launcher, until=until)
    except RunRefusedError as error:
        if all(run.result is None for run in runs):
            raise
        refusal = error
    outcomes = [
        Outcome(run.name, run.arm, run.settings["learning_rate"], run.settings["seed"], run.result)
        for run in runs
    ]
    facts = {
        "command": shlex.join(["hf-tst", command, *argv]),
        **_facts(experiment, args, arms, outcomes),
        **({} if limit is None else {"time limit": limit.fact}),
    }
    notes = []
    if args.processes > 1:
        notes.append(
            f"{args.processes} runs at the same time share the machine: times say little. Use --processes 1 to compare them."
        )
    if args.seconds is not None and any(run.status == "missing" for run in outcomes):
        notes.append(f"A run that would have ended after the limit of {args.seconds:g} s was not started.")
    grid = {name: arms[name] for name in arms if name != BASELINE} if args.is_grid else {}
    comparison = compare_outcomes(args.budget, plans, outcomes, facts, notes, grid)
    print("\n" + format_comparison(comparison) + "\n")
    for path in write_report(comparison, experiment.output_dir):
        print(path)
    if refusal is not None:
        raise refusal
    if failures:
        raise SystemExit("\n".join(failures.values()))
    return comparison


def plan_comparison(
    experiment: Experiment, args: ExperimentArguments, max_steps: int | None = None
) -> tuple[dict[str, ArmPlan], list[PlannedRun]]:
    """The arms, and all runs, in the order in which they are done. With an equal time, runs the calibration first.

    Args:
        experiment ([`Experiment`]): What the runs have in common.
        args ([`ExperimentArguments`]): What is compared.
        max_steps (`int`, *optional*): Steps in the place of those of the configuration. Without it, the data is not checked
            where a limit of seconds may lower the steps.

    Raises:
        TSTError: If the arms cannot be equal in the budget, or the data is too short for one.
    """
    arms = args.select_arms(experiment.values)
    values = {
        name: arm_values(changes, experiment.values, fusable=experiment.fusable)
        for name, changes in arms.items()
    }
    for arm in values.values():
        training_arguments(arm)
    rates = parse_list(
        "learning_rates", args.learning_rates or setting(experiment.values, "learning_rate"), float
    )
    is_final = max_steps is not None or args.seconds is None
    max_steps = max_steps or experiment.values["max_steps"]
    schedules = {name: arm_schedule(arm, max_steps) for name, arm in values.items()}
    if is_final:
        experiment.check_data(schedules)
    operations = {
        name: flops_per_step(
            experiment.shape,
            experiment.block_size,
            1,
            setting(arm, "mtp_num_heads"),
            setting(arm, "mtp_kind"),
        )
        for name, arm in values.items()
    }
    tokens = experiment.latent_tokens_per_step
    if args.budget == "time":
        costs = calibrate(experiment, values, args.calibration_steps, args.launcher)
    elif args.budget == "data":
        costs = {name: raw_tokens_per_step(schedule, tokens) for name, schedule in schedules.items()}
    else:
        costs = {
            name: StepCost(tokens * cost.superposition, tokens * cost.recovery)
            for name, cost in operations.items()
        }
    steps = steps_within_budget(args.budget, costs, schedules)
    schedules = {name: arm_schedule(arm, steps[name]) for name, arm in values.items()}
    if is_final:
        experiment.check_data(schedules)
    runs = []
    for name, arm in values.items():
        settings = with_steps(arm, steps[name])
        for rate in rates:
            for turn, seed in enumerate(parse_list("seeds", arms[name].get("seeds", args.seeds), int)):
                run = f"{name}-lr{rate:g}-seed{seed}"
                changed = {**settings, "learning_rate": rate, "seed": seed}
                runs.append(
                    (turn, PlannedRun(run, experiment.output_dir / run, changed, experiment.data, arm=name))
                )
    # A seed of every arm before the next seed: an interrupted comparison has pairs.
    runs.sort(key=lambda run: run[0])
    plans = {name: ArmPlan(schedules[name], operations[name]) for name in arms}
    return plans, [run for _, run in runs]


def _plan_within_limit(
    experiment: Experiment, args: ExperimentArguments, began: float
) -> tuple[dict[str, ArmPlan], list[PlannedRun], TimeLimit | None]:
    """The plan, and the limit of seconds that it keeps to: the one that the comparison was begun with, or else a new one."""
    limit = TimeLimit.load(experiment.output_dir, experiment.values["max_steps"])
    if limit is None:
        plans, runs = plan_comparison(experiment, args)
        if args.seconds is None:
            return plans, runs, None
        limit = time_short_run(experiment, plans, runs, args.seconds, args.calibration_steps, args.launcher)
        limit = limit.lowered(plans, runs, began + args.seconds - time.monotonic())
    plans, runs = plan_comparison(experiment, args, limit.max_steps)
    limit.save(experiment.output_dir)
    print(limit.fact, flush=True)
    return (
        plans,
        [replace(run, seconds=limit.seconds_of(plans[run.arm], run.settings)) for run in runs],
        limit,
    )


def _facts(
    experiment: Experiment,
    args: ExperimentArguments,
    arms: Mapping[str, Mapping[str, Any]],
    outcomes: Sequence[Outcome],
) -> dict[str, str]:
    """With what, on what and how runs were done."""
    values = experiment.values
    results = {run.arm: run.result for run in outcomes if run.result is not None}

    def all_of(name: str) -> str:
        found = dict.fromkeys(getattr(run.result, name) for run in outcomes if run.result is not None)
        return "; ".join(found) or "nothing has run"

    facts = {
        "parameters": f"{experiment.shape.parameters:,}",
        "runs at the same time": str(args.processes),
        "hardware": all_of("hardware"),
        "software": all_of("software"),
    }
    if not args.is_grid:  # whose arms' names say it
        if any(is_superposed({**values, **changes}) for changes in arms.values()):
            facts["superposition"] = (
                f"s = {setting(values, 'tst_bag_size')}, r = {setting(values, 'tst_phase_ratio')}"
            )
        for name, changes in arms.items():
            changed = ", ".join(
                f"{option}={changes[option]}" for option in sorted(changes.keys() - {"seeds"})
            )
            facts |= {} if name in ARMS else {f"arm {name}": changed}
    facts["steps"] = ", ".join(f"{name} {result.curve[-1].step:,}" for name, result in results.items())
    return facts | {"FLOPs": FORMULA}
