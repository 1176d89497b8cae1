"""Options that a comparison and a sweep have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from transformers.hf_argparser import HfArg

from ..errors import TSTError, bad_input, check_at_least
from ..pretraining.options import TRAINING, given_values, parse_mapping, parse_values, pick
from .arms import setting

T = TypeVar("T")
UNITS: Mapping[str, str] = {"flops": "FLOPs", "data": "raw tokens", "time": "measured time of training"}
EVERY_RUN = """Each run is a process with its own folder in output_dir. Start the command
again to do the missing runs; an interrupted run resumes from its last
checkpoint. Each run is also evaluated before training, continues even if it
diverges (tst_nonfinite_loss=ignore), shows no progress bar, and takes its seed
from --seeds. A run without evaluations, or with too few logs for a curve, gets
20 of them."""


@dataclass
class ExperimentArguments:
    """How runs are planned and done."""

    # The name of the command, and its `--help`.
    command: ClassVar[str]
    description: ClassVar[str]
    # What runs that all end at the same step cannot have.
    impossible: ClassVar[Sequence[str]] = (
        "push_to_hub", "load_best_model_at_end", "resume_from_checkpoint", "auto_find_batch_size",
    )  # fmt: skip

    budget: Literal["flops", "data", "time"] = HfArg(
        default="flops",
        help="Equal budget: flops (of the baseline's max_steps), data (raw tokens of the arm that reads most in max_steps) "
        "or time (measured, of the baseline's max_steps).",
    )
    learning_rates: str | None = HfArg(
        default=None, help="Learning rates to try, the same for each arm; learning_rate by default."
    )
    seeds: str = HfArg(default="0,1,2", help="Seeds that every run is repeated with.")
    processes: int = HfArg(
        default=1, help="Number of runs at the same time. With more than 1, times are not comparable."
    )
    launcher: str | None = HfArg(
        default=None,
        help="Command that starts a run instead of Python, for example 'accelerate launch --num_processes 8'.",
    )
    calibration_steps: int = HfArg(
        default=20, help="Steps per phase of the short run that is timed for budget=time and for seconds."
    )
    seconds: float | None = HfArg(
        default=None,
        help="Time limit for all runs together: max_steps is lowered equally for all arms, from the speed of a short run, and is "
        "kept when the comparison continues. A run that would end later is not started.",
    )

    def __post_init__(self) -> None:
        check_at_least(1, processes=self.processes)
        check_at_least(4, calibration_steps=self.calibration_steps)
        if self.seconds is not None and self.seconds <= 0:
            raise TSTError(f"seconds must be more than 0, but is {self.seconds:g}.")

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The arms to compare, by name, with their changes to the configuration `values`.

        Raises:
            TSTError: If an arm is unknown.
        """
        raise NotImplementedError


def parse_experiment(
    argv: Sequence[str], kind: type[ExperimentArguments], prog: str | None = None
) -> tuple[dict[str, Any], ExperimentArguments]:
    """The configuration of training, as a file would hold it, and the options of kind `kind`.

    Args:
        argv: A configuration file, if any, and flags.
        kind: Dataclass of the options.
        prog: For `--help`.

    Raises:
        TSTError: For unknown options, and for options that a comparison cannot have.
    """
    defaults = {"output_dir": f"runs/{kind.command}"}
    namespace = parse_values(argv, [kind, *TRAINING], kind.description, prog, defaults)
    values = given_values(namespace, TRAINING)
    if text := values.get("lr_scheduler_kwargs"):
        values["lr_scheduler_kwargs"] = parse_mapping("lr_scheduler_kwargs", text)
    steps = namespace.max_steps
    if steps <= 0:
        raise TSTError(f"max_steps is {steps}: set it, so that all runs have a known budget.")
    for name in kind.impossible:
        if values.get(name):
            raise TSTError(
                f"{name} is not possible in a comparison, whose runs all end at the same step: leave it out."
            )
    # So that there are curves, also of runs that diverge.
    values |= {"eval_on_start": True, "disable_tqdm": True, "tst_nonfinite_loss": "ignore"}
    # Fractions, because a time limit may lower the steps.
    if str(namespace.eval_strategy) == "no":
        values |= {"eval_strategy": "steps", "eval_steps": 0.05}
    is_unfit = namespace.seconds is not None and namespace.logging_steps == setting({}, "logging_steps")
    if is_unfit or str(namespace.logging_strategy) != "steps" or namespace.logging_steps * 10 > steps:
        values |= {"logging_strategy": "steps", "logging_steps": 0.05}
    return values, pick(vars(namespace), kind)


def parse_list(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The values of an option such as `0,1,2`.

    Raises:
        TSTError: If one has another type, there is none, or one is given twice.
    """
    parts = [part.strip() for part in str(text).strip("[]").split(",") if part.strip()]
    with bad_input(
        f"{name} must be a comma-separated list of {kind.__name__}, such as 1,2, but is {text!r}: "
    ):
        values = [kind(part) for part in parts]
    if not values or len(set(values)) < len(values):
        raise TSTError(f"{name} must have at least one value, and each only once, but is {text!r}.")
    return values
