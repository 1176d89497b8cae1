"""The tokenizer, the configuration and the model of a run, trained ones and new ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..data.quickstart import train_tokenizer
from ..data.token_file import TokenFile
from ..errors import TSTError, bad_input, check_names, whole_message
from .options import DataArguments, ModelArguments

QUICK_START_VOCABULARY = 8192


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
        f"Text needs a tokenizer: name one with tokenizer_name{also}, such as --tokenizer_name gpt2 --config_name "
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
