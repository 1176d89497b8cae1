"""Recipes and flags of training, made so small that a run takes a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 400, "max_position_embeddings": 64,
}  # fmt: skip
RUN = {
    "block_size": 16, "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "warmup_steps": 1,
    "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def shrink_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a configuration with small sizes in the place of those that it names."""
    return {name: SHAPE.get(name, value) for name, value in overrides.items()}


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the same arguments, a tiny model, 4 steps, and data in the current folder.

    There have to be `corpus.jsonl`, `tokenizer`, and `small` in the place of a trained model.
    """
    tiny = dict(values)
    names_data = "dataset_name" in values or "train_file" in values
    for name in ("dataset_name", "dataset_config_name", "preprocessing_num_workers"):
        tiny.pop(name, None)
    if "config_overrides" in values:
        tiny["config_overrides"] = shrink_overrides(values["config_overrides"])
    if "model_name_or_path" in values:
        tiny["model_name_or_path"] = "small"
    elif names_data:
        tiny["tokenizer_name"] = "tokenizer"
    if names_data:
        tiny["train_file"] = "corpus.jsonl"
    if "tokens_per_step" in values:
        tiny["tokens_per_step"] = 64
    if "lr_scheduler_kwargs" in values:
        tiny["lr_scheduler_kwargs"] = {"num_decay_steps": 1}
    return tiny | RUN
