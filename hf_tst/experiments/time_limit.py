"""A time limit for a comparison: the number of steps that fits into it, from the speed of a short run."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import TSTError
from ..records.run_record import write_atomically
from .arms import StepCost, asks_for_superposition, setting
from .budget import ArmRun, measure_pace, plan_comparison
from .experiment import Experiment
from .result import parse_file

LIMIT_FILE = "time_limit.json"
# Fraction of the limit to plan for: times of runs differ by some percent.
PLANNED_SHARE = 0.95
FEWEST_STEPS = 10


@dataclass(frozen=True)
class TimeLimit:
    """The number of steps that fits into a time limit, and the measured times that it is computed from.

    Args:
        configured_steps (`int`): `max_steps` of the configuration.
        max_steps (`int`): The number of steps to take instead.
        limit_seconds (`float`): The time limit.
        start_seconds (`float`): Of a run, for its start and its end.
        evaluation_seconds (`float`): Per evaluation.
        superposition_seconds (`float`), recovery_seconds (`float`): Per step.
        flops_per_latent_token (`float`): Of a recovery step of the arm that was timed.
    """

    configured_steps: int
    max_steps: int
    limit_seconds: float
    start_seconds: float
    evaluation_seconds: float
    superposition_seconds: float
    recovery_seconds: float
    flops_per_latent_token: float

    @property
    def fact(self) -> str:
        """Its text in a report."""
        return (
            f"max_steps {self.max_steps:,} of the configured {self.configured_steps:,}, for a limit of {self.limit_seconds:g} s; "
            f"measured: {self.superposition_seconds:.4g} s per step of superposition, {self.recovery_seconds:.4g} s per step of "
            f"recovery, {self.evaluation_seconds:.3g} s per evaluation, {self.start_seconds:.3g} s per run for its start and end"
        )

    def seconds_of(self, run: ArmRun) -> tuple[float, float]:
        """Seconds of a run for start, end and evaluations, and for its steps.

        It is evaluated before training, every `eval_steps` and at the last step, or after its epoch, and once more after training.
        """
        every = run.settings.get("eval_steps") or setting(run.settings, "logging_steps")
        last = run.arm.schedule.max_steps
        interval = math.ceil(every * last) if every < 1 else every
        within = math.ceil(last / interval) if run.settings["eval_strategy"] == "steps" else 1
        more = run.arm.flops.recovery / self.flops_per_latent_token  # of extra heads
        pace = StepCost(self.superposition_seconds, self.recovery_seconds * more)
        return self.start_seconds + (2 + within) * self.evaluation_seconds, pace.of_run(run.arm.schedule)


def time_short_run(experiment: Experiment, runs: Sequence[ArmRun]) -> TimeLimit:
    """The speed of runs, measured in a short run of the first arm with superposition, or else of the first arm.

    As many short runs take place at the same time as runs of the comparison.

    Args:
        experiment ([`Experiment`]): The common configuration of the runs.
        runs: All runs, for the configured steps.

    Returns:
        [`TimeLimit`], whose `max_steps` are still those of the configuration.

    Raises:
        TSTError: If the short run fails.
    """
    args = experiment.args
    assert args.seconds is not None
    first = next((run for run in runs if asks_for_superposition(run.settings)), runs[0])
    names = ["calibration", *(f"calibration-copy{i}" for i in range(1, min(args.processes, len(runs))))]
    for name in names:
        shutil.rmtree(experiment.output_dir / name, ignore_errors=True)
    began = time.monotonic()
    pace = measure_pace(experiment, names, first.settings)
    whole = time.monotonic() - began
    evaluation = max(
        json.loads((experiment.output_dir / name / "eval_results.json").read_text(encoding="utf-8"))[
            "eval_runtime"
        ]
        for name in names
    )
    timed = pace.recovery + (pace.superposition if asks_for_superposition(first.settings) else 0.0)
    start = max(0.0, whole - evaluation - args.calibration_steps * timed)
    steps = experiment.values["max_steps"]
    return TimeLimit(
        configured_steps=steps,
        max_steps=steps,
        limit_seconds=args.seconds,
        start_seconds=start,
        evaluation_seconds=evaluation,
        superposition_seconds=pace.superposition,
        recovery_seconds=pace.recovery,
        flops_per_latent_token=first.arm.flops.recovery,
    )


def _share_out(runs: Iterable[tuple[float, float]], processes: int) -> list[tuple[float, float]]:
    """Seconds of each process that takes runs: for starts and evaluations, and for steps. A free process takes the next run."""
    places = [(0.0, 0.0)] * processes
    for fixed, training in runs:
        places.sort(key=sum)
        places[0] = places[0][0] + fixed, places[0][1] + training
    return [place for place in places if sum(place)]


def plan_within_limit(experiment: Experiment, began: float) -> tuple[list[ArmRun], TimeLimit | None]:
    """All runs, and the time limit: that of the start of the comparison, or a new one.

    Args:
        experiment ([`Experiment`]): The common configuration of the runs.
        began (`float`): Start of the time limit, from `time.monotonic`.

    Raises:
        TSTError: As [`plan_comparison`] does, or if the limit leaves no time for steps.
    """
    file, seconds = experiment.output_dir / LIMIT_FILE, experiment.args.seconds
    steps = experiment.values["max_steps"]
    limit = parse_file(file, lambda text: TimeLimit(**json.loads(text)))
    if limit is None or limit.configured_steps != steps:
        runs = plan_comparison(experiment)
        if seconds is None:
            return runs, None
        limit = time_short_run(experiment, runs)
        gone = time.monotonic() - began
        places = _share_out(map(limit.seconds_of, runs), experiment.args.processes)
        left = PLANNED_SHARE * (seconds - gone)
        chosen = min(int(steps * (left - fixed) / training) for fixed, training in places)
        if chosen < FEWEST_STEPS:
            needed = max(fixed for fixed, _ in places)
            raise TSTError(
                f"seconds={seconds:g} is too little for {len(runs)} runs: {gone:.0f} s have passed, and the runs need {needed:.0f} s "
                "besides their steps. Give more seconds, or fewer arms or seeds."
            )
        limit = replace(limit, max_steps=min(steps, chosen))
    runs = plan_comparison(experiment, limit.max_steps)
    write_atomically(file, json.dumps(asdict(limit), indent=2) + "\n")
    print(limit.fact, flush=True)
    for run in runs:
        run.expected_seconds = sum(limit.seconds_of(run))
    return runs, limit
