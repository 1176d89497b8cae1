"""Which collators a run has: for superposition, recovery and evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ..bags.collator import DataCollatorForTokenSuperposition
from ..batches.collators import DefaultCollator, FoldingCollator, PhaseCollator
from ..errors import TSTError
from .arguments import TSTArguments


def make_collator(trainer: Any) -> Any:
    """The collator of a run, made from the trainer's `data_collator`: the user's, or a [`DefaultCollator`].

    Args:
        trainer (`TSTTrainer`): The trainer, with arguments, model, tokenizer and `data_collator`.

    Raises:
        TSTError: If the user's collator makes other bags than the arguments say, or cannot respect documents.
    """
    args: TSTArguments = trainer.args
    data_collator = _given_collator(trainer)
    is_default, ours = isinstance(data_collator, DefaultCollator), _is_ours(data_collator)
    boundaries = args.tst_document_boundaries
    options: Any = {
        "mode": args.tst_mode, "superposition_rows": args.tst_superposition_rows, "document_boundaries": boundaries,
        "eos_token_id": end_token_id(trainer.processing_class, trainer.model),
    }  # fmt: skip
    superposition: Any = DataCollatorForTokenSuperposition(args.tst_bag_size, **options)
    recovery: Any = DataCollatorForTokenSuperposition(1, **options)
    if boundaries == "respect" and not (is_default or ours):
        raise TSTError(
            f"tst_document_boundaries='respect' needs a collator that keeps documents apart, but data_collator is "
            f"{type(data_collator).__name__}: leave it out, or pass DataCollatorForTokenSuperposition(1, "
            "document_boundaries='respect')."
        )
    makes_bags = ours and data_collator.bag_size > 1
    if ours and args.tst_enabled:
        names = ["document_boundaries", *(("bag_size", "mode", "superposition_rows") if makes_bags else ())]
        differing = [name for name in names if getattr(data_collator, name) != getattr(args, f"tst_{name}")]
        if differing:
            name = differing[0]
            raise TSTError(
                f"data_collator has {name}={getattr(data_collator, name)!r}, but the arguments have "
                f"tst_{name}={getattr(args, f'tst_{name}')!r}: set both alike, or leave data_collator out."
            )
    if makes_bags:
        superposition = data_collator
    elif not is_default:
        recovery = data_collator
        if not ours:
            superposition = FoldingCollator(data_collator, superposition)
    evaluation = _evaluation_collator(data_collator)
    if args.tst_enabled:
        return PhaseCollator(superposition, recovery, evaluation)
    return evaluation if is_default and boundaries == "ignore" else recovery


def _is_ours(collator: Any) -> bool:
    return isinstance(collator, DataCollatorForTokenSuperposition)


def _given_collator(trainer: Any) -> Any:
    """The trainer's `data_collator`. One of ours without an `eos_token_id` gets that of the run."""
    collator: Any = trainer.data_collator
    if not _is_ours(collator) or collator.eos_token_id is not None:
        return collator
    collator = copy.copy(collator)
    collator.eos_token_id = end_token_id(trainer.processing_class, trainer.model)
    return collator


def document_end(trainer: Any) -> int | None:
    """The token that ends documents, if the arguments keep these apart: that of a collator of ours, else that of the run."""
    if trainer.args.tst_document_boundaries == "ignore":
        return None
    collator = _given_collator(trainer)
    return (
        collator.eos_token_id if _is_ours(collator) else end_token_id(trainer.processing_class, trainer.model)
    )


def keeps_ids(collator: Any) -> bool:
    """Whether the ids of a batch are those of the rows. A user's collator may change them."""
    return isinstance(collator, DefaultCollator) or _is_ours(collator)


def _evaluation_collator(data_collator: Any) -> Any:
    """The collator of evaluation, which never makes bags."""
    makes_bags = _is_ours(data_collator) and data_collator.bag_size > 1
    return DefaultCollator(data_collator) if makes_bags else data_collator


def without_added_labels(trainer: Any) -> Any:
    """The `data_collator` for prediction: that of evaluation, but it adds no labels."""
    collator = _evaluation_collator(_given_collator(trainer))
    return replace(collator, adds_labels=False) if isinstance(collator, DefaultCollator) else collator


def end_token_id(tokenizer: Any, model: Any) -> int | None:
    """The end-of-sequence token: the tokenizer's, else the model's."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        end = getattr(getattr(model, "config", None), "eos_token_id", None)
    return end[0] if isinstance(end, (list, tuple)) else end
