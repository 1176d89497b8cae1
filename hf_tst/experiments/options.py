"""What a comparison and a sweep have in common: their options, and one configuration that all runs change."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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
    make_output_dir,
    micro_batches,
    parse_values,
    pick,
)
from ..pretraining.run import prepare_run
from ..training.arguments import TSTTrainingArguments
from .arms import setting
from .result import RunResult

T = TypeVar("T")
TRAINING = [ModelArguments, DataArguments, TSTTrainingArguments]
EVERY_RUN = """Every run is evaluated before training, too, goes on to its end if it diverges (tst_bad_loss=ignore), and has no
progress bar; its seed is of --seeds; logs that are too rare for a curve, and evaluations where
there are none (eval_strategy=no), come 20 times a run."""


@dataclass
class ExperimentArguments:
    """How the runs are done."""

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

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise TSTError(f"processes must be at least 1, but is {self.processes}.")


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

    def check_data(self, name: str, schedule: PhaseSchedule) -> None:
        """Check that a run fits into one pass over the data, so that none reads data twice.

        Raises:
            TSTError: If it does not.
        """
        if self.blocks is None or self.rows_per_step is None:
            return
        needed = schedule.blocks_needed(self.rows_per_step)
        if needed > self.blocks:
            raise TSTError(
                f"{name} reads {needed:,} blocks of {self.block_size} tokens in {schedule.max_steps} steps, but the data has "
                f"{self.blocks:,}: give more data, or lower max_steps, the batch or the bag size."
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
    if isinstance(values.get("lr_scheduler_kwargs"), str):
        try:
            values["lr_scheduler_kwargs"] = json.loads(values["lr_scheduler_kwargs"])
        except json.JSONDecodeError as error:
            raise TSTError(
                f"lr_scheduler_kwargs is not JSON: {error} in {values['lr_scheduler_kwargs']!r}; "
                'write {"num_decay_steps": 100}.'
            ) from error
    if not isinstance(values.get("lr_scheduler_kwargs") or {}, dict):
        raise TSTError(
            f"lr_scheduler_kwargs must be names and values, but is {values['lr_scheduler_kwargs']}: "
            'write {"num_decay_steps": 100}.'
        )
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
    make_output_dir(args.output_dir)
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


def describe_runs(
    command: Sequence[str], experiment: Experiment, processes: int, results: Iterable[RunResult | None]
) -> dict[str, str]:
    """With what, on what and how runs were done, for a report.

    Args:
        command: The words of the command line.
        experiment ([`Experiment`]): What the runs have in common.
        processes (`int`): Runs at the same time.
        results: Of the runs; `None` for one that has none.
    """
    finished = [result for result in results if result is not None]

    def all_of(name: str) -> str:
        return "; ".join(dict.fromkeys(getattr(result, name) for result in finished)) or "nothing has run"

    return {
        "command": shlex.join(command),
        "parameters": f"{experiment.shape.parameters:,}",
        "runs at the same time": str(processes),
        "hardware": all_of("hardware"),
        "software": all_of("software"),
    }


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
