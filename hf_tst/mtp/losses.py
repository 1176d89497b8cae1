"""The losses of the extra heads in one forward pass, taken by hooks on the way through the model.

Shapes: B rows, l positions, d hidden size, V vocabulary.

The extra heads run after the model's body has, and their losses are taken at the beginning of the forward pass of the
model's head. There FSDP has its weight whole, also where the head is sharded apart; in the backward pass, which takes the
opposite way, it has gathered the weight before it comes there, and sums gradients over the processes afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..errors import TSTError
from ..models.probing import is_sharded, own_class
from .last_layer import LayerCall, ModelEnd, hidden_states_of

_IGNORED = -100


class ExtraLosses:
    """What the hooks of a forward pass keep from the model's last layer to its loss.

    Args:
        model (`PreTrainedModel`): The model, not wrapped.
        heads (`MTPHeads`): Its extra heads.
        end (`ModelEnd`): How it goes on from its last layer.
        weight (`float`): Weight of the sum (sequential: the mean) of the losses of the extra heads.
    """

    def __init__(self, model: Any, heads: Any, end: ModelEnd, weight: float) -> None:
        self.model, self.heads, self.end = model, heads, end
        self.weight = weight if heads.kind == "parallel" else weight / len(heads.heads)
        self.signature = inspect.signature(type(model).forward)
        self._at_head: RemovableHandle | None = None
        self._forget()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Context in which the hooks are on. They are in front of FSDP's: it casts what is given, and takes weights away."""
        model, end = self.model, self.end
        with (
            model.register_forward_pre_hook(self.before_model, with_kwargs=True, prepend=True),
            end.last_layer.register_forward_hook(self.after_last_layer, with_kwargs=True),
            end.body.register_forward_hook(self.after_body, prepend=True),
            # It runs when forward raises, too: nothing of a half-done forward pass is kept.
            model.register_forward_hook(self.after_model, prepend=True, always_call=True),
        ):
            yield

    def _forget(self) -> None:
        self._given: dict[str, Any] = {}  # what next-token losses are computed from; nothing in other passes
        self._superposed = False
        self._call: LayerCall | None = None
        self._last_hidden: Tensor | None = None
        self._states: Tensor | None = None
        self._loss: Tensor | None = None
        if self._at_head is not None:
            self._at_head.remove()
            self._at_head = None

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

    def _check(self) -> None:
        """Raise `TSTError` where the losses or their gradients would be wrong in silence."""
        divisor = self._given["num_items_in_batch"]
        if isinstance(divisor, Tensor) and divisor.dtype in (torch.bfloat16, torch.float16):
            raise TSTError(
                f"num_items_in_batch has come as {divisor.dtype}, which cannot count: give a whole number, which FSDP's "
                "mixed precision leaves as it is."
            )
        if is_sharded(self.end.body):
            raise TSTError(
                f"fully_shard was called on the {own_class(self.end.body).__name__} inside of the model, whose norm the extra "
                "heads use once more, outside of what FSDP gathers it for: shard layers and the model."
            )
        if is_sharded(self.end.last_layer) and not is_sharded(self.model):
            raise TSTError(
                "fully_shard was called on layers but not on the model, so nothing would add up the gradients of the "
                "extra heads: call it on the model last."
            )

    def after_last_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook of the last layer: how it was called, and what it returned."""
        if self._given:
            self._call = LayerCall.bind(module, args, kwargs)
            self._last_hidden = hidden_states_of(output)

    def after_body(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the body: the extra heads, inside the model's forward, where autocast and DDP look."""
        if not self._given:
            return
        assert self._call is not None
        assert self._last_hidden is not None
        hidden = self.heads(self._call, self._last_hidden, self._next_embeddings(len(self.heads.heads)))
        self._call = self._last_hidden = None
        norm = self.end.norm
        self._states = torch.cat([h if norm is None else norm(h) for h in hidden])
        # For this pass only: a head with hooks of others cannot be fused with the model's loss.
        self._at_head = self.end.head.module.register_forward_pre_hook(self.before_head)

    def before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model's head, behind FSDP's: the losses of the extra heads, with its weight."""
        states, self._states = self._states, None
        if states is None:
            return
        head, labels = self.end.head, self._given["labels"].to(states.device)
        if isinstance(head.module.weight, DTensor):
            raise TSTError(
                "The weight of the model's head is sharded and not gathered in its forward pass: shard it with fully_shard."
            )
        ahead = range(2, len(self.heads.heads) + 2)
        targets = torch.cat([_targets(labels, k, self._given["position_ids"]) for k in ahead])
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
