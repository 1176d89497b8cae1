"""Axolotl with the plugin, against TSTTrainer alone on the same blocks. It needs Axolotl, which needs Python 3.12:

pip install "torch==2.13.*" "transformers==5.20.*" "trl==1.14.*" liger-kernel fastcore wandb bitsandbytes pytest
pip install --no-deps "axolotl>=0.21" axolotl-contribs-lgpl axolotl-contribs-mit
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DENSE, losses, weights_equal, write_corpus
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_tst import BlockStream, TSTError, TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents
from hf_tst.data.files import load_text_file

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip(
    "axolotl.train", reason="Axolotl is not installed, which needs Python 3.12 and other packages"
)
train_module = pytest.importorskip("axolotl.cli.train")

HALF = {"tst_phase_ratio": 0.5, "tst_bag_size": 4}
EXAMPLE = Path(__file__).parent.parent / "scripts" / "examples" / "axolotl.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model with its tokenizer, and a corpus with a document a line."""
    folder = tmp_path_factory.mktemp("axolotl")
    texts = write_corpus(folder, 2000)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**DENSE | {"vocab_size": len(tokenizer)})).save_pretrained(folder / "model")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def axolotl(data, tmp_path, monkeypatch):
    """Trains as `axolotl train FILE` does; returns the trainer."""
    from axolotl import train as training

    made = []
    setup = training.setup_model_and_trainer

    def noted(*args, **kwargs):
        made.append(setup(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(training, "setup_model_and_trainer", noted)
    monkeypatch.setattr(sys, "argv", ["axolotl"])

    def run(name="run", **options):
        values = {
            "base_model": str(data / "model"), "datasets": [{"path": str(data / "corpus.jsonl"), "type": "completion"}],
            "plugins": ["hf_tst.integrations.axolotl.TokenSuperpositionPlugin"], "sequence_len": 16,
            "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 10, "learning_rate": 0.01,
            "optimizer": "adamw_torch", "lr_scheduler": "linear", "warmup_steps": 0, "seed": 42, "bf16": False, "tf32": False,
            "special_tokens": {"pad_token": "<|endoftext|>"}, "logging_steps": 1, "save_strategy": "no",
            "output_dir": str(tmp_path / name), "dataset_prepared_path": str(tmp_path / "prepared"),
        }  # fmt: skip
        values = {key: value for key, value in (values | options).items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        train_module.do_cli(config=str(tmp_path / "run.yaml"))
        return made[-1][0]

    return run


def train_alone(data, folder, stream=False, **options):
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    documents = tokenize_documents(load_text_file(str(data / "corpus.jsonl"), streaming=stream), tokenizer)
    args = TSTTrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=0.01, optim="adamw_torch",
        seed=42, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    blocks = BlockStream(documents, 16) if stream else pack_blocks(documents, 16)
    model = AutoModelForCausalLM.from_pretrained(data / "model")
    trainer = TSTTrainer(model, args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("ratio", [0.5, 0])
@pytest.mark.parametrize("stream", [False, True])
def test_it_trains_the_weights_of_the_tst_trainer(axolotl, data, tmp_path, ratio, stream):
    options = {"tst_phase_ratio": ratio, "tst_bag_size": 4}
    source = {"datasets": None, "pretraining_dataset": [{"path": str(data / "corpus.jsonl")}]}
    trainer = axolotl(**options, tst_fused_loss=False, **source if stream else {})
    alone = train_alone(data, tmp_path / "alone", stream, **options, tst_fused_loss="off")
    assert losses(trainer) == losses(alone)
    assert losses(trainer)[0] == pytest.approx(math.log(400), rel=0.02)
    assert weights_equal(trainer.model, alone.model)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weight, alone.model.state_dict()[name]) for name, weight in saved.items())


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_resumed_bit_for_bit_at_and_after_the_switch(axolotl, data, tmp_path, stream):
    source = (
        {"datasets": None, "pretraining_dataset": [{"path": str(data / "corpus.jsonl")}]} if stream else {}
    )
    options = HALF | source | {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 10}
    whole = axolotl("whole", **options)
    for step in (3, 5, 6):
        checkpoint = shutil.copytree(
            tmp_path / "whole" / f"checkpoint-{step}",
            tmp_path / "resumed" / f"checkpoint-{step}",
            dirs_exist_ok=True,
        )
        resumed = axolotl("resumed", **options, resume_from_checkpoint=str(checkpoint))
        assert weights_equal(whole.model, resumed.model), step
        shutil.rmtree(tmp_path / "resumed")


def test_epochs_and_evaluation(axolotl):
    trainer = axolotl(**HALF, max_steps=None, num_epochs=1, val_set_size=0.1, eval_strategy="epoch")
    rows = trainer.state.max_steps * 2
    assert rows * 2.5 <= len(trainer.train_dataset) < (rows + 4) * 2.5
    assert [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1] < 5


def test_an_adapter_is_trained_in_both_phases(axolotl, tmp_path):
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True}
    kernels = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")  # for GPUs
    trainer = axolotl(**HALF, **lora, **dict.fromkeys(kernels, False))
    assert losses(trainer)[0] == pytest.approx(math.log(400), rel=0.02)
    at_switch, end = (
        load_file(tmp_path / "run" / folder / "adapter_model.safetensors") for folder in ("checkpoint-5", "")
    )
    for name in [name for name in end if "lora_B" in name]:
        assert at_switch[name].any(), name
        assert not torch.equal(at_switch[name], end[name]), name


def test_extra_heads_are_trained_and_not_saved(axolotl, data, tmp_path):
    trainer = axolotl(**HALF, mtp_num_heads=2)
    assert ["mtp_loss" in entry for entry in trainer.state.log_history if "loss" in entry] == [False] * 5 + [
        True
    ] * 5
    assert (
        load_file(tmp_path / "run" / "model.safetensors").keys()
        == load_file(data / "model" / "model.safetensors").keys()
    )


LIGER = ["axolotl.integrations.liger.LigerPlugin", "hf_tst.integrations.axolotl.TokenSuperpositionPlugin"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tst_bagsize": 4}, "no such option as 'tst_bagsize': did you mean 'tst_bag_size'"),
        ({"tst_bag_size": 0}, "tst_bag_size"),
        ({"sample_packing": True}, "sample_packing: True does not work with"),
        ({"datasets": [{"path": "x.jsonl", "type": "alpaca"}]}, "must be one of completion, pretrain, but is 'alpaca'"),
        ({"datasets": [{"path": "x.jsonl", "shards": 4}]}, "no option 'shards'"),
        ({"datasets": [{"path": "missing.jsonl"}]}, "There is no file missing.jsonl"),
        ({"plugins": LIGER, "liger_fused_linear_cross_entropy": True}, "computes its loss itself"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(axolotl, options, message, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # Liger patches it
    # Its kernel needs a GPU, its forward does not.
    liger = pytest.importorskip("liger_kernel.transformers.model.llama")
    monkeypatch.setattr(liger, "LigerForCausalLMLoss", lambda hidden_states, **_: hidden_states.mean())
    with pytest.raises(TSTError, match=message):
        axolotl(**HALF | options)


def test_the_example_trains(axolotl, data):
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    tiny = {
        "base_model": str(data / "model"),
        "datasets": [{"path": str(data / "corpus.jsonl"), "type": "completion"}],
    }
    tiny |= {
        "sequence_len": 16,
        "micro_batch_size": 2,
        "max_steps": 4,
        "warmup_steps": 1,
        "val_set_size": 0.01,
    }
    small = {name: value for name, value in example.items() if name not in ("output_dir", "bf16")}
    trainer = axolotl(**small | tiny | {"save_strategy": None})
    assert trainer.state.global_step == 4
    assert trainer.schedule.switch_step == 1
