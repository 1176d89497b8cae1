"""The record of a run: the logs in `trainer_state.json`, and its notes on arguments, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import TSTError, bad_input
from ..version import __version__

# Where `trainer_state.json` holds the notes: not in the log history, whose entries scripts expect to be logs.
NOTES = "TSTTrainer"
RUN_NOTE = "tst_run"
RUN_ID = "tst_run_id"
UTILIZATION = "tst_model_flops_utilization"
# The arguments that a card shows; the others hold paths and names of this machine.
ARGUMENTS = (
    "tst_phase_ratio", "tst_bag_size", "tst_offset_weighting", "tst_input_weighting", "tst_mode",
    "tst_superposition_rows",
    "tst_document_boundaries", "tst_fused_loss",
    "mtp_num_heads", "mtp_kind", "mtp_loss_weight", "mtp_loss_weight_end",
    "optim", "learning_rate", "weight_decay", "lr_scheduler_type", "seed", "bf16", "fp16", "load_best_model_at_end",
)  # fmt: skip


def run_notes(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The notes of each start of training, with its step, in order; a new note is appended.

    Args:
        state (`dict`): What `trainer_state.json` holds, or `vars` of a `TrainerState`.
    """
    return state.setdefault("stateful_callbacks", {}).setdefault(NOTES, [])


def phase_of(entry: Mapping[str, Any]) -> str | None:
    """Phase of the last optimizer step done when an entry was logged; `None` if it was not logged in training."""
    if (bag_size := entry.get("tst_current_bag_size")) is None:
        return None
    return "superposition" if bag_size > 1 else "recovery"


@dataclass(frozen=True)
class TimedSteps:
    """Optimizer steps `begin` to `end` of a phase, and their seconds of training."""

    begin: int
    end: int
    phase: str
    seconds: float
    utilization: float | None = None  # model FLOPs utilization, where the peak of the device is known


def timed_steps(log_history: Sequence[Mapping[str, Any]]) -> list[TimedSteps]:
    """The steps between logs, in order, without the time of evaluation, saving and loading.

    They are computed from the speeds in the log: wall-clock times would count the pause before a resume. Like
    `tst_latent_tokens`, a speed assumes rows as long as the last one.
    """
    timed: list[TimedSteps] = []
    step = 0
    for entry in log_history:
        speed = entry.get("tst_latent_tokens_per_second")
        if not speed or entry["step"] <= step:
            continue
        seconds = (entry["step"] - step) * entry["tst_latent_tokens"] / entry["step"] / speed
        phase = phase_of(entry) or "recovery"
        timed.append(TimedSteps(step, entry["step"], phase, seconds, entry.get(UTILIZATION)))
        step = entry["step"]
    return timed


@dataclass(frozen=True)
class RunRecord:
    """The data of a model card.

    Args:
        log_history: The entries of `trainer_state.json`.
        max_steps (`int`): Optimizer steps of the run, N.
        switch_step (`int`): First step of recovery; 0 without superposition.
        arguments (`dict`): The training arguments, at least those that a card shows.
        rows_per_step (`int`): Rows per optimizer step, over all devices.
        total_flos (`float`): FLOPs of the run, see [`step_flops`].
        parameters (`int`): Parameters of the model.
        hardware (`str`): Devices of the run.
        evaluation (`dict`): Result of the final `Trainer.evaluate`.
        software (`str`): Versions of the run.
        base_model (`str`, *optional*): Hub id of the model that training started from.
        library_name (`str`, *optional*, defaults to `"transformers"`): `"peft"` for an adapter.
        global_step (`int`, *optional*): Optimizer steps done; all of them by default.
        peak_tflops (`float`, *optional*): Peak of one device in TFLOP/s, which utilization is relative to.
    """

    log_history: Sequence[Mapping[str, Any]]
    max_steps: int
    switch_step: int
    arguments: Mapping[str, Any]
    rows_per_step: int
    total_flos: float
    parameters: int
    hardware: str
    evaluation: Mapping[str, float] = field(default_factory=dict)
    software: str = ""
    base_model: str | None = None
    library_name: str = "transformers"
    global_step: int | None = None
    peak_tflops: float | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any], now: Mapping[str, Any] | None = None) -> RunRecord:
        """The record of a run.

        Args:
            state (`dict`): As for [`run_notes`].
            now (`dict`, *optional*): A [`run_note`] for a run that has not started.

        Raises:
            ValueError: If no TST run is on record.
        """
        runs = [note[RUN_NOTE] for note in run_notes(state) if RUN_NOTE in note] or ([now] if now else [])
        if not runs:
            raise ValueError("it has no record of a TSTTrainer run")
        last = runs[-1]
        # A run that was resumed on another machine has several.
        machines = {
            name: "; then ".join(dict.fromkeys(run[name] for run in runs))
            for name in ("hardware", "software")
        }
        return cls(
            log_history=state.get("log_history") or [],
            evaluation=_evaluation_of_weights(state, bool(last["arguments"].get("load_best_model_at_end"))),
            **{name: state[name] for name in ("max_steps", "total_flos", "global_step")},
            **{**last, **machines},
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> RunRecord:
        """The record of the run that left `trainer_state.json` in a folder.

        Raises:
            TSTError: If there is none, or it is not of a TST run.
        """
        path = Path(folder) / "trainer_state.json"
        if not path.is_file():
            raise TSTError(f"There is no {path}: name the output folder of a finished run, or a checkpoint.")
        with bad_input(f"{path} cannot be used: ", (ValueError, KeyError, TypeError, AttributeError)):
            return cls.from_state(json.loads(path.read_text(encoding="utf-8")))


def _evaluation_of_weights(state: Mapping[str, Any], loads_best: bool) -> Mapping[str, float]:
    """The last evaluation; if the best weights were loaded at the end and not evaluated since, that of their step."""
    history = state.get("log_history") or []
    evaluations = [entry for entry in history if "eval_loss" in entry]
    ends = [place for place, entry in enumerate(history) if "train_runtime" in entry]
    if loads_best and ends and not any("eval_loss" in entry for entry in history[ends[-1] :]):
        of_best = [entry for entry in evaluations if entry.get("step") == state.get("best_global_step")]
        evaluations = of_best or evaluations
    return evaluations[-1] if evaluations else {}


def run_note(trainer: Any) -> dict[str, Any]:
    """The note of a [`TSTTrainer`]'s run: arguments, versions and hardware."""
    values, model = trainer.args.to_dict(), trainer.accelerator.unwrap_model(trainer.model)
    return {
        "switch_step": trainer.schedule.switch_step if trainer.schedule else 0,
        "rows_per_step": trainer.get_total_train_batch_size(trainer.args),
        "arguments": {name: values[name] for name in ARGUMENTS if name in values},
        "parameters": _saved_parameters(model),
        "hardware": describe_hardware(trainer.args.world_size),
        "software": describe_software(),
        "base_model": loaded_from(model),
        "library_name": "peft" if hasattr(model, "peft_config") else "transformers",
    }


def restored_arguments(
    state: dict[str, Any], arguments: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The arguments that a resumed run does not apply, with the values of the checkpoint, which its optimizer has restored.

    The type, warm-up and options of a learning rate schedule are none of them: a checkpoint does not hold them.

    Args:
        state (`dict`): As for [`run_notes`], before this start is noted.
        arguments (`dict`): Those of this start.
        groups: The groups of parameters of the optimizer.
    """
    notes = [note[RUN_NOTE]["arguments"] for note in run_notes(state) if RUN_NOTE in note]
    restored = {}
    for name, key in (("learning_rate", "initial_lr"), ("weight_decay", "weight_decay")):
        # Biases and norms are in a group without weight decay.
        value = max((float(group[key]) for group in groups if key in group), default=None)
        if notes and value == notes[-1].get(name) and value != arguments.get(name):
            restored[name] = value
    return restored


def _saved_parameters(model: Any) -> int:
    """Parameters of the saved model, without extra heads."""
    if not hasattr(model, "num_parameters"):
        return 0
    saved = model.state_dict().keys()
    return model.num_parameters() - sum(
        p.numel() for name, p in model.named_parameters() if name not in saved
    )


def describe_hardware(world_size: int = 1) -> str:
    """The devices of all `world_size` processes."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{world_size} x {name}"


def describe_software() -> str:
    """The versions that are installed."""
    packages = ("transformers", "torch", "accelerate")
    # This package may run from a checkout that is not installed.
    return ", ".join([f"hf-tst {__version__}", *(f"{package} {version(package)}" for package in packages)])


def loaded_from(model: Any) -> str | None:
    """Hub id that a model was loaded from; `None` if it was made from a configuration or a local folder."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and not Path(name).exists() else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
