"""What scripts change on a trainer or a model that is made already, or in Transformers: it counts, or is refused before the first step."""

import copy
import logging
from typing import ClassVar

import pytest
import torch
from conftest import BLOCK_LENGTH, losses, make_blocks, make_model
from datasets import Dataset
from test_other_trainers import S, loader_of
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss import loss_utils
from transformers.trainer_callback import DefaultFlowCallback

from hf_tst import TSTError, TSTTrainer, token_superposition
from hf_tst.batches.blocks import BlockRules

HALF = {"tst_phase_ratio": 0.5, "tst_bag_size": S, "max_steps": 6}


def make_trainer(make_args, model=None, cls=TSTTrainer, blocks=None, **options):
    args = make_args(**HALF | options)
    return cls(model or make_model("llama"), args, train_dataset=blocks or make_blocks(300))


def bag_sizes(trainer):
    return [e["tst_current_bag_size"] for e in trainer.state.log_history if "loss" in e]


def train_and_return_first_ids(trainer):
    seen = []
    step = trainer.training_step

    def watched(model, inputs, *more):
        seen.append(inputs["input_ids"])
        return step(model, inputs, *more)

    trainer.training_step = watched
    trainer.train()
    return seen[0]


def another_loss(logits, labels, *args, **kwargs):
    raise AssertionError("a loss that training would use in part of its steps")


def set_loss_function(trainer, monkeypatch):
    trainer.model.loss_function = another_loss


def set_compute_loss_func(trainer, monkeypatch):
    trainer.compute_loss_func = another_loss


def set_in_a_callback(trainer, monkeypatch):
    class Sets(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.loss_function = another_loss

    trainer.add_callback(Sets())


def set_the_mapping(trainer, monkeypatch):
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", another_loss)


def set_a_part(trainer, monkeypatch):
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", another_loss)


def keep_one_callback(trainer, monkeypatch):
    trainer.callback_handler.callbacks = [DefaultFlowCallback()]


@pytest.mark.parametrize(
    "change",
    [
        set_loss_function,
        set_compute_loss_func,
        set_in_a_callback,
        set_the_mapping,
        set_a_part,
        keep_one_callback,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_would_end_superposition_is_refused_before_the_first_step(
    make_args, monkeypatch, change, family
):
    trainer = make_trainer(make_args, make_model(family))
    change(trainer, monkeypatch)
    with pytest.raises(TSTError):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("place", ["instance", "class"])
def test_a_loader_that_was_set_is_the_one_that_is_folded(make_args, monkeypatch, place):
    others = make_blocks(300, seed=9)
    trainer = make_trainer(make_args)
    expected = iter(loader_of(trainer, others))
    if place == "instance":
        trainer.get_train_dataloader = lambda: loader_of(trainer, others)
    else:
        monkeypatch.setattr(Trainer, "get_train_dataloader", lambda self: loader_of(self, others))
    first_ids = train_and_return_first_ids(trainer)
    assert bag_sizes(trainer) == [S] * 3 + [1] * 3
    first = torch.cat([next(expected)["input_ids"] for _ in range(S)])
    assert torch.equal(first_ids.flatten().sort()[0], first.flatten().sort()[0])


def test_a_sampler_that_was_set_gives_the_order(make_args):
    trainer = make_trainer(make_args)
    trainer._get_train_sampler = lambda *data: SequentialSampler(trainer.train_dataset)
    first_ids = train_and_return_first_ids(trainer)
    rows = trainer.args.per_device_train_batch_size
    first = torch.tensor([block["input_ids"] for block in make_blocks(300)[: S * rows]])
    assert torch.equal(first_ids.flatten(), first.flatten())


SEPARATOR = 5


def masks_separators(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs["labels"]
    if labels.dim() == 3:
        labels = labels.masked_fill(inputs["input_ids"] == SEPARATOR, -100)
    outputs = model(**{**inputs, "labels": labels}, num_items_in_batch=num_items_in_batch)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("place", ["subclass", "instance"])
def test_labels_masked_by_the_ids_of_a_later_batch_are_refused(make_args, place):
    """The first batches have no separator."""
    cls = (
        type("Masks", (TSTTrainer,), {"compute_loss": masks_separators})
        if place == "subclass"
        else TSTTrainer
    )
    blocks = [{"input_ids": [6 + i % 20 for i in range(BLOCK_LENGTH)]} for _ in range(300)]
    for block in blocks[S * 2 :]:
        block["input_ids"] = [SEPARATOR, *block["input_ids"][1:]]
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
    trainer = make_trainer(make_args, cls=cls, blocks=blocks, **options)
    if place == "instance":
        trainer.compute_loss = masks_separators.__get__(trainer)
    with pytest.raises(TSTError):
        trainer.train()
    assert trainer.state.global_step == 2


class ShiftsItself(LlamaForCausalLM):
    """As in nanoGPT: labels are shifted already."""

    arguments: ClassVar = {"shift_labels"}

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        given = {"shift_labels": labels} if "shift_labels" in self.arguments else {}
        given |= {"ignore_index": SEPARATOR} if "ignore_index" in self.arguments else {}
        if "labels" in self.arguments:
            labels = labels.masked_fill(labels == SEPARATOR, -100)
        if "labels in place" in self.arguments and labels is not None:
            labels[..., :2] = -100  # the first two tokens of a row, it was; now of each bag
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **given)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("argument", ["shift_labels", "ignore_index", "labels", "labels in place"])
def test_a_model_that_hands_on_other_targets_is_refused(make_args, argument):
    cls = type("OwnForCausalLM", (ShiftsItself,), {"arguments": {argument}})
    model = cls(make_model("llama").config)
    trainer = make_trainer(make_args, model, blocks=make_blocks(300))
    with pytest.raises(TSTError):
        trainer.train()
    assert trainer.state.global_step == 0


class Scaled(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.temperature * self.lm_head(self.model(input_ids).last_hidden_state)
        loss = (
            self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
            if labels is not None
            else None
        )
        return {"loss": loss, "logits": logits}


def test_a_learned_scale_of_the_logits_is_trained_in_both_phases(make_args):
    model = Scaled(make_model("llama").config)
    values = []

    class Notes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            values.append(model.temperature.item())

    trainer = make_trainer(make_args, model)
    trainer.add_callback(Notes())
    trainer.train()
    assert len(set(values)) == 6


class Rolls(LlamaForCausalLM):
    """Adds the embedding of the position before, which it looks up on its own."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        table = self.get_input_embeddings()
        embedded = table(input_ids) + 0.5 * table(input=torch.roll(input_ids, 1, dims=1))
        logits = self.lm_head(self.model(inputs_embeds=embedded).last_hidden_state)
        return {
            "loss": self.loss_function(logits, labels, vocab_size=self.config.vocab_size),
            "logits": logits,
        }


class LooksUp(LlamaForCausalLM):
    """Looks up what `change` makes of the ids."""

    change: ClassVar = None

    def forward(self, input_ids=None, labels=None, **kwargs):
        embedded = self.get_input_embeddings()(type(self).change(input_ids)).view(*input_ids.shape, -1)
        logits = self.lm_head(self.model(inputs_embeds=embedded).last_hidden_state)
        return {
            "loss": self.loss_function(logits, labels, vocab_size=self.config.vocab_size),
            "logits": logits,
        }


@pytest.mark.parametrize(
    ("change", "works"),
    [
        (lambda ids: ids.reshape(-1), True),
        (lambda ids: ids.long().clone(), True),
        (lambda ids: ids + 1, False),
        (lambda ids: ids.clamp(min=0), False),
    ],
    ids=["flat", "copied", "shifted", "clamped"],
)
def test_bags_are_looked_up_by_the_ids_that_the_model_was_given(change, works):
    model = type("OwnForCausalLM", (LooksUp,), {"change": staticmethod(change)})(make_model("llama").config)
    bags = torch.randint(0, 90, (2, 6, S), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 90, (2, 6, S), generator=torch.Generator().manual_seed(1))
    if not works:
        with token_superposition(model, S), pytest.raises(TSTError):
            model(input_ids=bags, labels=labels)
        return
    means = model.get_input_embeddings()(bags).mean(dim=2)
    expected = model.lm_head(model.model(inputs_embeds=means).last_hidden_state)
    model.eval()
    with token_superposition(model, S):
        torch.testing.assert_close(model(input_ids=bags, labels=labels)["logits"], expected)


def test_each_look_up_gets_the_bags_that_it_asks_for():
    model = Rolls(make_model("llama").config)
    bags = torch.randint(0, 90, (2, 6, S), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 90, (2, 6, S), generator=torch.Generator().manual_seed(1))
    means = model.get_input_embeddings()(bags).mean(dim=2)
    logits = model.lm_head(
        model.model(inputs_embeds=means + 0.5 * torch.roll(means, 1, dims=1)).last_hidden_state
    )
    expected = sum(cross_entropy(logits.flatten(0, 1), labels[..., i].flatten()) for i in range(S)) / S
    with token_superposition(model, S, fused_loss="off"):
        found = model(input_ids=bags, labels=labels)["loss"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keeps", [True, False])
def test_columns_that_an_own_method_keeps_are_not_dropped_in_silence(make_args, keeps):
    class Own(TSTTrainer):
        def _remove_unused_columns(self, dataset, description=None):
            return dataset if keeps else dataset.remove_columns(["weight"])

    blocks = [{**block, "weight": [1.0] * BLOCK_LENGTH} for block in make_blocks(300)]
    trainer = make_trainer(make_args, cls=Own, blocks=Dataset.from_list(blocks))
    if keeps:
        with pytest.raises(TSTError, match="weight"):
            trainer.train()
    else:
        trainer.train()


def test_a_model_may_be_copied_in_training_with_an_own_loss(make_args):
    class Own(TSTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(
                model, {**inputs, "labels": inputs["labels"].clone()}, *args, **kwargs
            )

    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    trainer = make_trainer(make_args, cls=Own)
    trainer.add_callback(Copies())
    trainer.train()
    assert len(copies) == 6


@pytest.mark.parametrize("off", [{"tst_phase_ratio": 0}, {"tst_bag_size": 1}], ids=["r=0", "s=1"])
def test_plain_training_does_not_resume_superposition_and_read_its_data_again(make_args, off):
    make_trainer(make_args, save_steps=2, save_strategy="steps").train()
    trainer = make_trainer(make_args, **off)
    with pytest.raises(TSTError, match="tst_allow_data_change"):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    make_trainer(make_args, **off, tst_allow_data_change=True).train(
        resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2"
    )


def test_labels_of_three_dimensions_are_the_users_own_in_plain_training(make_args, tmp_path):
    """Here the same targets twice, for a model that takes the mean of them."""

    class Twice(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = super().forward(input_ids=input_ids).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:, 0].flatten())
            return {"loss": loss, "logits": logits}

    def collate(blocks):
        ids = torch.tensor([block["input_ids"] for block in blocks])
        return {"input_ids": ids, "labels": torch.stack([ids, ids], dim=-1)}

    config = make_model("llama").config
    results = []
    for cls, args in [
        (TSTTrainer, make_args(**HALF | {"tst_phase_ratio": 0})),
        (
            Trainer,
            TrainingArguments(
                str(tmp_path / "plain"), max_steps=6, logging_steps=1, report_to="none", use_cpu=True
            ),
        ),
    ]:
        args.per_device_train_batch_size, args.learning_rate, args.seed = 2, 1e-3, 3
        torch.manual_seed(0)
        trainer = cls(Twice(config), args, train_dataset=make_blocks(300), data_collator=collate)
        trainer.train()
        results.append(losses(trainer))
    assert results[0] == results[1]


def test_counting_flops_draws_no_random_numbers(make_args):
    from hf_tst.planning.flops import find_shape

    class Draws(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            torch.rand(3, device="cpu")

    model = Draws(make_model("llama").config)
    before = torch.get_rng_state()
    assert find_shape(model) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_one_padding_token_at_the_end_of_a_block_may_separate_documents():
    rules = BlockRules(BLOCK_LENGTH, pad_token_id=96)
    row = {"input_ids": ([5] * (BLOCK_LENGTH - 1) + [96]) * S}
    rules.check_padding(row, 0)  # raises nothing
    row["input_ids"][-2] = 96
    with pytest.raises(TSTError):
        rules.check_padding(row, 0)


def test_a_callback_may_look_at_a_batch_in_the_last_step(make_args):
    shapes = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            shapes.append(next(iter(train_dataloader))["input_ids"].dim())

    trainer = make_trainer(make_args)
    trainer.add_callback(Looks())
    trainer.train()
    assert len(shapes) == 6


def test_an_end_in_superposition_is_told(make_args, caplog):
    logger = logging.getLogger("hf_tst.training.trainer")
    logger.addHandler(caplog.handler)
    trainer = make_trainer(make_args, max_steps=20, save_strategy="no")

    class Stops(TrainerCallback):  # as EarlyStoppingCallback does
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(Stops())
    try:
        trainer.train()
    finally:
        logger.removeHandler(caplog.handler)
    assert "superposition" in caplog.text


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_arguments_of_superposition_in_a_plain_trainer_are_warned_of(ratio, make_args, caplog):
    """Of the two names in a script, one is easily forgotten."""
    args = make_args(**HALF | {"tst_phase_ratio": ratio})
    warning = "no TSTTrainer was made with these arguments"
    trainer = Trainer(make_model("llama"), args, train_dataset=make_blocks(20), eval_dataset=make_blocks(2))
    trainer.evaluate()
    assert warning not in caplog.text
    trainer.train()
    assert (warning in caplog.text) == bool(ratio)
    caplog.clear()
    make_trainer(make_args, **{"tst_phase_ratio": ratio}).train()
    assert warning not in caplog.text


@pytest.mark.parametrize(
    ("patience", "options", "warned"),
    [(2, {}, True), (4, {}, False), (4, {"eval_strategy": "epoch", "save_strategy": "epoch"}, True)],
)
def test_early_stopping_that_may_end_superposition_is_warned_of(patience, options, warned, make_args, caplog):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = make_args(
        **HALF | steps | options, load_best_model_at_end=True, metric_for_best_model="eval_worst"
    )
    trainer = TSTTrainer(
        make_model("llama"), args, train_dataset=make_blocks(300), eval_dataset=make_blocks(2),
        compute_metrics=lambda prediction: {"worst": 0.0}, callbacks=[EarlyStoppingCallback(patience)],
    )  # fmt: skip
    trainer.train()
    warning = "may end the run in superposition (until step 3)"
    assert (warning in caplog.text) == warned
    if patience == 2:
        assert trainer.state.global_step == 3
        assert "Training ended after 3 steps, in superposition" in caplog.text
