"""Trainers and scripts that people already have, with the two names changed: right in every count, or refused in a sentence.

What a model has read is counted at its embedding, not in the logs.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    BLOCK_LENGTH,
    TINY,
    VOCAB_SIZE,
    losses,
    make_blocks,
    make_model,
    weights_equal,
    write_corpus,
)
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_tst import TSTError, TSTTrainer, token_superposition

S, STEPS, BATCH = 4, 10, 2
TOKENS_PER_STEP = BATCH * BLOCK_LENGTH


class Read(TrainerCallback):
    """Counts the tokens that a model in training looks up, in every step."""

    def __init__(self):
        self.tokens, self._now = [], 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        embedding = model.get_input_embeddings()
        self._hook = embedding.register_forward_pre_hook(
            lambda module, inputs: self._count(module, inputs[0]), prepend=True
        )

    def _count(self, module, ids):
        if module.training:
            self._now += ids.numel()

    def on_step_end(self, args, state, control, **kwargs):
        self.tokens.append(self._now)
        self._now = 0

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()


def loader_of(trainer, rows=None, **options):
    rows = trainer.train_dataset if rows is None else rows
    options = {
        "batch_size": trainer.args.per_device_train_batch_size,
        "collate_fn": default_data_collator,
    } | options
    return DataLoader(rows, **options)


class Stream(IterableDataset):
    """Blocks without a length."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __iter__(self):
        return iter(self.blocks)


def own_loader(base):
    class OwnLoader(base):
        def get_train_dataloader(self):
            return loader_of(self, shuffle=True, generator=torch.Generator().manual_seed(3))

    return OwnLoader


def shuffled_loader(base):
    """Its order comes from torch's global generator."""

    class ShuffledLoader(base):
        def get_train_dataloader(self):
            return loader_of(self, shuffle=True)

    return ShuffledLoader


def own_stream(base):
    class OwnStream(base):
        def get_train_dataloader(self):
            return loader_of(self, Stream(self.train_dataset))

    return OwnStream


def prepared_loader(base):
    class PreparedLoader(base):
        def get_train_dataloader(self):
            return self.accelerator.prepare(loader_of(self, shuffle=True))

    return PreparedLoader


def own_sampler(base):
    class OwnSampler(base):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    return OwnSampler


def wrapped_loader(base):
    class WrappedLoader(base):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            self.seen = type(loader).__name__
            return loader

    return WrappedLoader


def own_loss(base):
    class OwnLoss(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return OwnLoss


def own_model_call(base):
    class OwnModelCall(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return OwnModelCall


def plain(base):
    return base


KINDS = [
    plain,
    own_loader,
    shuffled_loader,
    own_stream,
    prepared_loader,
    own_sampler,
    wrapped_loader,
    own_loss,
    own_model_call,
]


@pytest.mark.parametrize("kind", KINDS)
def test_superposition_reads_s_times_the_tokens(kind, llama, make_args):
    read = Read()
    trainer = kind(TSTTrainer)(
        llama,
        make_args(tst_phase_ratio=0.3, max_steps=STEPS),
        train_dataset=make_blocks(400),
        callbacks=[read],
    )
    trainer.train()
    assert read.tokens == [S * TOKENS_PER_STEP] * 3 + [TOKENS_PER_STEP] * 7
    assert losses(trainer)[0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.05)
    logged = [entry["tst_raw_tokens"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] == sum(read.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_without_superposition_it_is_the_plain_trainer(kind, llama, make_args, tmp_path):
    args = make_args(tst_phase_ratio=0.0)
    trainer = kind(TSTTrainer)(llama, args, train_dataset=make_blocks(100))
    trainer.train()
    common = {
        name: getattr(args, name) for name in ("max_steps", "per_device_train_batch_size", "learning_rate")
    }
    plain_args = TrainingArguments(
        str(tmp_path / "plain"),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **common,
    )
    other = kind(Trainer)(make_model("llama"), plain_args, train_dataset=make_blocks(100))
    other.train()
    assert weights_equal(trainer.model, other.model)


@pytest.mark.parametrize("kind", [own_loader, shuffled_loader, own_sampler, prepared_loader])
def test_an_own_loader_resumes_bit_for_bit(kind, make_args, tmp_path):
    def run(folder, resume=None, **options):
        args = make_args(
            tst_phase_ratio=0.5,
            output_dir=str(tmp_path / folder),
            save_strategy="steps",
            save_steps=1,
            **options,
        )
        trainer = kind(TSTTrainer)(make_model("llama"), args, train_dataset=make_blocks(30))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    for step in (2, 5, 7):
        resumed = run("pieces", resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert weights_equal(whole.model, resumed.model), step


def test_another_bag_size_is_refused_at_resume(make_args):
    def run(resume=None, **options):
        args = make_args(tst_phase_ratio=0.5, save_strategy="steps", save_steps=5, **options)
        own_loader(TSTTrainer)(make_model("llama"), args, train_dataset=make_blocks(100)).train(resume)

    run()
    with pytest.raises(TSTError, match="tst_bag_size was 4 and is 2"):
        run(resume=True, tst_bag_size=2)


def test_epochs_of_an_own_loader_are_counted_in_batches(llama, make_args):
    read = Read()
    args = make_args(tst_phase_ratio=0.5, max_steps=-1, num_train_epochs=2)
    trainer = own_loader(TSTTrainer)(llama, args, train_dataset=make_blocks(40), callbacks=[read])
    trainer.train()
    # 40 batches in two passes: 8 steps of four batches and 8 of one.
    assert read.tokens == [S * TOKENS_PER_STEP] * 8 + [TOKENS_PER_STEP] * 8
    assert trainer.state.epoch == 2


def test_folded_batches_and_planned_rows_give_the_same_loss(llama):
    """The same bags, as rows of L bags of consecutive blocks and as rows of L/s bags of one block each."""
    from hf_tst import DataCollatorForTokenSuperposition, token_superposition
    from hf_tst.batches.collators import fold_batch

    blocks = make_blocks(8)
    batch = default_data_collator(blocks)
    collator = DataCollatorForTokenSuperposition(S)
    folded = fold_batch(batch, 8, collator)
    planned = collator([{name: block[name] for name in ("input_ids", "labels")} for block in blocks])
    assert folded["input_ids"].shape == (8, BLOCK_LENGTH // S, S)
    grads = []
    for bags in (folded, planned):
        llama.zero_grad()
        with token_superposition(llama, S):
            llama(**bags).loss.backward()
        grads.append([parameter.grad.clone() for parameter in llama.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def mask_three_in_four(features):
    batch = default_data_collator(features)
    batch["labels"][:, torch.arange(BLOCK_LENGTH) % 4 > 0] = -100
    return batch


def test_labels_of_an_own_collator_count_in_both_phases(make_args):
    counted = []

    class Counts(TSTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            counted.append((inputs["labels"] != -100).sum().item())
            return super().training_step(model, inputs, num_items_in_batch)

    args = make_args(tst_phase_ratio=0.5)
    Counts(
        make_model("llama"), args, data_collator=mask_three_in_four, train_dataset=make_blocks(400)
    ).train()
    # Of s blocks per row a quarter of the labels, without those of the first bag, which nothing predicts.
    in_first_bag = S // 4
    assert counted[:5] == [BATCH * (S * BLOCK_LENGTH // 4 - in_first_bag)] * 5
    assert counted[5:] == [BATCH * BLOCK_LENGTH // 4] * 5


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}, "must hold input_ids and labels"),
        (lambda rows: default_data_collator(rows) | {"weight": torch.ones(len(rows))}, "hold weight"),
        (
            lambda rows: default_data_collator(rows) | {"attention_mask": torch.zeros(len(rows), BLOCK_LENGTH)},
            "A row is padded",
        ),
    ],
)  # fmt: skip
def test_batches_that_make_no_bags_are_refused_before_the_first_step(collator, message, llama, make_args):
    trainer = TSTTrainer(
        llama, make_args(tst_phase_ratio=0.5), data_collator=collator, train_dataset=make_blocks(100)
    )
    with pytest.raises(TSTError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_column_that_superposition_would_drop_is_refused(llama, make_args):
    blocks = [block | {"weight": 1.0} for block in make_blocks(100)]
    args = make_args(tst_phase_ratio=0.5, remove_unused_columns=False)
    with pytest.raises(TSTError, match="the columns weight, which bags cannot hold"):
        TSTTrainer(llama, args, train_dataset=blocks).train()


def test_a_column_without_values_is_left_out(llama, make_args):
    class Loader(TSTTrainer):
        def get_train_dataloader(self):
            return loader_of(
                self, collate_fn=lambda rows: {**default_data_collator(rows), "attention_mask": None}
            )

    Loader(llama, make_args(), train_dataset=make_blocks(400)).train()


def test_labels_equal_to_the_input_are_refused(llama, make_args):
    class PredictsItsInput(TSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"].clone()).loss

    trainer = PredictsItsInput(llama, make_args(tst_phase_ratio=0.5), train_dataset=make_blocks(100))
    with pytest.raises(TSTError, match="labels of the batch are changed"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_terms_on_logits_are_those_of_the_logits(llama, make_args):
    entropies = []

    class Entropy(TSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            entropy = torch.distributions.Categorical(logits=outputs.logits.float()).entropy().mean()
            entropies.append(entropy.item())
            return loss - 0.01 * entropy

    Entropy(llama, make_args(tst_phase_ratio=0.5), train_dataset=make_blocks(100)).train()
    assert len(entropies) == 10
    assert all(0.5 * math.log(VOCAB_SIZE) < entropy <= math.log(VOCAB_SIZE) + 1e-4 for entropy in entropies)


def has_term(term):
    class HasTerm(TSTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return loss + term(outputs.logits, inputs)

    return HasTerm


TERMS = {
    "entropy": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(),
    "z-loss": lambda logits: logits.logsumexp(-1).square().mean(),
    "accuracy": lambda logits: (logits.argmax(-1) == 0).float().mean(),
    "view": lambda logits: logits.view(-1, VOCAB_SIZE).mean(),
    "part": lambda logits: logits[:, :-1].sum(),
    "handed on": lambda logits: logits.detach().clone().sum(),
}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("term", TERMS)
def test_logits_that_the_fused_loss_never_computes_are_refused_when_used(term, ratio, llama, make_args):
    args = make_args(tst_phase_ratio=ratio, tst_fused_loss="on")
    trainer = has_term(lambda logits, inputs: TERMS[term](logits))(
        llama, args, train_dataset=make_blocks(100)
    )
    with pytest.raises(TSTError, match="set tst_fused_loss='off' to use them"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_teacher_reads_bags_or_is_refused(make_args):
    teacher = make_model("llama").eval()

    def distillation(logits, inputs, bags=nullcontext):
        with torch.no_grad(), bags():
            target = teacher(input_ids=inputs["input_ids"]).logits
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    def with_bags(logits, inputs):
        superposed = inputs["labels"].dim() == 3
        return distillation(
            logits, inputs, lambda: token_superposition(teacher, S) if superposed else nullcontext()
        )

    args = make_args(tst_phase_ratio=0.5)
    trainer = has_term(distillation)(make_model("llama"), args, train_dataset=make_blocks(100))
    with pytest.raises(TSTError, match=r"inside token_superposition\(teacher, bag_size\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    has_term(with_bags)(make_model("llama"), args, train_dataset=make_blocks(100)).train()


def test_overlapping_windows_are_told(llama, make_args, caplog):
    tokens = torch.randint(0, VOCAB_SIZE, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    windows = [{"input_ids": tokens[i : i + 24]} for i in range(0, 1900, 12)]
    trainer = TSTTrainer(llama, make_args(tst_phase_ratio=0.5), train_dataset=windows)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "share 12 of their 24 tokens" in caplog.text


def test_what_a_callback_adds_to_the_logs_reaches_the_caller(llama, make_args):
    class Adds(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "eval_loss" in logs:
                logs["eval_more"] = 7.0

    trainer = TSTTrainer(
        llama,
        make_args(tst_phase_ratio=0.5, eval_strategy="steps", eval_steps=5),
        train_dataset=make_blocks(100),
        eval_dataset=make_blocks(4),
        callbacks=[Adds()],
    )
    trainer.train()
    assert trainer.evaluate()["eval_more"] == 7.0


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_log_history_holds_logs_alone_as_that_of_trainer(ratio, llama, make_args):
    """What scripts plot after training, and what callbacks and trackers take logs for."""
    logged = []

    class SumsUp(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(sum(logs.values()))

    args = make_args(tst_phase_ratio=ratio, save_strategy="steps", save_steps=4)
    for resume in (False, True):
        trainer = TSTTrainer(llama, args, train_dataset=make_blocks(100), callbacks=[SumsUp()])
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4" if resume else None)
        assert len([entry["loss"] for entry in trainer.state.log_history[:-1]]) == 10
    assert len(logged) == 11 + 7


def test_a_schedule_of_the_users_own_is_warned_of_when_epochs_give_other_steps(llama, make_args, caplog):
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50)
    args = make_args(tst_phase_ratio=0.5, max_steps=-1, num_train_epochs=1)
    with caplog.at_level("WARNING"):
        TSTTrainer(llama, args, train_dataset=make_blocks(100), optimizers=(optimizer, schedule)).train()
    assert "num_train_epochs=1 gives 20 optimizer steps instead of Trainer's 50" in caplog.text


def test_files_that_a_subclass_writes_into_a_checkpoint_stay(llama, make_args, tmp_path):
    class WritesNotes(TSTTrainer):
        def _save_checkpoint(self, model, trial):
            folder = tmp_path / "run" / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("mine")
            super()._save_checkpoint(model, trial)

    args = make_args(tst_phase_ratio=0.5, save_strategy="steps", save_steps=10)
    WritesNotes(llama, args, train_dataset=make_blocks(100)).train()
    assert (tmp_path / "run" / "checkpoint-10" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "checkpoint-10" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("reduce_lr_on_plateau", {"patience": 3}), ("cosine_with_restarts", {"num_cycles": 2})],
)
def test_options_of_every_schedule_are_taken(kind, options, make_args):
    evaluates = {"eval_strategy": "steps", "metric_for_best_model": "eval_loss"}
    args = make_args(tst_phase_ratio=0.5, lr_scheduler_type=kind, lr_scheduler_kwargs=options, **evaluates)
    trainer = TSTTrainer(
        make_model("llama"), args, train_dataset=make_blocks(100), eval_dataset=make_blocks(4)
    )
    trainer.train()
    assert trainer.state.global_step == 10


def test_a_tokenizer_in_the_collator_is_saved(llama, make_args, tmp_path):
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    write_corpus(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    args = make_args(tst_phase_ratio=0.5, save_strategy="steps", save_steps=10)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    TSTTrainer(llama, args, data_collator=collator, train_dataset=make_blocks(100)).train()
    assert (tmp_path / "run" / "checkpoint-10" / "tokenizer.json").is_file()


def test_a_stream_with_a_length_trains_by_epochs(llama, make_args):
    class Sized(Stream):
        def __len__(self):
            return len(self.blocks)

    read = Read()
    args = make_args(tst_phase_ratio=0.5, max_steps=-1, num_train_epochs=2)
    TSTTrainer(llama, args, train_dataset=Sized(make_blocks(20)), callbacks=[read]).train()
    assert read.tokens == [S * TOKENS_PER_STEP] * 4 + [TOKENS_PER_STEP] * 4


def test_predict_pads_rows_of_several_lengths_as_trainer_does(make_args, tmp_path):
    from transformers import AutoTokenizer

    write_corpus(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    model = make_model("llama", vocab_size=len(tokenizer))
    rows = [{"input_ids": [5] * 4}, {"input_ids": [6] * 7}]
    for ratio in (0.0, 0.5):
        trainer = TSTTrainer(model, make_args(tst_phase_ratio=ratio), processing_class=tokenizer)
        assert trainer.predict(rows).predictions.shape == (2, 7, len(tokenizer))


def test_float_labels_of_another_task_stay_floats(make_args, tmp_path):
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

    config = CONFIG_MAPPING["llama"](**TINY["llama"], num_labels=1, problem_type="regression", pad_token_id=0)
    rows = [{"input_ids": [3] * 6, "label": 0.25}, {"input_ids": [4] * 6, "label": -0.75}] * 20
    models = []
    for name, base, kind in (("a", TSTTrainer, None), ("b", Trainer, TrainingArguments)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        args = make_args(tst_phase_ratio=0.0)
        if kind is not None:
            names = ("max_steps", "per_device_train_batch_size", "learning_rate")
            values = {option: getattr(args, option) for option in names}
            args = kind(str(tmp_path / name), use_cpu=True, report_to="none", save_strategy="no", **values)
        base(model, args, train_dataset=rows).train()
        models.append(model)
    assert weights_equal(*models)
