"""SIGTERM with enable_jit_checkpoint: what happens between it and the end of training, and who has the signal then."""

import os
import signal

from conftest import make_blocks
from transformers import TrainerCallback

from hf_tst import TSTTrainer


class Witness(TrainerCallback):
    """Ends the process's training at a step, and notes what Trainer does from then on."""

    def __init__(self, step):
        self.step = step
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(f"save {state.global_step}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(f"evaluate {state.global_step}")


def test_nothing_is_evaluated_and_nothing_saved_twice_though_an_epoch_ends_with_it(llama, make_args):
    witness = Witness(4)
    args = make_args(
        enable_jit_checkpoint=True, eval_strategy="epoch", save_strategy="epoch", tst_save_at_switch=False
    )
    trainer = TSTTrainer(
        llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4), callbacks=[witness]
    )
    trainer.train()
    assert trainer.preempted
    assert witness.seen == ["save 5"]


def test_the_signal_is_given_back_after_a_beginning_that_ran_out_of_memory(llama, make_args):
    class OneTooLarge(TSTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if inputs["input_ids"].shape[0] > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    args = make_args(enable_jit_checkpoint=True, auto_find_batch_size=True, per_device_train_batch_size=2)
    trainer = OneTooLarge(llama, args, train_dataset=make_blocks(200))
    trainer.train()
    assert trainer._train_batch_size == 1
    assert signal.getsignal(signal.SIGTERM) == before
