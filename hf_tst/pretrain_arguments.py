"""The options of a pre-training run, from flags and configuration files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .arguments import TSTTrainingArguments

QUICK_START: dict[str, Any] = {
    "output_dir": "runs/quickstart",
    "model_type": "llama",
    "config_overrides": "hidden_size=128,intermediate_size=384,num_hidden_layers=4,num_attention_heads=4,"
    "num_key_value_heads=4,max_position_embeddings=128,tie_word_embeddings=False",
    "block_size": 128,
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_eval_samples": 128,
    "learning_rate": 2e-3,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": '{"num_decay_steps": 60}',
    "warmup_steps": 20,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 30,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to go on training from. Leave it out to train from scratch."},
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Architecture to train from scratch, for example llama, qwen3 or mixtral."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Hub id or path of a configuration to train from scratch with."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration: hidden_size=128,num_hidden_layers=4"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or path of the tokenizer; the model's own by default."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: str | None = field(
        default=None, metadata={"help": "Dtype of the weights, for example float32 or bfloat16."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: eager, sdpa, flash_attention_2, …"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes from the Hub."}
    )

    def __post_init__(self) -> None:
        if self.config_overrides and self.model_name_or_path:
            raise ValueError(
                "config_overrides cannot change a trained model: leave out it or model_name_or_path."
            )


@dataclass
class DataArguments:
    """Which text to train on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt, .jsonl, .json, .csv or .parquet, or a pattern such as 'corpus/*.jsonl'."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Share of the training data to evaluate on, where there is no validation data."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of text; 'text' or the first by default."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens a block, L; the model's context up to 1024 by default."}
    )
    append_eos: bool | None = field(
        default=None,
        metadata={
            "help": "End each row of text with the end-of-sequence token; by default all but lines of .txt files."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenise the training data as training goes on; needs max_steps."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many blocks to train on."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only so many blocks to evaluate on."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes to tokenise with."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise ValueError("Both dataset_name and train_file are given: name one of them.")
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage must be from 0 to 99, but is {self.validation_split_percentage}."
            )
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, but is {self.block_size}.")

    @property
    def is_quick_start(self) -> bool:
        return not self.dataset_name and not self.train_file


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TSTTrainingArguments]:
    """Arguments from an optional YAML or JSON file, named first, and flags, which win."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TSTTrainingArguments),
        description="Pre-train a causal language model with Token Superposition Training.",
    )
    values: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        values, argv = read_config(argv[0]), argv[1:]
    known = {entry.name for dataclass_type in parser.dataclass_types for entry in fields(dataclass_type)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"The configuration file has unknown arguments: {', '.join(unknown)}.")
    flags = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")}
    names_data = any(values.get(name) or name in flags for name in ("dataset_name", "train_file"))
    parser.set_defaults(**({} if names_data else QUICK_START) | values)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    return model_args, data_args, training_args


def read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"There is no configuration file {path}.")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(values, dict):
        raise ValueError(f"The configuration file {path} must hold names and values of arguments.")
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
