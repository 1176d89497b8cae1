"""The losses of the extra heads in one forward pass, taken by hooks on the way through the model.

Shapes: B rows, l positions, d hidden size, V vocabulary.

The extra heads run, and their losses are taken, at the beginning of the forward pass of the model's head. There FSDP has
its weight whole, also where the head is sharded apart. In the backward pass, which takes the opposite way, FSDP has gathered
the weight before, and sums gradients over the processes afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TSTError
from ..models.sharding import is_sharded, own_class
from .last_layer import LayerCall, ModelEnd, hidden_states_of

_IGNORED = -100


@contextmanager
def extra_losses(model: Any, heads: Any, end: ModelEnd, loss_weight: float | None = None) -> Iterator[None]:
    """The second half of [`multi_token_prediction`]: attached heads add to the loss. The model may be sharded before.

    Args:
        model (`PreTrainedModel`), heads (`MTPHeads`), loss_weight (`float`, *optional*): As there.
        end (`ModelEnd`): The model from its last layer on.
    """
    losses = _ExtraLosses(model, heads, end, loss_weight)
    with (
        # Both are in front of FSDP's hooks: it casts what is given, and takes weights away.
        model.register_forward_pre_hook(losses.before_model, with_kwargs=True, prepend=True),
        # It runs when forward raises, too: nothing of a half-done forward pass is kept.
        model.register_forward_hook(losses.after_model, prepend=True, always_call=True),
    ):
        yield


class _ExtraLosses:
    """Hooks on a model and, in next-token training passes, on its last layer and its head."""

    def __init__(self, model: Any, heads: Any, end: ModelEnd, loss_weight: float | None) -> None:
        self.model, self.heads, self.end = model, heads, end
        # DeepSeek-V3's weight for most of its training; the heads of arXiv 2404.19737 weigh what the next token weighs.
        weight, parts = (1.0, 1) if heads.kind == "parallel" else (0.3, len(heads.heads))
        self.weight = (weight if loss_weight is None else float(loss_weight)) / parts
        self.signature = inspect.signature(type(model).forward)
        self._hooks = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._hooks.close()
        self._given: dict[str, Any] = {}  # what next-token losses are computed from; nothing in other passes
        self._superposed = False
        self._call: LayerCall | None = None
        self._last_hidden: Tensor | None = None
        self._loss: Tensor | None = None

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: what the losses of this pass are computed from."""
        self._forget()
        bound = self.signature.bind_partial(module, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        labels = given.get("labels")
        if not module.training or not isinstance(labels, Tensor):
            return
        self._superposed = labels.dim() == 3
        if labels.dim() == 2:
            names = ("input_ids", "labels", "position_ids", "num_items_in_batch")
            self._given = {name: given.get(name) for name in names}
            self._check()
            layer, head = self.end.last_layer, self.end.head.module
            self._hooks.enter_context(layer.register_forward_hook(self.after_last_layer, with_kwargs=True))
            # Behind FSDP's hook, and in this pass only: a head with hooks cannot be fused with the model's loss.
            self._hooks.enter_context(head.register_forward_pre_hook(self.before_head))

    def _check(self) -> None:
        """Raise `TSTError` where the losses or their gradients would be wrong in silence."""
        divisor = self._given["num_items_in_batch"]
        if isinstance(divisor, Tensor) and divisor.dtype in (torch.bfloat16, torch.float16):
            raise TSTError(
                f"num_items_in_batch has dtype {divisor.dtype}, which cannot count: give a whole number, which FSDP does not cast."
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
        """Forward hook of the last layer: how it was called, and what it returned."""
        self._call, self._last_hidden = LayerCall.bind(module, args, kwargs), hidden_states_of(output)

    def before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model's head: runs the extra heads, and takes their losses with its weight.

        It is inside the model's forward, where autocast and DDP look.
        """
        if self._call is None or self._last_hidden is None:
            return
        head, norm, labels = self.end.head, self.end.norm, self._given["labels"].to(self._last_hidden.device)
        if isinstance(head.module.weight, DTensor):
            raise TSTError(
                "The weight of the model's head is sharded and not gathered in its forward pass: shard it with fully_shard."
            )
        count = len(self.heads.heads)
        hidden = self.heads(self._call, self._last_hidden, self._next_embeddings(count))
        self._call = self._last_hidden = None
        states = torch.cat([h if norm is None else norm(h) for h in hidden])
        targets = torch.cat([_targets(labels, k, self._given["position_ids"]) for k in range(2, count + 2)])
        divisor = self._given["num_items_in_batch"]
        if divisor is None:
            divisor = (labels[:, 1:] != _IGNORED).sum()
        self._loss = self.weight * head.loss(states, targets.unsqueeze(-1), num_items_in_batch=divisor)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model: its output with the losses of the heads added; also after a failed pass."""
        extra, predicts, superposed = self._loss, bool(self._given), self._superposed
        self._forget()
        if extra is not None:
            self.heads.note_loss(extra)
        elif predicts and output is not None:
            raise RuntimeError(
                "The model has not run the layers that its extra heads were made for: was a module replaced?"
            )
        if superposed and torch.distributed.is_initialized() and not is_sharded(self.model):
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
            raise TSTError("Sequential heads look the next tokens up: give input_ids, not inputs_embeds.")
        # The last positions have no next token and no target; what they read instead reaches no other position.
        embedding = self.model.get_input_embeddings()
        return [embedding(nn.functional.pad(ids, (0, k))[:, k:]) for k in range(1, count + 1)]


def _targets(labels: Tensor, ahead: int, position_ids: Tensor | None) -> Tensor:
    """Labels `ahead` positions on, `(B, l)`; none past the end of a row, or of a document where positions restart."""
    targets = nn.functional.pad(labels, (0, ahead), value=_IGNORED)[:, ahead:]
    if position_ids is None or position_ids.dim() != 2:
        return targets
    position_ids = position_ids.to(labels.device)
    there = nn.functional.pad(position_ids, (0, ahead))[:, ahead:]
    return targets.masked_fill(there - position_ids != ahead, _IGNORED)
