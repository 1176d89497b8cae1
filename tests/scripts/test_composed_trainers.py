"""TSTTrainer as the first parent of a class whose second is somebody else's trainer: `class X(TSTTrainer, OtherTrainer)`.

trl's SFTTrainer is in tests/test_trl.py, Axolotl's own in tests/test_axolotl.py.
"""

import math
from dataclasses import dataclass

import datasets
import pytest
from conftest import TINY_RUN, losses, make_blocks, make_model, weights_equal
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_tst import TSTArguments, TSTError, TSTTrainer, TSTTrainingArguments

OPTIONS = TINY_RUN | {"tst_bag_size": 4, "tst_phase_ratio": 0.5}


class CountingTrainer(Trainer):
    """In the manner of Axolotl's: keywords of its own, a loader that looks at column names, a count of tokens beside the loss."""

    def __init__(self, *args, eval_data_collator=None, dataset_tags=None, **kwargs):
        self.eval_data_collator, self.dataset_tags, self.counted = eval_data_collator, dataset_tags, 0
        super().__init__(*args, **kwargs)
        self.train_data_collator = self.data_collator

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        if dataset.column_names and "length" in dataset.column_names:
            dataset = dataset.remove_columns(["length"])
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator, sampler=sampler_fn(dataset))
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.counted += inputs["labels"].numel()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model, trial, **kwargs):
        return super()._save_checkpoint(model, trial, **kwargs)


class ConfiguredTrainer(Trainer):
    """In the manner of LLaMA-Factory's and ms-swift's: another first argument, the rest by name, a collator of its own, a loss
    scaled by what it takes for rows."""

    def __init__(self, finetuning, model, args, train_dataset, processor=None, **kwargs):
        self.finetuning = finetuning
        super().__init__(model, args, default_data_collator, train_dataset, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scale = inputs["labels"].numel() / inputs["labels"].shape[:2].numel()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (result[0] * scale, result[1]) if return_outputs else result * scale


class TokenCounting(TSTTrainer, CountingTrainer):
    pass


class TokenConfigured(TSTTrainer, ConfiguredTrainer):
    pass


KINDS = {TokenCounting: {"dataset_tags": ["text"]}, TokenConfigured: {"finetuning": {"lora": False}}}


@pytest.fixture
def train(tmp_path):
    def train(kind, args_class=TSTTrainingArguments, resume=None, **options):
        args = args_class(output_dir=str(tmp_path / kind.__name__), **OPTIONS | options)
        rows = datasets.Dataset.from_list(make_blocks(200))
        trainer = kind(model=make_model("llama"), args=args, train_dataset=rows, **KINDS.get(kind, {}))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_trains_the_weights_of_the_tst_trainer(train, kind, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "tst_fused_loss": "off"}
    composed, alone = train(kind, **options), train(TSTTrainer, **options)
    assert losses(composed) == losses(alone)
    assert weights_equal(composed.model, alone.model)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_resumed_bit_for_bit(train, kind, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = train(kind, **options)
    for step in (3, 5, 6):
        resumed = train(kind, **options, resume=str(tmp_path / kind.__name__ / f"checkpoint-{step}"))
        assert weights_equal(whole.model, resumed.model), step


def test_without_superposition_it_is_the_other_trainer(train):
    composed = train(TokenCounting, tst_phase_ratio=0)
    args = TrainingArguments(output_dir=composed.args.output_dir, **TINY_RUN)
    alone = CountingTrainer(
        make_model("llama"), args, train_dataset=datasets.Dataset.from_list(make_blocks(200))
    )
    alone.train()
    assert weights_equal(composed.model, alone.model)
    assert composed.counted == alone.counted > 0


def test_the_other_trainer_s_loss_begins_with_recovery(train):
    """And has logits there, which it may read; superposition has none."""
    trainer = train(TokenCounting)
    assert trainer.counted == 5 * 2 * 12
    assert (trainer.fused_loss, trainer.fused_recovery) == ("auto", "off")


def test_how_the_other_trainer_s_loss_is_scaled_says_nothing_of_superposition_s(train):
    class OfMicroBatches(CountingTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    options = {"gradient_accumulation_steps": 2, "tst_fused_loss": "off"}
    composed = train(type("Composed", (TSTTrainer, OfMicroBatches), {}), **options)
    assert losses(composed)[:5] == losses(train(TSTTrainer, **options))[:5]
    assert losses(composed)[5] > 4


def test_the_other_trainer_s_sampler_or_loader_is_folded(train):
    class InOrder(CountingTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    class OwnLoader(CountingTrainer):
        def get_train_dataloader(self):
            return self._get_dataloader(self.train_dataset, "Training", 2, SequentialSampler, True)

    found = []
    for other in (InOrder, OwnLoader):
        composed = type("Composed", (TSTTrainer, other), {})
        trainer = train(composed)
        assert losses(trainer)[0] == pytest.approx(losses(train(TSTTrainer))[0], rel=0.02)
        found.append(trainer)
    assert weights_equal(found[0].model, found[1].model)


def test_extra_heads_that_the_loss_leaves_out_are_refused(train):
    class FromLogits(CountingTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(TSTError, match=r"mtp_num_heads=2, but .*Composed"):
        train(type("Composed", (TSTTrainer, FromLogits), {}), tst_phase_ratio=0, mtp_num_heads=2)
    assert math.isfinite(losses(train(TokenCounting, mtp_num_heads=2))[-1])


# Arguments


@dataclass
class OtherArguments(TrainingArguments):
    lisa: int = 0

    def __post_init__(self):
        super().__post_init__()


@dataclass
class First(TSTArguments, OtherArguments):
    pass


@dataclass
class Last(OtherArguments, TSTArguments):
    pass


@pytest.mark.parametrize("args_class", [First, Last])
def test_any_class_of_arguments_with_the_fields_serves(train, args_class):
    trainer = train(TSTTrainer, args_class, lisa=2)
    assert weights_equal(trainer.model, train(TSTTrainer).model)


def test_values_are_checked_whatever_the_order_of_the_parents(tmp_path):
    with pytest.raises(TSTError, match="tst_bag_size"):
        First(output_dir=str(tmp_path), tst_bag_size=0)
    args = Last(output_dir=str(tmp_path), tst_bag_size=0, report_to="none")
    with pytest.raises(TSTError, match="tst_bag_size"):
        TSTTrainer(make_model("llama"), args, train_dataset=make_blocks(4))
    with pytest.raises(TSTError, match=r"OtherArguments.*inherit hf_tst\.TSTArguments"):
        TSTTrainer(make_model("llama"), OtherArguments(str(tmp_path)), train_dataset=make_blocks(4))


def test_a_loss_patched_into_the_model_is_refused(tmp_path):
    class Patched(type(make_model("llama"))):
        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = hidden @ self.lm_head.weight.T
            return {"loss": cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

    model = make_model("llama")
    model.__class__ = Patched
    args = TSTTrainingArguments(output_dir=str(tmp_path / "run"), **OPTIONS)
    with pytest.raises(TSTError, match="computes its loss itself"):
        TokenCounting(model=model, args=args, train_dataset=make_blocks(4))
