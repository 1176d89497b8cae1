"""Options that a comparison and a sweep have in common, and the one configuration that all runs change."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..bags.phases import PhaseSchedule
from ..data.blocks import check_blocks
from ..errors import TSTError
from ..models.fused import check_fusable
from ..models.shape import ModelShape
from ..models.superposition import find_language_model
from ..mtp.heads import MTPHeads
from ..pretraining.options import (
    DataArguments,
    ModelArguments,
    explained_arguments,
    given_values,
    micro_batches,
    parse_values,
    pick,
)
from ..pretraining.pretrain import prepare_run
from ..training.arguments import TSTTrainingArguments
from .arms import setting
from .budget import Budget

T = TypeVar("T")
TRAINING = [ModelArguments, DataArguments, TSTTrainingArguments]
EVERY_RUN = """Every run is a process with
a folder of its own in output_dir. Started again, the command does what is missing, and an interrupted run continues from its
last checkpoint. Every run is evaluated before training, too, continues to its end if it diverges (tst_bad_loss=ignore), and
has no progress bar; its seed is of --seeds; logs that are too rare for a curve, and evaluations where there are none
(eval_strategy=no), come 20 times per run."""


@dataclass
class ExperimentArguments:
    """How runs are planned and done. The arms of a grid are drawn as heat maps, others as curves."""

    is_grid: ClassVar[bool] = False
    budget: Budget = field(
        default="flops",
        metadata={
            "help": "What is equal: flops (max_steps of the baseline), data (raw tokens of the arm that reads most in max_steps) "
            "or time (measured, of the baseline's max_steps)."
        },
    )
    learning_rates: str | None = field(
        default=None, metadata={"help": "Learning rates, the same for each arm; learning_rate by default."}
    )
    seeds: str = field(default="0,1,2", metadata={"help": "Seeds that every run is repeated with."})
    processes: int = field(
        default=1,
        metadata={"help": "Runs at the same time. With more than 1, times are not comparable."},
    )
    launcher: str | None = field(
        default=None,
        metadata={
            "help": "What starts a run instead of Python, for example 'accelerate launch --num_processes 8'."
        },
    )
    calibration_steps: int = field(
        default=20,
        metadata={"help": "Steps that are timed in each phase for an equal time or a limit of seconds."},
    )
    seconds: float | None = field(
        default=None,
        metadata={
            "help": "Limit for all runs together: max_steps is lowered for all arms alike, by the speed of a short run, and stays "
            "so when the comparison continues. A run that would end later is not started. Needs processes=1."
        },
    )

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise TSTError(f"processes must be at least 1, but is {self.processes}.")
        if self.calibration_steps < 4:
            raise TSTError(f"calibration_steps must be at least 4, but is {self.calibration_steps}.")
        if self.seconds is not None and self.seconds <= 0:
            raise TSTError(f"seconds must be more than 0, but is {self.seconds:g}.")
        if self.seconds is not None and self.processes > 1:
            raise TSTError(
                f"seconds={self.seconds:g} needs processes=1, not {self.processes}: runs at the same time slow each other down."
            )

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The arms that are compared, by name, with what each changes in the configuration `values`.

        Raises:
            TSTError: If an arm is unknown, or cannot have what the configuration asks for.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Experiment:
    """One configuration, and what is known of it before any run.

    Args:
        values (`dict`): The configuration, as a file holds it: what is not in it has its default.
        shape (`ModelShape`): The model.
        block_size (`int`): Tokens a block, L.
        rows_per_step (`int`, *optional*): Over all devices; `None` if a launcher decides it.
        blocks (`int`, *optional*): Of training data; `None` for a stream.
        fusable (`bool`): Whether the model's loss can be fused with its head.
        data (`dict`): Fingerprints of the blocks of `"training"` and `"evaluation"`; a stream has none.
    """

    values: Mapping[str, Any]
    shape: ModelShape
    block_size: int
    rows_per_step: int | None
    blocks: int | None
    fusable: bool
    data: Mapping[str, str]

    @property
    def output_dir(self) -> Path:
        """Where the runs and the report go."""
        return Path(self.values["output_dir"])

    @property
    def latent_tokens_per_step(self) -> int:
        """Latent tokens a step; those of one process where it is not known how many there are."""
        rows = self.rows_per_step or setting(self.values, "per_device_train_batch_size")
        return rows * self.block_size

    def check_data(self, schedules: Mapping[str, PhaseSchedule]) -> None:
        """Check that runs of these phases, by arm, fit into one pass over the data, so that none reads data twice.

        Raises:
            TSTError: If one does not.
        """
        for name, schedule in schedules.items():
            if self.blocks is None or self.rows_per_step is None:
                continue
            needed = schedule.blocks_needed(self.rows_per_step)
            if needed > self.blocks:
                raise TSTError(
                    f"The arm {name} reads {needed:,} blocks of {self.block_size} tokens in {schedule.max_steps} steps, but the "
                    f"data has {self.blocks:,}: give more data, or lower max_steps, the batch or the bag size."
                )


def parse_experiment(
    argv: Sequence[str], kind: type[T], description: str, prog: str | None, output_dir: str
) -> tuple[dict[str, Any], T]:
    """The configuration of training, as a file would hold it, and the options of kind `kind`.

    Args:
        argv: A configuration file, if any, and flags.
        kind: Dataclass of the options.
        description, prog: For `--help`.
        output_dir (`str`): The default of `output_dir`.

    Raises:
        TSTError: For what cannot be understood, or cannot be part of a comparison.
    """
    namespace = parse_values(argv, [kind, *TRAINING], description, prog, {"output_dir": output_dir})
    values = given_values(namespace, TRAINING)
    schedule = values.get("lr_scheduler_kwargs") or {}
    if isinstance(schedule, str):
        with explained_arguments(values):
            schedule = json.loads(schedule)
    if not isinstance(schedule, dict):
        raise TSTError(
            f'lr_scheduler_kwargs must be names and values, but is {schedule}: write {{"num_decay_steps": 100}}.'
        )
    if schedule:
        values["lr_scheduler_kwargs"] = schedule
    if namespace.max_steps <= 0:
        raise TSTError(f"max_steps is {namespace.max_steps}: set it, so that all runs have a known budget.")
    for name in ("push_to_hub", "load_best_model_at_end", "resume_from_checkpoint", "auto_find_batch_size"):
        if values.get(name):
            raise TSTError(
                f"{name} cannot go with several runs that are compared after as many steps: leave it out."
            )
    return values | _records(namespace), pick(namespace, kind)


def _records(namespace: Namespace) -> dict[str, Any]:
    """What every run does so that there are curves: log, evaluate also before training, and diverge to the end if it does."""
    values: dict[str, Any] = {"eval_on_start": True, "disable_tqdm": True, "tst_bad_loss": "ignore"}
    interval = max(1, namespace.max_steps // 20)
    if str(namespace.eval_strategy) == "no":
        values |= {"eval_strategy": "steps", "eval_steps": interval}
    if str(namespace.logging_strategy) != "steps" or namespace.logging_steps * 10 > namespace.max_steps:
        values |= {"logging_strategy": "steps", "logging_steps": interval}
    return values


def open_experiment(
    values: Mapping[str, Any], launcher: str | None = None, *, extra_heads: bool = False
) -> Experiment:
    """Load what a configuration names, once, before any run: so that bad input is refused at once, and data packed once.

    `extra_heads` says that some run has multi-token prediction, which the model must be able to have.

    Raises:
        TSTError: If a run would be refused, or there is no data to evaluate on.
    """
    model_args = _make(ModelArguments, values)
    args = training_arguments(values)
    prepared = prepare_run(model_args, _make(DataArguments, values), args)
    if prepared.eval_blocks is None:
        raise TSTError("There is no data to evaluate on: set validation_file or validation_split_percentage.")
    _, model = find_language_model(prepared.model)
    try:
        check_fusable(model, "on")
        fusable = True
    except TSTError:
        fusable = False
    if extra_heads:
        MTPHeads(prepared.model, 2, setting(values, "mtp_kind"))  # says it if the model cannot have any
    tokens = values.get("tokens_per_step")
    rows = tokens // prepared.block_size if tokens else None
    if rows is None and launcher is None:
        batch = setting(values, "per_device_train_batch_size")
        rows = batch * setting(values, "gradient_accumulation_steps")
    return Experiment(
        values=values,
        shape=ModelShape.from_config(prepared.model.config, model_args.lora_config()),
        block_size=prepared.block_size,
        rows_per_step=rows,
        blocks=len(prepared.train_blocks) if hasattr(prepared.train_blocks, "num_rows") else None,
        fusable=fusable,
        data={
            name: check_blocks(blocks).data
            for name, blocks in [("training", prepared.train_blocks), ("evaluation", prepared.eval_blocks)]
            if hasattr(blocks, "num_rows")
        },
    )


def training_arguments(values: Mapping[str, Any]) -> TSTTrainingArguments:
    """The training arguments of a configuration, checked.

    Raises:
        TSTError: If they contradict each other.
    """
    settings = dict(values)
    if settings.get("tokens_per_step"):
        names = ("gradient_accumulation_steps", "per_device_train_batch_size")
        filled = {name: setting(values, name) for name in names} | {"block_size": None}
        settings["gradient_accumulation_steps"] = micro_batches(Namespace(**filled | settings), 1)
    return _make(TSTTrainingArguments, settings)


def _make(kind: type[T], values: Mapping[str, Any]) -> T:
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    with explained_arguments(values):
        return kind(**{name: value for name, value in values.items() if name in names})


def parse_list(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """The values that an option names, such as `0,1,2`.

    Raises:
        TSTError: If one is of another kind, there is none, or one comes twice.
    """
    parts = [part.strip() for part in str(text).strip("[]").split(",") if part.strip()]
    try:
        values = [kind(part) for part in parts]
    except ValueError:
        raise TSTError(
            f"{name} must be values of the kind {kind.__name__}, such as 1,2, but is {text!r}."
        ) from None
    if not values or len(set(values)) < len(values):
        raise TSTError(f"{name} must name each value once, and at least one, but is {text!r}.")
    return values
