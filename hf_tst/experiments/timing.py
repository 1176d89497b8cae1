"""Short runs that are timed: the pace of each arm, and how many steps let all runs of a comparison end within a limit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TSTError
from .arms import is_superposed, setting
from .budget import StepCost
from .comparison import ArmPlan
from .options import Experiment
from .queue import PlannedRun, run_all
from .result import write_whole

LIMIT_FILE = "time_limit.json"
# Share of the limit that is planned: times of runs differ by some percent.
PLANNED_SHARE = 0.95
FEWEST_STEPS = 10


def calibrate(
    experiment: Experiment, values: Mapping[str, dict[str, Any]], steps: int, launcher: str | None
) -> dict[str, StepCost]:
    """Seconds per step of each arm, by phase, from short runs one after the other; kept, and not measured again.

    Args:
        experiment ([`Experiment`]): What they have in common.
        values (`dict`): The configuration of each arm.
        steps (`int`): Steps per phase.
        launcher (`str`, *optional*): As of [`run_all`].

    Raises:
        TSTError: If one fails.
    """
    # A stream can't be cut.
    evaluation = {"max_eval_samples": 1} if "evaluation" in experiment.data else {}
    return {
        name: _pace(_short_run(experiment, f"calibration-{name}", arm | evaluation, steps, launcher))
        for name, arm in values.items()
    }


def _short_run(
    experiment: Experiment, name: str, arm: Mapping[str, Any], steps: int, launcher: str | None
) -> PlannedRun:
    """A run, done, of `steps` steps in each phase of an arm, evaluated at its end only."""
    superposed = is_superposed(arm)
    settings = {
        **arm, "max_steps": steps * (2 if superposed else 1), "logging_strategy": "steps",
        "logging_steps": max(1, steps // 4), "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
        "tst_save_at_switch": False, "seed": 0, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {},
        "report_to": "none", **({"tst_phase_ratio": 0.5} if superposed else {}),
    }  # fmt: skip
    run = PlannedRun(name, experiment.output_dir / name, settings)
    failures = run_all([run], launcher=launcher)
    if failures:
        raise TSTError(failures[name])
    return run


def _pace(run: PlannedRun) -> StepCost:
    assert run.result is not None
    seconds = run.result.seconds_per_step
    return StepCost(seconds.get("superposition", seconds["recovery"]), seconds["recovery"])


@dataclass(frozen=True)
class TimeLimit:
    """How many steps a comparison takes because of a limit of seconds, and the measured times that they follow from.

    Args:
        configured_steps (`int`): `max_steps` of the configuration.
        max_steps (`int`): Those that are taken in their place.
        seconds (`float`): The limit that they were chosen for.
        start (`float`): Seconds of a run for its start and its end.
        evaluation (`float`): Seconds per evaluation.
        superposition (`float`), recovery (`float`): Seconds per step.
        operations (`float`): Of a recovery step's latent token, of the arm that was timed.
    """

    configured_steps: int
    max_steps: int
    seconds: float
    start: float
    evaluation: float
    superposition: float
    recovery: float
    operations: float

    @property
    def fact(self) -> str:
        """What a report says of it."""
        shortened = self.max_steps < self.configured_steps
        before = f"shortened from {self.configured_steps:,} to" if shortened else "as configured,"
        return (
            f"max_steps {before} {self.max_steps:,}, for a limit of {self.seconds:g} s; measured: {self.superposition:.4g} s per "
            f"step of superposition, {self.recovery:.4g} s of recovery, {self.evaluation:.3g} s per evaluation, "
            f"{self.start:.3g} s per run besides"
        )

    def save(self, folder: Path) -> None:
        """Write it into the folder of a comparison."""
        write_whole(folder / LIMIT_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, configured_steps: int) -> TimeLimit | None:
        """The limit that a comparison was begun with, or `None` if none was, or for another `max_steps`.

        Raises:
            TSTError: If the file is damaged.
        """
        path = folder / LIMIT_FILE
        if not path.is_file():
            return None
        try:
            limit = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise TSTError(f"The file {path} is damaged ({error}): name another output_dir.") from None
        return limit if limit.configured_steps == configured_steps else None

    def fixed_seconds(self, settings: Mapping[str, Any]) -> float:
        """Seconds of a run however long it is. Evaluations are as many, before it, `eval_steps` apart and after it."""
        every = settings.get("eval_steps") or setting(settings, "logging_steps")
        between = round(1 / every) if every < 1 else settings["max_steps"] // every
        return self.start + (2 + between) * self.evaluation

    def lowered(self, plans: Mapping[str, ArmPlan], runs: Sequence[PlannedRun], left: float) -> TimeLimit:
        """The limit with the `max_steps` with which all runs, one after the other, end within `left` seconds.

        Args:
            plans (`dict[str, ArmPlan]`): The arms, for the configured steps.
            runs: All runs, for the configured steps.
            left (`float`): Seconds that are left of the limit.

        Raises:
            TSTError: If no time is left for steps.
        """
        fixed = sum(self.fixed_seconds(run.settings) for run in runs)
        training = sum(self.seconds_of(plans[run.arm], run.settings) for run in runs) - fixed
        chosen = int(self.configured_steps * (PLANNED_SHARE * left - fixed) / training)
        if chosen < FEWEST_STEPS:
            raise TSTError(
                f"seconds={self.seconds:g} is too little for {len(runs)} runs: {self.seconds - left:.0f} s are gone, and they need "
                f"{fixed:.0f} s besides their steps. Give more seconds, or fewer arms or seeds."
            )
        return replace(self, max_steps=min(self.configured_steps, chosen))

    def seconds_of(self, plan: ArmPlan, settings: Mapping[str, Any]) -> float:
        """Seconds of a run of an arm."""
        more = plan.operations.recovery / self.operations  # of extra heads
        return self.fixed_seconds(settings) + StepCost(self.superposition, self.recovery * more).of_run(
            plan.schedule
        )


def time_short_run(
    experiment: Experiment,
    plans: Mapping[str, ArmPlan],
    runs: Sequence[PlannedRun],
    seconds: float,
    steps: int,
    launcher: str | None,
) -> TimeLimit:
    """The pace of runs, by a short one of the first arm with superposition, or else of the first arm.

    Args:
        experiment ([`Experiment`]): What the runs have in common.
        plans (`dict[str, ArmPlan]`), runs: As of [`TimeLimit.lowered`].
        seconds (`float`): The limit.
        steps (`int`): Steps that are timed in each phase.
        launcher (`str`, *optional*): As of [`run_all`].

    Returns:
        [`TimeLimit`], whose `max_steps` are those of the configuration still.

    Raises:
        TSTError: If the short run fails.
    """
    first = next((run for run in runs if is_superposed(run.settings)), runs[0])
    folder = experiment.output_dir / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    timed = _short_run(experiment, folder.name, first.settings, steps, launcher)
    whole = time.monotonic() - began
    pace = _pace(timed)
    evaluation = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["eval_runtime"]
    training = steps * (pace.recovery + (pace.superposition if is_superposed(first.settings) else 0.0))
    configured = experiment.values["max_steps"]
    return TimeLimit(
        configured, configured, seconds, max(0.0, whole - evaluation - training), evaluation, pace.superposition,
        pace.recovery, plans[first.arm].operations.recovery,
    )  # fmt: skip
