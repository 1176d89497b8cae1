"""Numbers that are not finite are found without waiting for the device, and told with their step and blocks."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from hf_tst import PhaseSchedule, RunError, TSTTrainer
from hf_tst.training.callbacks.non_finite import NonFiniteCallback

WAITS = torch.ops.aten._local_scalar_dense.default  # of `item`, `float`, `bool` of a tensor


class CountWaits(TorchDispatchMode):
    """Counts how often a number is fetched from the device, which waits for all that was asked of it before."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == WAITS
        return function(*args, **(kwargs or {}))


class Data:
    """Of micro-batch m of step k it says that it has blocks k and m; of whole steps, that they have a thousand."""

    rank = 0

    def blocks_of_step(self, step, rank, micro_batch):
        return list(range(1000)) if micro_batch is None else [step, micro_batch]


@pytest.fixture
def watch():
    """What looks at the numbers of a trainer of one process."""
    args = SimpleNamespace(tst_nonfinite_loss="stop", process_index=0, world_size=1)
    state, accelerator = SimpleNamespace(global_step=0), SimpleNamespace(scaler=None)
    schedule = PhaseSchedule(max_steps=10, phase_ratio=0.1, bag_size=4)
    return NonFiniteCallback(
        SimpleNamespace(args=args, state=state, accelerator=accelerator, schedule=schedule, _data=Data())
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_of_several_is_told(watch, bad, dtype):
    watch.check()
    with CountWaits() as waits:
        for step, losses in enumerate([(1.0, 2.0), (1.0, bad), (math.nan, math.inf)]):
            watch._trainer.state.global_step = step
            for loss in losses:
                watch.note_loss(torch.tensor(loss, dtype=dtype))
            watch.note_norm(torch.nn.Linear(1, 1), torch.tensor(math.nan) if step else torch.tensor(1.0))
        assert waits.count == 0
        message = (
            rf"^The loss of optimizer step 1 \(recovery\) is {bad}; it was computed on blocks 1, 1 of the"
        )
        with pytest.raises(RunError, match=message):
            watch.check()
    watch.check()  # it was told, and is forgotten


def test_finite_numbers_are_none_of_it(watch):
    watch.note_loss(torch.tensor(1e300, dtype=torch.float64))
    watch.note_norm(torch.nn.Linear(1, 1), torch.tensor(3e38))
    watch.check()


def test_a_gradient_is_that_of_the_whole_step(watch):
    watch.note_loss(torch.tensor(1.0))
    watch.note_norm(torch.nn.Linear(1, 1), torch.tensor(math.inf))
    with pytest.raises(
        RunError, match=r"The gradient of optimizer step 0 \(superposition\) is inf; .* 30, 31, … of"
    ):
        watch.check()


def waits_per_step(model, make_args, trainer_class, **options):
    counts = []
    for steps in (4, 12):
        args = make_args(max_steps=steps, logging_steps=1000, tst_phase_ratio=0, **options)
        trainer = trainer_class(model, args, train_dataset=make_blocks(200))
        with CountWaits() as counter:
            trainer.train()
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 8


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stopping_waits_for_the_device_less_often_than_the_plain_trainer(llama, make_args, accumulation):
    """Its filter of losses waits twice per micro-batch; skipping waits once per step."""
    options = {"gradient_accumulation_steps": accumulation}
    plain = waits_per_step(llama, make_args, Trainer, **options)
    unfiltered = waits_per_step(llama, make_args, Trainer, **options, logging_nan_inf_filter=False)
    assert plain == unfiltered + 2 * accumulation
    assert waits_per_step(llama, make_args, TSTTrainer, **options) == unfiltered
    assert waits_per_step(llama, make_args, TSTTrainer, **options, tst_nonfinite_loss="ignore") == plain
    assert waits_per_step(llama, make_args, TSTTrainer, **options, tst_nonfinite_loss="skip") == plain + 1


def test_arguments_are_those_given_in_checkpoints_and_when_training_is_over(llama, make_args):
    args = make_args(save_strategy="steps", save_steps=3)
    TSTTrainer(llama, args, train_dataset=make_blocks(200)).train()
    saved = torch.load(Path(args.output_dir) / "checkpoint-3" / "training_args.bin", weights_only=False)
    for each in (args, saved):
        assert each.logging_nan_inf_filter
        assert not each.ignore_data_skip


def test_it_stops_though_nothing_is_logged_for_long(llama, make_args, monkeypatch):
    monkeypatch.setattr("hf_tst.training.callbacks.non_finite._MOST_NOTES", 6)
    with torch.no_grad():
        next(llama.parameters()).fill_(math.nan)
    args = make_args(logging_steps=1000, tst_save_at_switch=False, tst_phase_ratio=0.9)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(400))
    with pytest.raises(RunError, match="optimizer step 0"):
        trainer.train()
    assert trainer.state.global_step == 3  # a loss and a norm per step


class Breaks(TSTTrainer):
    """Its loss is not a number in the last micro-batch of the second step."""

    seen = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen += 1
        return loss * math.nan if self.seen == 2 * self.args.gradient_accumulation_steps else loss


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_training_and_accumulation(llama, make_args, accumulation):
    """Without superposition there is no plan: the step is told, not its blocks."""
    args = make_args(tst_phase_ratio=0, gradient_accumulation_steps=accumulation)
    trainer = Breaks(llama, args, train_dataset=make_blocks(200))
    with pytest.raises(
        RunError,
        match=r"^The loss of optimizer step 1 \(training\) is nan\. Training stops.*or start a new run with a lower learning_rate",
    ):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.is_in_train


def test_the_last_step_is_looked_at_though_it_is_not_logged(llama, make_args):
    trainer = Breaks(
        llama, make_args(max_steps=2, logging_steps=1000, tst_phase_ratio=0), train_dataset=make_blocks(200)
    )
    with pytest.raises(RunError, match="optimizer step 1"):
        trainer.train()


def test_a_second_training_forgets_the_first(llama, make_args):
    weights = {name: weight.clone() for name, weight in llama.state_dict().items()}
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    with torch.no_grad():
        next(llama.parameters()).fill_(math.nan)
    with pytest.raises(RunError, match="optimizer step 0"):
        trainer.train()
    llama.load_state_dict(weights)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert trainer.state.global_step == 10
