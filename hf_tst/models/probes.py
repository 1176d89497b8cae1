"""Forward passes over a few tokens that show what superposition relies on: attention inside documents, and where ids are read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import TSTError, one_line
from .sharding import own_class
from .superposition import FIRST_STAND_IN, find_language_model

logger = logging.get_logger(__name__)

# Tokens per document in a row of two.
_LENGTH = 4
# A change of the logits below this share of the change in a row without boundaries counts as rounding: mixtures of experts and
# low precision are not exact from one batch to another.
_ROUNDING = 0.1


def check_document_attention(model: nn.Module, rows: int = 2) -> None:
    """Check that attention does not cross documents in a row whose `position_ids` restart between them.

    The first half of a row is changed. If the halves are two documents, the logits of the second half must not change; if the row
    is one document, they do, which gives the scale. This takes four forward passes over rows of eight tokens, without gradients.
    In sharded training every rank must take part.

    Args:
        model: The model; it may be wrapped.
        rows (`int`, *optional*, defaults to 2): Rows per batch. Some attention implementations keep documents apart only in
            batches of one row.

    Raises:
        TSTError: If attention, or another layer that mixes positions, crosses documents.
    """
    _, core = find_language_model(model)
    name = own_class(core).__name__
    if "position_ids" not in inspect.signature(type(core).forward).parameters:
        raise TSTError(
            f"{name} takes no position_ids, so it cannot keep documents apart: set tst_document_boundaries='ignore'."
        )
    tokens, other, ascending = _probe_rows(core, rows)
    with _probing(model):
        across = _change(model, tokens, other, position_ids=ascending)
        inside = _change(model, tokens, other, position_ids=ascending % _LENGTH)
    if not inside <= _ROUNDING * across:
        implementation = getattr(core.config, "_attn_implementation", None)
        raise TSTError(
            f"tst_document_boundaries='respect' needs a model that keeps attention inside documents, but {name} with "
            f"attn_implementation={implementation!r} in batches of {rows} does not: use attn_implementation='sdpa', "
            "'eager' or 'flex_attention' (flash attention does with per_device_train_batch_size=1), or set "
            "tst_document_boundaries='ignore'."
        )


def check_ids_reach_the_embedding_alone(model: nn.Module) -> None:
    """Check that a model reads ids through its input embedding alone, since superposition averages what that gives.

    The ids of a row are replaced, by other ids and by the stand-ins for bags, while the input embedding returns what it returned for
    the first ids. The logits must then change by noise only. The limit comes from two measured changes: between two equal passes, and
    when the embedding gets the other ids, too. This takes eight forward passes over a row of eight tokens, without gradients. In
    sharded training every rank must take part. If the model cannot run them, a warning is logged.

    Args:
        model: The model; it may be wrapped.

    Raises:
        TSTError: If the model reads ids elsewhere, too, for example in a second table, by hashes of neighbors or to make a mask.
    """
    _, core = find_language_model(model)
    name = own_class(core).__name__
    tokens, other, ascending = _probe_rows(core, rows=1)
    stand_ins = (FIRST_STAND_IN - ascending).int()
    first: list[Tensor] = []

    def look_up_tokens(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return ((tokens, *args[1:]), kwargs) if args else ((), kwargs | {"input": tokens})

    def hold(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        first.append(output.clone())
        return first[0].clone()  # models may scale it in place

    try:
        with _probing(model):
            scale = _change(model, tokens, other, begin=0)
            embedding = core.get_input_embeddings()
            with (
                embedding.register_forward_pre_hook(look_up_tokens, with_kwargs=True, prepend=True),
                embedding.register_forward_hook(hold),
            ):
                limit = _ROUNDING * scale + 3 * _change(model, tokens, tokens, begin=0)
                # Stand-ins last: a second table has no row for them, which on a GPU would crash the process. They may give NaN.
                changes = (_change(model, tokens, ids, begin=0) for ids in (other, stand_ins))
                reads_elsewhere = math.isfinite(limit) and any(not change <= limit for change in changes)
    except Exception as error:  # whatever a model may raise: the check is an extra
        logger.warning(f"Cannot check that ids reach {name} by its input embedding alone: {one_line(error)}.")
        return
    if reads_elsewhere:
        raise TSTError(
            f"{name} also reads token ids outside its input embedding, for example in a second table or to make a mask: its logits change with "
            "the ids although the embeddings do not. Superposition cannot train this model; set tst_phase_ratio=0."
        )


def _probe_rows(core: Any, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row of tokens of two documents, the same with another first half, and its positions, each `rows` times."""
    vocabulary = core.config.get_text_config().vocab_size
    ascending = torch.arange(2 * _LENGTH, device=next(core.parameters()).device).expand(rows, -1)
    # From the middle of the vocabulary, since special tokens, such as padding, are at its ends.
    tokens = (vocabulary // 2 + ascending) % vocabulary
    return tokens, torch.where(ascending < _LENGTH, (tokens - _LENGTH) % vocabulary, tokens), ascending


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Context for forward passes of a few tokens, which leave no trace."""
    was_training = model.training
    model.eval()
    try:
        # Odd shapes would make a compiled model recompile for dynamic shapes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _change(model: nn.Module, tokens: Tensor, other: Tensor, begin: int = _LENGTH, **inputs: Tensor) -> float:
    """The largest change of the logits from position `begin` on, by default of the second half, when the first half changes."""
    _, core = find_language_model(model)
    options: dict[str, Any] = inputs
    if "use_cache" in inspect.signature(type(core).forward).parameters:
        options = inputs | {"use_cache": False}  # as in training; with a cache, attention crosses documents
    outputs = [model(input_ids=ids, **options) for ids in (tokens, other)]
    logits = [(each["logits"] if isinstance(each, Mapping) else each[0])[:, begin:] for each in outputs]
    return float((logits[0].float() - logits[1].float()).abs().max())
