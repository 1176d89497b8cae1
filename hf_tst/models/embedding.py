"""How a model's input embeddings reach its first layer, found out by trying.

Superposition feeds averaged embeddings as `inputs_embeds`. Most families treat these as they treat their own, whatever
they scale or add; some (Falcon-H1) scale only what they looked up themselves. The model's own forward is run up to its
first layer, with the embedding replaced by a stand-in, once with ids and once with the same numbers as `inputs_embeds`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TSTError
from .probing import StandIn, own_class, replaced_module

_POSITIONS = 3


def inputs_embeds_scale(model: Any) -> float:
    """Factor to put on `inputs_embeds` so that a model treats them as it treats its own embeddings; 1 for most.

    Nothing of the model changes, and none of its layers runs. A model that cannot be followed from its embedding to
    its first layer is taken for one of the most.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped.

    Raises:
        TSTError: If the model does something else than scaling to its own embeddings only.
    """
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    width = getattr(embedding, "embedding_dim", weight.shape[-1])
    embedded = torch.linspace(-1, 1, _POSITIONS * width, device=weight.device).view(1, _POSITIONS, width)
    try:
        by_ids = _at_first_layer(model, embedding, embedded, by_ids=True)
        by_embeds = _at_first_layer(model, embedding, embedded, by_ids=False)
        if torch.allclose(by_ids, by_embeds, rtol=1e-4, atol=1e-6):
            return 1.0
        zeros = torch.zeros_like(embedded)
        own = by_ids - _at_first_layer(model, embedding, zeros, by_ids=True)
        given = by_embeds - _at_first_layer(model, embedding, zeros, by_ids=False)
        scale = float(f"{((own * given).sum() / (given * given).sum()).item():.6g}")
        scaled = _at_first_layer(model, embedding, embedded * scale, by_ids=False)
    except _UnknownWayError:
        return 1.0
    if not torch.allclose(by_ids, scaled, rtol=1e-4, atol=1e-6):
        raise TSTError(
            f"{own_class(model).__name__} cannot be fed averaged embeddings: what it does to those it looks up itself, it "
            "does not do to `inputs_embeds`."
        )
    return scale


def first_layer(model: Any) -> nn.Module | None:
    """The first of [`decoder_layers`], or `None` if there are none."""
    layers = decoder_layers(model)
    return layers[0] if layers else None


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's layers: the list that is as long as its configuration says, or the first list; empty if there is none."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and len(m)]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in lists if len(m) == count] or lists
    if not lists:
        return []
    return list(lists[0].values() if isinstance(lists[0], nn.ModuleDict) else lists[0])


class _UnknownWayError(Exception):
    """The way from embedding to first layer cannot be followed."""


class _LayerReachedError(Exception):
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


def _end_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _LayerReachedError(args[0] if args else kwargs.get("hidden_states"))


def _at_first_layer(model: Any, embedding: nn.Module, embedded: Tensor, by_ids: bool) -> Tensor:
    """What the first layer is given when the model looks up `embedded`, or is given it as `inputs_embeds`."""
    layer = first_layer(model)
    if layer is None:
        raise _UnknownWayError
    device = embedded.device
    # Float32 whatever the model's dtype, for the scale's digits. A copy: CTRL scales what it is given where it lies.
    embedded = embedded.clone()
    ids = torch.zeros(1, _POSITIONS, dtype=torch.long, device=device)
    inputs = {"input_ids": ids} if by_ids else {"inputs_embeds": embedded}
    body = model.base_model
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(replaced_module(model, embedding, StandIn(embedding, embedded)))
        # A hook and not a stand-in: in a first forward pass Transformers looks for the layers whose outputs it records.
        # In front of other hooks: FSDP's would gather the layer.
        handle = layer.register_forward_pre_hook(_end_forward, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)
        try:
            type(body).forward(body, **inputs, use_cache=False)
        except _LayerReachedError as reached:
            hidden = reached.hidden
        except Exception as error:  # whatever a family does that a probe does not foresee
            raise _UnknownWayError from error
        else:
            raise _UnknownWayError
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise _UnknownWayError
    return hidden.float()
