"""What came of one run of a comparison, in `result.json` in its folder."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..records.run_record import TimedSteps, timed_steps

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation. `eval_loss` in nats a token, `None` if it is no finite number; `seconds` of training before it."""

    step: int
    raw_tokens: int
    latent_tokens: int
    seconds: float
    eval_loss: float | None


@dataclass(frozen=True)
class RunResult:
    """What came of one run.

    Args:
        curve (`list[CurvePoint]`): All evaluations, in order; the first before training, the last after it.
        seconds_per_step (`dict`): Median by phase.
        peak_memory_bytes (`int`, *optional*): Of the first device; of the process where there is no GPU.
        memory_of (`str`): `"GPU"` or `"process"`.
        parameters (`int`), hardware (`str`), software (`str`): As on record of the run.
    """

    curve: list[CurvePoint]
    seconds_per_step: dict[str, float]
    peak_memory_bytes: int | None
    memory_of: str
    parameters: int
    hardware: str
    software: str

    @property
    def initial_eval_loss(self) -> float | None:
        """Nats a token, before training."""
        return self.curve[0].eval_loss

    @property
    def final_eval_loss(self) -> float | None:
        """Nats a token, after training."""
        return self.curve[-1].eval_loss

    @property
    def has_diverged(self) -> bool:
        """Whether the final loss is no finite number, or has lost more than half of what the run had gained at its best.

        Less than 5 % of the first loss is never divergence: a trained model that goes on has little to gain, and may end
        a little above its best, or its start.
        """
        first, last = self.initial_eval_loss, self.final_eval_loss
        if first is None or last is None:
            return last is None
        best = min(point.eval_loss for point in self.curve if point.eval_loss is not None)
        return last - best > max((first - best) / 2, 0.05 * first)

    def save(self, folder: str | Path) -> None:
        """Write `result.json`; a reader sees all of it or nothing."""
        write_whole(Path(folder) / RESULT_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RunResult | None:
        """The result in a run's folder, or `None` if it is not finished.

        Raises:
            TSTError: If the file is damaged.
        """
        path = Path(folder) / RESULT_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["curve"] = [CurvePoint(**point) for point in values["curve"]]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise TSTError(
                f"The file {path} is damaged ({error}): remove it to have the run done again."
            ) from None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def result_of_run(
    log_history: Sequence[Mapping[str, Any]],
    schedule: PhaseSchedule,
    latent_tokens_per_step: int,
    run: Mapping[str, Any],
) -> RunResult:
    """The result of a run, from its log history.

    Args:
        log_history: As in `TrainerState`.
        schedule (`PhaseSchedule`): Its phases.
        latent_tokens_per_step (`int`): Over all devices.
        run (`dict`): What it ran with and on, as [`run_entry`] gives it.

    Raises:
        TSTError: If it was not evaluated.
    """
    timed = timed_steps(log_history)
    left_out, points = 0, {}
    for entry in log_history:
        left_out = entry.get("tst_tokens_left_out", left_out)
        if "eval_loss" not in entry:
            continue
        step, loss = entry["step"], float(entry["eval_loss"])
        points[step] = CurvePoint(
            step=step,
            raw_tokens=max(0, schedule.tokens_seen(step, latent_tokens_per_step) - left_out),
            latent_tokens=step * latent_tokens_per_step,
            seconds=_seconds_at(step, timed),
            eval_loss=loss if math.isfinite(loss) else None,
        )
    if not points:
        raise TSTError("The run was not evaluated: give it evaluation data.")
    memory, memory_of = _peak_memory()
    return RunResult(
        curve=[points[step] for step in sorted(points)],
        seconds_per_step=_seconds_per_step(timed),
        peak_memory_bytes=memory,
        memory_of=memory_of,
        **{name: run[name] for name in ("parameters", "hardware", "software")},
    )


def _seconds_per_step(timed: Sequence[TimedSteps]) -> dict[str, float]:
    """Median by phase."""
    paces: dict[str, list[float]] = {}
    for steps in timed:
        paces.setdefault(steps.phase, []).append(steps.seconds / (steps.end - steps.begin))
    # The first interval of a phase holds what is done once, such as compiling.
    return {phase: median(values[1:] or values) for phase, values in paces.items()}


def _seconds_at(step: int, timed: Sequence[TimedSteps]) -> float:
    """Seconds after `step` steps, between logs in proportion, after the last at its pace."""
    seconds = 0.0
    for steps in timed:
        if step <= steps.end or steps is timed[-1]:
            return seconds + (step - steps.begin) * steps.seconds / (steps.end - steps.begin)
        seconds += steps.seconds
    return 0.0


def _peak_memory() -> tuple[int | None, str]:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU"
    try:
        import resource
    except ImportError:  # Windows
        return None, "process"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "process"
