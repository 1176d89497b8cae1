"""What a causal language model does between its last hidden state and its loss, found by probing its forward.

Families differ there: most apply a plain linear head, some scale the logits (Cohere, Granite), some cap them
(Gemma), some do more. Instead of a list of families, the model's own `forward` runs with stand-ins for the body
and the head, on probe values that reveal the transform between head and loss function.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from ..errors import TSTError
from ..losses.linear import linear_multi_hot_cross_entropy
from .sharding import is_sharded, own_class
from .temporary import replaced, trial_pass

_PROBE_ROWS = 3
_PROBE_LOSS = 7.0

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LinearHead:
    """A head that can be fused with the loss: `z = logit_scale · (W h + b)`, then `softcap · tanh(z / softcap)`.

    Args:
        module (`nn.Linear`): The head; its `weight` and `bias` are read at each step.
        logit_scale (`float`): Factor on its output; 1 for none.
        softcap (`float`, *optional*): Cap on the scaled logits.
    """

    module: nn.Linear
    logit_scale: float
    softcap: float | None

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """[`linear_multi_hot_cross_entropy`] of hidden states, with this head's current weight."""
        options |= {"bias": self.module.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return linear_multi_hot_cross_entropy(hidden, self.module.weight, labels, **options)


class UnfusableHeadError(ValueError):
    """The loss of this model cannot be fused with its head; the message says why."""


def inspect_head(model: Any) -> LinearHead:
    """The head of a Transformers model, if head and loss can be fused.

    The model is not changed and none of its layers runs, so this takes milliseconds at any size.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped.

    Raises:
        UnfusableHeadError: If the head is not a plain linear layer on the hidden states, or if it is followed
            by something other than a scale or a soft cap.
    """
    head = model.get_output_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or type(head).forward is not nn.Linear.forward
        or "forward" in vars(head)
    ):
        raise UnfusableHeadError(f"its head is a {own_class(head).__name__}, not a plain nn.Linear")
    has_hooks = (head._forward_hooks or head._forward_pre_hooks) and not is_sharded(head)
    reasons = {
        "its head has forward hooks, which would miss the logits": has_hooks,
        "the weight of its head is parametrized": nn.utils.parametrize.is_parametrized(head),
        "DeepSpeed ZeRO-3 partitions its weight, which has not been tested": hasattr(head.weight, "ds_id"),
        "its head is split by tensor parallelism": (getattr(model, "_tp_size", None) or 1) > 1,
    }
    _refuse(reasons)
    probe = _probe_values(head.out_features)
    scale, softcap = _fit(probe, _logits_at_loss(model, head, probe))
    # The empty tensor of the fused path must pass through the rest of forward, too.
    _logits_at_loss(model, head, probe[..., :0])
    return LinearHead(head, scale, softcap)


def computes_own_loss(model: Any) -> bool:
    """Whether a model computes its loss itself, in training or evaluation, without calling its `loss_function`.

    If the probe cannot reach the loss, a warning is logged.

    Args:
        model (`PreTrainedModel`): A causal language model, not wrapped.

    Raises:
        TSTError: If superposition cannot replace the loss: it is another one than the mean next-token cross entropy of the logits that
            the model returns, or the model changes its labels.
    """
    computes_itself = False
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return False
    name, probe = own_class(model).__name__, _probe_values(weight.shape[0]).clamp(-3, 3)
    for training in (False, True):
        try:
            given, inputs, _, outputs = _run_to_loss(model, head, probe, training)
        except UnfusableHeadError as error:
            logger.warning(
                f"Cannot check that {name} calls `loss_function`: {error}. Compare its first loss with log(vocab_size)."
            )
            return False
        if not given:
            if not _is_next_token_loss(outputs, inputs["labels"]):
                raise TSTError(
                    f"{name} computes its loss itself, and not as the mean next-token cross entropy of the logits that it returns, so "
                    "superposition cannot replace it: let its forward call self.loss_function(logits, labels, vocab_size). If a fused loss is "
                    "patched into its forward, turn it off: fused_linear_cross_entropy=False (Liger), enable_liger_kernel: false "
                    "(LLaMA-Factory), liger_fused_linear_cross_entropy: false or cut_cross_entropy: false (Axolotl); a model of Unsloth must be "
                    "loaded with Transformers instead."
                )
            computes_itself = True
        elif not isinstance(given["labels"], Tensor) or given["labels"].shape != (1, _PROBE_ROWS):
            raise TSTError(
                f"{name} changes its labels before `loss_function`, so superposition cannot replace its loss: set tst_phase_ratio=0."
            )
    return computes_itself


def loss_and_logits(outputs: Any) -> tuple[Any, Any]:
    """The loss and the logits of a forward pass with labels, which may return a tuple or any mapping."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss"), outputs.get("logits")
    return (*outputs, None)[:2] if isinstance(outputs, tuple) else (None, None)


def _is_next_token_loss(outputs: Any, labels: Tensor) -> bool:
    """Whether the loss of `outputs` is the mean next-token cross entropy of its logits, to a precision that shows other terms."""
    loss, logits = loss_and_logits(outputs)
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor) or logits.shape[:2] != labels.shape:
        return False
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
    return torch.allclose(loss.float(), expected, rtol=1e-5)


def _probe_values(vocabulary: int) -> Tensor:
    """Probe logits from tiny to huge, float32 of shape `(1, _PROBE_ROWS, vocabulary)`."""
    magnitudes = torch.tensor([1e-3, 0.5, 3.0, 20.0, 150.0, 1e4, -1e-3, -0.5, -3.0, -20.0, -150.0, -1e4])
    count = _PROBE_ROWS * vocabulary
    return magnitudes.repeat(-(-count // len(magnitudes)))[:count].view(1, _PROBE_ROWS, vocabulary)


def _fit(probe: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap that turn `probe` into `logits`."""
    if logits.shape != probe.shape:
        raise UnfusableHeadError(
            f"its loss is given logits of shape {tuple(logits.shape)}, not the head's {tuple(probe.shape)}"
        )
    given, found = probe.cpu().double(), logits.cpu().double()  # Apple's GPUs have no float64
    one, its_logit = given.flatten()[0], found.flatten()[0]  # too small for any cap to have an effect
    scale = _rounded((its_logit / one).item())
    if _agrees(given * scale, found):
        return scale, None
    softcap = _rounded(found.abs().max().item())
    scale = _rounded((softcap * torch.atanh(its_logit / softcap) / one).item())
    if _agrees(softcap * torch.tanh(given * scale / softcap), found):
        return scale, softcap
    raise UnfusableHeadError("what it does with logits before the loss is neither a scale nor a soft cap")


def _rounded(value: float) -> float:
    """`value` rounded, if only the last bits of float32 differ from a round number such as 1."""
    rounded = float(f"{value:.6g}")
    return rounded if abs(rounded - value) <= 2e-7 * abs(value) else value


def _agrees(expected: Tensor, found: Tensor) -> bool:
    return bool(torch.isclose(expected, found, rtol=1e-4, atol=1e-6).all())


@dataclass
class _AnyOutput(ModelOutput):
    """Output of the stand-in body: a hidden state, and `None` under every other name."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


def _run_to_loss(
    model: Any, head: Any, returned: Tensor, training: bool = True, runs_body: bool = False
) -> tuple[dict[str, Any], dict[str, Any], list[Any], Any]:
    """Run the model's forward, in training or evaluation mode, with a head that returns `returned`.

    A stand-in takes the place of the body. The body itself runs with `runs_body`, and if the forward fails with the stand-in or does
    not call the loss function: what the body returns may be part of the loss. Only then do its modules change their mode, too.

    Returns:
        The arguments of the loss function, empty if it was not called; the arguments of forward besides ids; the first
        argument of each call of the head; and the output of forward.

    Raises:
        UnfusableHeadError: If forward fails.
    """
    runs_body = runs_body or model.base_model is model
    weight = head.weight
    hidden = torch.zeros(1, _PROBE_ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    padding = getattr(model.config, "pad_token_id", None)
    # Ids that a loss might leave out are targets: the first one, and the padding token.
    has_padding = padding is not None and 0 <= padding < len(weight)
    ids = torch.tensor([[1, 0, padding if has_padding else 2]], device=weight.device)
    inputs: dict[str, Any] = {"labels": ids}
    if hasattr(model.config, "output_router_logits"):
        inputs["output_router_logits"] = False
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values()):
        inputs["num_items_in_batch"] = 3  # as Trainer hands it to models that take such arguments
    stand_in = _StandIn(head, returned.to(weight.device))
    body = _StandIn(model.base_model, _AnyOutput(last_hidden_state=hidden))
    stand_ins = {head: stand_in} | ({} if runs_body else {model.base_model: body})
    given: dict[str, Any] = {}

    def loss_function(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.update({"num_items_in_batch": None, **kwargs, "logits": logits, "labels": labels})
        return torch.tensor(_PROBE_LOSS, device=logits.device)

    with ExitStack() as stack:
        stack.enter_context(trial_pass(weight.device))
        stack.enter_context(torch.enable_grad())  # so that what has a learned factor shows
        stack.enter_context(torch.autocast(weight.device.type, enabled=False))
        stack.enter_context(replaced(vars(model), _loss_function=loss_function))
        for part in model.modules() if runs_body else [model]:
            stack.enter_context(replaced(vars(part), training=training))
        for modules in [parent._modules for parent in model.modules()]:
            for name, child in modules.items():
                if child in stand_ins:
                    stack.enter_context(replaced(modules, **{name: stand_ins[child]}))
        # FSDP gathers the weights of layers only if the whole model is called.
        run = model if runs_body and is_sharded(model) else model.forward
        try:
            outputs = run(input_ids=ids, **inputs)
        except Exception as error:  # a family may access anything that the stand-ins lack
            if runs_body:
                raise UnfusableHeadError(
                    f"its forward cannot be followed from head to loss ({type(error).__name__}: {error})"
                ) from error
            given.clear()
    if given or runs_body:
        return given, inputs, stand_in.calls, outputs
    return _run_to_loss(model, head, returned, training, runs_body=True)


def _logits_at_loss(model: Any, head: nn.Linear, returned: Tensor) -> Tensor:
    """The logits that reach the loss function when the head returns `returned`.

    Raises:
        UnfusableHeadError: If the forward does more between head and loss than scaling and capping logits.
    """
    given, inputs, calls, outputs = _run_to_loss(model, head, returned)
    if not given:
        raise UnfusableHeadError("its forward does not call loss_function")
    shapes = [getattr(call, "shape", None) for call in calls]
    has_labels = isinstance(given["labels"], Tensor) and torch.equal(given["labels"], inputs["labels"])
    keeps_inputs = has_labels and given["num_items_in_batch"] == inputs.get("num_items_in_batch")
    total, _ = loss_and_logits(outputs)
    is_total = isinstance(total, Tensor) and total.flatten().tolist() == [_PROBE_LOSS]
    reasons = {
        "something with parameters is between its head and its loss": given["logits"].requires_grad,
        "its head is not applied once to the hidden states of all positions": shapes
        != [(1, _PROBE_ROWS, head.weight.shape[1])],
        "its forward changes labels or num_items_in_batch before loss_function": not keeps_inputs,
        "its forward adds something to what loss_function returns, such as a z-loss of the logits": not is_total,
    }
    _refuse(reasons)
    return given["logits"]


def _refuse(reasons: dict[str, Any]) -> None:
    """Raise [`UnfusableHeadError`] with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise UnfusableHeadError(reason)


class _StandIn(nn.Module):
    """Replaces a module: returns `answer` when called, and forwards everything else to the module."""

    def __init__(self, module: nn.Module, answer: Any) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)
        self.answer = answer
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args[0] if args else None)
        return self.answer

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "module"), name)
