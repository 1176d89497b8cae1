"""How a causal language model calls its last layer, and what it does between that layer and its head, found out by trying.

A forward pass over a few tokens is watched by hooks. What is found is enough to call another layer of the same class in
the same place: beside the last one, or behind it.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.head import LinearHead, UnfusableHeadError, inspect_head

_POSITIONS = 3
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class UnknownEndError(ValueError):
    """The way from a model's last layer to its loss cannot be followed; the message says why."""


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
        UnknownEndError: If it is something else, or its loss cannot be fused with its head, or something other than one
            norm is between its last layer and its head.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UnknownEndError("it is no causal language model of Transformers, or is wrapped")
    layers = decoder_layers(model)
    if not layers:
        raise UnknownEndError("its decoder layers cannot be found")
    try:
        head = inspect_head(model)
    except UnfusableHeadError as error:
        raise UnknownEndError(str(error)) from error
    seen = _watch(model, layers, head.module)
    around = [module for module in seen.called if any(inner is layers[-1] for inner in module.modules())]
    bodies = [module for module in around if module is not layers[-1]]
    if seen.call is None or not isinstance(seen.hidden, Tensor) or not bodies:
        raise UnknownEndError("its last layer is not called with hidden states inside of a body")
    norms = [module for module, output in seen.after if _is_same(output, seen.end)]
    if not norms and not _is_same(seen.hidden, seen.end):
        raise UnknownEndError("something other than one norm is between its last layer and its head")
    return ModelEnd(bodies[-1], layers[-1], norms[0] if norms else None, head, seen.call, seen.hidden)


class _Seen:
    """What a forward pass shows of the last layer and of the modules that take what it returns."""

    def __init__(self) -> None:
        self.call: LayerCall | None = None
        self.hidden: Any = None
        self.after: list[tuple[nn.Module, Any]] = []
        self.end: Any = None
        self.called: list[nn.Module] = []  # in the order in which they return: the outermost last

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = LayerCall.bind(module, args, kwargs)

    def after_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hidden = hidden_states_of(output)

    def before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.end = args[0] if args else None

    def after_any(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.called.append(module)
        if self.hidden is not None and args and args[0] is self.hidden:
            self.after.append((module, output))


def _watch(model: Any, layers: list[nn.Module], head: nn.Module) -> _Seen:
    seen, last_layer = _Seen(), layers[-1]
    device = next(last_layer.parameters()).device
    ids = torch.zeros(1, _POSITIONS, dtype=torch.long, device=device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for handle in (
            last_layer.register_forward_pre_hook(seen.before_layer, with_kwargs=True),
            last_layer.register_forward_hook(seen.after_layer),
            head.register_forward_pre_hook(seen.before_head),
            *(module.register_forward_hook(seen.after_any) for module in model.modules()),
        ):
            stack.callback(handle.remove)
        try:
            type(model).forward(
                model, input_ids=ids, use_cache=False
            )  # without hooks that want more than this
        except Exception as error:  # whatever a family's forward wants
            raise UnknownEndError(
                f"its layers cannot be followed ({type(error).__name__}: {error})"
            ) from error
    return seen


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tensors are the same numbers in the same place, perhaps in another shape."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
