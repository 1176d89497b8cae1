"""Multi-token prediction: extra heads on an unmodified Transformers model, during training.

Shapes: B rows, l positions, d hidden size, n heads with the model's own.

Extra head k = 1 … n-1 predicts token t+1+k at position t, by a decoder layer of the model's own class, followed by the
model's own final norm and head. What is between last layer and head is found by probing, as in `head.py`.

- `"parallel"` (arXiv 2404.19737): the trunk is all layers except the last, which is the head of the next token; the extra
  heads are layers beside it. The paper removes n - 1 layers from the trunk, for equal parameters; here the model keeps them.
- `"sequential"` (arXiv 2412.19437, section 2.2): head k reads the head before it, the first one the model's last layer,
  and the embedding of token t+k: both normalized, concatenated, projected to d, then a decoder layer.

Memory: the paper processes one head at a time, so that only the logits of one head are in memory. Here the hidden states of all
extra heads go through one fused loss, with one chunk of logits and one gradient of the model's head for any n. Memory grows
by one layer's activations per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TSTError, check_choice
from ..models.sharding import is_sharded, own_class
from ..models.temporary import trial_pass
from .losses import LayerCall, decoder_layers, extra_losses, find_model_end, trying, unsupported

MTPKind = Literal["parallel", "sequential"]

MTP_KINDS: tuple[MTPKind, ...] = get_args(MTPKind)
# The name of the heads among a model's modules.
ATTRIBUTE = "mtp_heads"


def check_mtp(
    num_heads: int, kind: str = "parallel", loss_weight: float | None = None, *, prefix: str = ""
) -> None:
    """Raise `TSTError` unless the arguments are valid for [`MTPHeads`] and [`multi_token_prediction`];
    `prefix` is for messages."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise TSTError(f"{prefix}num_heads must be a whole number of at least 1, but is {num_heads!r}.")
    check_choice(f"{prefix}kind", kind, MTP_KINDS)
    check_loss_weight(f"{prefix}loss_weight", loss_weight)


def check_loss_weight(name: str, loss_weight: float | None) -> None:
    """Raise `TSTError` unless the argument `name` is the weight of a loss, or `None`."""
    is_number = isinstance(loss_weight, (int, float)) and not isinstance(loss_weight, bool)
    if loss_weight is not None and not (is_number and 0 <= loss_weight < math.inf):
        raise TSTError(f"{name} must be a finite number of at least 0, but is {loss_weight!r}.")


class MTPHeads(nn.Module):
    """The extra heads of a model, freshly initialized as the model initializes its own layers.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped. It is not changed.
        num_heads (`int`): Number of heads, n, including the model's own; at least 2.
        kind (`str`, *optional*, defaults to `"parallel"`): `"parallel"` or `"sequential"`.
        seed (`int`, *optional*): Seed of the initial weights; by default they use the global generator.

    Raises:
        TSTError: If an argument is out of range, or the layers of the model cannot be found, made or called.

    Source: arXiv 2404.19737 (parallel), arXiv 2412.19437 (sequential).
    """

    def __init__(
        self, model: Any, num_heads: int, kind: MTPKind = "parallel", seed: int | None = None
    ) -> None:
        super().__init__()
        check_mtp(num_heads, kind)
        if num_heads < 2:
            raise TSTError("With num_heads=1 a model has no extra heads: set it to at least 2.")
        self.kind = kind
        self.share = 1.0  # the fraction of a loss that `note_loss` adds
        self._noted_loss: Tensor | None = None
        if any(is_sharded(module) for module in model.modules()):
            raise TSTError("The model is sharded already: make its extra heads before fully_shard.")
        self.end = find_model_end(model)
        like = next(self.end.last_layer.parameters())
        devices = [like.device] if like.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            heads = [self._make_head(model, self.end.last_layer) for _ in range(num_heads - 1)]
        self.heads = nn.ModuleList(heads).to(device=like.device, dtype=like.dtype)
        self._try_heads(model, self.end.call)

    @property
    def num_heads(self) -> int:
        """Heads with the model's own, n."""
        return len(self.heads) + 1

    def take_loss(self) -> Tensor | None:
        """The part of the loss since the last call that comes from the heads; `None` if they did not train.

        Returns:
            `torch.FloatTensor`: In nats, float32, 0-dim, detached, with `loss_weight` in it, on the model's device.
        """
        loss, self._noted_loss = self._noted_loss, None
        return loss

    def note_loss(self, loss: Tensor) -> None:
        """Add the fraction `share` of a loss to the result of [`take_loss`], without a synchronization."""
        loss = loss.detach() * self.share
        self._noted_loss = loss if self._noted_loss is None else self._noted_loss + loss

    def find_end(self, model: Any) -> None:
        """Find the model's end. A sharded model cannot be probed, so it keeps the end found before.

        Raises:
            TSTError: If the model is not supported, or is sharded and these heads are not.
        """
        if not is_sharded(model):
            self.end = find_model_end(model)
            return
        for module in (model, *self.modules()):
            if is_sharded(module):
                module.reshard()  # so that a weight that is currently gathered does not look unsharded
        if not all(isinstance(parameter, DTensor) for parameter in self.parameters()):
            raise TSTError(
                "The model is sharded, but its extra heads are not: call fully_shard inside multi_token_prediction."
            )
        if all(module is not self.end.last_layer for module in model.modules()):
            raise TSTError("These extra heads were made for another model: make new MTPHeads from this one.")

    def forward(self, call: LayerCall, next_embeddings: list[Tensor]) -> list[Tensor]:
        """The hidden states of the extra heads, before the model's final norm.

        Args:
            call (`LayerCall`): How the model called its last layer, and the result.
            next_embeddings: For each sequential head, the embeddings `(B, l, d)` of the tokens that it reads.

        Returns:
            n-1 tensors of shape `(B, l, d)`.
        """
        if self.kind == "parallel":
            return [call.repeat(layer, call.hidden) for layer in self.heads]
        heads: list[Any] = list(self.heads)
        found = [call.returned]
        for head, embedded in zip(heads, next_embeddings, strict=True):
            found.append(call.repeat(head.layer, head.join(found[-1], embedded)))
        return found[1:]

    def _make_head(self, model: Any, last_layer: nn.Module) -> nn.Module:
        config, layer_class = model.config.get_text_config(), own_class(last_layer)
        with trying(model, f"it cannot make a {layer_class.__name__} for the heads"):
            # A layer like the last one: layers of one model may differ.
            layer = layer_class(config, layer_idx=len(decoder_layers(model)) - 1)
        layer.apply(model._init_weights)
        if self.kind == "parallel":
            return layer
        head = _SequentialHead(layer, config.hidden_size)
        model._init_weights(head.projection)
        return head

    def _try_heads(self, model: Any, call: LayerCall) -> None:
        """Raise `TSTError` unless the heads can be called as the last layer is called."""
        embedded = [torch.zeros_like(call.returned)] * len(self.heads)
        with trying(model, "one of its layers cannot be called alone"), trial_pass(call.returned.device):
            shapes = {getattr(hidden, "shape", None) for hidden in self(call, embedded)}
        if shapes != {call.returned.shape}:
            raise unsupported(model, "one of its layers does not return hidden states when called alone")


class _SequentialHead(nn.Module):
    """The own modules of a sequential head: two norms, the projection `(2d → d)` and a decoder layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(width, eps=1e-6)
        self.embedding_norm = nn.RMSNorm(width, eps=1e-6)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.layer = layer

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        dtype = self.projection.weight.dtype
        normed = self.hidden_norm(hidden.to(dtype)), self.embedding_norm(embedded.to(dtype))
        return self.projection(torch.cat(normed, dim=-1)).to(hidden.dtype)


@contextmanager
def multi_token_prediction(
    model: Any, heads: MTPHeads, loss_weight: float | None = None
) -> Iterator[nn.Module]:
    """Context in which the training loss of a model is its next-token loss plus the losses of its extra heads.

    Inside, the heads are a module of the model (`model.mtp_heads`), so that an optimizer made there, DDP and gradient
    checkpointing find them; the model's state dict leaves them out. `model(input_ids=…, labels=…).loss` is the model's
    own loss plus `loss_weight` times the sum (sequential: the mean) of the cross entropies of the extra heads, all
    divided by the same number of targets: `num_items_in_batch`, or the next tokens in the batch. The logits of the extra
    heads are never in memory as a whole. Forward passes in evaluation mode, without labels, or with bags of labels (superposition) do not
    change; with bags of labels and several processes, the heads get gradients of 0, because DDP waits for a gradient.
    If `position_ids` restart, no head predicts past the end of a document. The auxiliary loss of a mixture of experts
    covers the model's own layers. Call `fully_shard` inside the context, on the model last: it shards the heads, too. The context
    can then be exited and entered again. After the context, also after an exception, the model is restored.

    Args:
        model (`PreTrainedModel`): The model that `heads` are for, not wrapped; it may be wrapped inside. Contexts of
            [`token_superposition`] and [`fused_next_token_loss`] are entered inside, too.
        heads (`MTPHeads`): The extra heads.
        loss_weight (`float`, *optional*): 0.1 for parallel heads and 0.3 for sequential ones by default.

    Yields:
        The same `model`.

    Raises:
        TSTError: If `loss_weight` is out of range, or the model is not supported.
        RuntimeError: If the model is inside such a context already.

    Example:
        >>> heads = MTPHeads(model, num_heads=2)
        >>> with multi_token_prediction(model, heads):
        ...     optimizer = torch.optim.AdamW(model.parameters())
        ...     model(input_ids=tokens, labels=tokens).loss.backward()
    """
    check_mtp(heads.num_heads, heads.kind, loss_weight)
    with attached_heads(model, heads), extra_losses(model, heads, loss_weight):
        yield model


@contextmanager
def attached_heads(model: Any, heads: MTPHeads) -> Iterator[None]:
    """Context in which heads are a module of a model, outside of its state dict.

    An optimizer or a wrapper made now includes them; the loss does not change.

    Raises:
        TSTError: If the model is not supported, or is sharded and its heads are not.
        RuntimeError: If the model is inside such a context already.
    """
    if hasattr(model, ATTRIBUTE):
        raise RuntimeError("The model is inside multi_token_prediction already: leave that context first.")
    heads.find_end(model)
    model.add_module(ATTRIBUTE, heads)
    try:
        with (
            model.register_state_dict_post_hook(_leave_heads_out),
            model.register_load_state_dict_post_hook(_miss_no_heads),
        ):
            yield
    finally:
        model._modules.pop(ATTRIBUTE, None)


def _leave_heads_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{ATTRIBUTE}.")]:
        del state_dict[name]


def _miss_no_heads(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if f"{ATTRIBUTE}." not in k]
