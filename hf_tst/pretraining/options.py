"""The options of a pre-training run, from flags and configuration files."""

from __future__ import annotations

import difflib
import json
import os
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import TSTError, one_line
from ..training.arguments import TSTTrainingArguments
from ..training.phase_switch import Reinitialized

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

DESCRIPTION = """Pre-train a causal language model with Token Superposition Training.

A YAML or JSON file of arguments comes first, if any; flags win over it. With neither dataset_name nor train_file it
trains a small Llama on Python's standard library, and the defaults below are those of that run. With data, they are
Trainer's: name it in front of --help to see them.

  %(prog)s
  %(prog)s recipe.yaml --max_steps 1000
  %(prog)s --train_file corpus.jsonl --tokenizer_name gpt2 --model_type llama --max_steps 1000
  %(prog)s recipe.yaml --resume_from_checkpoint last     the newest complete checkpoint in output_dir
"""


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
        default=None,
        metadata={
            "help": "Changes to the configuration: hidden_size=128,num_hidden_layers=4, or JSON, or a mapping in a file."
        },
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

    lora_rank: int | None = field(
        default=None, metadata={"help": "Train a LoRA adapter of this rank instead of the model; needs PEFT."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the adapter; twice its rank by default."}
    )
    lora_target_modules: str = field(
        default="all-linear",
        metadata={"help": "Layers to adapt: all-linear, or names such as q_proj,v_proj."},
    )
    reinit_at_switch: Reinitialized | None = field(
        default=None,
        metadata={
            "help": "Ablation: new random weights when superposition ends, of embeddings, head or both."
        },
    )

    def __post_init__(self) -> None:
        self.torch_dtype()
        if self.config_overrides and self.model_name_or_path:
            raise TSTError(
                "config_overrides cannot change a trained model: leave out config_overrides or model_name_or_path."
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise TSTError(f"lora_rank must be at least 1, but is {self.lora_rank}.")
        if self.lora_rank and not self.model_name_or_path:
            raise TSTError("lora_rank adapts a trained model: name it with model_name_or_path.")
        if self.lora_rank and self.reinit_at_switch:
            raise TSTError("reinit_at_switch would change what an adapter adapts: leave it or lora_rank out.")

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

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt, .jsonl, .json, .csv or .parquet, or a pattern such as 'corpus/*.jsonl'; or token "
            "ids in a .npy file, one row of uint16 or uint32, as scripts/pack_ids.py writes."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Text or token ids to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={
            "help": "Percent of the training data's rows, the first ones, to evaluate on instead, where there is no validation data."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of text; 'text' or the first by default."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens a block, L; the model's context up to 1024 by default."}
    )
    tokens_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Latent tokens an optimizer step over all processes; sets gradient_accumulation_steps to make them."
        },
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
        default=None,
        metadata={"help": "Use only so many blocks to evaluate on, taken all over the evaluation data."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes to tokenise with."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise TSTError("Both dataset_name and train_file are given: name one of them.")
        if self.validation_file and self.is_quick_start:
            raise TSTError(
                f"validation_file={self.validation_file} needs training data beside it: name train_file or dataset_name."
            )
        if self.streaming and self.is_quick_start:
            raise TSTError(
                "streaming reads data that is named: name train_file or dataset_name, or leave it out."
            )
        if not 0 <= self.validation_split_percentage < 100:
            raise TSTError(
                f"validation_split_percentage must be from 0 to 99, but is {self.validation_split_percentage}."
            )
        if self.block_size is not None and self.block_size < 2:
            raise TSTError(f"block_size must be at least 2, but is {self.block_size}.")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TSTError(f"{name} must be at least 1, but is {value}.")

    @property
    def is_quick_start(self) -> bool:
        """Whether no data is named, so that Python's standard library is trained on."""
        return not self.dataset_name and not self.train_file


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, and shows defaults."""


class ArgumentParser(HfArgumentParser):
    """A parser that raises `TSTError` with one sentence where `argparse` prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise TSTError(f"{message[:1].upper()}{message[1:]}.")


def parse_arguments(
    argv: list[str], prog: str | None = None
) -> tuple[ModelArguments, DataArguments, TSTTrainingArguments]:
    """Arguments from an optional YAML or JSON file, named first, and flags, which win."""
    namespace = parse_values(argv, [ModelArguments, DataArguments, TSTTrainingArguments], DESCRIPTION, prog)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    namespace.gradient_accumulation_steps = micro_batches(namespace, world_size)
    with explained_arguments(vars(namespace)):
        return (
            pick(namespace, ModelArguments),
            pick(namespace, DataArguments),
            pick(namespace, TSTTrainingArguments),
        )


@contextmanager
def explained_arguments(values: Mapping[str, Any]) -> Iterator[None]:
    """Context in which dataclasses are made of arguments, that turns what they raise into one sentence."""
    try:
        yield
    except TSTError:
        raise
    except json.JSONDecodeError as error:
        names = [name for name, value in values.items() if value == error.doc]
        raise TSTError(f"{names[0] if names else 'An argument'} is not JSON: {error}.") from error
    except ImportError as error:  # PackageNotFoundError of importlib is one
        raise TSTError(f"The arguments need a package that is missing: {one_line(error)}.") from error
    except TypeError as error:
        raise TSTError(f"The arguments do not fit: {one_line(error)}.") from error
    except ValueError as error:  # of Transformers, in more than a line at times
        raise TSTError(" ".join(str(error).split())) from error


def make_output_dir(path: str) -> None:
    """Make the folder of a run.

    Raises:
        TSTError: If it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TSTError(f"Cannot make output_dir={path}: {error.strerror}.") from error


def parse_values(
    argv: Sequence[str],
    dataclass_types: list[type],
    description: str,
    prog: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Namespace:
    """The values of all arguments, not checked together yet.

    Args:
        argv: A YAML or JSON file of arguments, if the first one ends so, and flags.
        dataclass_types: The dataclasses of arguments.
        description, prog: For `--help`.
        defaults (`dict`, *optional*): Values in the place of the dataclasses' and the quick start's.

    Raises:
        TSTError: For a file or flag that cannot be understood.
    """
    parser = ArgumentParser(
        dataclass_types,
        description=description,
        prog=prog,
        usage="%(prog)s [recipe.yaml] [--flag value ...]",
        formatter_class=HelpFormatter,
    )
    known = {entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type)}
    values: dict[str, Any] = {}
    of_file: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        values, argv = read_config(argv[0]), argv[1:]
        check_names(values, known, "The configuration file has no such argument as")
        actions = {action.dest: action for action in parser._actions}
        hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in values.items():
            takes_none = type(None) in get_args(hints[name]) or actions[name].default is None
            if value is None and not takes_none:
                raise TSTError(
                    f"{name} in the configuration file has no value: give one, or leave the line out."
                )
            of_file += _as_flag(actions[name], value)
    flags = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")}
    names_data = any(values.get(name) or name in flags for name in ("dataset_name", "train_file"))
    names_model = bool(values.get("model_name_or_path")) or "model_name_or_path" in flags
    if names_model and not names_data and "-h" not in argv and "help" not in flags:
        raise TSTError(
            "model_name_or_path goes on training a model: name its data with train_file or dataset_name."
        )
    parser.set_defaults(**({} if names_data else QUICK_START) | dict(defaults or {}) | values)
    namespace, rest = parser.parse_known_args([*of_file, *argv])
    unknown = [flag.split("=")[0].lstrip("-").replace("-", "_") for flag in rest if flag.startswith("--")]
    check_names(unknown, known, "There is no flag")
    if rest:
        raise TSTError(f"{rest[0]!r} belongs to no flag: write --name value.")
    return namespace


def given_values(namespace: Namespace, dataclass_types: list[type]) -> dict[str, Any]:
    """The values in `namespace` that a configuration file must hold to give it again: those that are not the default."""
    values = {}
    for entry in (entry for kind in dataclass_types for entry in fields(kind) if entry.init):
        value = getattr(namespace, entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if value != default or entry.name in QUICK_START:
            values[entry.name] = value.value if isinstance(value, Enum) else value
    return values


def check_names(names: Iterable[str], known: Iterable[str], problem: str) -> None:
    """Raise `TSTError` at a name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help."
            raise TSTError(f"{problem} {name!r}: {hint}")


def pick(namespace: Namespace, dataclass_type: Any) -> Any:
    """The dataclass made of its own values in `namespace`."""
    names = [entry.name for entry in fields(dataclass_type) if entry.init]
    return dataclass_type(**{name: getattr(namespace, name) for name in names})


def micro_batches(namespace: Namespace, world_size: int) -> int:
    """Micro-batches an optimizer step: as given, or as `tokens_per_step` needs them on `world_size` processes.

    Raises:
        TSTError: If they do not make `tokens_per_step`.
    """
    given, tokens = namespace.gradient_accumulation_steps, namespace.tokens_per_step
    if tokens is None:
        return given
    if given != 1:
        raise TSTError(
            f"tokens_per_step={tokens} and gradient_accumulation_steps={given} are both given: leave one out."
        )
    if namespace.block_size is None:
        raise TSTError(f"tokens_per_step={tokens} needs block_size: set both.")
    micro_batch = world_size * namespace.per_device_train_batch_size * namespace.block_size
    count, rest = divmod(tokens, micro_batch)
    if rest or count < 1:
        raise TSTError(
            f"tokens_per_step={tokens} is not a multiple of the {micro_batch} tokens of a micro-batch ({world_size} processes "
            f"· per_device_train_batch_size={namespace.per_device_train_batch_size} · block_size={namespace.block_size}): "
            f"set it to {max(1, round(tokens / micro_batch)) * micro_batch}, or change the batch or the processes."
        )
    return count


def read_config(path: str) -> dict[str, Any]:
    """Names and values of a YAML or JSON file; mappings become JSON, which flags would hold as well."""
    if not Path(path).is_file():
        raise TSTError(f"There is no configuration file {path}.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise TSTError(f"The configuration file {path} is not YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise TSTError(f"The configuration file {path} must hold names and values of arguments.")
    return {
        str(name): json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()
    }


def _as_flag(action: Any, value: Any) -> list[str]:
    """The words that give an argument the value that a file has for it; none where no flag can say it."""
    if isinstance(value, bool) and "on" in (action.choices or ()):  # YAML reads `on` and `off` as booleans
        value = "on" if value else "off"
    elif isinstance(value, float) and action.type is int and value.is_integer():  # such as 2.0e+4
        value = int(value)
    elif isinstance(value, list) and action.nargs == "+":
        return [f"--{action.dest}", *map(str, value)]
    is_default = value is None or (isinstance(value, list) and action.type is str)
    return [] if is_default else [f"--{action.dest}={value}"]
