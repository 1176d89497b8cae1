"""Baseline, TST and other arms on one configuration and one budget: what `hf-tst compare` and `scripts/compare.py` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TSTError
from ..planning.flops import FORMULA
from .arms import ARMS, arm_schedule, arm_values, check_arms, is_superposed, setting
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
from .queue import PlannedRun, run_all, run_all_shown
from .report import format_comparison, write_report

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

    arms: str = field(default="baseline,tst", metadata={"help": f"Arms, of {', '.join(ARMS)}."})
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
        default=20, metadata={"help": "Steps that are timed in each phase for an equal time."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget not in BUDGETS:
            raise TSTError(f"budget must be one of {', '.join(BUDGETS)}, but is {self.budget!r}.")
        if self.calibration_steps < 4:
            raise TSTError(f"calibration_steps must be at least 4, but is {self.calibration_steps}.")


def plan_comparison(
    experiment: Experiment, args: CompareArguments
) -> tuple[dict[str, ArmPlan], list[tuple[Outcome, PlannedRun]]]:
    """The arms, and all runs, in the order in which they are done. With an equal time, runs the calibration first.

    Raises:
        TSTError: If the arms cannot be equal in the budget, or the data is too short for one.
    """
    names = parse_list("arms", args.arms, str)
    seeds = parse_list("seeds", args.seeds, int)
    values = {name: arm_values(name, experiment.values, fusable=experiment.fusable) for name in names}
    for arm in values.values():
        training_arguments(arm)
    default_rate = str(setting(experiment.values, "learning_rate"))
    rates = parse_list("learning_rates", args.learning_rates or default_rate, float)
    max_steps = experiment.values["max_steps"]
    schedules = {name: arm_schedule(arm, max_steps) for name, arm in values.items()}
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
        costs = calibrate(experiment, args, values)
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
        experiment.check_data(f"The arm {name}", schedule)
        plans[name] = ArmPlan(schedule, flops[name])
        settings = with_steps(values[name], steps[name])
        for rate in rates:
            for seed in seeds:
                run = f"{name}-lr{rate:g}-seed{seed}"
                planned = PlannedRun(
                    run,
                    experiment.output_dir / run,
                    {**settings, "learning_rate": rate, "seed": seed},
                    experiment.data,
                )
                runs.append((Outcome(run, name, rate, seed, None), planned))
    # A seed of every arm before the next seed: an interrupted comparison has pairs.
    runs.sort(key=lambda run: seeds.index(run[0].seed))
    return plans, runs


def calibrate(
    experiment: Experiment, args: CompareArguments, values: Mapping[str, Mapping[str, Any]]
) -> dict[str, StepCost]:
    """Seconds a step of each arm, by phase, from short runs one after the other; kept, and not measured again.

    Raises:
        TSTError: If one fails.
    """
    runs = {}
    for name, arm in values.items():
        steps = args.calibration_steps * (2 if is_superposed(arm) else 1)
        settings = {
            **arm, "max_steps": steps, "logging_strategy": "steps", "logging_steps": max(1, args.calibration_steps // 4),
            "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
            "tst_save_at_switch": False, "seed": 0, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {},
            "report_to": "none",
        }  # fmt: skip
        if is_superposed(arm):
            settings["tst_phase_ratio"] = 0.5
        data = dict(experiment.data)
        if data.pop("evaluation", None):  # a stream can't be cut
            settings["max_eval_samples"] = 1
        folder = experiment.output_dir / f"calibration-{name}"
        runs[name] = PlannedRun(f"calibration of {name}", folder, settings, data)
    failures = run_all(list(runs.values()), launcher=args.launcher)
    if failures:
        raise TSTError(next(iter(failures.values())))
    costs = {}
    for name, run in runs.items():
        assert run.result is not None
        seconds = run.result.seconds_per_step
        recovery = seconds["recovery"]
        costs[name] = StepCost(seconds.get("superposition", recovery), recovery)
    return costs


def main(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """Do what is missing of a comparison, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Raises:
        TSTError: For bad input, arms that cannot be equal in the budget, or settings that have changed.
        SystemExit: With status 1, if a run failed; the report is written with what there is.
    """
    values, args = parse_experiment(argv, CompareArguments, DESCRIPTION, prog, "runs/compare")
    names = parse_list("arms", args.arms, str)
    check_arms(names, values)
    extra_heads = any("mtp_num_heads" in ARMS[name] for name in names)
    experiment = open_experiment(values, args.launcher, extra_heads=extra_heads)
    plans, runs = plan_comparison(experiment, args)
    queue = [planned for _, planned in runs]
    failures, refusal = run_all_shown(queue, processes=args.processes, launcher=args.launcher)
    outcomes = [
        Outcome(run.name, run.arm, run.learning_rate, run.seed, planned.result) for run, planned in runs
    ]
    comparison = compare_outcomes(
        args.budget, plans, outcomes, _facts(argv, experiment, args, outcomes), _notes(args, outcomes)
    )
    print("\n" + format_comparison(comparison) + "\n")
    for path in write_report(comparison, experiment.output_dir):
        print(path)
    if refusal is not None:
        raise refusal
    if failures:
        raise SystemExit("\n".join(failures.values()))
    return comparison


def _facts(
    argv: Sequence[str], experiment: Experiment, args: CompareArguments, outcomes: Sequence[Outcome]
) -> dict[str, str]:
    values = experiment.values
    runs = describe_runs(
        ["hf-tst", "compare", *argv], experiment, args.processes, [run.result for run in outcomes]
    )
    superposition = f"s = {setting(values, 'tst_bag_size')}, r = {setting(values, 'tst_phase_ratio')}"
    superposed = any("tst_phase_ratio" not in ARMS[run.arm] for run in outcomes)
    return {
        **runs,
        **({"superposition": superposition} if superposed else {}),
        "steps": ", ".join(
            f"{name} {count:,}"
            for name, count in {r.arm: r.result.steps for r in outcomes if r.result}.items()
        ),
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
    return notes
