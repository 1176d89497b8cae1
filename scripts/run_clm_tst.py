#!/usr/bin/env python
"""Pre-train a causal language model with Token Superposition Training.

    python scripts/run_clm_tst.py                                    # the quick start: no data needed
    python scripts/run_clm_tst.py config.yaml --max_steps 1000       # arguments of a YAML or JSON file, then flags
    python scripts/run_clm_tst.py --train_file corpus.jsonl --tokenizer_name gpt2 --model_type llama --max_steps 1000
    accelerate launch scripts/run_clm_tst.py config.yaml             # several GPUs

With neither --dataset_name nor --train_file it trains a small Llama on Python's standard library, with the
arguments in QUICK_START below wherever a flag says nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass, field, fields
from logging import INFO, basicConfig, getLogger
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.checkpoints import last_complete_checkpoint
from hf_tst.hub import HubError
from hf_tst.packing import BlockStream, pack_blocks, tokenize_documents
from hf_tst.quickstart import standard_library_documents, train_tokenizer
from hf_tst.report import format_phases, summarize_phases
from hf_tst.text_files import load_text_file

logger = logging.get_logger("run_clm_tst")

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
QUICK_START_BYTES = 6_000_000
QUICK_START_VOCABULARY = 8192


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
        (ModelArguments, DataArguments, TSTTrainingArguments), description=__doc__.split("\n")[0]
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


def load_documents(args: DataArguments, model_args: ModelArguments) -> tuple[Any, Any]:
    """Training and validation text, as `datasets` data sets."""
    import datasets

    if args.is_quick_start:
        documents = standard_library_documents(QUICK_START_BYTES).train_test_split(
            test_size=max(0.01, args.validation_split_percentage / 100), seed=0
        )
        return documents["train"], documents["test"]
    share = args.validation_split_percentage
    train_file = args.train_file
    if train_file:

        def load(split: str) -> Any:
            return load_text_file(train_file, split, streaming=args.streaming and split == "train")

        validation = load_text_file(args.validation_file) if args.validation_file else None
    else:

        def load(split: str) -> Any:
            return datasets.load_dataset(
                args.dataset_name,
                args.dataset_config_name,
                split=split,
                streaming=args.streaming and split in ("train", "validation"),
                cache_dir=model_args.cache_dir,
            )

        names = datasets.get_dataset_split_names(args.dataset_name, args.dataset_config_name)
        validation = load("validation") if "validation" in names else None
    if validation is not None or not share:
        return load("train"), validation
    if args.streaming:
        raise ValueError(
            "A streamed data set cannot be split: give a validation_file, or set validation_split_percentage to 0."
        )
    return load(f"train[{share}%:]"), load(f"train[:{share}%]")


def load_tokenizer(args: ModelArguments, data_args: DataArguments, documents: Any) -> PreTrainedTokenizerBase:
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name:
        return AutoTokenizer.from_pretrained(
            name,
            cache_dir=args.cache_dir,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    if data_args.is_quick_start:
        return train_tokenizer(documents["text"], QUICK_START_VOCABULARY)
    raise ValueError("No tokenizer is given: set tokenizer_name (or model_name_or_path).")


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A trained model to go on with, or a new one whose vocabulary fits the tokenizer."""
    options = {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            dtype=args.dtype or "auto",
            attn_implementation=args.attn_implementation,
            **options,
        )
    if args.config_name:
        config = AutoConfig.from_pretrained(args.config_name, **options)
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        raise ValueError(
            f"model_type is {args.model_type!r}: set it to an architecture such as llama, or set config_name or "
            "model_name_or_path."
        )
    config.vocab_size = len(tokenizer)
    for name in ("bos", "eos", "pad"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=args.attn_implementation, trust_remote_code=args.trust_remote_code
    )
    return model if args.dtype is None else model.to(dtype=args.dtype)


def prepare_blocks(
    args: DataArguments,
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_samples: int | None,
) -> Any:
    """Blocks of tokens, packed on disk or, for a streamed data set, on the fly."""
    is_text_file = (args.train_file or "").endswith(".txt")
    tokenized = tokenize_documents(
        documents,
        tokenizer,
        text_column=args.text_column,
        append_eos=not is_text_file if args.append_eos is None else args.append_eos,
        num_proc=args.preprocessing_num_workers,
    )
    if not hasattr(tokenized, "num_rows"):
        if max_samples is not None:
            raise ValueError(
                f"A stream is read until max_steps, not max_train_samples={max_samples}: leave it out."
            )
        return BlockStream(tokenized, block_size)
    blocks = pack_blocks(tokenized, block_size)
    return blocks if max_samples is None else blocks.select(range(min(max_samples, len(blocks))))


def print_summary(trainer: TSTTrainer, final_eval: dict[str, float] | None) -> None:
    history = trainer.state.log_history
    output = Path(trainer.args.output_dir)
    switch = trainer.schedule.switch_step if trainer.schedule else 0
    print("\n" + format_phases(summarize_phases(history)))
    if final_eval:
        loss = final_eval["eval_loss"]
        print(f"\nfinal evaluation loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):.2f}")
    print(f"\nmodel       {output}  (load it with AutoModelForCausalLM.from_pretrained)")
    if switch and (output / f"checkpoint-{switch}").is_dir():
        print(f"at switch   {output / f'checkpoint-{switch}'}")
    print(f"card        {output / 'README.md'}")
    curve = output / "loss_curve.png"
    missing = "not drawn: install matplotlib, for example with pip install 'hf-tst[plot]'"
    print(f"loss curve  {curve if curve.is_file() else missing}")


def main(argv: list[str] | None = None) -> TSTTrainer:
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity(args.get_process_log_level())
    if args.should_log:  # what was packed and dropped, and when the phase switches
        basicConfig(format="%(name)s: %(message)s")
        getLogger("hf_tst").setLevel(INFO if args.log_level == "passive" else args.get_process_log_level())
    set_seed(args.seed)

    # The first process downloads and tokenises; the others read its cache.
    with args.main_process_first(desc="preparing the data"):
        train_documents, eval_documents = load_documents(data_args, model_args)
        tokenizer = load_tokenizer(model_args, data_args, train_documents)
        model = load_model(model_args, tokenizer)
        context = getattr(model.config, "max_position_embeddings", None) or 1024
        block_size = data_args.block_size or min(1024, context)
        if block_size > context:
            raise ValueError(f"block_size={block_size} is more than the model's context of {context} tokens.")
        train_blocks = prepare_blocks(
            data_args, train_documents, tokenizer, block_size, data_args.max_train_samples
        )
        eval_blocks = None
        if eval_documents is not None:
            eval_blocks = prepare_blocks(
                data_args, eval_documents, tokenizer, block_size, data_args.max_eval_samples
            )

    if eval_blocks is None:
        args.eval_strategy = "no"
    trainer = TSTTrainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
    )
    resume: str | None = args.resume_from_checkpoint
    if resume in ("last", "true", "True"):
        resume = last_complete_checkpoint(args.output_dir)
        if resume is None:
            raise ValueError(f"There is no checkpoint to resume from in {args.output_dir}.")
    result = trainer.train(resume_from_checkpoint=resume)
    with suppress(HubError):  # the model is saved before it is pushed, and the push is tried again at the end
        trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    final_eval = trainer.evaluate() if eval_blocks is not None else None
    if final_eval:
        trainer.save_metrics("eval", final_eval)
    trainer.save_state()
    trainer.create_model_card(dataset=data_args.dataset_name)
    if trainer.is_world_process_zero():
        print_summary(trainer, final_eval)
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"run_clm_tst.py: {error}", file=sys.stderr)
        sys.exit(2)
