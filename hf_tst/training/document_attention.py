"""Whether a model keeps attention inside documents, found by trying it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import TSTError
from ..models.superposition import find_language_model

_LENGTH = 4
# Share of the effect that one document has on the next across the boundary, in a row without documents, that is
# taken for rounding: mixtures of experts and low precision are not exact from one batch to another.
_ROUNDING = 0.1


class DocumentAttentionCallback(TrainerCallback):
    """Refuses, before the first step, to train a model whose attention crosses documents."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_document_attention(kwargs["model"], rows=min(2, args.per_device_train_batch_size))


def check_document_attention(model: nn.Module, rows: int = 2) -> None:
    """Check that a document in a row does not see the one before it, when `position_ids` restart between them.

    Four forward passes over rows of eight tokens, without gradients: in sharded training every rank must take
    part. What the first document is must not matter to the logits of the second, against a row of one document,
    where it does.

    Args:
        model: The model, also wrapped.
        rows (`int`, defaults to 2): Rows of a batch; some attention implementations keep documents apart in batches
            of one row only.

    Raises:
        TSTError: If the model's attention, or another mixing of positions, crosses documents.
    """
    _, core = find_language_model(model)
    name = type(core).__name__
    if "position_ids" not in inspect.signature(type(core).forward).parameters:
        raise TSTError(
            f"{name} takes no position_ids, so it cannot keep documents apart: set tst_document_boundaries='ignore'."
        )
    device = next(core.parameters()).device
    vocabulary = core.config.get_text_config().vocab_size
    token = torch.arange(2 * _LENGTH, device=device).expand(rows, -1) % vocabulary
    other = torch.where(token < _LENGTH, vocabulary - 1 - token, token)
    ascending = torch.arange(2 * _LENGTH, device=device).expand(rows, -1)
    restarting = ascending % _LENGTH

    was_training = model.training
    model.eval()
    try:
        # Odd shapes would make a compiled model recompile for dynamic shapes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            across = _change(model, token, other, ascending)
            inside = _change(model, token, other, restarting)
    finally:
        model.train(was_training)
    if not inside <= _ROUNDING * across:
        implementation = getattr(core.config, "_attn_implementation", None)
        raise TSTError(
            f"tst_document_boundaries='respect' needs a model that keeps attention inside documents, but {name} with "
            f"attn_implementation={implementation!r} in batches of {rows} does not: use attn_implementation='sdpa', "
            "'eager' or 'flex_attention' (flash attention does with per_device_train_batch_size=1), or set "
            "tst_document_boundaries='ignore'."
        )


def _change(model: nn.Module, tokens: Tensor, other: Tensor, position_ids: Tensor) -> float:
    """How far the logits of the second half move when the first half changes."""
    logits = [model(input_ids=ids, position_ids=position_ids).logits[:, _LENGTH:] for ids in (tokens, other)]
    return float((logits[0].float() - logits[1].float()).abs().max())
