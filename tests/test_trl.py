"""The example with trl's SFTTrainer against SFTTrainer alone and TSTTrainer alone."""

import dataclasses
import math

import datasets
import pytest
import torch
from conftest import TINY_RUN, make_model, write_corpus
from examples.sft_trl import TSTSFTConfig, TSTSFTTrainer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_tst import (
    DataCollatorForTokenSuperposition,
    TSTError,
    TSTTrainer,
    TSTTrainingArguments,
    token_superposition,
)
from hf_tst.data.packing import pack_blocks, tokenize_documents
from hf_tst.training.schedule import make_plan

HALF = {"tst_phase_ratio": 0.5, "tst_bag_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents, blocks of 16 tokens, and a tokenizer."""
    folder = tmp_path_factory.mktemp("trl")
    documents = datasets.Dataset.from_dict({"text": write_corpus(folder)})
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return documents, pack_blocks(tokenize_documents(documents, tokenizer), 16), tokenizer


@pytest.fixture
def train(data, tmp_path):
    _, blocks, tokenizer = data
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id)

    def train(
        trainer_class, args_class, *, rows=blocks, model=None, data_collator=collator, resume=None, **options
    ):
        tiny = TINY_RUN | {"output_dir": str(tmp_path / trainer_class.__name__), "bf16": False}
        if issubclass(args_class, SFTConfig):
            tiny["max_length"] = None
        given = {name: options.pop(name) for name in ("eval_dataset", "peft_config") if name in options}
        trainer = trainer_class(
            model or make_model("llama", vocab_size=len(tokenizer)),
            args_class(**tiny | options),
            data_collator,
            train_dataset=rows,
            processing_class=tokenizer,
            **given,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_weights(trainer, other):
    weights, others = trainer.model.state_dict(), other.model.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_the_defaults_are_those_of_trl():
    defaults = {field.name: field.default for field in dataclasses.fields(TSTSFTConfig)}
    for field in dataclasses.fields(SFTConfig):
        assert defaults[field.name] == field.default, field.name
    assert TSTSFTConfig(output_dir="out", use_cpu=True).bf16


def test_without_superposition_it_is_the_sft_trainer_bit_for_bit(train):
    ours, plain = train(TSTSFTTrainer, TSTSFTConfig, tst_phase_ratio=0), train(SFTTrainer, SFTConfig)
    assert logged(ours) == logged(plain)
    assert logged(ours, "mean_token_accuracy") == logged(plain, "mean_token_accuracy")
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_superposition_it_trains_as_the_tst_trainer(train, data, accumulation):
    _, blocks, tokenizer = data
    options = HALF | {"gradient_accumulation_steps": accumulation}
    options |= {"eval_dataset": blocks.select(range(8)), "eval_strategy": "steps", "eval_steps": 2}
    options |= {"tst_fused_loss": "off"}  # SFTTrainer's compute_loss reads logits
    ours = train(TSTSFTTrainer, TSTSFTConfig, **options)
    alone = train(TSTTrainer, TSTTrainingArguments, data_collator=None, **options)
    assert logged(ours)[0] == pytest.approx(math.log(len(tokenizer)), rel=0.02)
    assert logged(ours)[:5] == logged(alone)[:5]  # bags: the very same loss
    assert logged(ours) == pytest.approx(logged(alone), rel=1e-5)  # tokens: another kernel
    assert logged(ours, "eval_loss") == pytest.approx(logged(alone, "eval_loss"), rel=1e-5)
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, alone.model.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_recovery_starts_from_the_superposed_weights(train, data, tmp_path):
    _, blocks, tokenizer = data
    ours = train(TSTSFTTrainer, TSTSFTConfig, **HALF)
    model = make_model("llama", vocab_size=len(tokenizer))
    model.load_state_dict(load_file(tmp_path / "TSTSFTTrainer" / "checkpoint-5" / "model.safetensors"))
    rows = [row for row in ours.state.log_history if "loss" in row]
    assert [row["tst_current_bag_size"] for row in rows] == [ours.args.tst_bag_size] * 5 + [1] * 5
    assert ["mean_token_accuracy" in row for row in rows] == [False] * 5 + [True] * 5
    plan = make_plan(ours.args, len(blocks), rows_per_step=2)
    tokens = torch.tensor([blocks[block]["input_ids"] for row in (10, 11) for block in plan.row_blocks(row)])
    assert rows[5]["loss"] == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


def test_it_is_resumed_bit_for_bit(train, tmp_path):
    options = HALF | {"save_strategy": "steps", "save_steps": 3}
    whole = train(TSTSFTTrainer, TSTSFTConfig, **options)
    resumed = train(
        TSTSFTTrainer, TSTSFTConfig, **options, resume=str(tmp_path / "TSTSFTTrainer" / "checkpoint-3")
    )
    assert logged(resumed)[-7:] == logged(whole)[-7:]
    assert_same_weights(resumed, whole)


def test_its_adapters_are_trained_in_both_phases(train, data):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    ours = train(TSTSFTTrainer, TSTSFTConfig, **HALF, peft_config=config)
    losses = logged(ours)
    assert losses[0] == pytest.approx(math.log(len(data[2])), rel=0.02)
    assert losses[4] < losses[0]
    assert losses[9] < losses[5]


@pytest.mark.parametrize(
    ("strategy", "message"), [("wrapped", "Blocks must be of equal length"), ("bfd", "padding-free")]
)
def test_packing_by_trl_is_refused(train, data, strategy, message):
    options = HALF | {"packing": True, "packing_strategy": strategy, "max_length": 16}
    with pytest.raises(TSTError, match=message):
        train(TSTSFTTrainer, TSTSFTConfig, rows=data[0], **options)


def test_the_context_alone_does_not_serve_the_sft_trainer(train, data):
    _, blocks, tokenizer = data
    model = make_model("llama", vocab_size=len(tokenizer))
    rows = torch.tensor(blocks[:80]["input_ids"]).view(20, 64).tolist()
    with token_superposition(model, 4), pytest.raises(RuntimeError, match="shape"):
        train(
            SFTTrainer,
            SFTConfig,
            rows=datasets.Dataset.from_dict({"input_ids": rows}),
            model=model,
            data_collator=DataCollatorForTokenSuperposition(4),
        )
