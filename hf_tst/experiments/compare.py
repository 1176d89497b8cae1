"""Baseline, TST and other arms on one configuration and one budget: what `hf-tst compare` and `scripts/compare.py` run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import TSTError
from ..planning.flops import FORMULA
from .arms import ARMS, arm_schedule, arm_values, check_arms, define_arms, is_superposed, setting
from .budget import (
    BUDGETS,
    Budget,
    StepCost,
    flops_per_step,
    raw_tokens_per_step,
    steps_within_budget,
    with_steps,
)
from .comparison import ArmPlan, Comparison, Outcome, compare_outcomes
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
from .report import format_comparison, write_report
from .timing import TimeLimit, calibrate, time_short_run

DESCRIPTION = f"""Train arms ({", ".join(ARMS)}) on one configuration and one budget, and compare them.

Takes a recipe and the flags of training, and those of the comparison, which are listed first. Every run is a process with a
folder of its own in output_dir. Started again, it does what is missing; half a run goes on from its last checkpoint.
{EVERY_RUN}

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
    budget: Budget = field(
        default="flops",
        metadata={
            "help": "What is equal: flops (max_steps of the baseline), data (raw tokens of the TST run of max_steps) or time "
            "(measured, of the baseline's max_steps)."
        },
    )
    learning_rates: str | None = field(
        default=None, metadata={"help": "Learning rates, the same for each arm; learning_rate by default."}
    )
    calibration_steps: int = field(
        default=20,
        metadata={"help": "Steps that are timed in each phase for an equal time or a limit of seconds."},
    )
    seconds: float | None = field(
        default=None,
        metadata={
            "help": "Limit for all runs together: max_steps is lowered for all arms alike, by the speed of a short run, and stays "
            "so when the comparison goes on. A run that would end later is not started. Needs processes=1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in BUDGETS:
            raise TSTError(f"budget must be one of {', '.join(BUDGETS)}, but is {self.budget!r}.")
        if self.calibration_steps < 4:
            raise TSTError(f"calibration_steps must be at least 4, but is {self.calibration_steps}.")
        if self.seconds is not None and self.seconds <= 0:
            raise TSTError(f"seconds must be more than 0, but is {self.seconds:g}.")
        if self.seconds is not None and self.processes > 1:
            raise TSTError(
                f"seconds={self.seconds:g} needs processes=1, not {self.processes}: runs at the same time slow each other down."
            )


def plan_comparison(
    experiment: Experiment, args: CompareArguments, max_steps: int | None = None
) -> tuple[dict[str, ArmPlan], list[tuple[Outcome, PlannedRun]]]:
    """The arms, and all runs, in the order in which they are done. With an equal time, runs the calibration first.

    Args:
        experiment ([`Experiment`]): What the runs have in common.
        args ([`CompareArguments`]): What is compared.
        max_steps (`int`, *optional*): Steps in the place of those of the configuration, with which the data is not checked
            where they may be lowered.

    Raises:
        TSTError: If the arms cannot be equal in the budget, or the data is too short for one.
    """
    names = parse_list("arms", args.arms, str)
    arms = define_arms(experiment.values, args.more_arms)
    values = {name: arm_values(arms[name], experiment.values, fusable=experiment.fusable) for name in names}
    for arm in values.values():
        training_arguments(arm)
    default_rate = str(setting(experiment.values, "learning_rate"))
    rates = parse_list("learning_rates", args.learning_rates or default_rate, float)
    is_final = max_steps is not None or args.seconds is None
    max_steps = max_steps or experiment.values["max_steps"]
    schedules = {name: arm_schedule(arm, max_steps) for name, arm in values.items()}
    if is_final:
        for name, schedule in schedules.items():
            experiment.check_data(f"The arm {name}", schedule)
    tokens = experiment.latent_tokens_per_step
    flops = {
        name: flops_per_step(
            experiment.shape,
            experiment.block_size,
            1,
            setting(arm, "mtp_num_heads"),
            setting(arm, "mtp_kind"),
        )
        for name, arm in values.items()
    }
    if args.budget == "time":
        costs = calibrate(experiment, values, args.calibration_steps, args.launcher)
    elif args.budget == "data":
        costs = {name: raw_tokens_per_step(schedule, tokens) for name, schedule in schedules.items()}
    else:
        costs = {
            name: StepCost(tokens * arm.superposition, tokens * arm.recovery) for name, arm in flops.items()
        }
    steps = steps_within_budget(args.budget, costs, schedules)
    plans, runs = {}, []
    for name in names:
        schedule = arm_schedule(values[name], steps[name])
        if is_final:
            experiment.check_data(f"The arm {name}", schedule)
        plans[name] = ArmPlan(schedule, flops[name])
        settings = with_steps(values[name], steps[name])
        for rate in rates:
            for turn, seed in enumerate(parse_list("seeds", arms[name].get("seeds", args.seeds), int)):
                run = f"{name}-lr{rate:g}-seed{seed}"
                planned = PlannedRun(
                    run,
                    experiment.output_dir / run,
                    {**settings, "learning_rate": rate, "seed": seed},
                    experiment.data,
                )
                runs.append((turn, (Outcome(run, name, rate, seed, None), planned)))
    # A seed of every arm before the next seed: an interrupted comparison has pairs.
    runs.sort(key=lambda run: run[0])
    return plans, [run for _, run in runs]


def main(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """Do what is missing of a comparison, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Raises:
        TSTError: For bad input, arms that cannot be equal in the budget, or settings that have changed.
        SystemExit: With status 1, if a run failed; the report is written with what there is.
    """
    began = time.monotonic()
    values, args = parse_experiment(argv, CompareArguments, DESCRIPTION, prog, "runs/compare")
    names = parse_list("arms", args.arms, str)
    arms = define_arms(values, args.more_arms)
    check_arms(names, arms, values)
    extra_heads = any(arms[name].get("mtp_num_heads", 1) > 1 for name in names)
    experiment = open_experiment(values, args.launcher, extra_heads=extra_heads)
    plans, runs, limit = _plan_within_limit(experiment, args, began)
    queue = [planned for _, planned in runs]
    until = math.inf if args.seconds is None else began + args.seconds
    failures, refusal = run_all_shown(queue, processes=args.processes, launcher=args.launcher, until=until)
    outcomes = [
        Outcome(run.name, run.arm, run.learning_rate, run.seed, planned.result) for run, planned in runs
    ]
    comparison = compare_outcomes(
        args.budget, plans, outcomes, _facts(argv, experiment, args, outcomes, limit), _notes(args, outcomes)
    )
    print("\n" + format_comparison(comparison) + "\n")
    for path in write_report(comparison, experiment.output_dir):
        print(path)
    if refusal is not None:
        raise refusal
    if failures:
        raise SystemExit("\n".join(failures.values()))
    return comparison


def _plan_within_limit(
    experiment: Experiment, args: CompareArguments, began: float
) -> tuple[dict[str, ArmPlan], list[tuple[Outcome, PlannedRun]], TimeLimit | None]:
    """The plan, and the limit of seconds that it keeps to: the one that the comparison was begun with, or else a new one."""
    limit = TimeLimit.load(experiment.output_dir, experiment.values["max_steps"])
    if limit is None and args.seconds is None:
        return *plan_comparison(experiment, args), None
    if limit is None:
        assert args.seconds is not None
        plans, runs = plan_comparison(experiment, args)
        queue = [(run.arm, planned) for run, planned in runs]
        limit = time_short_run(experiment, plans, queue, args.seconds, args.calibration_steps, args.launcher)
        limit = limit.lowered(plans, queue, began + args.seconds - time.monotonic())
    plans, runs = plan_comparison(experiment, args, limit.max_steps)
    limit.save(experiment.output_dir)
    print(limit.fact, flush=True)
    timed = [
        (run, replace(planned, seconds=limit.seconds_of(plans[run.arm], planned.settings)))
        for run, planned in runs
    ]
    return plans, timed, limit


def _facts(
    argv: Sequence[str],
    experiment: Experiment,
    args: CompareArguments,
    outcomes: Sequence[Outcome],
    limit: TimeLimit | None,
) -> dict[str, str]:
    values = experiment.values
    runs = describe_runs(
        ["hf-tst", "compare", *argv], experiment, args.processes, [run.result for run in outcomes]
    )
    superposition = f"s = {setting(values, 'tst_bag_size')}, r = {setting(values, 'tst_phase_ratio')}"
    arms = define_arms(values, args.more_arms)
    names = list(dict.fromkeys(run.arm for run in outcomes))
    superposed = any(is_superposed({**values, **arms[name]}) for name in names)
    further = {
        f"arm {name}": ", ".join(
            f"{option}={arms[name][option]}" for option in sorted(arms[name].keys() - {"seeds"})
        )
        for name in names
        if name not in ARMS
    }
    return {
        **runs,
        **({"superposition": superposition} if superposed else {}),
        **further,
        "steps": ", ".join(
            f"{name} {count:,}"
            for name, count in {r.arm: r.result.steps for r in outcomes if r.result}.items()
        ),
        **({} if limit is None else {"time limit": limit.fact}),
        "FLOPs": FORMULA,
    }


def _notes(args: CompareArguments, outcomes: Sequence[Outcome]) -> list[str]:
    notes = []
    if args.processes > 1:
        notes.append(
            f"{args.processes} runs at the same time share the machine: times say little. Use --processes 1 to compare them."
        )
    for status in ("diverged", "missing"):
        names = [run.name for run in outcomes if run.status == status]
        if names:
            notes.append(f"{status}, and in no mean: {', '.join(names)}.")
            if status == "missing" and args.seconds is not None:
                notes.append(
                    f"A run that would have ended after the limit of {args.seconds:g} s was not started."
                )
    return notes
