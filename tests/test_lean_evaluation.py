"""Evaluation without logits against the plain Trainer's, and when it has logits after all."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import BLOCK_LENGTH, VOCAB_SIZE, make_blocks, make_model
from transformers import Trainer, TrainerCallback

from hf_tst import TSTTrainer, fused_evaluation_loss, token_superposition


@contextmanager
def logit_widths(model):
    """The last dimension of the logits of every forward pass with labels in evaluation mode."""
    widths = []

    def note(module, args, output):
        if not module.training and output.loss is not None:
            widths.append(output.logits.shape[-1])

    handle = model.register_forward_hook(note)
    try:
        yield widths
    finally:
        handle.remove()


def own_attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_loss_is_that_of_the_plain_trainer(model_type, make_args):
    model = make_model(model_type)
    evaluation = make_blocks(6, seed=9)
    args = make_args(per_device_eval_batch_size=4)
    expected = Trainer(model, args, eval_dataset=evaluation).evaluate()["eval_loss"]
    before = own_attributes(model)
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200), eval_dataset=evaluation)
    with logit_widths(model) as widths:
        found = trainer.evaluate()["eval_loss"]
    assert widths == [0, 0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert own_attributes(model) == before


def test_no_evaluation_of_a_run_has_logits(llama, make_args):
    args = make_args(eval_strategy="steps", eval_steps=1, eval_on_start=True, per_device_eval_batch_size=4)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4, seed=9))
    with logit_widths(llama) as widths:
        trainer.train()
        trainer.evaluate()
    assert widths == [0] * 12  # before training, after each of 10 steps, and afterwards


def test_ignored_labels_and_padding_count_for_nothing(llama, make_args):
    evaluation = make_blocks(4, seed=9)
    for row, block in enumerate(evaluation):
        block["labels"] = [-100 if i < 2 * row else token for i, token in enumerate(block["labels"])]
    args = make_args(per_device_eval_batch_size=4)
    collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
    arguments = {"data_collator": collate, "eval_dataset": evaluation}
    expected = Trainer(llama, args, **arguments).evaluate()["eval_loss"]
    found = TSTTrainer(llama, args, train_dataset=make_blocks(200), **arguments).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_targets_is_left_out_of_the_mean(llama, make_args):
    evaluation = make_blocks(4, seed=9)
    for block in evaluation[2:]:
        block["labels"] = [-100] * BLOCK_LENGTH
    args = make_args(per_device_eval_batch_size=2)
    expected = Trainer(llama, args, eval_dataset=evaluation).evaluate()["eval_loss"]
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=evaluation)
    with logit_widths(llama) as widths:
        found = trainer.evaluate()["eval_loss"]
    assert widths == [0, 0]
    # Older versions of Transformers do not leave it out.
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_metrics_and_predictions_get_logits_during_training_too(llama, make_args):
    seen = []

    def shapes(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    evaluation = make_blocks(4, seed=9)
    args = make_args(eval_strategy="steps", eval_steps=2)
    trainer = TSTTrainer(
        llama, args, train_dataset=make_blocks(200), eval_dataset=evaluation, compute_metrics=shapes
    )
    trainer.train()
    assert seen == [(4, BLOCK_LENGTH, VOCAB_SIZE)] * 5
    assert trainer.predict(evaluation).predictions.shape == seen[0]


@pytest.mark.parametrize(
    "options", [{"tst_fused_loss": "off"}, {"tst_phase_ratio": 0.0}], ids=["off", "plain training"]
)
def test_logits_exist_where_the_loss_is_not_fused(options, llama, make_args):
    args = make_args(eval_strategy="steps", eval_steps=5, **options)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4, seed=9))
    with logit_widths(llama) as widths:
        trainer.train()
    assert widths
    assert set(widths) == {VOCAB_SIZE}


def test_model_is_as_before_when_evaluation_fails(llama, make_args):
    class Fail(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    args = make_args(tst_fused_loss="on")
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4, seed=9))
    with logit_widths(llama):
        trainer.evaluate()
    before = own_attributes(llama)
    trainer.add_callback(Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert own_attributes(llama) == before


def test_superposition_goes_on_after_an_evaluation_inside_it(llama):
    tokens = torch.tensor([block["input_ids"] for block in make_blocks(2, length=24)])
    bags = tokens.view(2, 6, 4)
    untouched = copy.deepcopy(llama).train()
    with token_superposition(untouched, 4):
        expected = untouched(input_ids=bags, labels=bags.flip(1)).loss
    with token_superposition(llama, 4):
        with fused_evaluation_loss(llama.eval()):
            assert llama(input_ids=tokens, labels=tokens).logits.shape[-1] == 0
            assert llama(input_ids=tokens).logits.shape[-1] == VOCAB_SIZE
        with fused_evaluation_loss(llama, "off"):
            assert llama(input_ids=tokens, labels=tokens).logits.shape[-1] == VOCAB_SIZE
        assert llama(input_ids=tokens, labels=tokens).logits.shape[-1] == VOCAB_SIZE
        assert torch.equal(llama.train()(input_ids=bags, labels=bags.flip(1)).loss, expected)
