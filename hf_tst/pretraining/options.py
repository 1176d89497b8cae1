"""The options of a pre-training run, from flags and configuration files."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any, get_type_hints

from transformers.hf_argparser import HfArg

from ..data.files import matching_files
from ..errors import TSTError, bad_input, check_at_least, check_names, whole_message
from ..models.shape import context_length
from ..training.arguments import TSTTrainingArguments
from ..training.callbacks.reinitialize import Reinitialized
from .parser import ArgumentParser, flag_names
from .recipes import quick_start, read_config, replaced_names, split_recipe

DESCRIPTION = """Pre-train a causal language model with Token Superposition Training.

A recipe comes first, if any: its name (`hf-tst recipes` lists them), or a
YAML or JSON file of arguments. Flags override it. Without dataset_name and
train_file it trains a small Llama on Python's standard library; the defaults
below are of that run. To see the defaults for your own data, name it before
--help.

  %(prog)s
  %(prog)s 30m-laptop-tst --max_steps 1000
  %(prog)s --train_file a.jsonl --tokenizer_name gpt2 --model_type llama \\
      --config_overrides hidden_size=256,num_hidden_layers=8,intermediate_size=768
  %(prog)s recipe.yaml --resume_from_checkpoint last   the newest complete one
  %(prog)s recipe.yaml --dry_run                       check all, train nothing
  %(prog)s --help_all                                  all flags
"""


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = HfArg(default=None, help="Trained model to continue training.")
    model_type: str | None = HfArg(default=None, help="Architecture of a new model: llama, qwen3, mixtral, …")
    config_name: str | None = HfArg(default=None, help="Hub id or path of a new model's configuration.")
    config_overrides: str | None = HfArg(
        default=None,
        help="Changes to the configuration: hidden_size=128,num_hidden_layers=4, or JSON, or a mapping in a file.",
    )
    tokenizer_name: str | None = HfArg(default=None, help="Hub id or path; by default the model's tokenizer.")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    dtype: str | None = HfArg(default=None, help="Dtype of the weights: float32, bfloat16, …")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = HfArg(default=False, help="Run model code from the Hub.")
    lora_rank: int | None = HfArg(default=None, help="Train a LoRA adapter of this rank; needs PEFT.")
    lora_alpha: int | None = HfArg(default=None, help="Scale of the adapter; by default twice its rank.")
    lora_target_modules: str = HfArg(default="all-linear", help="Layers to adapt, such as q_proj,v_proj.")
    reinit_at_switch: Reinitialized | None = HfArg(
        default=None, help="Ablation: re-initialize embeddings, head or both at the switch."
    )

    def __post_init__(self) -> None:
        self.torch_dtype()
        check_at_least(1, lora_rank=self.lora_rank)
        if self.config_overrides and self.model_name_or_path:
            raise TSTError(
                "config_overrides cannot change a trained model: leave out config_overrides or model_name_or_path."
            )
        named = [name for name in ("model_name_or_path", "config_name", "model_type") if getattr(self, name)]
        if len(named) > 1:
            raise TSTError(f"Both {named[0]} and {named[1]} are given: name the model with one of them.")
        for name in ("lora_alpha", "lora_target_modules"):
            if self.lora_rank is None and getattr(self, name) != getattr(ModelArguments, name):
                raise TSTError(
                    f"{name} needs an adapter, but lora_rank is not set: set it, or leave {name} out."
                )
        if self.lora_rank and not self.model_name_or_path:
            raise TSTError("lora_rank adapts a trained model: name it with model_name_or_path.")
        if self.lora_rank and self.reinit_at_switch:
            raise TSTError(
                "reinit_at_switch would change the weights that an adapter adapts: leave out reinit_at_switch or lora_rank."
            )

    def torch_dtype(self) -> Any:
        """The `torch.dtype` that `dtype` names; `None` for the checkpoint's own, and for a new model's float32.

        Raises:
            TSTError: If it is no dtype that weights can be trained in.
        """
        if self.dtype in (None, "auto"):
            return None
        import torch

        found = getattr(torch, self.dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise TSTError(f"dtype must be auto, float32, bfloat16 or float16, but is {self.dtype!r}.")
        return found

    def lora_config(self) -> Any:
        """The `peft.LoraConfig` that the arguments ask for, or `None`."""
        if self.lora_rank is None:
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha or 2 * self.lora_rank,
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )


@dataclass
class DataArguments:
    """Which text to train on."""

    dataset_name: str | None = HfArg(default=None, help="Hub id or path of a data set.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set.")
    train_file: str | None = HfArg(
        default=None,
        help="Text to train on: .txt, .jsonl, .ndjson, .json, .csv or .tsv (also with .gz, .bz2, .zst or .xz), or .parquet; a pattern such as "
        "'corpus/**/*.jsonl'; or token ids in a .npy file, one row of uint16 or uint32, as scripts/pack_ids.py writes.",
    )
    validation_file: str | None = HfArg(default=None, help="Text or token ids to evaluate on.")
    validation_split_percentage: int = HfArg(
        default=5,
        help="Percentage of training rows, from the beginning, to evaluate on if there is no validation data.",
    )
    text_column: str | None = HfArg(
        default=None, help="Column of text; by default 'input_ids' (tokens), 'text' or the only one."
    )
    block_size: int | None = HfArg(
        default=None, help="Tokens per block, L; by default the model's context, up to 1024."
    )
    tokens_per_step: int | None = HfArg(
        default=None, help="Latent tokens per step over all processes; sets gradient_accumulation_steps."
    )
    append_eos: bool | None = HfArg(
        default=None,
        help="End each row of text with the end-of-sequence token; by default not in .txt files.",
    )
    streaming: bool = HfArg(default=False, help="Read and tokenize during training; needs max_steps.")
    max_train_samples: int | None = HfArg(
        default=None, help="Maximum number of training blocks, from the beginning."
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Maximum number of evaluation blocks, evenly spread; of a stream, the first."
    )
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes that tokenize.")

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise TSTError("Both dataset_name and train_file are given: name one of them.")
        if self.dataset_config_name and not self.dataset_name:
            raise TSTError(
                f"dataset_config_name={self.dataset_config_name} is part of a data set: name that with dataset_name, or leave it out."
            )
        if self.is_quick_start and (self.validation_file or self.streaming):
            raise TSTError(
                "validation_file and streaming need training data: name train_file or dataset_name."
            )
        if not 0 <= self.validation_split_percentage < 100:
            raise TSTError(
                f"validation_split_percentage must be from 0 to 99, but is {self.validation_split_percentage}."
            )
        check_at_least(2, block_size=self.block_size)
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            check_at_least(1, **{name: getattr(self, name)})

    @property
    def is_quick_start(self) -> bool:
        """Whether no data is named: then the run trains on Python's standard library."""
        return not self.dataset_name and not self.train_file

    @cached_property
    def train_files(self) -> list[str]:
        """The files that `train_file` names, as they are when they are first asked for; none without it."""
        return matching_files(self.train_file) if self.train_file else []

    @cached_property
    def validation_files(self) -> list[str]:
        """The same of `validation_file`."""
        return matching_files(self.validation_file) if self.validation_file else []


@dataclass
class RunArguments:
    """Other options of a run."""

    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Replace the run in output_dir, which is kept until the new one has its first checkpoint.",
    )


# The configuration of a run.
TRAINING: list[type] = [ModelArguments, DataArguments, TSTTrainingArguments]


def parse_arguments(
    argv: list[str], prog: str | None = None
) -> tuple[ModelArguments, DataArguments, TSTTrainingArguments, RunArguments]:
    """Arguments from an optional recipe, named first, and flags, which override it."""
    kinds = [TSTTrainingArguments, DataArguments, ModelArguments, RunArguments]
    namespace = parse_values(argv, kinds, DESCRIPTION, prog)
    values = vars(namespace)
    values["gradient_accumulation_steps"] = micro_batches(namespace, int(os.environ.get("WORLD_SIZE", 1)))
    model, data, training, run = (pick(values, kind) for kind in (*TRAINING, RunArguments))
    return model, data, training, run


def parse_values(
    argv: Sequence[str],
    dataclass_types: list[type],
    description: str,
    prog: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Namespace:
    """The values of all arguments. Their combination is not checked yet.

    Args:
        argv: An optional recipe, and flags.
        dataclass_types: The dataclasses of arguments.
        description, prog: For `--help`.
        defaults (`dict`, *optional*): Defaults that override those of the dataclasses and the quick start.

    Raises:
        TSTError: For an unknown argument, or a file that cannot be read.
    """
    parser = ArgumentParser(dataclass_types, description=description, prog=prog)
    values: dict[str, Any] = {}
    of_file: list[str] = []
    file, argv = split_recipe(list(argv))
    if file is not None:
        values = read_config(file)
        for name in replaced_names(flag_names(argv)):
            values.pop(name, None)
        actions = {action.dest: action for action in parser._actions}
        check_names(values, actions, "The configuration file has no such argument as")
        hints = {name: str(hint) for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in values.items():
            if (
                isinstance(value, list)
                and actions[name].type is str
                and "list" not in hints.get(name, "list")
            ):
                raise TSTError(f"{name} in the configuration file takes one value, but is the list {value}.")
        of_file = [word for name, value in values.items() for word in _as_flag(actions[name], value)]
    names_data = any(values.get(name) or name in flag_names(argv) for name in ("dataset_name", "train_file"))
    # A value that no flag can express, such as an empty one, becomes a default.
    own = {} if names_data else quick_start()
    kept = own.keys() - replaced_names({*values, *flag_names(argv)})
    parser.set_defaults(**{name: own[name] for name in kept} | dict(defaults or {}) | values)
    namespace = parser.parse_flags([*of_file, *argv])
    if namespace.model_name_or_path and not names_data:
        raise TSTError(
            "model_name_or_path is given without data: name the data with train_file or dataset_name."
        )
    return namespace


def given_values(namespace: Namespace, dataclass_types: list[type]) -> dict[str, Any]:
    """The values in `namespace` that are not the default. A configuration file with them gives the same namespace."""
    values = {}
    for name, default in vars(ArgumentParser(dataclass_types).parse_flags([])).items():
        value = getattr(namespace, name)
        if value != default or name in quick_start():
            values[name] = value.value if isinstance(value, Enum) else value
    return values


def pick(values: Mapping[str, Any], dataclass_type: Any) -> Any:
    """An instance of a dataclass of arguments, made from those of `values` that are its fields.

    Raises:
        TSTError: If the values are not valid.
    """
    names = {entry.name for entry in fields(dataclass_type) if entry.init}
    own = {name: value for name, value in values.items() if name in names}
    # Some errors of Transformers have several lines.
    with bad_input("The arguments cannot be used: ", (ImportError, TypeError, ValueError), whole_message):
        try:
            return dataclass_type(**own)
        except json.JSONDecodeError as error:
            name = next((name for name, value in own.items() if value == error.doc), "An argument")
            raise TSTError(f"{name} is not JSON: {error}.") from error


def parse_mapping(name: str, text: str | None) -> dict[str, Any]:
    """The JSON mapping of the option `name`; empty if it is not given.

    Raises:
        TSTError: If it is not a mapping.
    """
    with bad_input(f"{name} is not JSON: "):
        found = json.loads(text or "{}")
    if not isinstance(found, dict):
        raise TSTError(f'{name} must be a mapping, but is {text}: write {{"name": value}}.')
    return found


def micro_batches(namespace: Namespace, world_size: int) -> int:
    """Micro-batches per optimizer step: as given, or as `tokens_per_step` needs them on `world_size` processes.

    Raises:
        TSTError: If they do not make `tokens_per_step`.
    """
    given, tokens = namespace.gradient_accumulation_steps, namespace.tokens_per_step
    if tokens is None:
        return given
    if given != 1:
        raise TSTError(f"tokens_per_step={tokens} and gradient_accumulation_steps={given}: leave one out.")
    if namespace.block_size is None:
        raise TSTError(f"tokens_per_step={tokens} needs block_size: set both.")
    micro_batch = world_size * namespace.per_device_train_batch_size * namespace.block_size
    count, rest = divmod(tokens, micro_batch)
    if rest or count < 1:
        raise TSTError(
            f"tokens_per_step={tokens} is not a multiple of the {micro_batch} tokens of a micro-batch on {world_size} processes: "
            f"set it to {max(1, round(tokens / micro_batch)) * micro_batch}, or change per_device_train_batch_size or block_size."
        )
    return count


def choose_block_size(args: DataArguments, config: Any) -> int:
    """Tokens per block, L, for a model of this configuration: as given, or its context up to 1024.

    Raises:
        TSTError: If blocks are longer than the context, where the model has a limit.
    """
    context = context_length(config)
    length = args.block_size or min(1024, context or 1024)
    if context and length > context:
        raise TSTError(
            f"block_size={length} is more than the model's context of {context} tokens: lower it, or raise "
            "max_position_embeddings of a new model in config_overrides."
        )
    return length


def _as_flag(action: Any, value: Any) -> list[str]:
    """The words on a command line for an argument of a configuration file; empty if no flag can express it."""
    if value is None and action.default not in (None, "none"):
        raise TSTError(
            f"{action.dest} in the configuration file has no value: give one, or leave the line out."
        )
    if isinstance(value, bool):  # YAML reads on, off, yes and no as booleans
        words = ("on", "yes") if value else ("off", "no")
        value = next((word for word in words if word in (action.choices or ())), value)
    elif action.type is int and isinstance(value, (float, str)):  # such as 2e4
        with suppress(ValueError):
            value = int(float(value)) if float(value).is_integer() else value
    elif isinstance(value, list) and action.nargs == "+":
        return [f"--{action.dest}", *map(str, value)]
    is_default = value is None or (isinstance(value, list) and action.type is str)
    return [] if is_default else [f"--{action.dest}={value}"]
