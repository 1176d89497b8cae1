"""How a causal language model calls its last layer, and what it does between that layer and its head, found out by trying.

A forward pass over a few tokens is watched by hooks. What is found is enough to call another layer of the same class in
the same place: beside the last one, or behind it.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TSTError
from ..models.head import LinearHead, UnfusableHeadError, inspect_head, trial_pass
from ..models.sharding import own_class

_POSITIONS = 3
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def unservable(model: Any, reason: str) -> TSTError:
    """The error of a model whose way from its last layer to its loss cannot be followed."""
    return TSTError(
        f"Multi-token prediction cannot serve {own_class(model).__name__}: {reason}. Set mtp_num_heads=1."
    )


@dataclass
class LayerCall:
    """How a layer was called: its hidden states `(B, l, d)`, and the other arguments, without a cache."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def bind(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        """The call of `layer` with `args` and `kwargs`, as a forward pre-hook is given them."""
        bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
        for name in _CACHES:
            if name in bound.arguments:
                bound.arguments[name] = None
        _, hidden, *rest = bound.args
        return cls(hidden, tuple(rest), bound.kwargs)

    def of(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What `layer` makes of `hidden` when it is called in the same way."""
        return hidden_states_of(layer(hidden, *self.args, **self.kwargs))


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's layers: the list that is as long as its configuration says, or the first list; empty if there is none."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and len(m)]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in lists if len(m) == count] or lists
    if not lists:
        return []
    return list(lists[0].values() if isinstance(lists[0], nn.ModuleDict) else lists[0])


def hidden_states_of(output: Any) -> Any:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class ModelEnd:
    """A model from its last layer to its loss.

    Args:
        body (`nn.Module`): What the model's forward calls to run the layers.
        last_layer (`nn.Module`): The last layer.
        norm (`nn.Module`, *optional*): What is between last layer and head.
        head (`LinearHead`): The head, see [`inspect_head`].
        call (`LayerCall`), last_hidden (`torch.FloatTensor` of shape `(1, l, d)`): How the last layer was called on a few
            tokens, and what it returned.
    """

    body: nn.Module
    last_layer: nn.Module
    norm: nn.Module | None
    head: LinearHead
    call: LayerCall
    last_hidden: Tensor


def find_model_end(model: Any) -> ModelEnd:
    """The parts of a model from its last layer on, found by a forward pass over a few tokens. Nothing of it changes.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped.

    Raises:
        TSTError: If it is something else, or its loss cannot be fused with its head, or something other than one
            norm is between its last layer and its head.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise unservable(model, "it is no causal language model of Transformers, or is wrapped")
    layers = decoder_layers(model)
    if not layers:
        raise unservable(model, "its decoder layers cannot be found")
    try:
        head = inspect_head(model)
    except UnfusableHeadError as error:
        raise unservable(model, str(error)) from error
    last_layer = layers[-1]
    try:
        calls = _watch(model, next(last_layer.parameters()).device)
        called = {call.module: call for call in calls}
        at_layer, at_head = called.get(last_layer), called.get(head.module)
        layer_call = LayerCall.bind(last_layer, at_layer.args, at_layer.kwargs) if at_layer else None
    except Exception as error:  # whatever a family's forward wants
        reason = f"its layers cannot be followed ({type(error).__name__}: {error})"
        raise unservable(model, reason) from error
    hidden = hidden_states_of(at_layer.output) if at_layer else None
    bodies = [module for module in called if module is not last_layer and last_layer in module.modules()]
    if layer_call is None or not isinstance(hidden, Tensor) or not bodies:
        raise unservable(model, "its last layer is not called with hidden states inside of a body")
    end = at_head.args[0] if at_head and at_head.args else None
    after = [call for call in calls if call.args and call.args[0] is hidden]
    norms = [call.module for call in after if _is_same(call.output, end)]
    if not norms and not _is_same(hidden, end):
        raise unservable(model, "something other than one norm is between its last layer and its head")
    return ModelEnd(bodies[-1], last_layer, norms[0] if norms else None, head, layer_call, hidden)


class _Call(NamedTuple):
    """A call of a module in a forward pass."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _watch(model: Any, device: torch.device) -> list[_Call]:
    """The calls of all modules in a forward pass over a few tokens, in the order in which they return."""
    calls: list[_Call] = []

    def note(*call: Any) -> None:
        calls.append(_Call(*call))

    ids = torch.zeros(1, _POSITIONS, dtype=torch.long, device=device)
    with trial_pass(device), ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        # Without hooks that want more than this.
        type(model).forward(model, input_ids=ids, use_cache=False)
    return calls


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tensors are the same numbers in the same place, perhaps in another shape."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
