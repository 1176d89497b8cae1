"""Options that a comparison and a sweep have in common, and the one configuration that all runs change."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformers.hf_argparser import HfArg

from ..data.blocks import check_blocks
from ..errors import TSTError, bad_input, check_at_least
from ..models.fused import check_fusable
from ..models.shape import ModelShape
from ..models.superposition import find_language_model
from ..mtp.heads import MTPHeads
from ..pretraining.options import TRAINING, given_values, micro_batches, parse_mapping, parse_values, pick
from ..pretraining.parts import prepare_run
from ..training.arguments import TSTTrainingArguments
from .arms import Arm, check_arms, make_arm, setting

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


@dataclass(frozen=True)
class Experiment:
    """One configuration, its arms, and the facts known before any run.

    Args:
        args (`ExperimentArguments`): How runs are planned and done.
        values (`dict`): The configuration, as a file holds it; missing values have their defaults.
        arms (`list[Arm]`): The arms.
        shape (`ModelShape`): The model.
        block_size (`int`): Tokens per block, L.
        rows_per_step (`int`, *optional*): Over all devices; `None` if a launcher decides it.
        blocks (`int`, *optional*): Of training data; `None` for a stream.
        inputs (`dict`): Fingerprints of the blocks of `"training data"` and `"evaluation data"`, which a stream does not have, and
            what [`describe_model`] returns.
    """

    args: ExperimentArguments
    values: Mapping[str, Any]
    arms: Sequence[Arm]
    shape: ModelShape
    block_size: int
    rows_per_step: int | None
    blocks: int | None
    inputs: Mapping[str, Any]

    @property
    def output_dir(self) -> Path:
        """Where the runs and the report go."""
        return Path(self.values["output_dir"])


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


def open_experiment(
    argv: Sequence[str], kind: type[ExperimentArguments], prog: str | None = None
) -> Experiment:
    """Load data and model once, before any run: bad input is refused at once, and data is packed once.

    Args:
        argv, kind, prog: As for [`parse_experiment`].

    Raises:
        TSTError: As [`parse_experiment`], and if a run would be refused or there is no data to evaluate on.
    """
    values, args = parse_experiment(argv, kind, prog)
    changes = args.select_arms(values)
    check_arms(changes, values)
    model_args, data_args, training = (pick(values, part) for part in TRAINING)
    accumulated = micro_batches(Namespace(**vars(training) | vars(data_args)), world_size=1)
    parts, block_size = prepare_run(model_args, data_args, training)
    if parts["eval_dataset"] is None:
        raise TSTError("There is no data to evaluate on: set validation_file or validation_split_percentage.")
    try:
        check_fusable(find_language_model(parts["model"])[1], "on")
    except TSTError:
        values["tst_fused_loss"] = "off"
    if any(arm.get("mtp_num_heads", 1) > 1 for arm in changes.values()):
        MTPHeads(parts["model"], 2, setting(values, "mtp_kind"))  # raises if the model does not support them
    shape = ModelShape.from_config(parts["model"].config, model_args.lora_config())
    arms = [make_arm(name, arm, values, shape, block_size) for name, arm in changes.items()]
    for arm in arms:
        pick(arm.values, TSTTrainingArguments)  # raises if the arm contradicts itself
    rows = training.per_device_train_batch_size * accumulated
    blocks = {"training": parts["train_dataset"], "evaluation": parts["eval_dataset"]}
    sized = {name: part for name, part in blocks.items() if hasattr(part, "num_rows")}
    return Experiment(
        args=args,
        values=values,
        arms=arms,
        shape=shape,
        block_size=block_size,
        rows_per_step=rows if args.launcher is None or values.get("tokens_per_step") else None,
        blocks=len(sized["training"]) if "training" in sized else None,
        inputs={f"{name} data": check_blocks(part).data for name, part in sized.items()}
        | describe_model(parts["model"], has_weights=bool(model_args.model_name_or_path)),
    )


def describe_model(model: Any, has_weights: bool) -> dict[str, Any]:
    """The fields of a model's configuration and, of a trained model, a fingerprint of its input embeddings."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    del fields["transformers_version"]
    if has_weights:
        weights = model.get_input_embeddings().weight.detach().cpu().contiguous().view(torch.uint8)
        fields["weights"] = hashlib.sha256(weights.numpy()).hexdigest()[:16]
    return {f"model {name}": value for name, value in fields.items()}


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
