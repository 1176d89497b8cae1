"""TSTTrainer against independent checks: the plain Trainer, one large batch, the checkpoint of a plain model."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import BLOCK_LENGTH, VOCAB_SIZE, losses, make_blocks, make_model, set_dropout, weights_equal
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from hf_tst import TSTError, TSTTrainer, multi_hot_cross_entropy
from hf_tst.bags.weighting import OFFSET_WEIGHTINGS
from hf_tst.training.callbacks import non_finite, token_meter

LOG_V = math.log(VOCAB_SIZE)


class Recorder(TrainerCallback):
    """Notes what the model is given in each forward pass of training."""

    def __init__(self):
        self.batches = []

    def watch(self, model):
        def note(module, args, kwargs):
            if module.training:
                self.batches.append((kwargs["input_ids"].clone(), kwargs["labels"].clone()))

        model.register_forward_pre_hook(note, with_kwargs=True)


# The plain Trainer


@pytest.mark.parametrize("off", [{"tst_phase_ratio": 0}, {"tst_bag_size": 1}])
@pytest.mark.parametrize("length", [{"max_steps": 7}, {"max_steps": -1, "num_train_epochs": 2}])
def test_switched_off_it_is_the_plain_trainer_bit_for_bit(llama, make_args, off, length):
    blocks = make_blocks(10)
    set_dropout(llama)
    plain_model = copy.deepcopy(llama)
    args = make_args(gradient_accumulation_steps=2, **length, **off)
    trainer = TSTTrainer(llama, args, train_dataset=blocks)
    trainer.train()
    names = set(TrainingArguments.__dataclass_fields__)
    plain_args = TrainingArguments(
        **{
            k: v
            for k, v in args.to_dict().items()
            if k in names and TrainingArguments.__dataclass_fields__[k].init
        }
    )
    plain = Trainer(plain_model, plain_args, train_dataset=blocks)
    plain.train()
    assert losses(trainer) == losses(plain)
    assert weights_equal(llama, plain_model)


# The loss


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
def test_the_first_logged_loss_is_log_v(llama, make_args, weighting, accumulation):
    args = make_args(tst_offset_weighting=weighting, gradient_accumulation_steps=accumulation, max_steps=2)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LOG_V, rel=0.02)


@pytest.mark.parametrize("weighting", ["linear", "exponential"])
def test_weighted_input_trains_as_a_loop_does(llama, make_args, weighting):
    other, batches = copy.deepcopy(llama), []

    class Watch(TSTTrainer):
        def training_step(self, model, inputs, *args):
            batches.append((inputs["input_ids"], inputs["labels"]))
            return super().training_step(model, inputs, *args)

    options = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    Watch(llama, make_args(tst_input_weighting=weighting, **options), train_dataset=make_blocks(200)).train()
    weights = torch.tensor([1.0, 2, 3, 4]) if weighting == "linear" else torch.arange(4.0).exp()
    for tokens, labels in batches:
        if tokens.dim() == 3:
            embedded = other.get_input_embeddings()(tokens) * (weights / weights.sum())[:, None]
            loss = multi_hot_cross_entropy(other(inputs_embeds=embedded.sum(2)).logits, labels)
        else:
            loss = other(input_ids=tokens, labels=labels).loss
        loss.backward()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter -= 0.5 * parameter.grad
        other.zero_grad()
    assert [tokens.dim() for tokens, _ in batches] == [3] * 3 + [2] * 7
    for a, b in zip(llama.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "input", "output"])
def test_accumulation_gives_one_large_batch(llama, make_args, mode):
    blocks = make_blocks(200)
    for block in blocks[::3]:
        block["labels"] = [-100] * 5 + block["labels"][5:]  # micro-batches with different numbers of targets
    other = copy.deepcopy(llama)
    common = {"tst_mode": mode, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    large = TSTTrainer(llama, make_args(per_device_train_batch_size=8, **common), train_dataset=blocks)
    small_args = make_args(per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
    small = TSTTrainer(other, small_args, train_dataset=blocks)
    large.train()
    small.train()
    torch.testing.assert_close(losses(small), losses(large), rtol=1e-5, atol=1e-5)
    for a, b in zip(llama.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "ratio", "accumulation"),
    # Over several micro-batches plain training, ratio 0 and not fused, weighs Mixtral's auxiliary loss by their number.
    [("llama", 0.3, 2), ("llama", 0, 2), ("mixtral", 0.3, 2), ("mixtral", 0, 1)],
)
def test_the_fused_loss_gives_the_same_run(model_type, make_args, ratio, accumulation):
    model = make_model(model_type)
    fused, other = copy.deepcopy(model), model
    seen = []
    common = {"tst_phase_ratio": ratio, "optim": "sgd", "gradient_accumulation_steps": accumulation}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append("forward" in vars(model.lm_head))

    trainer = TSTTrainer(
        fused, make_args(tst_fused_loss="on", **common), train_dataset=make_blocks(200), callbacks=[Watch()]
    )
    trainer.train()
    plain = TSTTrainer(other, make_args(tst_fused_loss="off", **common), train_dataset=make_blocks(200))
    plain.train()
    assert seen == [True] * 10
    assert "forward" not in vars(fused.lm_head)
    torch.testing.assert_close(losses(trainer), losses(plain), rtol=1e-5, atol=1e-5)
    for a, b in zip(fused.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Phases


def test_phases_data_and_the_switch(llama, make_args):
    blocks = make_blocks(200)
    recorder = Recorder()
    recorder.watch(llama)
    trainer = TSTTrainer(
        llama,
        make_args(gradient_accumulation_steps=2, tst_phase_ratio=0.3),
        train_dataset=blocks,
        callbacks=[recorder],
    )
    trainer.train()
    dims = [ids.dim() for ids, _ in recorder.batches]
    assert dims == [3] * 6 + [2] * 14  # 3 of 10 steps, two micro-batches each
    order = {tuple(block["input_ids"]): i for i, block in enumerate(blocks)}
    used = []
    for ids, labels in recorder.batches[:6]:
        assert ids.shape == labels.shape == (2, BLOCK_LENGTH, 4)
        for row in ids:
            group = [order[tuple(block)] for block in row.flatten().view(4, BLOCK_LENGTH).tolist()]
            assert group == list(range(group[0], group[0] + 4))
            used += group
    used += [order[tuple(block)] for ids, _ in recorder.batches[6:] for block in ids.tolist()]
    assert len(used) == len(set(used)) == trainer.schedule.blocks_needed(4)


def test_one_optimizer_and_one_schedule(llama, make_args):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
            parameter = next(iter(optimizer.state))
            seen.append((id(optimizer), lr_scheduler.last_epoch, int(optimizer.state[parameter]["step"])))

    TSTTrainer(llama, make_args(), train_dataset=make_blocks(200), callbacks=[Watch()]).train()
    assert len({optimizer for optimizer, _, _ in seen}) == 1
    assert [(step, state) for _, step, state in seen] == [(i, i) for i in range(1, 11)]


@pytest.mark.parametrize("epochs", [1, 2, 0.5])
def test_epochs_give_the_steps_that_the_data_gives(llama, make_args, epochs):
    args = make_args(max_steps=-1, num_train_epochs=epochs, tst_phase_ratio=0.5, eval_strategy="epoch")
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(100), eval_dataset=make_blocks(4))
    trainer.train()
    steps = trainer.state.global_step
    assert trainer.schedule.max_steps == steps == {1: 20, 2: 39, 0.5: 10}[epochs] or steps == 40
    assert trainer.schedule.blocks_needed(2) <= epochs * 100 + 8
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == math.ceil(epochs)


def test_two_runs_are_the_same_and_another_seed_differs(llama, make_args):
    runs = []
    for seed in (1, 1, 2):
        trainer = TSTTrainer(copy.deepcopy(llama), make_args(seed=seed), train_dataset=make_blocks(200))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_resumed_run_is_the_uninterrupted_run(llama, make_args, tmp_path, stop):
    """Before the switch, at it, and after it."""
    blocks = make_blocks(200)
    resumed_model = copy.deepcopy(set_dropout(llama))
    whole = TSTTrainer(llama, make_args(save_strategy="steps", save_steps=stop), train_dataset=blocks)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{stop}"
    resumed = TSTTrainer(resumed_model, make_args(output_dir=str(tmp_path / "resumed")), train_dataset=blocks)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert weights_equal(resumed_model, llama)


def test_a_stream_trains_through_the_switch(llama, make_args):
    stream = datasets.Dataset.from_list(make_blocks(200)).to_iterable_dataset()
    trainer = TSTTrainer(llama, make_args(), train_dataset=stream)
    trainer.train()
    sizes = [e["tst_current_bag_size"] for e in trainer.state.log_history if "loss" in e]
    assert sizes == [4] * 3 + [1] * 7
    assert trainer.state.log_history[-2]["tst_raw_tokens"] == (3 * 4 + 7) * 2 * BLOCK_LENGTH


def test_workers_do_not_change_the_run(llama, make_args):
    runs = []
    for workers in (0, 2):
        args = make_args(dataloader_num_workers=workers, max_steps=5)
        trainer = TSTTrainer(copy.deepcopy(llama), args, train_dataset=make_blocks(100))
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


class Bigrams(nn.Module):
    """No model of Transformers: it has no configuration."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_plain_training_takes_a_model_without_a_configuration(make_args):
    torch.manual_seed(0)
    model = Bigrams()
    runs = []
    for trainer_class in (Trainer, TSTTrainer):
        trainer = trainer_class(
            copy.deepcopy(model), make_args(tst_phase_ratio=0), train_dataset=make_blocks(200)
        )
        trainer.train()
        runs.append((losses(trainer), trainer.model))
    assert runs[0][0] == runs[1][0]
    assert weights_equal(runs[0][1], runs[1][1])


# Evaluation


def test_evaluation_and_prediction_are_next_token_in_both_phases(llama, make_args):
    found = []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            clean = copy.deepcopy(model)
            clean._forward_pre_hooks.clear()
            vars(clean).pop("_loss_function", None)
            clean.eval()
            ids = torch.tensor([block["input_ids"] for block in evaluation])
            found.append((metrics["eval_loss"], clean(input_ids=ids, labels=ids).loss.item()))

    evaluation = make_blocks(4, seed=9)
    args = make_args(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    trainer = TSTTrainer(
        llama, args, train_dataset=make_blocks(200), eval_dataset=evaluation, callbacks=[Compare()]
    )
    trainer.train()
    assert len(found) == 10
    for ours, oracle in found:
        assert ours == pytest.approx(oracle, rel=1e-5)
    assert trainer.predict(evaluation).predictions.shape == (4, BLOCK_LENGTH, VOCAB_SIZE)


# Logs


def test_logs_name_phase_and_tokens(llama, make_args):
    trainer = TSTTrainer(llama, make_args(gradient_accumulation_steps=2), train_dataset=make_blocks(200))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    latent = 2 * 2 * BLOCK_LENGTH
    for step, entry in enumerate(entries, start=1):
        assert entry["tst_current_bag_size"] == (4 if step <= 3 else 1)
        assert entry["tst_latent_tokens"] == step * latent
        assert entry["tst_raw_tokens"] == (min(step, 3) * 4 + max(step - 3, 0)) * latent
        ratio = entry["tst_raw_tokens_per_second"] / entry["tst_latent_tokens_per_second"]
        assert ratio == pytest.approx(4 if step <= 3 else 1, rel=0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_above_the_floor_is_logged(llama, make_args, accumulation):
    """Of bags of one token four times the floor is 0, of bags of four tokens log 4."""
    once, four_times = [1, 2, 3, 4, 2, 1, 4, 3, 5, 6, 7, 8], [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    for tokens, floor in (four_times, 0.0), (once, math.log(4)):
        blocks = [{"input_ids": tokens}] * 200
        args = make_args(gradient_accumulation_steps=accumulation, logging_steps=2)
        trainer = TSTTrainer(copy.deepcopy(llama), args, train_dataset=blocks)
        trainer.train()
        for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
            assert ("tst_loss_above_floor" in entry) == (entry["tst_current_bag_size"] == 4)
            assert entry.get("tst_loss_above_floor", entry["loss"] - floor) == pytest.approx(
                entry["loss"] - floor, abs=1e-4
            )


@pytest.mark.parametrize("boundaries", ["ignore", "respect"])
@pytest.mark.parametrize("mode", ["full", "output"])
def test_trainer_counts_input_tokens_as_raw_tokens(llama, make_args, mode, boundaries):
    args = make_args(include_num_input_tokens_seen="all", tst_mode=mode, tst_document_boundaries=boundaries)
    blocks = [block | {"document_ids": [0] * 5 + [1] * 7} for block in make_blocks(200)]
    trainer = TSTTrainer(llama, args, train_dataset=blocks)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        raw = entry["tst_raw_tokens"] + entry.get("tst_tokens_left_out", 0)
        assert entry["num_input_tokens_seen"] == raw


def test_waiting_for_data_is_logged(llama, make_args, monkeypatch, caplog):
    """By a clock that moves a second a forward pass, and five where the data of the third step begins."""
    now = [0.0]
    monkeypatch.setattr(token_meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i, block in enumerate(make_blocks(200)):
                now[0] += 5 * (i == 2 * 2 * 4)
                yield block

    llama.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    trainer = TSTTrainer(llama, make_args(), train_dataset=Slow())
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert caplog.text.count("dataloader_num_workers=2") == 1
    # The loader of accelerate fetches one batch ahead, so the second step waits for the third step's data.
    assert [entry["tst_data_wait_seconds"] for entry in entries] == [0, 5, *[0] * 8]
    assert [entry["tst_data_wait_fraction"] for entry in entries] == [0, 0.8333, *[0] * 8]
    latent = 2 * BLOCK_LENGTH
    assert [entry["tst_latent_tokens_per_second"] for entry in entries] == [latent, latent / 6, *[latent] * 8]
    raw = [entry["tst_raw_tokens_per_second"] for entry in entries]
    assert raw == [latent * 4, latent * 4 / 6, latent * 4, *[latent] * 7]


@pytest.mark.parametrize("fails", [False, True])
def test_batches_are_made_with_one_thread_and_steps_with_all(llama, make_args, fails):
    """Where cores are busy, many threads that share out a small copy wait for the slowest of them."""
    seen = {"data": set(), "model": set()}

    def collate(blocks):
        seen["data"].add(torch.get_num_threads())
        if fails and len(seen["model"]):
            raise ValueError("no batch")
        tokens = torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks])
        return {"input_ids": tokens, "labels": tokens.clone()}

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        llama.register_forward_pre_hook(lambda *_: seen["model"].add(torch.get_num_threads()))
        trainer = TSTTrainer(llama, make_args(max_steps=4), collate, make_blocks(60))
        if fails:
            with pytest.raises(ValueError, match="no batch"):
                trainer.train()
        else:
            trainer.train()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"data": {1}, "model": {3}}


def test_the_last_loss_of_superposition_is_logged(llama, make_args):
    trainer = TSTTrainer(llama, make_args(logging_steps=100), train_dataset=make_blocks(200))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3]


def test_flops_count_latent_work(llama, make_args):
    flops = []
    for ratio in (0, 1):
        trainer = TSTTrainer(
            copy.deepcopy(llama), make_args(tst_phase_ratio=ratio), train_dataset=make_blocks(200)
        )
        trainer.train()
        flops.append(trainer.state.total_flos)
    assert flops[0] == flops[1] > 0


# Checkpoints


def test_the_checkpoint_is_that_of_a_plain_model(llama, make_args, tmp_path):
    expected = json.loads(llama.config.to_json_string(use_diff=False))
    keys = set(llama.state_dict())
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    trainer.train()
    switch = Path(trainer.args.output_dir) / "checkpoint-3"
    trainer.save_model(tmp_path / "final")
    for folder in (switch, tmp_path / "final"):
        config = json.loads((folder / "config.json").read_text())
        assert "tst" not in (folder / "config.json").read_text().lower()
        changed = {k for k, v in config.items() if expected.get(k) != v}
        assert changed <= {"architectures", "dtype", "use_cache"}
        assert set(load_file(folder / "model.safetensors")) == keys
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert weights_equal(loaded, llama)


@pytest.mark.parametrize("save", [True, False])
def test_a_checkpoint_at_the_switch(llama, make_args, save):
    trainer = TSTTrainer(llama, make_args(tst_save_at_switch=save), train_dataset=make_blocks(200))
    trainer.train()
    saved = [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")]
    assert saved == (["checkpoint-3"] if save else [])


def test_saving_the_best_keeps_the_switch(llama, make_args):
    args = make_args(
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="worst",
        greater_is_better=True,
    )

    def compute_metrics(prediction):
        compute_metrics.value -= 1
        return {"worst": compute_metrics.value}

    compute_metrics.value = 0
    trainer = TSTTrainer(
        llama,
        args,
        train_dataset=make_blocks(200),
        eval_dataset=make_blocks(4),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    assert {path.name for path in Path(args.output_dir).glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-3",
    }


def test_the_model_is_clean_after_training_and_after_a_failure(llama, make_args):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("stop")

    trainer = TSTTrainer(
        llama, make_args(), train_dataset=make_blocks(200), eval_dataset=make_blocks(4), callbacks=[Fail()]
    )
    with pytest.raises(KeyError):
        trainer.train()
    trainer.evaluate()
    assert "tst_current_bag_size" not in trainer.state.log_history[-1]
    assert "_loss_function" not in vars(llama)
    assert not llama._forward_pre_hooks
    TSTTrainer(llama, make_args(tst_phase_ratio=1), train_dataset=make_blocks(200)).train()
    assert "_loss_function" not in vars(llama)
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("accumulation", [1, 2])
def test_more_rows_are_what_a_loader_of_the_users_own_gives(llama, make_args, accumulation):
    """The planned run against one whose ready batches are folded as they come, in the same order."""

    class OwnLoader(TSTTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, collate_fn=default_data_collator
            )

    options = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation}
    runs = []
    for trainer_class in (TSTTrainer, OwnLoader):
        args = make_args(tst_superposition_rows="more", **options)
        trainer = trainer_class(copy.deepcopy(llama), args, train_dataset=make_blocks(200))
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    assert weights_equal(runs[0].model, runs[1].model)
    assert runs[0].state.total_flos == runs[1].state.total_flos


@pytest.mark.parametrize("step", [2, 3, 6])
def test_tokens_of_an_own_loader_are_counted_alike_after_a_resume_at_a_short_batch(llama, make_args, step):
    """The last batch of a pass has one row, the others two."""

    class OwnLoader(TSTTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, collate_fn=default_data_collator
            )

    options = {
        "max_steps": 8,
        "tst_phase_ratio": 0.25,
        "tst_bag_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    found = []
    for resumed in (None, f"checkpoint-{step}"):
        args = make_args(per_device_train_batch_size=2, logging_steps=8, **options)
        trainer = OwnLoader(copy.deepcopy(llama), args, train_dataset=make_blocks(5))
        trainer.train(resumed and str(Path(args.output_dir) / resumed))
        found.append(
            [entry["tst_raw_tokens"] for entry in trainer.state.log_history if "tst_raw_tokens" in entry]
        )
    assert found[0][-1] == found[1][-1]


def test_a_negative_data_seed_is_one(llama, make_args):
    orders = []
    for seed in (-1, 1):
        trainer = TSTTrainer(llama, make_args(data_seed=seed), train_dataset=make_blocks(400))
        orders.append(
            [
                row.columns["input_ids"].tolist()
                for row in trainer.get_train_dataloader().dataset.__getitems__([0, 1])
            ]
        )
    assert orders[0] != orders[1]


@pytest.mark.parametrize("given_by", ["data", "collator", "neither"])
def test_positions_that_superposition_drops_are_told(llama, make_args, caplog, given_by):
    def flattened(rows):
        batch = default_data_collator(rows)
        return batch | {"position_ids": (torch.arange(BLOCK_LENGTH) % 5).expand(len(rows), -1)}

    blocks = make_blocks(100)
    if given_by == "data":
        blocks = [{**block, "position_ids": [i % 5 for i in range(BLOCK_LENGTH)]} for block in blocks]
    logging.warning_once.cache_clear()
    caplog.clear()
    collator = flattened if given_by == "collator" else None
    TSTTrainer(llama, make_args(max_steps=4), collator, train_dataset=blocks).train()
    assert ("does not pass position_ids on" in caplog.text) == (given_by != "neither")


class Searched(TSTTrainer):
    """Its training begins as a trial of `hyperparameter_search` does, whose packages are not installed."""

    def search(self, trial):
        self.hp_search_backend, self.next_trial = HPSearchBackend.RAY, trial
        self.train()

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(self.next_trial)


class SearchedAndChecked(Searched):
    """Batches of a subclass with its own step are checked in superposition alone."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("trainer_class", [Searched, SearchedAndChecked])
@pytest.mark.parametrize("collator", [None, default_data_collator])
def test_trials_of_a_search_train_as_trainers_made_with_their_arguments(
    llama, make_args, trainer_class, collator
):
    def start():
        return copy.deepcopy(llama)

    trials = [
        {"tst_phase_ratio": 0.0, "learning_rate": 0.5},
        {"tst_phase_ratio": 0.5, "tst_bag_size": 2, "tst_input_weighting": "linear"},
        {"tst_phase_ratio": 0.3, "tst_bag_size": 4, "tst_superposition_rows": "more"},
    ]
    blocks = make_blocks(400)
    searched = trainer_class(args=make_args(), model_init=start, data_collator=collator, train_dataset=blocks)
    values = {}
    for trial in trials:
        values |= trial
        searched.search(dict(trial))
        alone = TSTTrainer(start(), make_args(**values), collator, train_dataset=blocks)
        alone.train()
        assert losses(searched) == losses(alone)
        assert weights_equal(searched.model, alone.model)


def test_a_trial_with_wrong_arguments_or_other_heads_is_refused(llama, make_args):
    trainer = Searched(llama, make_args(), train_dataset=make_blocks(400))
    with pytest.raises(TSTError, match="mtp_num_heads=3"):
        trainer.search({"mtp_num_heads": 3})
    trainer.args.mtp_num_heads = 1
    with pytest.raises(TSTError, match="tst_phase_ratio"):
        trainer.search({"tst_phase_ratio": 3})


@pytest.mark.parametrize("collator", [None, default_data_collator])
@pytest.mark.parametrize("makes", ["other ids", "other labels", "a column", "ids of text"])
def test_a_transform_of_the_data_is_kept_in_both_phases(llama, make_args, collator, makes):
    """Training on its rows is training on a list of what it makes."""
    stored = datasets.Dataset.from_list([{"input_ids": block["input_ids"]} for block in make_blocks(400)])
    if makes == "other labels":
        stored = stored.map(lambda row: {"labels": row["input_ids"]})
    if makes == "ids of text":
        stored = stored.map(
            lambda row: {"text": " ".join(map(str, row["input_ids"]))}, remove_columns=["input_ids"]
        )

    def change(rows):
        if makes == "ids of text":
            ids = [[int(token) for token in text.split()] for text in rows["text"]]
            return {"input_ids": ids, "labels": ids}
        ids = [[token % 10 if makes == "other ids" else token for token in row] for row in rows["input_ids"]]
        return {
            "input_ids": ids,
            "labels": [[-100] * 5 + row[5:] for row in ids] if "label" in makes else ids,
        }

    runs = []
    for data in (stored.with_transform(change), stored.with_transform(change)[:]):
        if isinstance(data, dict):
            data = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
        trainer = TSTTrainer(
            copy.deepcopy(llama), make_args(remove_unused_columns=False), collator, train_dataset=data
        )
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    assert weights_equal(runs[0].model, runs[1].model)


def test_a_collator_may_be_assigned_later(llama, make_args):
    """As callers of Trainer do. It collates the blocks of both phases and of evaluation."""
    seen = []

    def mine(features):
        seen.append(len(features))
        return default_data_collator(features)

    blocks = make_blocks(400)
    runs = []
    for later in (False, True):
        trainer = TSTTrainer(
            copy.deepcopy(llama),
            make_args(),
            None if later else mine,
            train_dataset=blocks,
            eval_dataset=blocks[:4],
        )
        if later:
            trainer.data_collator = mine
        assert trainer.data_collator is mine
        trainer.train()
        trainer.evaluate()
        runs.append((losses(trainer), list(seen)))
        seen.clear()
    assert runs[0] == runs[1]
    assert runs[0][1]


@pytest.mark.parametrize("name", ["own", "train_loss"])
def test_a_log_of_the_users_own_is_no_business_of_other_ranks_and_keeps_the_limit(
    llama, make_args, monkeypatch, name, tmp_path
):
    """A script may log on the main process alone, where a sum over all would wait for ever."""

    class Logging(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(trainer.accelerator, "reduce", lambda *_: pytest.fail("waits for other ranks"))
                patch.setattr(non_finite, "gather_object", lambda *_: pytest.fail("waits for other ranks"))
                trainer.log({name: 1.0})

        def on_save(self, args, state, control, **kwargs):
            kept.append(len([*tmp_path.glob("checkpoint-*")]))

    kept = []
    args = make_args(
        tst_document_boundaries="respect", output_dir=str(tmp_path), save_strategy="steps", save_steps=1,
        save_total_limit=1, tst_save_at_switch=False,
    )  # fmt: skip
    blocks = [{**block, "document_ids": [0] * BLOCK_LENGTH} for block in make_blocks(400)]
    trainer = TSTTrainer(llama, args, train_dataset=blocks, callbacks=[Logging()])
    trainer.train()
    assert max(kept) <= 2
