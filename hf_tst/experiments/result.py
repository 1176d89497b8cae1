"""The result of one run of a comparison, and how files of a run are read."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import yaml

from ..bags.phases import PhaseSchedule
from ..errors import TSTError, bad_input, whole_message
from ..records.run_record import TimedSteps, timed_steps, write_atomically

T = TypeVar("T")
RESULT_FILE = "result.json"
REFUSAL_FILE = "refused.txt"  # why the input of a run was refused, in one sentence


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation. `eval_loss` in nats per token, `None` if it is not finite; `seconds` of training before it."""

    step: int
    raw_tokens: int
    latent_tokens: int
    seconds: float
    eval_loss: float | None


@dataclass(frozen=True)
class RunResult:
    """The result of one run, in `result.json` in its folder.

    Args:
        curve (`list[CurvePoint]`): All evaluations, in order; the first before training, the last after it.
        seconds_per_step (`dict`): Median by phase.
        peak_memory_bytes (`int`, *optional*): Of the first GPU, or of the process without a GPU.
        memory_of (`str`): `"GPU"` or `"process"`.
        parameters (`int`), hardware (`str`), software (`str`): As in [`RunRecord`].
        loss_by_frequency, loss_by_position (`list[float]`): Losses of the saved model on the evaluation data, ten means each; see
            [`LossTally`].
    """

    curve: list[CurvePoint]
    seconds_per_step: dict[str, float]
    peak_memory_bytes: int | None
    memory_of: str
    parameters: int
    hardware: str
    software: str
    loss_by_frequency: list[float | None] = field(default_factory=list)
    loss_by_position: list[float | None] = field(default_factory=list)

    @property
    def initial_eval_loss(self) -> float | None:
        """Nats per token, before training."""
        return self.curve[0].eval_loss

    @property
    def final_eval_loss(self) -> float | None:
        """Nats per token, after training."""
        return self.curve[-1].eval_loss

    @property
    def has_diverged(self) -> bool:
        """Whether the final loss is non-finite, or the run has lost more than half of its best gain.

        A loss of less than 5 % of the first loss does not count: a model whose training continues gains little, and may end slightly
        above its best loss or its first one.
        """
        first, last = self.initial_eval_loss, self.final_eval_loss
        if first is None or last is None:
            return last is None
        best = min(point.eval_loss for point in self.curve if point.eval_loss is not None)
        return last - best > max((first - best) / 2, 0.05 * first)

    def save(self, folder: str | Path) -> None:
        """Write `result.json`."""
        write_atomically(Path(folder) / RESULT_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RunResult | None:
        """The result in a run's folder, or `None` if the run is not finished.

        Raises:
            TSTError: If the file is damaged.
        """

        def parse(text: str) -> RunResult:
            values = json.loads(text)
            return cls(**{**values, "curve": [CurvePoint(**point) for point in values["curve"]]})

        return parse_file(Path(folder) / RESULT_FILE, parse)


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
        run (`dict`): Its note, from [`run_note`].

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
            raw_tokens=max(0, schedule.amount_read(step, latent_tokens_per_step) - left_out),
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
    # The first interval of a phase includes one-time work, such as compiling.
    return {phase: median(values[1:] or values) for phase, values in paces.items()}


def _seconds_at(step: int, timed: Sequence[TimedSteps]) -> float:
    """Seconds after `step` steps: interpolated between logs, and after the last log at the last speed."""
    seconds = 0.0
    for steps in timed:
        if step <= steps.end or steps is timed[-1]:
            return seconds + (step - steps.begin) * steps.seconds / (steps.end - steps.begin)
        seconds += steps.seconds
    return 0.0


def _peak_memory() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"


def parse_file(path: Path, parse: Callable[[str], T], removed: str = "it") -> T | None:
    """The result of `parse` on the text of a file; `None` if there is no such file.

    Raises:
        TSTError: If the file is damaged. The message proposes to remove `removed`.
    """
    if not path.is_file():
        return None
    what = f"The file {path} is damaged, so remove {removed} or name another output_dir: "
    with bad_input(what, (ValueError, TypeError, KeyError, yaml.YAMLError), whole_message):
        return parse(path.read_text(encoding="utf-8"))


def read_settings(path: Path) -> dict[str, Any] | None:
    """The names and values in a YAML file of a run; `None` if there is no such file.

    Raises:
        TSTError: If it is damaged.
    """
    return parse_file(path, lambda text: dict(yaml.safe_load(text)), removed="its folder")
