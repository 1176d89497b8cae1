"""Tiny models made from configurations, and blocks of random tokens. Nothing is downloaded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# What the machine has in its environment and caches stays out of the tests; processes that they start inherit this.
if "HF_TST_TEST_CACHE" not in os.environ:
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "HF_", "TRANSFORMERS_")) and not name.startswith("HF_TST_"):
            del os.environ[name]
    os.environ["HF_HOME"] = os.environ["HF_TST_TEST_CACHE"] = tempfile.mkdtemp(prefix="hf_tst-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are too small to share out, and threads that wait for each other slow down whatever runs beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("HF_TST_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import copy
import re
import sys

# Kernels for GPUs, which Transformers would call on a CPU, too, where they fail.
if os.environ.get("HF_TST_TEST_DEVICE", "cpu") == "cpu":
    for name in ("fla", "mamba_ssm", "causal_conv1d"):
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_tst import PhaseSchedule, TSTError, TSTTrainer, TSTTrainingArguments
from hf_tst.batches.read_order import DataPlan, longest_plan

VOCAB_SIZE = 97
BLOCK_LENGTH = 12

DENSE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
TINY: dict[str, dict[str, Any]] = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE | {"head_dim": 8},
    "mistral": DENSE,
    "mixtral": DENSE | MOE | {"num_local_experts": 4},
    "qwen3_moe": DENSE | MOE | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt2": {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
# Families that do something to the logits between head and loss.
TINY_LOGITS: dict[str, dict[str, Any]] = {
    "gemma2": DENSE | {"head_dim": 8, "final_logit_softcapping": 0.05},
    "cohere": DENSE | {"logit_scale": 0.0625},
    "granite": DENSE | {"logits_scaling": 3.0},
    "phi": DENSE,  # bias in the head
}

# The core: what `pytest` alone runs, in a few minutes. By module, what of it: a pattern that names of tests match. All other tests
# carry the marker `full`.
CORE = {
    "test_loss": "",
    "test_linear_loss": "equal_the_loop|micro_batches|frozen|all_ignored|does_not_fit",
    "test_phases": "",
    "test_bags": "",
    "test_documents": "full_bags",
    "test_collator": "",
    "test_data": "",
    "test_layout": "",
    "test_arguments": "",
    "test_superposition": "",
    "test_families": r"\[(Llama|Mixtral|GPT-2|Falcon-H1)\]",
    "test_trainer": "plain_trainer|log_v|accumulation|fused_loss|switch|one_optimizer|epochs_give|uninterrupted|next_token|plain_model",
    "test_checkpoints": r"flipped-model\.safetensors|plain_trainer_are_taken|started_last",
    "test_resume": r"uninterrupted_run\[.*-(blocks|block stream)\]|refused_with_both_values",
    "test_other_trainers": "s_times|plain_trainer|same_loss|refused",
    "test_bad_input": "",
    "test_mtp": r"written_out\[llama-",
    "test_text_files": r"file_that_was_changed|no_text.*\[(two kinds|all null)-map\]",
    "test_console": "not_overwritten|old_one_back|replaced_when|one_line|resumed_run_begins|ctrl_c|misspelt",
    "test_cli": "help_teaches|ordinary_model|one_sentence_and_status_2",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        pattern = CORE.get(item.path.stem)
        if pattern is None or not re.search(pattern, item.name):
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that names no folder writes into its own, not into the checkout."""
    monkeypatch.chdir(tmp_path)


sys.path[:0] = [str(Path(__file__).parent.parent / "scripts"), str(Path(__file__).parent / "distributed")]


def make_model(model_type: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING[model_type](**(TINY | TINY_LOGITS)[model_type] | special | overrides)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def _llama() -> Any:
    return make_model("llama")


@pytest.fixture
def llama(_llama: Any) -> Any:
    return copy.deepcopy(_llama)


def set_dropout(model: Any, rate: float = 0.1) -> Any:
    """Dropout in the attention of a model that is made already: the layers have copied the configuration's rate."""
    layers = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    assert layers
    for module in layers:
        module.attention_dropout = rate
    return model


def make_blocks(count: int, length: int = BLOCK_LENGTH, seed: int = 0) -> list[dict[str, Any]]:
    tokens = torch.randint(0, VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]


def write_corpus(folder: Path, lines: int = 400) -> list[str]:
    """Write `corpus.txt` and a `tokenizer` for it into a folder, and return the lines."""
    from hf_tst.data.quickstart import train_tokenizer

    texts = [f"line {i} of the text, which says {i * i}\n" for i in range(lines)]
    train_tokenizer(texts, 400).save_pretrained(folder / "tokenizer")
    (folder / "corpus.txt").write_text("".join(texts), encoding="utf-8")
    return texts


def write_recipe(folder: Path, lines: int, sizes: dict[str, int], **values: Any) -> Path:
    """Write a recipe of a tiny Llama into a folder, with a corpus of so many lines and a tokenizer beside it."""
    write_corpus(folder, lines)
    values |= {
        "output_dir": str(folder / "run"), "model_type": "llama", "train_file": str(folder / "corpus.txt"),
        "tokenizer_name": str(folder / "tokenizer"), "block_size": 16, "report_to": "none", "use_cpu": True,
        "config_overrides": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 32, **sizes,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# Arguments of Trainer for a run of a second.
TINY_RUN: dict[str, Any] = {
    "max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def make_args(tmp_path: Path) -> Any:
    def make(**overrides: Any) -> TSTTrainingArguments:
        defaults = {"output_dir": str(tmp_path / "run"), "tst_bag_size": 4}
        return TSTTrainingArguments(**TINY_RUN | defaults | overrides)

    return make


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 40 steps of a tiny Llama, with a tokenizer and a corpus beside it; it saves every 10 steps."""
    return write_recipe(
        tmp_path_factory.mktemp("tiny_recipe"), 1500, {"vocab_size": 512}, max_steps=40, tst_bag_size=4,
        per_device_train_batch_size=4, max_eval_samples=16, learning_rate=1e-2, warmup_steps=4,
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 8}, logging_steps=2,
        eval_strategy="steps", eval_steps=10, save_steps=10,
    )  # fmt: skip


class Ended:
    """A process that has ended."""

    def __init__(self, status: int) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs of a comparison in this process, which has all imported already; the folders of those started."""
    from hf_tst.experiments import queue as run_queue
    from hf_tst.experiments import run as run_worker

    started: list[str] = []

    def run(command: list[str], stdout: Any, **_: Any) -> Ended:
        started.append(Path(command[-1]).parent.name)
        try:
            run_worker.main([command[-1]])
        except (ValueError, RuntimeError) as error:
            stdout.write(f"{error}\n".encode())
            return Ended(2 if isinstance(error, TSTError) else 1)
        return Ended(0)

    monkeypatch.setattr(run_queue, "Popen", run)
    return started


def losses(trainer: Any) -> list[float]:
    """The training losses that a trainer has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_equal(one: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def train_to_be_best_at_step_4(
    model: Any,
    make_args: Any,
    accuracies: Sequence[float] = (0.1, 0.5, 0.4, 0.3, 0.2),
    resume: bool = False,
    **options: Any,
) -> TSTTrainer:
    """Train with evaluations of which the second, at step 4, is the best, and with the best model at the end."""
    args = make_args(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="accuracy", greater_is_better=True,
    )  # fmt: skip
    values = iter(accuracies)
    trainer = TSTTrainer(
        model,
        args,
        train_dataset=make_blocks(200),
        eval_dataset=make_blocks(4),
        compute_metrics=lambda prediction: {"accuracy": next(values)},
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plan_for_passes(
    num_blocks: int,
    passes: float,
    make_schedule: Callable[[int], PhaseSchedule],
    rows_per_step: int,
    seed: int,
    shuffle: bool = True,
) -> DataPlan:
    """The longest plan over so many passes, whatever the arguments of a trainer."""
    return longest_plan(
        passes, lambda steps: DataPlan(num_blocks, make_schedule(steps), rows_per_step, seed, shuffle)
    )


def plan_for_steps(
    num_blocks: int, schedule: PhaseSchedule, rows_per_step: int, seed: int, shuffle: bool = True
) -> DataPlan:
    """A plan within one pass, whatever the arguments of a trainer."""
    plan = DataPlan(num_blocks, schedule, rows_per_step, seed, shuffle)
    plan.check_one_pass()
    return plan
