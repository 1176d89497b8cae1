"""What happens to the model at the start and at the phase switch, and what is logged by phase."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from .arguments import TSTTrainingArguments
from .phases import PhaseSchedule
from .superposition import fused_next_token_loss, token_superposition

logger = logging.get_logger(__name__)


class PhaseSwitchCallback(TrainerCallback):
    """Puts the model into token superposition or the fused next-token loss, as the phase of training asks.

    [`TSTTrainer`] sets `schedule` once the number of steps is known (`None` for plain training), and calls [`close`]
    when training ends, however it ends.
    """

    def __init__(self) -> None:
        self.schedule: PhaseSchedule | None = None
        self._context = ExitStack()

    def on_train_begin(
        self,
        args: TSTTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._enter(args, state.global_step, model)

    def on_step_end(
        self,
        args: TSTTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.schedule is None or state.global_step != self.schedule.switch_step:
            return
        self._enter(args, state.global_step, model)
        control.should_log = True
        if args.tst_save_at_switch:
            control.should_save = True
        logger.info(f"Step {state.global_step}: superposition ends, next-token training begins.")

    def close(self) -> None:
        """Give the model its own input and loss back."""
        self._context.close()

    def _enter(self, args: TSTTrainingArguments, step: int, model: Any) -> None:
        """Leave the phase that the model is in, and enter that of `step`."""
        self.close()
        if self.schedule is not None and self.schedule.phase(step) == "superposition":
            context = token_superposition(
                model,
                args.tst_bag_size,
                offset_weighting=args.tst_offset_weighting,
                mode=args.tst_mode,
                fused_loss=args.tst_fused_loss,
            )
        elif args.tst_replaces_loss:
            context = fused_next_token_loss(model, args.tst_fused_loss)
        else:
            return
        self._context.enter_context(context)


class TokenMeterCallback(TrainerCallback):
    """Counts raw and latent tokens and the seconds spent training (evaluation and saving left out).

    [`TSTTrainer`] sets `schedule` and `rows_per_step` (over all devices and accumulation steps) before training
    starts, and `latent_length` (positions a row, the same in both phases) from the batches.
    """

    def __init__(self) -> None:
        self.schedule: PhaseSchedule | None = None
        self.rows_per_step: int | None = None
        self.latent_length: int | None = None
        self._seconds = 0.0
        self._since = 0.0
        self._last_report = (0, 0.0)

    def on_train_begin(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds = 0.0
        self._last_report = (state.global_step, 0.0)
        self._restart_clock()

    def on_step_end(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds += time.perf_counter() - self._since
        self._restart_clock()

    def on_evaluate(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart_clock()

    def on_save(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since = time.perf_counter()

    def report(self, step: int, with_speed: bool) -> dict[str, Any]:
        """Log entries after `step` optimizer steps.

        Args:
            step (`int`): Optimizer steps done.
            with_speed (`bool`): Add tokens a second since the last report that had them.

        Returns:
            `tst_phase` of the last step done; `tst_raw_tokens` and `tst_latent_tokens` since the run began;
            `tst_raw_tokens_per_second` and `tst_latent_tokens_per_second`.
        """
        if self.schedule is None:
            return {}
        entries: dict[str, Any] = {"tst_phase": self.schedule.phase(max(step - 1, 0))}
        if self.rows_per_step is None or self.latent_length is None:
            return entries
        raw, latent = self._tokens(step)
        entries |= {"tst_raw_tokens": raw, "tst_latent_tokens": latent}
        last_step, last_seconds = self._last_report
        seconds = self._seconds - last_seconds
        if with_speed and step > last_step and seconds > 0:
            last_raw, last_latent = self._tokens(last_step)
            entries["tst_raw_tokens_per_second"] = round((raw - last_raw) / seconds, 1)
            entries["tst_latent_tokens_per_second"] = round((latent - last_latent) / seconds, 1)
            self._last_report = (step, self._seconds)
        return entries

    def _tokens(self, step: int) -> tuple[int, int]:
        assert self.schedule is not None
        assert self.rows_per_step is not None
        assert self.latent_length is not None
        tokens_per_step = self.rows_per_step * self.latent_length
        return self.schedule.tokens_seen(step, tokens_per_step), step * tokens_per_step


class PhaseProgressCallback(ProgressCallback):
    """Trainer's progress bar with the phase in front."""

    def __init__(self, meter: TokenMeterCallback) -> None:
        super().__init__()
        self._meter = meter

    def on_train_begin(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._show_phase(state.global_step)

    def on_step_end(
        self, args: TSTTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show_phase(state.global_step)
        super().on_step_end(args, state, control, **kwargs)

    def _show_phase(self, step: int) -> None:
        if self.training_bar is not None and self._meter.schedule is not None:
            self.training_bar.set_description(self._meter.schedule.phase(step), refresh=False)
