"""A table of bad input: each is a TSTError of one line, before the first step.

What the sentences say is tested beside what they are about, and for files and flags in `test_bad_input.py`.
"""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    BLOCK_LENGTH,
    VOCAB_SIZE,
    make_blocks,
    make_model,
    plan_for_passes,
    plan_for_steps,
    write_corpus,
)
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_tst import (
    DataCollatorForTokenSuperposition,
    PhaseSchedule,
    TSTError,
    TSTTrainer,
    input_weights,
    offset_weights,
    token_superposition,
)
from hf_tst.bags.folding import fold_into_bags
from hf_tst.batches.resume_position import DataPosition
from hf_tst.cli import card as run_card
from hf_tst.cli import plan as planning
from hf_tst.data.files import load_text_file
from hf_tst.data.packing import pack_blocks, tokenize_documents
from hf_tst.pretraining import parts
from hf_tst.pretraining.pretrain import main
from hf_tst.records.run_record import RunRecord
from hf_tst.training.audit import audit_step, plan_of_arguments, plan_of_position

OVERRIDES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip

# Names of options, and the packages that they need.
TRACKERS = {
    "wandb": "wandb", "clearml": "clearml", "comet_ml": "comet_ml", "dvclive": "dvclive", "swanlab": "swanlab",
    "codecarbon": "codecarbon",
}  # fmt: skip
OPTIMIZERS = {
    "schedule_free_adamw": "schedulefree", "grokadamw": "grokadamw", "lomo": "lomo_optim", "stable_adamw": "optimi",
    "adamw_bnb_8bit": "bitsandbytes",
}  # fmt: skip


def absent(options):
    """The options whose packages are not installed."""
    return [name for name, package in options.items() if find_spec(package) is None]


# Changes to a recipe that trains; `None` leaves a line empty.
RECIPES = {
    "steps: fraction": {"max_steps": 6.5},
    "steps: list": {"max_steps": [1, 2]},
    "steps: mapping": {"max_steps": {"a": 1}},
    "steps: nothing": {"max_steps": None},
    "steps: word": {"max_steps": "many"},
    "steps: truth": {"max_steps": True},
    "steps: none": {"max_steps": 0},
    "steps: more than the data": {"max_steps": 100_000},
    "epochs: none": {"max_steps": -1, "num_train_epochs": 0},
    "epochs: negative": {"max_steps": -1, "num_train_epochs": -2},
    "epochs: too few for a step": {"max_steps": -1, "num_train_epochs": 0.0001},
    "learning rate: word": {"learning_rate": "fast"},
    "learning rate: list": {"learning_rate": [1e-3]},
    "learning rate: truth": {"learning_rate": True},
    "learning rate: negative": {"learning_rate": -1.0},
    "learning rate: not a number": {"learning_rate": ".nan"},
    "adam: beta": {"adam_beta1": 2.0},
    "adam: epsilon": {"adam_epsilon": -1.0},
    "weight decay: negative": {"weight_decay": -0.1},
    "warmup: negative": {"warmup_steps": -1},
    "clipping: word": {"max_grad_norm": "soft"},
    "ratio: above one": {"tst_phase_ratio": 2},
    "ratio: below zero": {"tst_phase_ratio": -0.1},
    "ratio: not a number": {"tst_phase_ratio": "nan"},
    "ratio: word": {"tst_phase_ratio": "half"},
    "ratio: nothing": {"tst_phase_ratio": None},
    "bag: none": {"tst_bag_size": 0},
    "bag: negative": {"tst_bag_size": -3},
    "bag: fraction": {"tst_bag_size": 1.5},
    "bag: word": {"tst_bag_size": "six"},
    "bag: more than the data": {"tst_bag_size": 1_000_000},
    "mode": {"tst_mode": "both"},
    "rows": {"tst_superposition_rows": "shorter"},
    "more rows of what is no multiple of the bag": {"tst_superposition_rows": "more", "tst_bag_size": 7},
    "more rows of single tokens": {"tst_mode": "output", "tst_superposition_rows": "more"},
    "weighting": {"tst_offset_weighting": "linear"},
    "weighting of one target": {"tst_mode": "input", "tst_offset_weighting": "power_law"},
    "input weighting": {"tst_input_weighting": "power_law"},
    "input weighting of single tokens": {"tst_mode": "output", "tst_input_weighting": "linear"},
    "fused loss": {"tst_fused_loss": "maybe"},
    "documents": {"tst_document_boundaries": "sometimes"},
    "documents without superposition": {"tst_document_boundaries": "respect", "tst_phase_ratio": 0},
    "non-finite loss": {"tst_nonfinite_loss": "hope"},
    "peak: none": {"tst_peak_tflops": 0},
    "peak: word": {"tst_peak_tflops": "fast"},
    "smoothing": {"label_smoothing_factor": 0.1},
    "liger": {"use_liger_kernel": True},
    "batch: none": {"per_device_train_batch_size": 0},
    "batch: negative": {"per_device_train_batch_size": -1},
    "batch: fraction": {"per_device_train_batch_size": 2.5},
    "accumulation: none": {"gradient_accumulation_steps": 0},
    "evaluation batch: none": {"per_device_eval_batch_size": 0},
    "block: one": {"block_size": 1},
    "block: none": {"block_size": 0},
    "block: longer than the context": {"block_size": 64},
    "block: longer than MPT's context": {"model_type": "mpt", "config_overrides": {"max_seq_len": 8, "d_model": 16, "n_heads": 2}},
    "block: fraction": {"block_size": 16.5},
    "block: word": {"block_size": "long"},
    "tokens a step: no multiple": {"tokens_per_step": 33},
    "tokens a step: none": {"tokens_per_step": 0},
    "tokens a step: twice said": {"tokens_per_step": 64, "gradient_accumulation_steps": 2},
    "tokens a step: without block": {"tokens_per_step": 64, "block_size": ...},
    "validation: all": {"validation_split_percentage": 100},
    "validation: negative": {"validation_split_percentage": -1},
    "validation: missing file": {"validation_file": "nowhere.txt"},
    "validation: without training data": {"train_file": "", "validation_file": "nowhere.txt"},
    "samples: none": {"max_train_samples": 0},
    "samples: too few": {"max_train_samples": 3},
    "evaluation samples: none": {"max_eval_samples": 0},
    "workers: none": {"preprocessing_num_workers": 0},
    "loaders: negative": {"dataloader_num_workers": -1},
    "loaders: prefetching without": {"dataloader_prefetch_factor": 2},
    "order: unknown": {"train_sampling_strategy": "sideways"},
    "order: by length": {"train_sampling_strategy": "group_by_length"},
    "model: unknown": {"model_type": "nonsense"},
    "model: encoder": {"model_type": "t5", "config_overrides": ...},
    "model: nothing": {"model_type": None},
    "model: twice said": {"model_name_or_path": "nowhere", "config_overrides": ...},
    "model: and a configuration": {"config_name": "tokenizer"},
    "model: changed": {"model_name_or_path": "nowhere", "model_type": ...},
    "model: not there": {"model_type": ..., "model_name_or_path": "./nowhere", "config_overrides": ...},
    "model: a file": {"model_type": ..., "model_name_or_path": "corpus.txt", "config_overrides": ...},
    "model: no weights": {"model_type": ..., "model_name_or_path": "tokenizer", "config_overrides": ...},
    "configuration: not there": {"model_type": ..., "config_name": "./nowhere", "config_overrides": ...},
    "overrides: word": {"config_overrides": "hidden_size=abc"},
    "overrides: no value": {"config_overrides": "hidden_size"},
    "overrides: broken": {"config_overrides": "{bad"},
    "overrides: impossible": {"config_overrides": OVERRIDES | {"hidden_size": 15}},
    "overrides: unknown": {"config_overrides": OVERRIDES | {"hidden_siz": 16}},
    "overrides: type": {"config_overrides": OVERRIDES | {"hidden_size": "wide"}},
    "overrides: small vocabulary": {"config_overrides": OVERRIDES | {"vocab_size": 10}},
    "overrides: type of a flag": {"config_overrides": "hidden_size=16.5"},
    "dtype: unknown": {"dtype": "bogus"},
    "dtype: whole numbers": {"dtype": "int8"},
    "attention: missing": {"attn_implementation": "flash_attention_2"},
    "attention: unknown": {"attn_implementation": "nonsense"},
    "tokenizer: not there": {"tokenizer_name": "./nowhere"},
    "tokenizer: nothing": {"tokenizer_name": ...},
    "tokenizer: a file": {"tokenizer_name": "corpus.txt"},
    "data: not there": {"train_file": "nowhere.txt"},
    "data: no match": {"train_file": "nowhere-*.txt"},
    "data: folder": {"train_file": "tokenizer"},
    "data: ending": {"train_file": "corpus.doc"},
    "data: empty": {"train_file": "empty.txt"},
    "data: blank": {"train_file": "blank.txt"},
    "data: one line": {"train_file": "short.txt"},
    "data: not UTF-8": {"train_file": "latin.txt"},
    "data: broken JSON": {"train_file": "broken.jsonl"},
    "data: numbers": {"train_file": "numbers.jsonl"},
    "data: broken CSV": {"train_file": "broken.csv"},
    "data: broken Parquet": {"train_file": "broken.parquet"},
    "data: twice said": {"dataset_name": "some/data"},
    "data: part of a data set": {"dataset_config_name": "part"},
    "data: ends of token ids": {"train_file": "ids.npy", "append_eos": True},
    "data: no such column": {"text_column": "words"},
    "data set: not there": {"dataset_name": "./nowhere", "train_file": ...},
    "data set: offline": {"dataset_name": "some/data", "train_file": ...},
    "stream: split": {"streaming": True},
    "stream: samples": {"streaming": True, "validation_split_percentage": 0, "max_train_samples": 9},
    "stream: no steps": {"streaming": True, "validation_split_percentage": 0, "max_steps": -1},
    "schedule: unknown": {"lr_scheduler_type": "bogus"},
    "schedule: broken": {"lr_scheduler_kwargs": "{bad"},
    "schedule: unknown option": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay": 3}},
    "schedule: missing option": {"lr_scheduler_type": "cosine_with_min_lr"},
    "schedule: no end": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_stable_steps": 3}},
    "optimizer: unknown": {"optim": "bogus"},
    "optimizer: missing package": {"optim": absent(OPTIMIZERS)[0]},
    "optimizer: another missing package": {"optim": absent(OPTIMIZERS)[1]},
    "optimizer: no targets": {"optim": "galore_adamw"},
    "saving: unknown": {"save_strategy": "bogus"},
    "evaluation: unknown": {"eval_strategy": "bogus"},
    "evaluation: no steps": {"eval_strategy": "steps", "eval_steps": 0, "logging_steps": 0},
    "logging: unknown": {"logging_strategy": "bogus"},
    "best model: other steps": {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"},
    "best model: nothing to evaluate": {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "validation_split_percentage": 0,
    },
    "precision: both": {"bf16": True, "fp16": True},
    "trackers: unknown": {"report_to": "bogus"},
    "trackers: missing package": {"report_to": absent(TRACKERS)[0]},
    "seed: word": {"seed": "lucky"},
    "data seed: word": {"data_seed": "lucky"},
    "lora: rank": {"lora_rank": 0},
    "lora: no model": {"lora_rank": 4},
    "lora: no rank": {"lora_alpha": 32},
    "lora: layers, no rank": {"lora_target_modules": "q_proj"},
    "output: a file": {"output_dir": "corpus.txt"},
    "output: below a file": {"output_dir": "corpus.txt/run"},
    "resume: nothing there": {"resume_from_checkpoint": "last"},
    "resume: not there": {"resume_from_checkpoint": "nowhere/checkpoint-3"},
    "resume: a file": {"resume_from_checkpoint": "corpus.txt"},
    "hub: strategy": {"hub_strategy": "bogus"},
    "unknown name": {"max_step": 3},
    "fsdp: unknown": {"fsdp": "sharp"},
    "deepspeed: not there": {"deepspeed": "nowhere.json"},
    "accelerator: unknown": {"accelerator_config": {"split": True}},
}  # fmt: skip

FLAGS = {
    "flag: unknown": ["--max_stepz", "3"],
    "flag: far from all": ["--xyzzy"],
    "flag: no value": ["--max_steps"],
    "flag: word": ["--max_steps", "many"],
    "flag: fraction": ["--tst_bag_size", "2.5"],
    "flag: choice": ["--tst_mode", "both"],
    "flag: truth": ["--streaming", "perhaps"],
    "flag: stray": ["stray"],
    "flag: another file": ["other.yaml"],
    "flag: with equals": ["--learning_rate=fast"],
}

FILES = {
    "file: not there": "missing.yaml",
    "file: broken": "broken.yaml",
    "file: list": "list.yaml",
    "file: empty": "empty.yaml",
    "file: binary": "binary.yaml",
    "file: folder": "folder.yaml",
    "file: python": "python.yaml",
    "file: broken JSON": "broken.json",
}

PLANS = {
    "plan: GPU": ["--gpu", "b20"],
    "plan: utilisation": ["--mfu", "2"],
    "plan: no GPU": ["--num_gpus", "0"],
    "plan: shards": ["--num_gpus", "8", "--shard_size", "3"],
    "plan: no steps": ["--max_steps", "-1"],
    "plan: context": ["--block_size", "4096"],
    "plan: flag": ["--gpus", "8"],
    "plan: loss": ["--tst_fused_loss", "perhaps"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input_table")
    texts = write_corpus(folder)
    files = {
        "blank.txt": " \n" * 20_000, "short.txt": "one line\n", "empty.txt": "",
        "corpus.doc": "".join(texts), "broken.jsonl": '{"text": "abc"}\n{"text": \n', "numbers.jsonl": '{"body": 3}\n' * 50,
        "broken.csv": 'a,b\n1,2,3\n"x\n', "broken.parquet": "this is none", "broken.yaml": "a: [1\nb: 2", "list.yaml": "- 1\n",
        "empty.yaml": "", "python.yaml": "output_dir: !!python/object/apply:os.getcwd []\n", "broken.json": '{"output_dir": ',
        "other.yaml": "output_dir: x\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.txt").write_bytes("café\n".encode("latin1") * 100)
    np.save(folder / "ids.npy", np.arange(20_000, dtype=np.uint16) % 50)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "folder.yaml").mkdir()
    return folder


def write_recipe(folder, tmp_path, changes):
    values = {
        "output_dir": str(tmp_path / "out"), "model_type": "llama", "config_overrides": OVERRIDES, "block_size": 16,
        "max_steps": 6, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "train_file": "corpus.txt", "tokenizer_name": "tokenizer", "save_strategy": "no",
    } | changes  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not ...}))
    return str(path)


@pytest.fixture
def refused(tmp_path, capfd):
    """Checks that what it is given raises one sentence, and that nothing was trained."""

    def check(name, call):
        with pytest.raises(TSTError) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)
        assert 10 < len(str(caught.value)) < 1000
        assert "loss" not in capfd.readouterr().out
        assert not list(tmp_path.rglob("trainer_state.json"))

    yield check
    unset_hf_deepspeed_config()  # Transformers keeps one that failed, and would ask it about the next model


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(folder, tmp_path, monkeypatch, refused, name):
    monkeypatch.chdir(folder)
    if name.startswith(("schedule", "optimizer", "trackers")):
        monkeypatch.setattr(parts, "prepare_blocks", lambda *_, **__: pytest.fail("text is tokenized"))
    refused(name, lambda: main([write_recipe(folder, tmp_path, RECIPES[name])]))


@pytest.mark.parametrize("name", FLAGS)
def test_flags(folder, tmp_path, monkeypatch, refused, name):
    monkeypatch.chdir(folder)
    refused(name, lambda: main([write_recipe(folder, tmp_path, {}), *FLAGS[name]]))


@pytest.mark.parametrize("name", FILES)
def test_files(folder, monkeypatch, refused, name):
    monkeypatch.chdir(folder)
    refused(name, lambda: main([FILES[name]]))


@pytest.mark.parametrize("name", PLANS)
def test_plans(folder, tmp_path, monkeypatch, refused, name):
    monkeypatch.chdir(folder)
    refused(name, lambda: planning.main([write_recipe(folder, tmp_path, {}), *PLANS[name]]))


def ids(*values):
    return [{"input_ids": list(values)} for _ in range(200)]


# Training data for `TSTTrainer`, with blocks of 12 tokens and a vocabulary of 97.
DATA = {
    "data: none": [],
    "data: no column": [{"text": "abc"}] * 200,
    "data: text": [{"input_ids": "abc"}] * 200,
    "data: fractions": ids(*[0.5] * BLOCK_LENGTH),
    "data: nested": ids(*[[1, 2]] * BLOCK_LENGTH),
    "data: ragged": ids(*[[1], [1, 2]]),
    "data: no token": ids(),
    "data: one token": ids(1),
    "data: negative id": ids(*[-5] * BLOCK_LENGTH),
    "data: id above the vocabulary": ids(*[VOCAB_SIZE] * BLOCK_LENGTH),
    "data: other lengths": [*ids(*[1] * BLOCK_LENGTH), {"input_ids": [1] * 5}],
    "data: labels of other length": [{"input_ids": [1] * BLOCK_LENGTH, "labels": [1]}] * 200,
    "data: padded": [{"input_ids": [1] * BLOCK_LENGTH, "attention_mask": [1] * 11 + [0]}] * 200,
    "data: too little": make_blocks(3),
    "data: stored text": datasets.Dataset.from_dict({"input_ids": ["abc"] * 200}),
    "data: stored lengths": datasets.Dataset.from_dict({"input_ids": [[1] * 12] * 199 + [[1] * 9]}),
    "data: empty stream": datasets.IterableDataset.from_generator(lambda: iter(())),
    "data: stream of text": datasets.Dataset.from_dict({"text": ["abc"]}).to_iterable_dataset(),
}


@pytest.mark.parametrize("name", DATA)
def test_training_data(llama, make_args, refused, name):
    refused(name, lambda: TSTTrainer(llama, make_args(), train_dataset=DATA[name]).train())


# What resumes otherwise than it was saved.
RESUMED = {
    "resume: ratio": {"tst_phase_ratio": 0.5},
    "resume: bag": {"tst_bag_size": 2},
    "resume: steps": {"max_steps": 12},
    "resume: batch": {"per_device_train_batch_size": 4},
    "resume: accumulation": {"gradient_accumulation_steps": 3},
    "resume: mode": {"tst_mode": "input"},
    "resume: rows": {"tst_superposition_rows": "more"},
    "resume: offset weighting": {"tst_offset_weighting": "power_law"},
    "resume: input weighting": {"tst_input_weighting": "linear"},
    "resume: seed": {"data_seed": 7},
    "resume: order": {"train_sampling_strategy": "sequential"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The last checkpoint of a run of ten steps."""
    from hf_tst import TSTTrainingArguments

    args = TSTTrainingArguments(
        str(tmp_path_factory.mktemp("run")), max_steps=10, tst_bag_size=4, per_device_train_batch_size=2, save_steps=8,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="steps", tst_save_at_switch=False,
    )  # fmt: skip
    TSTTrainer(make_model("llama"), args, train_dataset=make_blocks(200)).train()
    return Path(args.output_dir) / "checkpoint-8"


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_otherwise(llama, make_args, checkpoint, capfd, refused, name):
    capfd.readouterr()
    trainer = TSTTrainer(llama, make_args(**RESUMED[name]), train_dataset=make_blocks(200))
    refused(name, lambda: trainer.train(str(checkpoint)))


def rewrite(**changes):
    """A change to the fields of `data_position.json`, in a checkpoint whose manifest does not tell."""

    def change(folder):
        values = json.loads((folder / "data_position.json").read_text())
        (folder / "data_position.json").write_text(json.dumps(values | changes))
        (folder / "manifest.json").unlink()

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:20])


DAMAGE = {
    **{f"checkpoint: {file} cut": cut(file) for file in (
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
        "data_position.json", "config.json", "manifest.json",
    )},
    **{f"checkpoint: {file} gone": lambda folder, file=file: (folder / file).unlink() for file in (
        "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json",
    )},
    "checkpoint: empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "checkpoint: manifest of nothing": lambda folder: (folder / "manifest.json").write_text("[]"),
    "position: version": rewrite(version=99),
    "position: unknown field": rewrite(shards=3),
    "position: other data": rewrite(data="0" * 16),
    "position: other blocks": rewrite(num_blocks=7),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(llama, make_args, checkpoint, tmp_path_factory, capfd, refused, name):
    copied = tmp_path_factory.mktemp("damaged") / "checkpoint-8"
    shutil.copytree(checkpoint, copied)
    DAMAGE[name](copied)
    capfd.readouterr()
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    refused(name, lambda: trainer.train(str(copied)))


def position(**changes):
    fields = {
        "step": 1, "max_steps": 10, "phase_ratio": 0.3, "bag_size": 4, "mode": "full", "document_boundaries": "ignore",
        "seed": 0, "shuffle": True, "per_device_batch_size": 2, "accumulation_steps": 1, "world_size": 1,
        "block_length": 12, "num_blocks": 200, "data": "x", "split_by_rank": False,
    }  # fmt: skip
    return DataPosition(**fields | changes)


SCHEDULE = PhaseSchedule(10, 0.3, 4)
CALLS = {
    "call: steps": lambda make_args: PhaseSchedule(0, 0.3, 4),
    "call: ratio": lambda make_args: PhaseSchedule(10, float("inf"), 4),
    "call: ratio of text": lambda make_args: PhaseSchedule(10, "0.3", 4),
    "call: bag": lambda make_args: PhaseSchedule(10, 0.3, 0),
    "call: bag of truth": lambda make_args: PhaseSchedule(10, 0.3, 1.5),
    "call: mode": lambda make_args: PhaseSchedule(10, 0.3, 4, "both"),
    "call: weighting": lambda make_args: offset_weights("linear", 4),
    "call: input weighting": lambda make_args: input_weights("power_law", 4),
    "call: fold": lambda make_args: fold_into_bags(torch.zeros(2, 7), 4),
    "call: fold of a row": lambda make_args: fold_into_bags(torch.zeros(8), 4),
    "call: collator's bag": lambda make_args: DataCollatorForTokenSuperposition(0),
    "call: collator's mode": lambda make_args: DataCollatorForTokenSuperposition(4, "both"),
    "call: collator's documents": lambda make_args: DataCollatorForTokenSuperposition(4, document_boundaries="no"),
    "call: collator without end": lambda make_args: DataCollatorForTokenSuperposition(4, document_boundaries="respect")(
        [{"input_ids": [1] * 8}]
    ),
    "call: collator, no column": lambda make_args: DataCollatorForTokenSuperposition(4)([{"text": "a"}]),
    "call: collator, lengths": lambda make_args: DataCollatorForTokenSuperposition(4)(
        [{"input_ids": [1] * 8}, {"input_ids": [1] * 4}]
    ),
    "call: collator, no multiple": lambda make_args: DataCollatorForTokenSuperposition(4)([{"input_ids": [1] * 7}]),
    "call: few blocks": lambda make_args: plan_for_steps(3, SCHEDULE, 2, 0),
    "call: few blocks for a pass": lambda make_args: plan_for_passes(1, 1, lambda n: PhaseSchedule(n, 0.3, 4), 2, 0),
    "call: fused loss": lambda make_args: make_args(tst_fused_loss="perhaps"),
    "call: wrong arguments": lambda make_args: TSTTrainer(make_model("llama"), TrainingArguments("x", use_cpu=True)),
    "call: loss function": lambda make_args: TSTTrainer(
        make_model("llama"), make_args(), train_dataset=make_blocks(9), compute_loss_func=lambda *_: 0
    ),
    "call: other bags": lambda make_args: TSTTrainer(
        make_model("llama"), make_args(), DataCollatorForTokenSuperposition(3), train_dataset=make_blocks(200)
    ),
    "call: own collator and documents": lambda make_args: TSTTrainer(
        make_model("llama"), make_args(tst_document_boundaries="respect"), lambda rows: rows, train_dataset=make_blocks(9)
    ),
    "call: split batches": lambda make_args: TSTTrainer(
        make_model("llama"), make_args(accelerator_config={"split_batches": True}), train_dataset=make_blocks(9)
    ),
    "call: stream workers": lambda make_args: TSTTrainer(
        make_model("llama"), make_args(dataloader_num_workers=2),
        train_dataset=datasets.Dataset.from_list(make_blocks(9)).to_iterable_dataset(num_shards=3),
    ).train(),
    "call: encoder-decoder": lambda make_args: token_superposition(T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ), 4).__enter__(),
    "call: bag of the context": lambda make_args: token_superposition(make_model("llama"), -1).__enter__(),
    "call: audit of plain training": lambda make_args: plan_of_arguments(make_args(tst_phase_ratio=0), 200),
    "call: audit of a stream": lambda make_args: plan_of_position(position(num_blocks=None)),
    "call: audit of a step": lambda make_args: audit_step(*plan_of_position(position()), 10, 12),
    "call: position": lambda make_args: position().check_resumable(replace(position(), seed=1)),
    "call: record": lambda make_args: RunRecord.from_folder("nowhere"),
    "call: card": lambda make_args: run_card.main(["nowhere"]),
    "call: card's flag": lambda make_args: run_card.main(["nowhere", "--licence", "mit"]),
    "call: text file": lambda make_args: load_text_file("nowhere.txt"),
    "call: packing too little": lambda make_args: pack_blocks(datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), 12),
    "call: tokenizer without end": lambda make_args: tokenize_documents(
        datasets.Dataset.from_dict({"text": ["a"]}), SimpleNamespace(eos_token_id=None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(make_args, tmp_path, monkeypatch, refused, name):
    monkeypatch.chdir(tmp_path)
    refused(name, lambda: CALLS[name](make_args))


def test_the_table_is_long():
    tables = (RECIPES, FLAGS, FILES, PLANS, DATA, RESUMED, DAMAGE, CALLS)
    assert sum(map(len, tables)) >= 120


def test_the_recipe_that_the_bad_ones_are_made_of_trains(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert main([write_recipe(folder, tmp_path, {})]).state.global_step == 6
