"""What happens to the model at the start and at the phase switch, and what is logged by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..bags.phases import PhaseSchedule
from ..models.superposition import fused_next_token_loss, token_superposition
from ..planning.reference import peak_tflops
from ..records.run_record import RUN_ENTRY, UTILIZATION, run_entry
from .arguments import TSTTrainingArguments

logger = logging.get_logger(__name__)


class PhaseSwitchCallback(TrainerCallback):
    """Puts the model into token superposition or the fused next-token loss, as the phase of training asks.

    [`TSTTrainer`] sets `schedule` once the number of steps is known (`None` for plain training), and calls [`close`]
    when training ends, however it ends.
    """

    def __init__(self) -> None:
        self.schedule: PhaseSchedule | None = None
        self._context = ExitStack()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._enter(args, state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule is None or state.global_step != self.schedule.switch_step:
            return
        self._enter(args, state.global_step, kwargs["model"])
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
                input_weighting=args.tst_input_weighting,
                mode=args.tst_mode,
                fused_loss=args.tst_fused_loss,
                document_boundaries=args.tst_document_boundaries,
            )
        elif args.tst_replaces_loss:
            context = fused_next_token_loss(model, args.tst_fused_loss)
        else:
            return
        self._context.enter_context(context)


class TokenMeterCallback(TrainerCallback):
    """Counts raw and latent tokens and the seconds spent training (evaluation and saving left out).

    [`TSTTrainer`] sets `schedule` and `rows_per_step` (over all devices and accumulation steps) before training
    starts, and `epoch`, which says what Trainer calls the epoch after so many steps, since Trainer itself does not know
    where a resumed epoch began, and calls [`watch`] and [`count_left_out`].
    """

    def __init__(self) -> None:
        self.schedule: PhaseSchedule | None = None
        self.rows_per_step: int | None = None
        self.latent_length: int | None = None
        self.epoch: Callable[[int], float] | None = None
        self.tokens_left_out: int | None = None
        self._left_out_here: torch.Tensor | None = None
        self._seconds = 0.0
        self._since = 0.0
        self._waited = 0.0
        self._peak_flops: float | None = None  # per second, of all devices
        self._last_report = (0, 0, 0.0, 0.0)  # step, tokens left out, seconds, FLOPs

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule is not None and self.rows_per_step is not None:
            run = run_entry(args, kwargs["model"], self.schedule.switch_step, self.rows_per_step)
            peak = args.tst_peak_tflops or peak_tflops(args.device)
            state.log_history.append({"step": state.global_step, RUN_ENTRY: run | {"peak_tflops": peak}})
            self._peak_flops = peak and peak * 1e12 * args.world_size * max(1, args.n_gpu)
        self._seconds = self._waited = 0.0
        self._last_report = (state.global_step, self.tokens_left_out or 0, 0.0, state.total_flos)
        self._restart_clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.epoch is not None:
            state.epoch = self.epoch(state.global_step)
        if args.device.type != "cpu" and (
            control.should_log or control.should_evaluate or control.should_save
        ):
            torch.accelerator.synchronize()  # as what comes next does: these steps' work is not the next ones' time
        self._seconds += time.perf_counter() - self._since
        self._restart_clock()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart_clock()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since = time.perf_counter()

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; notes their latent length, how long training waits for each, and the empty places of its bags."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), torch.Tensor):
                self.latent_length = ids.shape[1]
            if self.tokens_left_out is not None and batch["input_ids"].dim() == 3:
                # A row has as many places as it reads tokens: for each that is empty, a token was left out.
                empty = (batch["input_ids"] < 0).sum()
                self._left_out_here = empty if self._left_out_here is None else self._left_out_here + empty
            yield batch

    def count_left_out(self, so_far: int | None) -> None:
        """Count tokens, of all ranks, that find no place in a row of bags, as `tokens_left_out`, from `so_far`; with `None`
        count none. What was counted before, by a beginning that ran out of memory, is forgotten."""
        self.tokens_left_out, self._left_out_here = so_far, None

    def gather_left_out(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Bring `tokens_left_out` up to date; every rank must take part.

        Args:
            total: Adds up a 0-dim tensor over all ranks.
        """
        if self.tokens_left_out is not None and self._left_out_here is not None:
            self.tokens_left_out += int(total(self._left_out_here))
            self._left_out_here = torch.zeros_like(self._left_out_here)

    def report(self, step: int, flops: float, with_speed: bool) -> dict[str, Any]:
        """Log entries after `step` optimizer steps.

        Args:
            step (`int`): Optimizer steps done.
            flops (`float`): FLOPs of them, over all devices; 0 if they are not counted.
            with_speed (`bool`): Add tokens per second, utilization and the wait for data, since the last report that had them.

        Returns:
            `tst_phase` of the last step done, and `tst_current_bag_size`, s or 1, which trackers that plot numbers only
            show the phases by; `tst_raw_tokens` and `tst_latent_tokens` since the run began;
            `tst_tokens_left_out` of the raw tokens read, where bags end with documents (`tst_raw_tokens` does not
            count them); `tst_raw_tokens_per_second` and `tst_latent_tokens_per_second`;
            `tst_model_flops_utilization`, where FLOPs and the peak of the device are known; `tst_data_wait_seconds` that
            training waited for batches on this rank, and `tst_data_wait_fraction` of the time.
        """
        if self.schedule is None:
            return {}
        phase = self.schedule.phase(max(step - 1, 0))
        bag_size = self.schedule.bag_size if phase == "superposition" else 1
        entries: dict[str, Any] = {"tst_phase": phase, "tst_current_bag_size": bag_size}
        if self.rows_per_step is None or self.latent_length is None:
            return entries
        left_out = self.tokens_left_out or 0
        raw, latent = self._tokens(step)
        entries |= {"tst_raw_tokens": raw - left_out, "tst_latent_tokens": latent}
        if self.tokens_left_out is not None:
            entries["tst_tokens_left_out"] = left_out
        last_step, last_left_out, last_seconds, last_flops = self._last_report
        seconds = self._seconds - last_seconds
        if with_speed and step > last_step and seconds > 0:
            last_raw, last_latent = self._tokens(last_step)
            new_raw = raw - left_out - (last_raw - last_left_out)
            entries["tst_raw_tokens_per_second"] = round(new_raw / seconds, 1)
            entries["tst_latent_tokens_per_second"] = round((latent - last_latent) / seconds, 1)
            if self._peak_flops and flops > last_flops:
                entries[UTILIZATION] = round((flops - last_flops) / seconds / self._peak_flops, 4)
            entries["tst_data_wait_seconds"] = round(self._waited, 4)
            entries["tst_data_wait_fraction"] = round(min(1.0, self._waited / seconds), 4)
            self._last_report = (step, left_out, self._seconds, flops)
            self._waited = 0.0
        return entries

    def _tokens(self, step: int) -> tuple[int, int]:
        """Raw and latent tokens that `step` steps read."""
        assert self.schedule is not None
        assert self.rows_per_step is not None
        assert self.latent_length is not None
        tokens_per_step = self.rows_per_step * self.latent_length
        return self.schedule.tokens_seen(step, tokens_per_step), step * tokens_per_step


class PhaseProgressCallback(ProgressCallback):
    """Trainer's progress bar with the phase in front, and loss and raw tokens a second, as logged last, behind.

    The time left counts from the step that a resumed run began at.
    """

    def __init__(self, meter: TokenMeterCallback) -> None:
        super().__init__()
        self._meter = meter

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step
        self._show_phase(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show_phase(state.global_step)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TSTTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.3f}"}
            if "tst_raw_tokens_per_second" in logs:
                shown["raw tokens/s"] = self.training_bar.format_sizeof(logs["tst_raw_tokens_per_second"])
            self.training_bar.set_postfix(shown, refresh=False)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def _show_phase(self, step: int) -> None:
        if self.training_bar is not None and self._meter.schedule is not None:
            self.training_bar.set_description(self._meter.schedule.phase(step), refresh=False)
