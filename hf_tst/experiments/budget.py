"""The plan of a comparison: the steps of each arm, for an equal budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from .arms import BASELINE, Arm, StepCost, asks_for_superposition, setting
from .experiment import Experiment
from .options import UNITS, parse_list
from .queue import PlannedRun, run_all

# Allowed relative distance from the budget.
TOLERANCE = 0.01


@dataclass
class ArmRun(PlannedRun):
    """A planned run of an arm."""

    arm: Arm = field(kw_only=True)


def check_data(experiment: Experiment, schedules: Mapping[str, PhaseSchedule]) -> None:
    """Check that the runs of all arms fit into one pass over the data, so that none reads data twice.

    Raises:
        TSTError: If one does not fit.
    """
    if experiment.blocks is None or experiment.rows_per_step is None:
        return
    for name, schedule in schedules.items():
        needed = schedule.blocks_needed(experiment.rows_per_step)
        if needed > experiment.blocks:
            raise TSTError(
                f"The arm {name} reads {needed:,} blocks of {experiment.block_size} tokens in {schedule.max_steps} steps, but the "
                f"data has {experiment.blocks:,}: give more data, or lower max_steps, the batch or the bag size."
            )


def fit_to_budget(
    budget: str, costs: Mapping[str, StepCost], schedules: Mapping[str, PhaseSchedule]
) -> dict[str, PhaseSchedule]:
    """The phases of every arm, with the number of steps that uses up the budget.

    The baseline (without one, the first arm) takes the configured number of steps; with equal data, the arm that reads most in this
    number of steps takes it. The other arms take more or fewer steps.

    Args:
        budget (`str`): `"flops"`, `"data"` or `"time"`.
        costs (`dict[str, StepCost]`): The cost of a step, by arm, in any unit.
        schedules (`dict[str, PhaseSchedule]`): The phases by arm, for the configured number of steps.

    Raises:
        TSTError: If no number of steps of an arm is within 1 % of the budget.
    """
    totals = {name: costs[name].of_run(schedule) for name, schedule in schedules.items()}
    reference = BASELINE if BASELINE in totals else next(iter(totals))
    if budget == "data":
        reference = max(totals, key=totals.__getitem__)
    target = totals[reference]
    found = {}
    for name, schedule in schedules.items():
        cost, ratio = costs[name], schedule.phase_ratio
        about = round(target / (ratio * cost.superposition + (1 - ratio) * cost.recovery))
        gaps = {
            steps: abs(cost.of_run(replace(schedule, max_steps=steps)) - target)
            for steps in range(max(1, about - 3), about + 4)
        }
        nearest = min(gaps, key=gaps.__getitem__)
        if gaps[nearest] > TOLERANCE * target:
            raise TSTError(
                f"The arm {name} cannot be equal to {reference} in {UNITS[budget]}: {nearest} steps are the nearest, but "
                f"{gaps[nearest] / target:.1%} off ({TOLERANCE:.0%} is allowed). Raise max_steps, or leave the arm out."
            )
        found[name] = replace(schedule, max_steps=nearest)
    return found


def with_steps(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A configuration that takes `steps` optimizer steps, with the stages of its learning rate schedule scaled in proportion.

    Warm-up, decay and stable stages in steps are scaled; fractions do not change.
    """
    before = values["max_steps"]
    changed = {**values, "max_steps": steps}
    if steps == before:
        return changed

    def scale(count: float) -> int:
        return max(1, round(count * steps / before))

    warmup = values.get("warmup_steps") or 0
    if warmup >= 1:
        changed["warmup_steps"] = scale(warmup)
    options = values.get("lr_scheduler_kwargs") or {}
    changed["lr_scheduler_kwargs"] = {
        name: scale(value) if (name.endswith("_steps") or name == "timescale") and value else value
        for name, value in options.items()
    }
    return changed


def calibrate(experiment: Experiment) -> dict[str, StepCost]:
    """Seconds per step of each arm, by phase, from consecutive short runs. They are stored and not measured again.

    Raises:
        TSTError: If one fails.
    """
    return {
        arm.name: measure_pace(experiment, [f"calibration-{arm.name}"], {**arm.values, "max_eval_samples": 1})
        for arm in experiment.arms
    }


def measure_pace(experiment: Experiment, names: Sequence[str], values: Mapping[str, Any]) -> StepCost:
    """Seconds per step, from a run of `calibration_steps` steps in each phase of an arm, evaluated at its end only.

    Runs of several names take place at the same time, and the slowest counts.
    """
    superposed, steps = asks_for_superposition(values), experiment.args.calibration_steps
    settings = {
        **values, "max_steps": steps * (2 if superposed else 1), "logging_strategy": "steps",
        "logging_steps": max(1, steps // 4), "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
        "tst_save_at_switch": False, "seed": 0, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {},
        "report_to": "none", **({"tst_phase_ratio": 0.5} if superposed else {}),
    }  # fmt: skip
    runs = [PlannedRun(name, experiment.output_dir / name, settings, experiment.inputs) for name in names]
    failures = run_all(runs, processes=len(runs), launcher=experiment.args.launcher)
    found = []
    for run in runs:
        if run.result is None:
            raise TSTError(failures[run.name])
        seconds = run.result.seconds_per_step
        found.append(StepCost(seconds.get("superposition", seconds["recovery"]), seconds["recovery"]))
    return StepCost(max(cost.superposition for cost in found), max(cost.recovery for cost in found))


def plan_comparison(experiment: Experiment, max_steps: int | None = None) -> list[ArmRun]:
    """All runs, in order. With an equal time, runs the calibration first.

    Args:
        experiment ([`Experiment`]): The common configuration of the runs.
        max_steps (`int`, *optional*): Steps instead of the configuration's. Without it, the data is not checked if a time
            limit may lower the steps.

    Raises:
        TSTError: If the arms cannot be equal in the budget, or the data is too short for one.
    """
    args, values, arms = experiment.args, experiment.values, experiment.arms
    rates = parse_list("learning_rates", args.learning_rates or setting(values, "learning_rate"), float)
    is_final = max_steps is not None or args.seconds is None
    max_steps = max_steps or values["max_steps"]
    schedules = {arm.name: replace(arm.schedule, max_steps=max_steps) for arm in arms}
    if is_final:
        check_data(experiment, schedules)
    costs = {arm.name: arm.raw_tokens if args.budget == "data" else arm.flops for arm in arms}
    if args.budget == "time":
        costs = calibrate(experiment)
    schedules = fit_to_budget(args.budget, costs, schedules)
    if is_final:
        check_data(experiment, schedules)
    runs = []
    for arm in arms:
        planned = replace(arm, values=with_steps(arm.values, schedules[arm.name].max_steps))
        seeds = parse_list("seeds", arm.changes.get("seeds", args.seeds), int)
        for rate, (turn, seed) in product(rates, enumerate(seeds)):
            name = f"{arm.name}-lr{rate:g}-seed{seed}"
            settings = {**planned.values, "learning_rate": rate, "seed": seed}
            run = ArmRun(name, experiment.output_dir / name, settings, experiment.inputs, arm=planned)
            runs.append((turn, run))
    # All arms of one seed before the next seed, so an interrupted comparison has pairs.
    return [run for _, run in sorted(runs, key=lambda entry: entry[0])]
