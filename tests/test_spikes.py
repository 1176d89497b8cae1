"""Steps far above the running level: skipped or told, the same on a resumed run, and judged by phase."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import losses, make_blocks, weights_equal
from test_resume import StopAt
from transformers import TrainerCallback

from hf_tst import RunError, TSTError, TSTTrainer
from hf_tst.training.callbacks.spikes import SPIKES

OPTIONS = {"max_steps": 20, "tst_phase_ratio": 0.5, "tst_spike_window": 8, "tst_spike_threshold": 8.0}


class Spikes(TSTTrainer):
    """Its loss is a hundred times what it was in some steps."""

    steps = (16,)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * (100 if self.state.global_step in self.steps else 1)


class Weights(TrainerCallback):
    """Copies of the weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = copy.deepcopy(model)


def train(model, args, *callbacks, checkpoint=None, steps=(16,)):
    trainer = Spikes(copy.deepcopy(model), args, train_dataset=make_blocks(400), callbacks=[*callbacks])
    trainer.steps = steps
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_spike_is_skipped_and_recorded_with_its_blocks(llama, make_args, caplog, accumulation):
    weights = Weights()
    args = make_args(
        **OPTIONS,
        tst_spikes="skip",
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=20,
    )
    trainer = train(llama, args, weights)
    changed = [s for s in range(2, 21) if not weights_equal(weights.after[s - 1], weights.after[s])]
    assert changed == [s for s in range(2, 21) if s != 17]
    saved = json.loads((Path(args.output_dir) / "checkpoint-20" / "trainer_state.json").read_text())
    (record,) = saved["stateful_callbacks"][SPIKES]["found"]
    assert record["step"] == 16
    assert record["blocks"] == trainer._data.blocks_of_step(16, 0, None)
    assert record["loss"]["value"] > 50 * record["loss"]["limit"] > 0
    assert "gradient norm" in record
    assert f"blocks {record['blocks'][0]}, " in caplog.text
    assert trainer.state.log_history[-2]["tst_skipped_steps"] == 1


def test_a_step_of_the_users_own_is_judged_too(llama, make_args):
    class OwnStep(Spikes):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    args = make_args(**OPTIONS, tst_spikes="stop")
    with pytest.raises(RunError, match=r"step 16 \(recovery\) has a spike: loss"):
        OwnStep(llama, args, train_dataset=make_blocks(400)).train()


def test_a_run_without_spikes_is_that_of_a_trainer_that_ignores_them(llama, make_args):
    args = [make_args(**OPTIONS, tst_spikes=choice) for choice in ("ignore", "stop")]
    ignoring, watching = (train(llama, one, steps=()) for one in args)
    assert losses(ignoring) == losses(watching)
    assert weights_equal(ignoring.model, watching.model)
    assert SPIKES not in ignoring.state.stateful_callbacks


def test_stopping_names_step_numbers_and_blocks(llama, make_args):
    with pytest.raises(
        RunError, match=r"step 16 \(recovery\) has a spike: loss .* gradient norm .* on blocks \d+"
    ):
        train(llama, make_args(**OPTIONS, tst_spikes="stop"))


@pytest.mark.parametrize("stop", [6, 10, 14])
def test_a_resumed_run_judges_as_the_uninterrupted_one(llama, make_args, stop):
    """Also where the window of its phase is not full yet."""
    args = make_args(**OPTIONS, tst_spikes="skip", save_strategy="steps", save_steps=2)
    whole = train(llama, args, steps=(8, 16))
    assert [one["step"] for one in whole.state.stateful_callbacks[SPIKES]["found"]] == [8, 16]
    args = make_args(
        **OPTIONS, tst_spikes="skip", save_strategy="steps", save_steps=2, output_dir=args.output_dir + "2"
    )
    train(llama, args, StopAt(stop), steps=(8, 16))
    resumed = train(llama, args, checkpoint=f"{args.output_dir}/checkpoint-{stop}", steps=(8, 16))
    assert resumed.state.stateful_callbacks[SPIKES] == whole.state.stateful_callbacks[SPIKES]
    assert weights_equal(resumed.model, whole.model)


def test_the_level_begins_again_at_the_switch(llama, make_args):
    """The first steps of a phase have no level yet, so the loss of next tokens, which is another, is no spike."""
    trainer = train(llama, make_args(**OPTIONS, tst_spikes="skip"), steps=range(10, 14))
    assert trainer.state.stateful_callbacks[SPIKES]["found"] == []
    trainer = train(llama, make_args(**OPTIONS, tst_spikes="skip"), steps=range(8, 10))
    assert [one["step"] for one in trainer.state.stateful_callbacks[SPIKES]["found"]] == [8, 9]


def test_a_lasting_change_is_followed(llama, make_args):
    trainer = train(
        llama,
        make_args(**OPTIONS | {"max_steps": 40, "tst_spike_threshold": 25.0}, tst_spikes="skip"),
        steps=range(28, 40),
    )
    skipped = [one["step"] for one in trainer.state.stateful_callbacks[SPIKES]["found"]]
    assert skipped[0] == 28
    assert skipped[-1] < 39


def test_scaled_gradients_are_refused(llama, make_args):
    args = make_args(tst_spikes="skip")
    args.fp16 = True
    with pytest.raises(TSTError, match="use bf16"):
        TSTTrainer(llama, args, train_dataset=make_blocks(200))


def test_a_number_that_is_not_finite_is_no_spike(llama, make_args):
    class Breaks(TSTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (torch.inf if self.state.global_step == 16 else 1)

    args = make_args(**OPTIONS, tst_spikes="stop", tst_nonfinite_loss="skip")
    trainer = Breaks(llama, args, train_dataset=make_blocks(400))
    trainer.train()
    assert trainer.state.global_step == 20
