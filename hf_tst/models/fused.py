"""The model's loss, fused with its head: the logits of a whole batch never exist.

Inside [`replaced_loss`] a model's `loss_function` is a [`TSTLoss`]. Where head and loss can be fused, the head
computes the loss itself in training, in its one call in a forward pass, where FSDP has its weight whole; with
`TSTLoss.fuses_evaluation`, also in evaluation.
In place of logits it hands on an empty tensor, and the loss function answers with the loss. Whatever the model does
between head and loss it does to the empty tensor; a scale or a cap it would have applied is in the fused loss
(see [`inspect_head`]). What the caller gets as logits is a [`MissingLogits`], which says so when it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.utils import logging

from ..errors import TSTError, check_choice
from ..losses.multi_hot import check_shape, multi_hot_cross_entropy
from .head import LinearHead, UnfusableHeadError, inspect_head, replaced
from .sharding import own_class

FusedLoss = Literal["auto", "on", "off"]
FUSED_LOSSES: tuple[FusedLoss, ...] = get_args(FusedLoss)

logger = logging.get_logger(__name__)


@contextmanager
def replaced_loss(
    called: nn.Module, model: Any, weights: Tensor | None, choice: FusedLoss = "auto"
) -> Iterator[None]:
    """Context in which a model computes the multi-hot loss, or its own next-token loss, fused where it can be.

    Args:
        called: The module that is called: the model, or a PEFT wrapper of it.
        model (`PreTrainedModel`): The Transformers model whose head and loss it is.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): Weights of the offsets: labels of three dimensions
            get the multi-hot loss, others the model's own. Without them, ordinary labels get the fused loss.
        choice (`str`, defaults to `"auto"`): `"auto"` fuses where the head allows it, `"on"` insists, `"off"` never
            does. Which of them it came to, and why, is logged.

    Raises:
        TSTError: If `choice` is `"on"` and this model's head and loss cannot be fused.
        RuntimeError: If the model is inside such a context already.
    """
    if isinstance(model.loss_function, TSTLoss):
        raise RuntimeError(
            "The model is inside token_superposition or fused_next_token_loss already: leave that context first."
        )
    head = _choose_head(model, choice, next_token=weights is None)
    names, takes_cache = _argument_names(called), "use_cache" in _argument_names(model)
    loss = TSTLoss(model.loss_function, weights, head, names, takes_cache)
    with (
        # In front of FSDP's hook, which casts every float to the dtype of its mixed precision, divisors too.
        called.register_forward_pre_hook(loss.before_forward, with_kwargs=True, prepend=True),
        nullcontext() if head is None else replaced(vars(head.module), "forward", loss.head_forward),
        # It runs when forward raises, too: no half-done forward pass leaves the head without its logits.
        called.register_forward_hook(loss.after_forward, always_call=True),
        replaced(vars(model), "_loss_function", loss),
    ):
        yield


def check_fusable(model: Any, choice: FusedLoss) -> None:
    """Raise `TSTError` if `choice` is `"on"` and head and loss of `model` cannot be fused in both phases."""
    if choice == "on":
        _choose_head(model, choice, next_token=True)


def _choose_head(model: Any, choice: FusedLoss, next_token: bool) -> LinearHead | None:
    """The head to fuse the loss with, or `None`; says in the log which, and why."""
    check_choice("fused_loss", choice, FUSED_LOSSES)
    phase, name = "next-token" if next_token else "superposition", own_class(model).__name__
    try:
        if choice == "off":
            raise UnfusableHeadError("tst_fused_loss is 'off'")
        if next_token and model.loss_function is not LOSS_MAPPING["ForCausalLM"]:
            raise UnfusableHeadError("it has a loss function of its own")
        head = inspect_head(model)
    except UnfusableHeadError as error:
        if choice == "on":
            raise TSTError(
                f"tst_fused_loss='on', but {name} cannot be served: {error}. Set it to 'auto' or 'off'."
            ) from error
        # Who asked for nothing should know what it costs; who said "off" does.
        level = logger.info if choice == "off" else logger.warning
        level(f"The {phase} loss of {name} is computed from all logits, which takes more memory: {error}.")
        return None
    logger.info(f"The {phase} loss of {name} is fused with its head: {head}.")
    return head


@dataclass(eq=False)
class TSTLoss:
    """The loss function of a model in superposition, or with a fused next-token loss.

    A forward pass that is fused goes: `before_forward` notes labels and divisor; `head_forward` computes the loss from
    the hidden states and returns an empty tensor; the model calls this loss function with it, and gets the loss.
    Training passes with the labels of the phase are fused and, with `fuses_evaluation`, evaluation passes with next-token
    labels. Other forward passes do not change.

    Args:
        own_loss: The model's own loss function.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): See [`replaced_loss`].
        head (`LinearHead`, *optional*): The head to fuse the loss with.
        argument_names (`tuple[str, ...]`): Of what is called, by position.
        takes_cache (`bool`): Whether the model has an argument `use_cache`.
        fuses_evaluation (`bool`, defaults to `False`): Fuse the loss in evaluation, too.
    """

    own_loss: Callable[..., Tensor]
    weights: Tensor | None
    head: LinearHead | None
    argument_names: tuple[str, ...] = ()
    takes_cache: bool = False
    fuses_evaluation: bool = False
    _given: dict[str, Any] = field(default_factory=dict)
    _fuses: bool = False
    _has_fused: bool = False
    _trains: bool = False
    _loss: Tensor | None = None

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: what the loss of this pass is to be computed from, and whether it is fused.

        Arguments get their names. A pass with labels, or over bags, has no use for a cache, with which models of Transformers
        let attention cross documents.
        """
        if args and len(args) <= len(self.argument_names):
            args, kwargs = (), dict(zip(self.argument_names, args, strict=False)) | kwargs
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        generates = labels is None and not (isinstance(ids, Tensor) and ids.dim() == 3)
        if self.takes_cache and not generates and kwargs.get("use_cache") is None:
            kwargs = kwargs | {"use_cache": False}
        self._given, self._trains, self._has_fused = kwargs, module.training, False
        dimensions = labels.dim() if isinstance(labels, Tensor) else 0
        if self._trains:
            self._fuses = dimensions == (2 if self.weights is None else 3)
        else:
            is_usual = self.own_loss is LOSS_MAPPING["ForCausalLM"]
            self._fuses = self.fuses_evaluation and dimensions == 2 and is_usual
        return args, kwargs

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the pass is over, also when it failed; logits that were never computed cannot be used."""
        self._fuses, self._given, self._loss = False, {}, None
        if not self._has_fused or torch.compiler.is_compiling():
            return None
        return _without_logits(output)

    def head_forward(self, hidden: Tensor) -> Tensor:
        """The head's forward: logits, or an empty tensor in their place once the loss is computed."""
        assert self.head is not None
        module = self.head.module
        # A weight that is still split here is split by something that does not gather it for the forward pass.
        if not self._fuses or isinstance(module.weight, DTensor):
            return type(module).forward(module, hidden)
        self._fuses, self._has_fused = False, True
        labels, options = self._options(**self._given)
        self._loss = self.head.loss(hidden, labels, **options)
        if not self._trains:
            has_targets = (labels != options["ignore_index"]).any().to(self._loss.device)
            self._loss = torch.where(has_targets, self._loss, torch.nan)
        return _NoLogits.apply(hidden)

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss, self._loss = self._loss, None
        if loss is not None:
            # Their sum is 0: it makes the empty tensor part of the backward pass, as FSDP expects of a module's output.
            return loss + logits.sum().to(loss.dtype)
        if self.weights is None or labels.dim() != 3:
            # The divisor as the trainer gave it: FSDP casts what a module is given, and bfloat16 rounds counts.
            if "num_items_in_batch" in self._given:
                kwargs["num_items_in_batch"] = self._given["num_items_in_batch"]
            return self.own_loss(logits, labels, *args, **kwargs)
        labels, options = self._options(**kwargs | self._given | {"labels": labels})
        return multi_hot_cross_entropy(logits, labels.to(logits.device), **options)

    def _options(
        self,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Labels and options of the multi-hot loss, from what the model's forward or its loss function was given."""
        weights = None if labels.dim() == 2 else self.weights
        if weights is None:  # next-token prediction, as bags of one
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            labels = shift_labels.unsqueeze(-1)
        else:
            check_shape("labels", labels, (*labels.shape[:-1], len(weights)))
        options = {"weights": weights, "num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        return labels, options


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a module takes by position."""
    parameters = [*inspect.signature(type(module).forward).parameters.values()][1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


class _NoLogits(torch.autograd.Function):
    """An empty tensor in the place of logits `(..., V)` of hidden states `(..., d)`, connected to these."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.new_empty((*hidden.shape[:-1], 0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class MissingLogits(torch.Tensor):
    """An empty tensor in the place of logits that the fused loss never computes.

    It has a shape, a type and a device, can be copied and handed on, and raises a [`TSTError`] where it is computed with: a
    sum of nothing is 0 and a mean is NaN, so a term of somebody else's would be wrong without a word.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ not in _HARMLESS:
            raise TSTError(
                f"The logits are not there ({func.__name__} was asked of them), since the fused loss never computes them: set "
                "tst_fused_loss='off' to use them, which takes memory for each position and token of the vocabulary."
            )
        return super().__torch_function__(func, types, args, kwargs or {})


# What may be asked of logits that are not there: `__get__` is an attribute, such as the shape.
_HARMLESS = {"__get__", "size", "dim", "numel", "clone", "detach", "is_floating_point", "__repr__"}


@torch.compiler.disable  # Dynamo cannot trace this subclass, and traces calls of hooks that it does not trace themselves.
def _without_logits(output: Any) -> Any:
    """The result of the forward hook: a tuple whose empty logits are missing ones, or `None` for a mapping, changed in place."""
    if isinstance(output, tuple):
        return tuple(_missing(value) for value in output)
    if isinstance(output, Mapping) and "logits" in output:
        output["logits"] = _missing(output["logits"])  # type: ignore[index]
    return None


def _missing(value: Any) -> Any:
    """Empty logits as such, without their part in the backward pass, which the loss has."""
    is_empty = isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == 0
    return value.detach().as_subclass(MissingLogits) if is_empty else value
