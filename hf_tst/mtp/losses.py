"""From a model's last layer to its loss: how the layer is called, what follows it, and the losses of extra heads.

Shapes: B rows, l positions, d hidden size, V vocabulary.

The calls are found by probing: hooks watch a forward pass over a few tokens. That is enough to call another layer of the
same class in the same place: beside the last one, or after it.

In training, hooks compute the losses of the extra heads during the model's forward pass, at the start of the forward
pass of the model's head. FSDP has gathered its weight there, also if the head is sharded separately. In the
backward pass, FSDP gathers the weight before and reduces the gradients afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TSTError
from ..models.head import LinearHead, UnfusableHeadError, inspect_head
from ..models.sharding import is_sharded, own_class
from ..models.temporary import trial_pass

_IGNORED = -100
_POSITIONS = 3
# By comparison 0.1 is better than the 1 of arXiv 2404.19737 (docs/results.md); 0.3 is DeepSeek-V3's weight for most of its training.
LOSS_WEIGHTS = {"parallel": 0.1, "sequential": 0.3}
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def unsupported(model: Any, reason: str) -> TSTError:
    """The error for a model whose path from its last layer to its loss is not supported."""
    return TSTError(
        f"Multi-token prediction does not support {own_class(model).__name__}: {reason}. Set mtp_num_heads=1."
    )


@contextmanager
def trying(model: Any, failure: str) -> Iterator[None]:
    """Context that runs code of a model: any error becomes an [`unsupported`] error with `failure` as its reason."""
    try:
        yield
    except Exception as error:
        raise unsupported(model, f"{failure} ({type(error).__name__}: {error})") from error


@dataclass
class LayerCall:
    """How a layer was called, and what it returned.

    Args:
        hidden (`torch.FloatTensor` of shape `(B, l, d)`): The hidden states that it was given.
        args (`tuple`), kwargs (`dict`): Its other arguments, without a cache.
        returned (`torch.FloatTensor` of shape `(B, l, d)`): The hidden states that it returned.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Tensor

    @classmethod
    def from_hook(
        cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> LayerCall:
        """The call of `layer`, from the arguments of a forward hook."""
        bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
        for name in _CACHES:
            if name in bound.arguments:
                bound.arguments[name] = None
        _, hidden, *rest = bound.args
        return cls(hidden, tuple(rest), bound.kwargs, _hidden_states(output))

    def repeat(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The output of `layer` for `hidden`, called in the same way."""
        return _hidden_states(layer(hidden, *self.args, **self.kwargs))


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's layers: the list that is as long as its configuration says, or the first list; empty if there is none."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and len(m)]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in lists if len(m) == count] or lists
    if not lists:
        return []
    return list(lists[0].values() if isinstance(lists[0], nn.ModuleDict) else lists[0])


def _hidden_states(output: Any) -> Any:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class ModelEnd:
    """A model from its last layer to its loss.

    Args:
        body (`nn.Module`): The module that runs the layers.
        last_layer (`nn.Module`): The last layer.
        norm (`nn.Module`, *optional*): The norm between last layer and head.
        head (`LinearHead`): The head, see [`inspect_head`].
        call (`LayerCall`): A call of the last layer on a few tokens.
    """

    body: nn.Module
    last_layer: nn.Module
    norm: nn.Module | None
    head: LinearHead
    call: LayerCall


def find_model_end(model: Any) -> ModelEnd:
    """The parts of a model from its last layer on, found by a forward pass over a few tokens. The model is not changed.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped.

    Raises:
        TSTError: If it is not, if its loss cannot be fused with its head, or if something other than one norm is
            between last layer and head.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise unsupported(model, "it is not a causal language model of Transformers, or is wrapped")
    layers = decoder_layers(model)
    if not layers:
        raise unsupported(model, "its decoder layers cannot be found")
    try:
        head = inspect_head(model)
    except UnfusableHeadError as error:
        raise unsupported(model, str(error)) from error
    last_layer = layers[-1]
    call: LayerCall | None = None
    with trying(model, "its layers cannot be followed"):
        calls = _watch(model, next(last_layer.parameters()).device)
        called = {module: rest for module, *rest in calls}
        if last_layer in called:
            call = LayerCall.from_hook(last_layer, *called[last_layer])
    bodies = [module for module in called if module is not last_layer and last_layer in module.modules()]
    if call is None or not isinstance(call.returned, Tensor) or not bodies:
        raise unsupported(model, "its last layer is not called with hidden states inside of a body")
    head_args, *_ = called.get(head.module, [()])
    head_input = head_args[0] if head_args else None
    after = [(module, output) for module, args, _, output in calls if args and args[0] is call.returned]
    norms = [module for module, output in after if _is_same(output, head_input)]
    if not norms and not _is_same(call.returned, head_input):
        raise unsupported(model, "something other than one norm is between its last layer and its head")
    return ModelEnd(bodies[-1], last_layer, norms[0] if norms else None, head, call)


def _watch(model: Any, device: torch.device) -> list[tuple[Any, ...]]:
    """The module, arguments and output of all calls in a forward pass over a few tokens, in the order in which they return."""
    calls: list[tuple[Any, ...]] = []
    ids = torch.zeros(1, _POSITIONS, dtype=torch.long, device=device)
    with trial_pass(device), ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(
                module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
            )
        # Without the hooks of others.
        type(model).forward(model, input_ids=ids, use_cache=False)
    return calls


def _is_same(one: Any, other: Any) -> bool:
    """Whether two tensors share the same memory, in any shape."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@contextmanager
def extra_losses(
    model: Any, heads: Any, loss_weight: float | Callable[[], float] | None = None
) -> Iterator[None]:
    """Context in which heads that [`attached_heads`] has put on a model add to its loss. The model may be sharded before.

    Args:
        model (`PreTrainedModel`), heads (`MTPHeads`), loss_weight (`float`, *optional*): As for [`multi_token_prediction`];
            `loss_weight` may also be a function that returns the weight for the coming forward pass.
    """
    losses = _ExtraLosses(model, heads, loss_weight)
    with (
        # Both run before FSDP's hooks, which cast inputs and free weights.
        model.register_forward_pre_hook(losses.before_model, with_kwargs=True, prepend=True),
        # It also runs if forward raises, so no state of a failed pass is kept.
        model.register_forward_hook(losses.after_model, prepend=True, always_call=True),
    ):
        try:
            yield
        finally:
            losses.forget()  # of a pass that was interrupted, too, where the hook does not run


class _ExtraLosses:
    """Hooks on a model and, in next-token training passes, on its last layer and its head."""

    def __init__(self, model: Any, heads: Any, loss_weight: float | Callable[[], float] | None) -> None:
        self.model, self.heads, self.end = model, heads, heads.end
        self.loss_weight = LOSS_WEIGHTS[heads.kind] if loss_weight is None else loss_weight
        self.signature = inspect.signature(type(model).forward)
        self._hooks = ExitStack()
        self.forget()

    def forget(self) -> None:
        """Remove the hooks and values of the current pass."""
        self._hooks.close()
        self._given: dict[str, Any] = {}  # arguments of a training pass with labels; nothing in other passes
        self._call: LayerCall | None = None
        self._loss: Tensor | None = None

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: records the labels of this pass."""
        self.forget()
        bound = self.signature.bind_partial(module, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        labels = given.get("labels")
        if not module.training or not isinstance(labels, Tensor):
            return
        names = ("input_ids", "labels", "position_ids", "num_items_in_batch")
        self._given = {name: given.get(name) for name in names}
        if labels.dim() == 2:
            self._check()
            layer, head = self.end.last_layer, self.end.head.module
            self._hooks.enter_context(layer.register_forward_hook(self.after_last_layer, with_kwargs=True))
            # After FSDP's hook, and for this pass only: a head with hooks cannot be fused with the model's loss.
            self._hooks.enter_context(head.register_forward_pre_hook(self.before_head))

    def _check(self) -> None:
        """Raise `TSTError` if the losses or their gradients would be silently wrong."""
        divisor = self._given["num_items_in_batch"]
        if isinstance(divisor, Tensor) and divisor.dtype in (torch.bfloat16, torch.float16):
            raise TSTError(
                f"num_items_in_batch has dtype {divisor.dtype}, which rounds large numbers: give a whole number, which FSDP does not cast."
            )
        if is_sharded(self.end.body):
            raise TSTError(
                f"fully_shard was called on the {own_class(self.end.body).__name__}, whose norm the extra heads use: shard the "
                "layers and the model instead."
            )
        if is_sharded(self.end.last_layer) and not is_sharded(self.model):
            raise TSTError(
                "fully_shard was called on layers but not on the model, which the extra heads need: call it on the model last."
            )

    def after_last_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the last layer: records its call and its output."""
        self._call = LayerCall.from_hook(module, args, kwargs, output)

    def before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model's head: runs the extra heads, and computes their losses with its weight.

        It runs inside the model's forward, under autocast and DDP.
        """
        if self._call is None:
            return
        head, norm = self.end.head, self.end.norm
        labels = self._given["labels"].to(self._call.returned.device)
        if isinstance(head.module.weight, DTensor):
            raise TSTError(
                "The weight of the model's head is sharded and not gathered in its forward pass: shard it with fully_shard."
            )
        count = len(self.heads.heads)
        hidden = self.heads(self._call, self._next_embeddings(count))
        self._call = None
        states = torch.cat([h if norm is None else norm(h) for h in hidden])
        targets = torch.cat([_targets(labels, k, self._given["position_ids"]) for k in range(2, count + 2)])
        divisor = self._given["num_items_in_batch"]
        if divisor is None:
            divisor = (labels[:, 1:] != _IGNORED).sum()
        weight = self.loss_weight() if callable(self.loss_weight) else float(self.loss_weight)
        if self.heads.kind == "sequential":
            weight /= count
        self._loss = weight * head.loss(states, targets.unsqueeze(-1), num_items_in_batch=divisor)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model: adds the losses of the heads to its output. It also runs after an exception."""
        extra, dimensions = self._loss, self._given["labels"].dim() if self._given else 0
        self.forget()
        if extra is not None:
            self.heads.note_loss(extra)
        elif dimensions == 2 and output is not None:
            raise RuntimeError(
                "The model did not run the layers that its extra heads were made for. If a module was replaced, make new heads."
            )
        if dimensions == 3 and torch.distributed.is_initialized() and not is_sharded(self.model):
            # DDP waits for a gradient of every parameter.
            extra = 0.0 * torch.stack([parameter.sum() for parameter in self.heads.parameters()]).sum()
        if extra is None or output is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + extra.to(output[0].dtype), *output[1:])
        output.loss = output.loss + extra.to(output.loss.dtype)
        return output

    def _next_embeddings(self, count: int) -> list[Tensor]:
        if self.heads.kind == "parallel":
            return []
        ids = self._given["input_ids"]
        if ids is None:
            raise TSTError("Sequential heads embed the next tokens: pass input_ids, not inputs_embeds.")
        # The last positions have no next token and no target; their input affects no other position.
        embedding = self.model.get_input_embeddings()
        return [embedding(nn.functional.pad(ids, (0, k))[:, k:]) for k in range(1, count + 1)]


def _targets(labels: Tensor, ahead: int, position_ids: Tensor | None) -> Tensor:
    """Labels `ahead` positions later, `(B, l)`; -100 past the end of a row, or of a document if positions restart."""
    targets = nn.functional.pad(labels, (0, ahead), value=_IGNORED)[:, ahead:]
    if position_ids is None or position_ids.dim() != 2:
        return targets
    position_ids = position_ids.to(labels.device)
    there = nn.functional.pad(position_ids, (0, ahead))[:, ahead:]
    return targets.masked_fill(there - position_ids != ahead, _IGNORED)
