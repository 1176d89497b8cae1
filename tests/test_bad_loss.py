"""Numbers that are not finite are found without waiting for the device, and told with their step and blocks."""

import math

import pytest
import torch
from conftest import make_blocks
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tst import RunError, TSTTrainer
from hf_tst.training.bad_loss import BadNumber, FirstNotFinite

WAITS = torch.ops.aten._local_scalar_dense.default  # of `item`, `float`, `bool` of a tensor


class CountWaits(TorchDispatchMode):
    """Counts how often a number is fetched from the device, which waits for all that was asked of it before."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == WAITS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_of_several(bad, dtype):
    first = FirstNotFinite()
    assert first.found() is None
    with CountWaits() as waits:
        for time, number in enumerate([1.0, 2.0, bad, 3.0, math.nan, math.inf]):
            first.note(torch.tensor(number, dtype=dtype), time)
        assert waits.count == 0
        time, value = first.found()
    assert (time, str(value)) == (2, str(bad))
    assert waits.count == 2


def test_finite_numbers_are_not_found():
    first = FirstNotFinite()
    first.note(torch.tensor(3e38), 0)
    assert first.found() is None


def test_what_is_told():
    loss = BadNumber(step=7, micro_batch=1, value=math.nan)
    assert loss.describe("recovery", None) == "The loss of optimizer step 7 (recovery) is nan"
    assert loss.describe("recovery", [5, 3]).endswith("; it was computed on blocks 5, 3 of the training data")
    gradient = BadNumber(step=7, micro_batch=None, value=math.inf)
    assert (
        gradient.describe("superposition", None) == "The gradient of optimizer step 7 (superposition) is inf"
    )
    assert loss.describe("recovery", range(1000)).endswith("30, 31, … of the training data")


def waits(llama, make_args, choice, steps):
    args = make_args(tst_bad_loss=choice, max_steps=steps, logging_steps=1000, tst_phase_ratio=0.5)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    with CountWaits() as counter:
        trainer.train()
    return counter.count


def test_stopping_waits_for_the_device_no_more_often_than_ignoring(llama, make_args):
    """Longer runs do not wait more often for it; skipping waits once a step."""
    extra = {
        choice: [waits(llama, make_args, choice, n) - waits(llama, make_args, "ignore", n) for n in (4, 12)]
        for choice in ("stop", "skip")
    }
    assert extra["stop"][0] == extra["stop"][1]
    assert extra["skip"][1] - extra["skip"][0] == 8


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_training_and_accumulation(llama, make_args, accumulation):
    """Without superposition there is no plan: the step is told, not its blocks."""

    class Breaks(TSTTrainer):
        seen = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.seen += 1
            return loss * math.nan if self.seen == 2 * accumulation else loss

    args = make_args(tst_phase_ratio=0, gradient_accumulation_steps=accumulation)
    trainer = Breaks(llama, args, train_dataset=make_blocks(200))
    with pytest.raises(RunError, match=r"^The loss of optimizer step 1 \(training\) is nan\. Training stops"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.is_in_train


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
