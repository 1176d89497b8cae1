"""Graceful SIGTERM handling: finish the step, write a checkpoint, stop training."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PreemptionCallback(TrainerCallback):
    """Graceful SIGTERM handling for `enable_jit_checkpoint`, instead of Trainer's own callback.

    With Trainer's callback each process saves three seconds after the signal, possibly in the middle of a step. Processes at
    different steps then deadlock, and random numbers differ after the resume. Here the step is finished first, and the processes
    agree at its end. With several processes this costs one all-reduce of one number per step, between CPUs.

    [`TSTTrainer`] calls [`close`] when training ends or fails.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._signaled = False
        self._group: Any = None
        self._before: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()  # after out-of-memory, auto_find_batch_size starts training again
        self.stopped = self._signaled = False
        if self._group is None and distributed.is_available() and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():  # only this thread can set a signal handler
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._any_rank_signaled():
            return
        self.stopped = control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # there may be seconds left
        logger.warning(f"SIGTERM: training stops after step {state.global_step}, with a checkpoint.")

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:  # the checkpoint is written
            control.should_save = control.should_evaluate = False

    def close(self) -> None:
        """Restore the previous signal handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, *_: Any) -> None:
        self._signaled = True

    def _any_rank_signaled(self) -> bool:
        if self._group is None:
            return self._signaled
        signaled = torch.tensor(int(self._signaled))
        distributed.all_reduce(signaled, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(signaled)
