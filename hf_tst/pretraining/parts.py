"""The parts of a run: text, tokenizer, configuration, model and packed blocks."""

from __future__ import annotations

import copy
import glob
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from ..data.data_sets import load_data_set
from ..data.files import load_text_file, text_name
from ..data.packing import pack_blocks, tokenize_documents
from ..data.quickstart import standard_library_documents, train_tokenizer
from ..data.streams import BlockStream
from ..data.text_files import ending
from ..data.token_file import TokenFile
from ..errors import TSTError, bad_input, check_names, whole_message
from ..training.arguments import TSTTrainingArguments
from ..training.refusals import check_model, check_optimizer, check_tokenizer
from ..training.schedule import make_schedule
from .options import DataArguments, ModelArguments, choose_block_size

logger = logging.get_logger(__name__)

QUICK_START_BYTES = 6_000_000
QUICK_START_VOCABULARY = 8192


def load_documents(args: DataArguments, model_args: ModelArguments) -> tuple[Any, Any]:
    """Training and validation text, as `datasets` data sets or token files.

    Raises:
        TSTError: If a stream would have to be split, or a split would be empty.
    """
    share = args.validation_split_percentage
    if args.is_quick_start:
        documents = standard_library_documents(QUICK_START_BYTES)
        if not share:
            return documents, None
        split = documents.train_test_split(test_size=share / 100, seed=0)
        return split["train"], split["test"]
    validation = None
    if args.validation_file:
        validation = load_text_file(
            args.validation_file, text_column=args.text_column, files=args.validation_files
        )
    if args.train_file:
        trained = {*map(text_name, args.train_files)} if args.validation_file else set()
        if both := [file for file in args.validation_files if text_name(file) in trained]:
            logger.warning(
                f"{', '.join(both)} is trained on and evaluated on, so the evaluation loss says nothing about new text."
            )
        train = load_text_file(args.train_file, args.streaming, args.text_column, args.train_files)
    else:
        splits = _load_data_set(args, model_args)
        train = splits["train"]
        if validation is None:
            validation = splits.get("validation")
    if validation is not None or not share:
        return train, validation
    return _hold_out(train, share, args.streaming)


def _load_data_set(args: DataArguments, model_args: ModelArguments) -> Any:
    """The splits of the data set that `dataset_name` names, of the Hub or in a folder. One is `"train"`."""
    name = args.dataset_name or ""
    folder = os.path.abspath(name)
    if os.path.isdir(folder) and glob.has_magic(folder):
        raise TSTError(
            f"dataset_name={args.dataset_name} is the folder {folder}, whose name `datasets` takes for a pattern: rename what has "
            "one of *?[ in it, or name the files by train_file."
        )
    splits = load_data_set(
        name, args.dataset_config_name, cache_dir=model_args.cache_dir, streaming=args.streaming
    )
    if "train" not in splits:
        raise TSTError(f"{args.dataset_name} has no split train, but only {', '.join(splits)}.")
    return splits


def _hold_out(train: Any, share: int, streaming: bool) -> tuple[Any, Any]:
    """The training data without its first `share` percent, and these."""
    if streaming:
        raise TSTError("A stream cannot be split: give a validation_file, or validation_split_percentage=0.")
    held_out = round(len(train) * share / 100)
    if not 0 < held_out < len(train):
        raise TSTError(
            f"validation_split_percentage={share} of the {len(train)} rows of training data is {held_out} rows: "
            "give more text or a validation_file, or set it to 0."
        )
    return train.select(range(held_out, len(train))), train.select(range(held_out))


def hub_options(args: ModelArguments, name: str | None) -> dict[str, Any]:
    """Options of `from_pretrained` for `name`. `model_revision` is the model's, and not that of a tokenizer from elsewhere."""
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision if name in (args.model_name_or_path, args.config_name) else "main",
        "trust_remote_code": args.trust_remote_code,
    }


def load_tokenizer(args: ModelArguments, data_args: DataArguments, documents: Sequence[Any]) -> Any:
    """The tokenizer that the arguments name. The quick start trains its own. `None` if there is none and token ids need none.

    Raises:
        TSTError: If it cannot be loaded, or none is named.
    """
    packed = all(isinstance(text, TokenFile) for text in documents)
    name = args.tokenizer_name or args.model_name_or_path or (None if packed else args.config_name)
    if name:
        with explained_loading(name):
            return AutoTokenizer.from_pretrained(name, **hub_options(args, name))
    if data_args.is_quick_start:
        return train_tokenizer(documents[0]["text"], QUICK_START_VOCABULARY)
    if packed:
        return None
    also = "" if args.model_type else ", and an architecture by config_name or model_type"
    raise TSTError(
        f"Text needs a tokenizer: name one by tokenizer_name{also}, such as --tokenizer_name gpt2 --config_name "
        "HuggingFaceTB/SmolLM2-135M, or a folder of your own (see Tokenizer in docs/data.md)."
    )


def make_config(args: ModelArguments, vocab_size: int | None = None) -> Any:
    """The configuration of the model to train, a trained or a new one.

    Args:
        args (`ModelArguments`): The model.
        vocab_size (`int`, *optional*): Vocabulary of a new model, unless `config_overrides` names one.

    Raises:
        TSTError: If no architecture is named, or it has no such field as `config_overrides` names.
    """
    name = args.model_name_or_path or args.config_name
    if name:
        with explained_loading(name):
            config = AutoConfig.from_pretrained(name, **hub_options(args, name))
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        raise TSTError(
            f"model_type is {args.model_type!r}: name an architecture such as llama, or set config_name or model_name_or_path."
        )
    if args.model_name_or_path:
        return config
    changes = _parse_overrides(config, args.config_overrides or "")
    errors = (StrictDataclassError, TypeError, AttributeError)  # the last field that is derived from others
    with bad_input(f"config_overrides make no {config.model_type}: ", errors):
        # A new object, so that derived fields (the head size of Llama) are computed from the changed ones.
        if changes:
            config = _changed(config, changes) if args.config_name else type(config)(**changes)
    if vocab_size is not None and "vocab_size" not in changes:
        config.vocab_size = vocab_size
    return config


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration with `changes`. A field that follows from others, as the kinds of layers do, follows from the changed ones."""

    def make(values: dict[str, Any]) -> Any:
        return type(config)(**copy.deepcopy(values))

    def follows(name: str) -> bool:
        with suppress(Exception):  # no configuration without it
            made = make({other: value for other, value in values.items() if other != name}).to_dict()
            return name in made and made[name] == values[name]
        return False

    values = config.to_dict()
    changes = {config.attribute_map.get(name, name): value for name, value in changes.items()}
    return make({name: value for name, value in values.items() if not follows(name)} | changes)


def _parse_overrides(config: Any, overrides: str) -> dict[str, Any]:
    """The changes that `config_overrides` asks for, as JSON or `name=value,…` with the types of the fields."""
    is_json = overrides.lstrip().startswith("{")
    pairs = [pair.split("=", 1) for pair in overrides.split(",") if pair]
    with bad_input(f"config_overrides must be name=value,… or JSON, but is {overrides!r}: "):
        changes: dict[str, Any] = json.loads(overrides) if is_json else dict(pairs)
    fields = {"head_dim": None} | config.to_dict()
    fields |= {name: fields.get(field) for name, field in config.attribute_map.items()}
    check_names(changes, fields, f"config_overrides: {config.model_type} has no field")
    if is_json:
        return changes
    return {name: _read_value(name, text, fields[name]) for name, text in changes.items()}


def _read_value(name: str, text: str, default: Any) -> Any:
    """The value of `text`, in the type of the field's default. A whole number is also a valid float."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        value = text
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise TSTError(f"config_overrides: {name} must be of type {type(default).__name__}, but is {text!r}.")
    return value


def load_model(args: ModelArguments, tokenizer: Any) -> Any:
    """A trained model, whole or with a new adapter; or a new model, whose vocabulary must cover the tokenizer's."""
    if args.model_name_or_path:
        with explained_loading(args.model_name_or_path):
            model = AutoModelForCausalLM.from_pretrained(
                args.model_name_or_path,
                dtype=args.torch_dtype() or "auto",
                attn_implementation=args.attn_implementation,
                **hub_options(args, args.model_name_or_path),
            )
        if args.lora_rank is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, args.lora_config(), revision=args.model_revision)
    config = make_config(args, None if tokenizer is None else len(tokenizer))
    if tokenizer is not None:
        if config.vocab_size < len(tokenizer):
            raise TSTError(
                f"vocab_size={config.vocab_size} in config_overrides is less than the tokenizer's {len(tokenizer)} tokens: raise it."
            )
        for name in ("bos", "eos", "pad"):
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    # The same dtype for all weights: some models make a part in float32, which FSDP cannot shard with the rest.
    dtype = args.torch_dtype() or torch.float32
    with explained_loading(f"a model of type {config.model_type}"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype  # older versions of Transformers keep the configuration's
    # config_name is an architecture, not weights that a card could name as base model.
    model.config.name_or_path = ""
    return model


def explained_loading(name: str) -> AbstractContextManager[None]:
    """Context that turns an error while `name` is made, or loaded from a folder or the Hub, into one sentence."""
    errors = (OSError, ImportError, StrictDataclassError, ValueError)
    folder = Path(name).parent
    looks_local = folder != Path() and folder.is_dir() and not Path(name).exists()
    here = f" (the folder {folder} has no such name)" if looks_local else ""
    return bad_input(f"Cannot load {name}{here}: ", errors, whole_message)


def prepare_blocks(
    args: DataArguments, documents: Any, tokenizer: Any, block_size: int, *, evaluation: bool = False
) -> Any:
    """Blocks of tokens, packed on disk or, for a streamed data set, on the fly; of a token file, views.

    `max_train_samples` takes the first blocks. `max_eval_samples` takes blocks at equal distances, because neighbors come from a
    few documents, which do not represent the rest; of a stream it takes the first, as a list.
    """
    limit = "max_eval_samples" if evaluation else "max_train_samples"
    max_samples = getattr(args, limit)
    if isinstance(documents, TokenFile):
        if args.append_eos:
            raise TSTError(
                "append_eos ends rows of text, but a file of token ids is read as it is: leave it out."
            )
        blocks: Any = documents.cut(block_size)
    else:
        files = (args.validation_files if evaluation else []) or args.train_files
        append_eos = _appends_eos(args, files)
        tokenized = tokenize_documents(
            documents,
            tokenizer,
            text_column=args.text_column,
            append_eos=append_eos,
            num_proc=args.preprocessing_num_workers,
        )
        if not hasattr(tokenized, "num_rows"):
            from datasets.fingerprint import Hasher

            reading = None if tokenized is documents else (append_eos, tokenizer.get_vocab())
            facts = (_describe_source(args, files), args.text_column, reading, evaluation)
            stream = BlockStream(tokenized, block_size, Hasher.hash(facts))
            if evaluation:
                return _first_blocks(stream, max_samples)
            if max_samples is not None:
                raise TSTError(f"A stream has no number of blocks for {limit}={max_samples}: leave it out.")
            return stream
        blocks = pack_blocks(tokenized, block_size)
    if max_samples is None or max_samples >= len(blocks):
        return blocks
    taken = range(max_samples)
    return blocks.select([i * len(blocks) // max_samples for i in taken] if evaluation else taken)


def _appends_eos(args: DataArguments, files: Sequence[str]) -> bool:
    """Whether each row of text becomes a document of its own: by default unless the rows are the lines of text files."""
    if args.append_eos is not None:
        return args.append_eos
    is_text = bool(files) and ending(files[0]) == ".txt"
    if len(files) > 1 and is_text:
        logger.warning(
            f"The {len(files)} files {files[0]} … {files[-1]} are joined to one text without end tokens, the end of one with the beginning of "
            "the next: make them JSON Lines with one document per row, or set append_eos=True if each line is a document (False keeps this "
            "as it is)."
        )
    return not is_text


def _describe_source(args: DataArguments, files: Sequence[str]) -> list[Any]:
    """What tells a stream's data from others: names and sizes of its local files, or the name of a data set on the Hub."""
    folder = Path(args.dataset_name or "")
    if not files and folder.is_dir():
        files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    sizes = [(Path(file).name, os.path.getsize(file)) for file in files]
    return sizes or [args.dataset_name, args.dataset_config_name]


def _first_blocks(stream: BlockStream, count: int | None) -> Any:
    """The first blocks of a stream to evaluate on: the same ones each time, and no more is read. All of it without a `count`."""
    if count is None:
        logger.warning(
            "The evaluation data is a stream, all of which each evaluation reads: set max_eval_samples to evaluate on its first blocks."
        )
        return stream
    if not (blocks := list(islice(stream, count))):
        raise TSTError(
            f"The stream of evaluation data does not fill one block of {stream.block_size}: give more text or a smaller block_size."
        )
    return blocks


def load_parts(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TSTTrainingArguments,
    load: Callable[[ModelArguments, Any], Any] = load_model,
) -> tuple[dict[str, Any], int]:
    """Load or make the model of a run, its tokenizer and its packed data.

    Args:
        model_args, data_args, args: The arguments of the run.
        load (*optional*, defaults to [`load_model`]): Makes the model, given `model_args` and the tokenizer.

    Returns:
        What [`TSTTrainer`] takes, by name: `model`, `train_dataset`, `eval_dataset` (`None` without evaluation data) and
        `processing_class` (the tokenizer; `None` where token files need none). And tokens per block, L.

    Raises:
        TSTError: If one of them cannot be loaded or made, or the blocks are longer than the model's context.
    """
    # The first process downloads and tokenizes; the others read its cache.
    with args.main_process_first(desc="preparing the data"):
        with explained_loading(data_args.dataset_name or data_args.train_file or "the standard library"):
            train_documents, eval_documents = load_documents(data_args, model_args)
        documents = [text for text in (train_documents, eval_documents) if text is not None]
        tokenizer = load_tokenizer(model_args, data_args, documents)
        model = load(model_args, tokenizer)
        if model.device.type != "meta":  # the model of a dry run has no weights to check with
            check_model(args, model)
        check_optimizer(args, model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model)
        for text in documents if args.process_index == 0 else ():  # once, since the file may be large
            if isinstance(text, TokenFile):
                text.check_ids(model.get_input_embeddings().num_embeddings)
        block_size = choose_block_size(data_args, model.config)
        if args.tst_enabled:
            make_schedule(args, 1).positions_per_row("superposition", block_size)  # or its refusal
        parts = {"model": model, "processing_class": tokenizer, "eval_dataset": None}
        parts["train_dataset"] = prepare_blocks(data_args, train_documents, tokenizer, block_size)
        if eval_documents is not None:
            parts["eval_dataset"] = prepare_blocks(
                data_args, eval_documents, tokenizer, block_size, evaluation=True
            )
    return parts, block_size
