"""The model's loss, fused with its head: the logits of a batch are never computed.

Inside [`replaced_loss`] a model's `loss_function` is a [`TSTLoss`]. If head and loss can be fused, the head
computes the loss in training, in its only call of a forward pass, where FSDP has gathered its weight; with
`TSTLoss.fuses_evaluation`, also in evaluation. The head then returns an empty tensor instead of logits, and
the loss function returns the loss. The model applies its scale or cap to the empty tensor; the fused loss
applies the same scale and cap (see [`inspect_head`]). The caller gets a [`MissingLogits`] as logits, which
raises a clear error when it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.loss import loss_utils
from transformers.utils import logging

from ..errors import TSTError, check_choice
from ..losses.multi_hot import check_shape, multi_hot_cross_entropy
from .head import LinearHead, UnfusableHeadError, computes_own_loss, inspect_head, loss_and_logits
from .sharding import own_class
from .temporary import replaced

FusedLoss = Literal["auto", "on", "off"]

logger = logging.get_logger(__name__)


@contextmanager
def replaced_loss(
    called: nn.Module, model: Any, weights: Tensor | None, choice: FusedLoss = "auto"
) -> Iterator[None]:
    """Context in which a model computes the multi-hot loss, or its own next-token loss, fused with its head if possible.

    Args:
        called: The module that is called: the model, or a PEFT wrapper of it.
        model (`PreTrainedModel`): The Transformers model that has the head and the loss.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): Weights of the offsets in the multi-hot loss of 3-D labels;
            2-D labels then get the model's own loss. Without weights, 2-D labels get the fused next-token loss.
        choice (`str`, *optional*, defaults to `"auto"`): `"auto"` fuses if the head allows it, `"on"` raises an error if it
            does not, `"off"` never fuses. The result and its reason are logged.

    Raises:
        TSTError: If `choice` is `"on"` and this model's head and loss cannot be fused, or the multi-hot loss cannot take its place.
        RuntimeError: If the model is inside such a context already.
    """
    if isinstance(model.loss_function, TSTLoss):
        raise RuntimeError(
            "The model is inside token_superposition or fused_next_token_loss already: leave that context first. If it is a copy that was made "
            "in such a context, as in training, load its state_dict into a new model."
        )
    own = weights is not None and computes_own_loss(model)
    head = _choose_head(model, choice, next_token=weights is None)
    names, takes_cache = _argument_names(called), "use_cache" in _argument_names(model)
    loss = TSTLoss(model.loss_function, weights, head, names, takes_cache)
    with (
        # In front of FSDP's hook, which casts every float to the mixed-precision dtype, divisors included.
        called.register_forward_pre_hook(loss.before_forward, with_kwargs=True, prepend=True),
        called.register_forward_pre_hook(loss.before_own_loss, with_kwargs=True) if own else nullcontext(),
        nullcontext() if head is None else replaced(vars(head.module), forward=loss.head_forward),
        # It also runs if forward raises, so the head gets its logits back. Before a user's hooks, which may read logits.
        called.register_forward_hook(loss.after_forward, always_call=True, prepend=True),
        called.register_forward_hook(loss.after_own_loss, prepend=True) if own else nullcontext(),
        replaced(vars(model), _loss_function=loss),
    ):
        yield


def is_next_token_loss(loss: Any) -> bool:
    """Whether a loss function is Transformers' next-token loss, and nothing in it was replaced."""
    own = loss_utils.__name__
    names = (getattr(loss, "__module__", None), getattr(loss, "__qualname__", None))
    return names == (own, "ForCausalLMLoss") and loss_utils.fixed_cross_entropy.__module__ == own


def check_fusable(model: Any, choice: FusedLoss) -> None:
    """Raise `TSTError` if `choice` is `"on"` and head and loss of `model` cannot be fused in both phases."""
    if choice == "on":
        _choose_head(model, choice, next_token=True)


def _choose_head(model: Any, choice: FusedLoss, next_token: bool) -> LinearHead | None:
    """The head to fuse the loss with, or `None`. The choice and its reason are logged."""
    check_choice("fused_loss", choice, FusedLoss)
    phase, name = "next-token" if next_token else "superposition", own_class(model).__name__
    try:
        if choice == "off":
            raise UnfusableHeadError("tst_fused_loss is 'off', or the trainer has its own compute_loss")
        if next_token and not is_next_token_loss(model.loss_function):
            raise UnfusableHeadError("it has its own loss function")
        head = inspect_head(model)
    except UnfusableHeadError as error:
        if choice == "on":
            raise TSTError(
                f"tst_fused_loss='on', but the loss of {name} cannot be fused: {error}. Set it to 'auto' or 'off'."
            ) from error
        # A warning for the default; with "off" the cost is known.
        level = logger.info if choice == "off" else logger.warning
        level(f"The {phase} loss of {name} is computed from all logits, which takes more memory: {error}.")
        return None
    logger.info(f"The {phase} loss of {name} is fused with its head: {head}.")
    return head


@dataclass(eq=False)
class TSTLoss:
    """The loss function of a model in superposition, or with a fused next-token loss.

    A fused forward pass: `before_forward` records labels and divisor; `head_forward` computes the loss from
    the hidden states and returns an empty tensor; the model calls this loss function with it, and gets the loss.
    Training passes with the labels of the phase are fused and, with `fuses_evaluation`, evaluation passes with next-token
    labels. Other forward passes do not change.

    Args:
        own_loss: The model's own loss function.
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*): See [`replaced_loss`].
        head (`LinearHead`, *optional*): The head to fuse the loss with.
        argument_names (`tuple[str, ...]`): Argument names of the called module, by position.
        takes_cache (`bool`): Whether the model has an argument `use_cache`.
        fuses_evaluation (`bool`, *optional*, defaults to `False`): Fuse the loss in evaluation, too.
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
    _batch_labels: _KeptLabels | None = None  # inside `expecting`
    _pass_labels: _KeptLabels | None = None  # in a training pass over bags

    @contextmanager
    def expecting(self, labels: Tensor) -> Iterator[None]:
        """Context in which the model refuses labels of the same shape with other values.

        Labels of other shapes are accepted: a user's loss may be computed in parts.
        """
        self._batch_labels = _KeptLabels(labels)
        try:
            yield
        finally:
            self._batch_labels = None

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: records the labels and options of this pass, and whether it is fused.

        Positional arguments get their names. A pass with labels, or over bags, needs no cache; with one, models of Transformers
        let attention cross documents.
        """
        if args and len(args) <= len(self.argument_names):
            # Dictionaries are joined as dynamo of the oldest supported torch can trace it.
            kwargs = {**{self.argument_names[i]: args[i] for i in range(len(args))}, **kwargs}
            args = ()
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        if self._batch_labels is not None:
            self._check_batch_labels(labels)
        may_generate = labels is None and not (isinstance(ids, Tensor) and ids.dim() == 3)
        if self.takes_cache and not may_generate and kwargs.get("use_cache") is None:
            kwargs = {**kwargs, "use_cache": False}
        self._given, self._trains, self._has_fused = kwargs, module.training, False
        dimensions = labels.dim() if isinstance(labels, Tensor) else 0
        trains_on_bags = self._trains and dimensions == 3 and not torch.compiler.is_compiling()
        self._pass_labels = _KeptLabels(kwargs["labels"]) if trains_on_bags else None
        if self._trains:
            self._fuses = dimensions == (2 if self.weights is None else 3)
        else:
            self._fuses = self.fuses_evaluation and dimensions == 2 and is_next_token_loss(self.own_loss)
        return args, kwargs

    def before_own_loss(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a model that computes its loss itself: gives it labels that it can take, in place of those of bags."""
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 3:
            self._given = {"labels": labels}  # its loss is a mean, whatever the divisor
            kwargs = {**kwargs, "labels": labels[..., 0].clamp(min=0)}
        return args, kwargs

    def after_own_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of such a model: the loss of bags takes the place of its loss."""
        labels = self._given.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 3:
            return output
        loss = self(loss_and_logits(output)[1], labels)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: ends the pass, also after an exception, and replaces logits that were not computed."""
        self._fuses, self._given, self._loss, self._pass_labels = False, {}, None, None
        if not self._has_fused or torch.compiler.is_compiling():
            return None
        return _without_logits(output)

    def head_forward(self, hidden: Tensor) -> Tensor:
        """The head's forward: logits, or an empty tensor in their place once the loss is computed."""
        assert self.head is not None
        module = self.head.module
        # A weight that is still sharded here is not gathered for the forward pass.
        if not self._fuses or isinstance(module.weight, DTensor):
            return type(module).forward(module, hidden)
        self._fuses, self._has_fused = False, True
        labels, options = self._options(**self._given)
        self._loss = self.head.loss(hidden, labels, **options)
        if not self._trains:  # NaN without targets, as the model's own loss
            count = options["num_items_in_batch"]  # over all processes, where there are several
            targets = (labels != options["ignore_index"]).sum() if count is None else torch.as_tensor(count)
            self._loss = torch.where(targets.to(self._loss.device) > 0, self._loss, torch.nan)
        return _NoLogits.apply(hidden)

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss, self._loss = self._loss, None
        if loss is not None or labels.dim() == 3:
            self._check_targets(labels, kwargs)
        if loss is not None:
            # Their sum is 0. It connects the empty tensor to the backward pass, as FSDP expects of a module's output.
            return loss + logits.sum().to(loss.dtype)
        if self.weights is None or labels.dim() != 3:
            # The divisor as the trainer passed it: FSDP casts a module's inputs, and bfloat16 rounds counts.
            if "num_items_in_batch" in self._given:
                kwargs["num_items_in_batch"] = self._given["num_items_in_batch"]
            return self.own_loss(logits, labels, *args, **kwargs)
        labels, options = self._options(**{**kwargs, **self._given, "labels": labels})
        return multi_hot_cross_entropy(logits, labels.to(logits.device), **options)

    @torch.compiler.disable
    def _check_batch_labels(self, labels: Any) -> None:
        """Raise `TSTError` if the model is given other labels than those of the batch."""
        assert self._batch_labels is not None
        has_shape = isinstance(labels, Tensor) and labels.shape == self._batch_labels.values.shape
        if has_shape and not self._batch_labels.equal(labels):
            raise TSTError(
                "The labels of the batch are changed before the model is called: pass them on as they are. In superposition the labels of a "
                "position are the tokens of the next bag, so a mask made from input_ids hides the wrong targets; mask labels in the data or in "
                "data_collator, which gets single tokens."
            )

    def _check_targets(self, labels: Tensor, options: Mapping[str, Any]) -> None:
        """Raise `TSTError` if a model passes other targets to its loss function than its forward was given."""
        given = self._given.get("labels")
        if torch.compiler.is_compiling() or given is None:
            return
        if self._pass_labels is not None:
            same = self._pass_labels.equal(labels)
        else:  # a change in place shows in the loss of single tokens, as in plain training
            same = labels is given or (
                labels.shape == given.shape and torch.equal(labels, given.to(labels.device))
            )
        changed = [] if same else ["labels"]
        if options.get("shift_labels") is not self._given.get("shift_labels"):
            changed.append("shift_labels")
        if options.get("ignore_index", -100) != self._given.get("ignore_index", -100):
            changed.append("ignore_index")
        if changed:
            raise TSTError(
                f"The model's forward changes {', '.join(changed)} before loss_function, so its targets are not those of the batch: mask or "
                "shift labels in the data. In plain training, tst_fused_loss='off' keeps its own loss."
            )

    def _options(
        self,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Labels and options of the multi-hot loss, from the arguments of the model's forward or loss function."""
        weights = None if labels.dim() == 2 else self.weights
        if weights is None:  # next-token prediction, as bags of one
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            labels = shift_labels.unsqueeze(-1)
        elif shift_labels is not None:
            raise TSTError(
                "shift_labels is given beside labels of bags, which are shifted by a bag already: leave shift_labels out, and give the "
                "data labels that are not shifted."
            )
        else:
            check_shape("labels", labels, (*labels.shape[:-1], len(weights)))
        options = {"weights": weights, "num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        return labels, options


class _KeptLabels:
    """Labels, and a copy of their values, since they may be changed in place."""

    def __init__(self, labels: Tensor) -> None:
        self._labels, self._version, self.values = labels, labels._version, labels.clone()

    def equal(self, labels: Tensor) -> bool:
        """Whether `labels` still have these values."""
        if labels is self._labels and labels._version == self._version:
            return True  # without waiting for the device
        return labels.shape == self.values.shape and torch.equal(labels, self.values.to(labels.device))


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments."""
    parameters = [*inspect.signature(type(module).forward).parameters.values()][1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


class _NoLogits(torch.autograd.Function):
    """An empty tensor instead of the logits `(..., V)` of hidden states `(..., d)`, connected to them in the graph."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.new_empty((*hidden.shape[:-1], 0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class MissingLogits(torch.Tensor):
    """An empty tensor instead of logits that the fused loss does not compute.

    It has a shape, a dtype and a device, and can be copied and passed on. It raises a [`TSTError`] when it is used in a
    computation: an empty sum is 0 and an empty mean is NaN, so a user's extra loss term would be silently wrong.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ not in _HARMLESS:
            raise TSTError(
                f"The logits were not computed ({func.__name__} needs them), because the loss is fused with the head: set "
                "tst_fused_loss='off' to use them; they take memory for each position and token of the vocabulary."
            )
        return super().__torch_function__(func, types, args, kwargs or {})


# Functions allowed on missing logits; `__get__` reads an attribute, such as the shape.
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
    """Empty logits, detached from the backward pass, which the loss keeps."""
    is_empty = isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == 0
    return value.detach().as_subclass(MissingLogits) if is_empty else value
