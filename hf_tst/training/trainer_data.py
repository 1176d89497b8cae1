"""The data of a trainer's run, opened with what only the trainer knows: ranks, columns, tokens with a meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.folding import offset_weights, resolve_weighting
from ..data.blocks import BlockRules
from ..data.plan import BatchLayout
from ..data.rows import DOCUMENT_COLUMNS
from ..losses.multi_hot import count_target_bags
from ..models.superposition import find_language_model
from .arguments import TSTTrainingArguments
from .data import RunData, open_run_data

logger = logging.get_logger(__name__)


def open_trainer_data(trainer: Any) -> RunData:
    """Check a trainer's training data, and plan the run over it.

    Args:
        trainer (`TSTTrainer`): The trainer; its batch size may have been lowered by `auto_find_batch_size`.

    Raises:
        TSTError: If the data has no full blocks of equal length, or too few of them.
    """
    args = trainer.args
    accumulation, batch_size = args.gradient_accumulation_steps, trainer._train_batch_size
    ranks = trainer.get_total_train_batch_size(args) // (batch_size * accumulation)
    embedding = find_language_model(trainer.model)[1].get_input_embeddings()

    def columns(of_data: list[str] | None) -> Any:
        """Columns that reach the collator: all, or those that the model's forward takes."""
        if not args.remove_unused_columns:
            return of_data
        trainer._set_signature_columns_if_needed()
        used = list(trainer._signature_columns)
        if args.tst_document_boundaries == "respect":
            used += DOCUMENT_COLUMNS
        return [name for name in of_data if name in used] if of_data else used

    data = open_run_data(
        trainer.train_dataset,
        args,
        BatchLayout(batch_size, accumulation, ranks),
        rank=args.process_index // (args.world_size // ranks),
        columns=columns,
        rules=BlockRules(
            pad_token_id=padding_token_id(trainer.processing_class),
            vocab_size=getattr(embedding, "num_embeddings", None),
        ),
        as_arrays=isinstance(trainer.data_collator.recovery, DataCollatorForTokenSuperposition),
    )
    if data.schedule.switch_step == 0:
        logger.warning(
            f"tst_phase_ratio={data.schedule.phase_ratio} of {data.schedule.max_steps} steps is less than one step: "
            "there will be no superposition."
        )
    return data


def make_loader(trainer: Any, data: RunData) -> DataLoader:
    """The loader of a run's rows, from the step that training has reached."""
    loader = trainer._get_dataloader(
        dataset=data.rows,
        description="Training",
        batch_size=trainer._train_batch_size,
        sampler_fn=lambda rows: data.sampler(lambda: trainer.state.global_step),
        is_training=True,
    )
    # A loader draws a seed for its workers when it starts. It has a generator of its own, so that training draws the same
    # numbers whether it was resumed or not.
    loader.base_dataloader.generator = torch.Generator().manual_seed(trainer.args.seed)
    return loader


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


def count_targets(batches: Sequence[Any], args: TSTTrainingArguments) -> Tensor:
    """Target bags of some batches of superposition, those that weigh less than a whole one in part."""
    weighting = resolve_weighting(args.tst_mode, args.tst_offset_weighting)
    weights = offset_weights(weighting, args.tst_bag_size)
    return torch.stack([count_target_bags(batch["labels"], weights=weights) for batch in batches]).sum()
