"""Count and log the tokens and seconds of training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ...planning.reference import peak_tflops
from ...records.run_record import UTILIZATION

logger = logging.get_logger(__name__)

LONG_WAIT = 0.1  # fraction of the time


class TokenMeterCallback(TrainerCallback):
    """Counts raw and latent tokens, and the seconds of training without evaluation and saving.

    It also corrects `epoch`: Trainer does not know where a resumed epoch began.

    Args:
        trainer (`TSTTrainer`): The trainer. It reads its batches through [`watch`].
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._rows_per_step = 0  # over all devices and accumulation steps
        self._latent_length: int | None = None
        self._seconds = 0.0
        self._since = 0.0
        self._waited = 0.0
        self._warned = False
        self._peak_flops: float | None = None  # per second, of all devices
        self._last_report = (0, 0, 0.0, 0.0)  # step, tokens left out, seconds, FLOPs

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._rows_per_step = self._trainer.get_total_train_batch_size(args)
        peak = device_peak(args)
        self._peak_flops = peak and peak * 1e12 * args.world_size * max(1, args.n_gpu)
        self._seconds = self._waited = 0.0
        self._warned = False
        self._last_report = (state.global_step, self._tokens_left_out() or 0, 0.0, state.total_flos)
        self._restart_clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer._data is not None:
            state.epoch = self._trainer._data.epoch(state.global_step)
        pauses = control.should_log or control.should_evaluate or control.should_save
        if pauses and args.device.type != "cpu":
            torch.accelerator.synchronize()  # so that the time of these steps ends before logging, evaluation or saving
        self._seconds += time.perf_counter() - self._since
        self._restart_clock()

    def _restart_clock(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = on_save = _restart_clock

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass the batches on; measure their latent length and how long training waits for them."""
        start = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - start
            if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), torch.Tensor):
                # L, which is not `ids.shape[1]` where each block is folded into its own, shorter row.
                data = self._trainer._data
                self._latent_length = ids.shape[1] if data is None else data.start.block_length
            yield batch
            start = time.perf_counter()
        self._waited += time.perf_counter() - start

    def gather_left_out(self) -> None:
        """Sum the tokens left out of bags over all ranks. Every rank must take part."""
        if (data := self._trainer._data) is not None:
            data.gather_left_out(self._trainer.accelerator.reduce)

    def _tokens_left_out(self) -> int | None:
        return None if self._trainer._data is None else self._trainer._data.tokens_left_out

    def report(self, with_speed: bool) -> dict[str, Any]:
        """Log entries for the steps so far.

        Args:
            with_speed (`bool`): Add tokens per second, utilization and the wait for data since the last report with speed.

        Returns:
            Numbers only, because trackers may expect numbers: `tst_current_bag_size` of the last step, s in superposition and 1
            in recovery; `tst_raw_tokens` and `tst_latent_tokens` since the run began; `tst_tokens_left_out`, if bags end with
            documents: raw tokens that were read but are in no bag (`tst_raw_tokens` does not count them);
            `tst_raw_tokens_per_second` and `tst_latent_tokens_per_second`; `tst_model_flops_utilization`, if the FLOPs and the
            peak of the device are known; `tst_data_wait_seconds` that this rank waited for batches, and
            `tst_data_wait_fraction`, their share of the time.
        """
        schedule, state = self._trainer.schedule, self._trainer.state
        step, flops = state.global_step, state.total_flos
        superposed = schedule.phase(max(step - 1, 0)) == "superposition"
        entries: dict[str, Any] = {"tst_current_bag_size": schedule.bag_size if superposed else 1}
        if self._latent_length is None:
            return entries
        tokens_per_step = self._rows_per_step * self._latent_length
        left_out = self._tokens_left_out()
        raw = schedule.amount_read(step, tokens_per_step) - (left_out or 0)
        entries |= {"tst_raw_tokens": raw, "tst_latent_tokens": step * tokens_per_step}
        if left_out is not None:
            entries["tst_tokens_left_out"] = left_out
        last_step, last_left_out, last_seconds, last_flops = self._last_report
        seconds = self._seconds - last_seconds
        if with_speed and step > last_step and seconds > 0:
            new_raw = raw - schedule.amount_read(last_step, tokens_per_step) + last_left_out
            new_latent = (step - last_step) * tokens_per_step
            entries["tst_raw_tokens_per_second"] = round(new_raw / seconds, 1)
            entries["tst_latent_tokens_per_second"] = round(new_latent / seconds, 1)
            if self._peak_flops and flops > last_flops:
                entries[UTILIZATION] = round((flops - last_flops) / seconds / self._peak_flops, 4)
            entries["tst_data_wait_seconds"] = round(self._waited, 4)
            entries["tst_data_wait_fraction"] = round(min(1.0, self._waited / seconds), 4)
            self._warn_of_waiting(entries["tst_data_wait_fraction"])
            self._last_report = (step, left_out or 0, self._seconds, flops)
            self._waited = 0.0
        return entries

    def _warn_of_waiting(self, fraction: float) -> None:
        """Say once what to do where training waits for data. A second at least: the first batches of a short run always take a while."""
        if fraction > LONG_WAIT and self._waited > 1 and not self._warned:
            self._warned = True
            workers = self._trainer.args.dataloader_num_workers
            logger.warning(
                f"Training waits for data {fraction:.0%} of the time: set dataloader_num_workers={max(2, 2 * workers)} (now {workers})."
            )


def device_peak(args: Any) -> float | None:
    """The peak of one device in TFLOP/s, as given or as known; `None` if it is unknown."""
    return args.tst_peak_tflops or peak_tflops(args.device)
