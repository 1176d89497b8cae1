"""What rows of tokens and batches for a model must satisfy, and the check of stored rows before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..batches.blocks import SAMPLED_BLOCKS, BlockRules
from ..models.shape import context_length, embedding_size
from .run_collators import keeps_ids


def block_rules(model: Any, tokenizer: Any) -> BlockRules:
    """What the blocks for a model must satisfy: ids in the vocabulary, rows that fit a table of positions, no padding.

    Without a table of positions, rows may be longer than the configuration says. The padding token is not checked if it is also
    another special token.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    config = getattr(model, "config", None)
    context, tables = context_length(config), []
    if context is not None and isinstance(model, nn.Module):
        tables = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    # OPT's table has two more rows. MPT makes its attention biases for `context` positions.
    has_table = {context, (context or 0) + 2} & {*tables} or getattr(config, "model_type", None) == "mpt"
    return BlockRules(
        pad_token_id=None if pad in others else pad,
        vocab_size=embedding_size(model),
        context=context if has_table else None,
    )


def batch_rules(model: Any) -> BlockRules:
    """What every batch must satisfy, also from a user's own loader."""
    return BlockRules(vocab_size=embedding_size(model), purpose="given")


def check_stored_rows(trainer: Any) -> None:
    """Check the rows of stored evaluation data, and the first rows of plain training, before the first step.

    Raises:
        TSTError: If a row has an id without an embedding, or is longer than the model's table of positions.
    """
    if not keeps_ids(trainer.data_collator):
        return  # a collator of the user's may make other rows of them, whose ids are checked batch by batch
    rules, evaluation = block_rules(trainer.model, None), trainer.eval_dataset
    for blocks in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        replace(rules, purpose="evaluation").check_stored(blocks)
    if not trainer.args.tst_enabled:
        rules.check_stored(trainer.train_dataset, limit=SAMPLED_BLOCKS)
