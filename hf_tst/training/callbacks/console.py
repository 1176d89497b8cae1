"""What training prints: one line per log, with a progress bar below."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging as transformers_logging

from ...records.run_record import UTILIZATION

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {remaining} left{postfix}"
SPEED = "tst_raw_tokens_per_second"
# Log entries that are not printed, by name and by ending. Trackers and `trainer_state.json` have them all.
HIDDEN = (
    "grad_norm",
    "learning_rate",
    "epoch",
    "total_flos",
    "mtp_loss",
    "num_input_tokens_seen",
    "train_loss",
    "step",
)
HIDDEN_ENDS = ("_runtime", "_per_second")


class ConsoleCallback(ProgressCallback):
    """Prints one line per log. On a terminal it also shows a bar with the phase, the step and the time left.

    An evaluation right after a log is printed on the line of that log. In a resumed run, the speed is measured from the step that
    it resumed from.

    Args:
        trainer (`TSTTrainer`): The trainer; it has its `schedule` when training begins.
        has_bar (`bool`): Whether to show a bar.
    """

    def __init__(self, trainer: Any, has_bar: bool) -> None:
        super().__init__()
        self._trainer = trainer
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        # With None, tqdm shows a bar only on a terminal.
        self._no_bar = None if has_bar else True
        self._line: list[str] = []  # not printed yet, because an evaluation follows
        self._pace: list[str] = []
        self._first_step, self._began = 0, 0.0
        self._evaluated = 0  # batches of the current evaluation

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first_step, self._began = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            if self._first_step:
                tqdm.write(f"continued from step {self._first_step:,} of {state.max_steps:,}")
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, leave=False,
                disable=self._no_bar, bar_format=BAR,
            )  # fmt: skip
            self._show_phase(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self._show_phase(state.global_step)
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self.training_bar is not None:
            self._evaluated += 1
            self.training_bar.set_description_str(f"evaluation {self._evaluated}/{len(eval_dataloader)}")
            return
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="evaluation", dynamic_ncols=True, leave=False, disable=self._no_bar,
                bar_format=BAR,
            )  # fmt: skip
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        self._print()
        self._evaluated = 0
        self._show_phase(state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is None or not logs:  # not in training, or not the process that prints
            return
        if self._line and any(name.startswith("eval_") for name in logs):
            self._line += _figures(logs)
        else:
            self._print()
            self._line = self._begin(state, logs) + _figures(logs)
            self._pace = self._describe_pace(state, logs)
        if not (control.should_evaluate and "loss" in logs):
            self._print()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Print the last line and remove the bars. Also runs when training fails."""
        self._print()
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def _begin(self, state: TrainerState, logs: Mapping[str, Any]) -> list[str]:
        done = state.global_step - self._first_step
        if "train_runtime" in logs:
            return [f"{done:,} steps in {tqdm.format_interval(logs['train_runtime'])}"]
        phase = self._trainer.schedule.phase(max(state.global_step - 1, 0))
        return [f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}", f"{phase:<13}"]

    def _describe_pace(self, state: TrainerState, logs: Mapping[str, Any]) -> list[str]:
        if SPEED not in logs:
            return []
        done = state.global_step - self._first_step
        left = (time.monotonic() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
        pace = [f"{tqdm.format_sizeof(logs[SPEED])} raw tok/s", f"{tqdm.format_interval(left)} left"]
        return [*pace, f"mfu {logs[UTILIZATION]:.0%}"] if UTILIZATION in logs else pace

    def _print(self) -> None:
        if self._line:
            tqdm.write("  ".join(self._line + self._pace))
        self._line, self._pace = [], []

    def _show_phase(self, step: int) -> None:
        if self.training_bar is not None:
            self.training_bar.set_description_str(self._trainer.schedule.phase(step), refresh=False)


def replace_progress_callback(trainer: Any) -> ConsoleCallback | None:
    """Replace Trainer's own bar or printer, if it has one, by a [`ConsoleCallback`], and return it."""
    console = None
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
            console = ConsoleCallback(trainer, has_bar=type(callback) is ProgressCallback)
            trainer.add_callback(console)
    return console


def _figures(logs: Mapping[str, Any]) -> list[str]:
    """The entries of a log that are printed: losses, evaluation metrics, and entries that a script has logged."""
    shown = []
    for name, value in logs.items():
        if name == "tst_skipped_steps":
            shown.append(f"{value} skipped")
        elif not (name in HIDDEN or name.startswith("tst_") or name.endswith(HIDDEN_ENDS)):
            label = "eval" if name == "eval_loss" else name
            shown.append(f"{label} {value:.3f}" if isinstance(value, float) else f"{label} {value}")
    return shown


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context in which log messages and warnings do not break the bar, and saving and loading show no bars."""
    loggers = [logging.getLogger(name) for name in (None, "transformers")]
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        with logging_redirect_tqdm(loggers):
            yield
    finally:
        logging.captureWarnings(False)
        if had_bars:
            transformers_logging.enable_progress_bar()
