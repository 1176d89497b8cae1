"""TSTTrainer with families, options of Trainer, compilation and collators of the user's own."""

import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    VOCAB_SIZE,
    losses,
    make_blocks,
    make_model,
    train_to_be_best_at_step_4,
    weights_equal,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    TrainerCallback,
    default_data_collator,
)
from versions import fails_before

from hf_tst import TSTTrainer, TSTTrainingArguments

LOG_V = math.log(VOCAB_SIZE)


@pytest.mark.parametrize("model_type", TINY)
def test_families_train_through_the_switch(model_type, make_args):
    model = make_model(model_type)
    if model_type in ("mixtral", "qwen3_moe"):
        # Without a penalty on the router its gates would still move; this sees that the penalty is in the loss.
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = 10.0
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = TSTTrainer(model, make_args(), train_dataset=make_blocks(200))
    trainer.train()
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []
    if model_type in ("mixtral", "qwen3_moe"):
        assert min(losses(trainer)) > LOG_V + 10 * 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor"},
        {"report_to": "tensorboard"},
        {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1},
        {"save_strategy": "epoch"},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"include_num_input_tokens_seen": "all"},
        {"train_sampling_strategy": "sequential"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"remove_unused_columns": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_trainer_options_still_work(llama, make_args, options):
    unknown = set(options) - set(TSTTrainingArguments.__dataclass_fields__)
    if unknown:
        pytest.skip(f"this transformers has no {unknown}")
    args = make_args(**options)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    trainer.train()
    assert trainer.state.global_step == 10
    assert all(math.isfinite(loss) for loss in losses(trainer))
    if options.get("report_to") == "tensorboard":
        assert list(Path(args.output_dir).rglob("events.out*")) or list(Path().rglob("events.out*"))


def test_best_model_early_stopping_and_metrics(llama, make_args):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = train_to_be_best_at_step_4(llama, make_args, callbacks=[stopping])
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert weights_equal(best, llama)


@pytest.mark.parametrize("output_dir", ["./run", ".", "a//run"])
def test_the_best_model_is_loaded_however_the_folder_is_written(
    llama, make_args, tmp_path, monkeypatch, output_dir
):
    monkeypatch.chdir(tmp_path)
    trainer = train_to_be_best_at_step_4(llama, partial(make_args, output_dir=output_dir))
    best = Path(trainer.state.best_model_checkpoint)
    assert best == Path(output_dir) / "checkpoint-4"
    assert weights_equal(AutoModelForCausalLM.from_pretrained(best), llama)
    saved = json.loads((Path(output_dir) / "checkpoint-10" / "trainer_state.json").read_text())
    assert Path(saved["best_model_checkpoint"]) == best


def test_the_best_checkpoint_is_found_again_when_the_folder_was_renamed(llama, make_args, tmp_path):
    resumed = copy.deepcopy(llama)
    train_to_be_best_at_step_4(llama, make_args)
    (tmp_path / "run").rename(tmp_path / "renamed")
    for step in (8, 10):
        shutil.rmtree(tmp_path / "renamed" / f"checkpoint-{step}")
    trainer = train_to_be_best_at_step_4(
        resumed,
        partial(make_args, output_dir=str(tmp_path / "renamed"), save_total_limit=2),
        accuracies=[0.3, 0.2],
        resume=True,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "renamed" / "checkpoint-4")
    kept = {path.name for path in (tmp_path / "renamed").glob("checkpoint-*")}
    assert kept == {
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-10",
    }  # that of the switch, the best, the newest
    assert weights_equal(AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint), resumed)


@fails_before("torch", "2.13", "it compiles more often")
def test_torch_compile_recompiles_once_at_the_switch(llama, make_args):
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    other = copy.deepcopy(llama)
    plain = TSTTrainer(other, make_args(), train_dataset=make_blocks(200))
    plain.train()
    graphs_after_step = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs_after_step.append(len(graphs))

    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200), callbacks=[Count()])
    llama.compile(backend=backend)
    trainer.train()
    torch.testing.assert_close(losses(trainer), losses(plain))
    first = graphs_after_step[0]
    assert graphs_after_step == [first] * 3 + [first + 1] * 7


def test_a_collator_of_the_users_own_serves_both_phases_and_evaluation(llama, make_args):
    calls = []

    def collate(features):
        calls.append(len(features))
        assert set(features[0]) == {"input_ids", "labels"}
        return default_data_collator(features)

    trainer = TSTTrainer(
        llama, make_args(), collate, train_dataset=make_blocks(200), eval_dataset=make_blocks(4)
    )
    trainer.train()
    trainer.evaluate()
    assert calls == [2 * 4] * 3 + [2] * 7 + [4]
