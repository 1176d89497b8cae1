"""Ids that mean something: which ends a document, which is padding, how many there are."""

from __future__ import annotations

from typing import Any

from ..models.superposition import find_language_model


def end_token_id(tokenizer: Any, model: Any) -> int | None:
    """The token that ends a document: the tokenizer's, else the model's."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        end = getattr(getattr(model, "config", None), "eos_token_id", None)
    return end[0] if isinstance(end, (list, tuple)) else end


def padding_token_id(tokenizer: Any) -> int | None:
    """The tokenizer's padding token, if it stands for nothing but padding."""
    pad = getattr(tokenizer, "pad_token_id", None)
    others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    return None if pad in others else pad


def vocabulary_size(model: Any) -> int | None:
    """Ids that the model has an embedding for."""
    return getattr(find_language_model(model)[1].get_input_embeddings(), "num_embeddings", None)
