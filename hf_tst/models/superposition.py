"""The model hook: token superposition on an unmodified Transformers model, and its undo.

No model class is changed. Hooks on the model instance and on its input embedding average bags where the model
looks tokens up ([`_BagInput`]), and the instance's `loss_function` takes 3-D labels (see `fused.py`). In superposition both
act on 3-D tensors only, so ordinary 2-D batches (evaluation, generation) are not affected, except by
[`fused_evaluation_loss`].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bags.folding import IGNORE_INDEX, DocumentBoundaries, average_embeddings
from ..bags.phases import TSTMode, check_bag_size
from ..bags.weighting import InputWeighting, OffsetWeighting, input_weights, offset_weights, resolve_weighting
from ..errors import TSTError, check_choice
from ..losses.multi_hot import check_shape
from .fused import FusedLoss, TSTLoss, replaced_loss
from .sharding import own_class
from .temporary import replaced

# The stand-in for the first bag; those of other bags are below it. Some families give -1, -100 and -200 a meaning.
FIRST_STAND_IN = -(2**20)


@contextmanager
def token_superposition(
    model: nn.Module,
    bag_size: int,
    *,
    offset_weighting: OffsetWeighting = "uniform",
    input_weighting: InputWeighting = "uniform",
    mode: TSTMode = "full",
    fused_loss: FusedLoss = "auto",
    document_boundaries: DocumentBoundaries = "ignore",
) -> Iterator[nn.Module]:
    """Context in which a causal language model reads bags of tokens and predicts the next bag.

    Inside, `model(input_ids=bags, labels=labels).loss` is the superposition loss, where both are `torch.LongTensor` of shape
    `(B, l, s)` (`mode="output"`: `input_ids` stays `(B, l)`), aligned as `DataCollatorForTokenSuperposition`
    makes them. The model sees l latent positions: `attention_mask` and `position_ids`, if any, are `(B, l)`.
    Calls with ordinary 2-D ids and labels do not change. `loss` (nats, float32, 0-dim) is the mean over target bags. For
    gradient accumulation, pass `num_items_in_batch`: then it is the sum over target bags divided by this number (see
    [`count_target_bags`]). After the context, also after an exception, the model's hooks, attributes, outputs and loss are
    restored. A deep copy made inside has its own weights, and stays in superposition when the context ends.

    Args:
        model: A causal language model of Transformers, also one wrapped by PEFT, DDP, FSDP or `torch.compile`.
        bag_size (`int`): Tokens per bag, s.
        offset_weighting (`str`, *optional*, defaults to `"uniform"`): Weights of a target bag, see [`offset_weights`].
        input_weighting (`str`, *optional*, defaults to `"uniform"`): Weights of the averaged embeddings, see [`input_weights`].
        mode (`str`, *optional*, defaults to `"full"`): `"input"` averages the input and predicts the first token of the next
            bag; `"output"` reads single tokens and predicts the next s.
        fused_loss (`str`, *optional*, defaults to `"auto"`): Fuse the loss with the head, so that in training mode the logits of
            a batch are never computed: then `outputs.logits` of a forward pass with bags of labels is empty.
            `"auto"` fuses if the model allows it, `"on"` raises an error if it does not, `"off"` never fuses.
        document_boundaries (`str`, *optional*, defaults to `"ignore"`): `"respect"` takes bags that end where documents end, with
            -100 in their empty places, as `DataCollatorForTokenSuperposition` makes them; a bag is then averaged over
            the tokens that it holds.

    Yields:
        The same `model`.

    Raises:
        TSTError: If an argument is out of range, or the model is not supported (the message says why).
        RuntimeError: If the model is already inside such a context, or one of [`fused_next_token_loss`].

    Example:
        >>> with token_superposition(model, bag_size=4):
        ...     loss = model(input_ids=bags, labels=labels).loss
        ...     loss.backward()
    """
    check_bag_size(bag_size)
    check_choice("mode", mode, TSTMode)
    check_choice("document_boundaries", document_boundaries, DocumentBoundaries)
    weighting = resolve_weighting(mode, offset_weighting, input_weighting)
    called, core = find_language_model(model)
    device = next(core.parameters()).device
    averaged = None if input_weighting == "uniform" else input_weights(input_weighting, bag_size).to(device)
    bags = _BagInput(bag_size, mode, averaged, document_boundaries == "respect")
    embedding = core.get_input_embeddings()
    with (
        called.register_forward_pre_hook(bags.before_forward, with_kwargs=True),
        replaced_loss(called, core, offset_weights(weighting, bag_size).to(device), fused_loss),
        called.register_forward_hook(bags.after_forward, always_call=True),
        core.base_model.register_forward_pre_hook(bags.before_body, with_kwargs=True),
        # Around other hooks on the embedding, which see its ordinary input and output.
        embedding.register_forward_pre_hook(bags.before_embedding, with_kwargs=True, prepend=True),
        embedding.register_forward_hook(bags.after_embedding),
    ):
        yield model


@contextmanager
def fused_next_token_loss(model: nn.Module, fused_loss: FusedLoss = "auto") -> Iterator[nn.Module]:
    """Context in which a causal language model computes its next-token loss fused with its head.

    The loss (nats, float32, 0-dim) is the model's own up to rounding, but 0 for a batch without targets, where the model's own is
    NaN. In training mode, the logits of a batch are never computed: with labels of shape `(B, l)`, `outputs.logits` is empty.
    [`token_superposition`] fuses its own loss, so this is for the recovery phase and for baselines. After the context the model
    is restored.

    Args:
        model: As for [`token_superposition`].
        fused_loss (`str`, *optional*, defaults to `"auto"`): As for [`token_superposition`]; with `"off"` the model
            computes its own loss from all logits.

    Yields:
        The same `model`.

    Raises:
        TSTError: If `fused_loss` is `"on"` and the loss of the model cannot be fused.
        RuntimeError: If the model is already inside such a context, or one of [`token_superposition`].

    Example:
        >>> with fused_next_token_loss(model.train()):
        ...     loss = model(input_ids=tokens, labels=tokens).loss
        ...     loss.backward()
    """
    called, core = find_language_model(model)
    with replaced_loss(called, core, None, fused_loss):
        yield model


@contextmanager
def fused_evaluation_loss(model: nn.Module, fused_loss: FusedLoss = "auto") -> Iterator[nn.Module]:
    """Context in which a model in evaluation mode computes its next-token loss fused with its head, and no logits.

    With labels, `outputs.logits` is empty; without labels, it is not. The loss is the model's own up
    to rounding, and NaN without targets. The context may be entered inside [`token_superposition`] and
    [`fused_next_token_loss`]; then it fuses if they do.

    Args:
        model: As for [`token_superposition`].
        fused_loss (`str`, *optional*, defaults to `"auto"`): As for [`token_superposition`]; `"off"` changes nothing.

    Yields:
        The same `model`.

    Raises:
        TSTError: If `fused_loss` is `"on"` and the loss of the model cannot be fused.
    """
    called, core = find_language_model(model)
    with ExitStack() as stack:
        if fused_loss != "off":
            if not isinstance(core.loss_function, TSTLoss):
                stack.enter_context(replaced_loss(called, core, None, fused_loss))
            stack.enter_context(replaced(vars(core.loss_function), fuses_evaluation=True))
        yield model


def find_language_model(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module that is called (a PEFT wrapper or the model itself) and the Transformers model inside it.

    Raises:
        TSTError: With the reason, if superposition cannot train this model.
    """
    from accelerate.utils import extract_model_from_parallel

    called = extract_model_from_parallel(model, keep_torch_compile=False)
    core = called
    if hasattr(called, "peft_config") and hasattr(called, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in called.peft_config.values()):
            raise TSTError(
                "Token superposition cannot train PEFT prompt learning, which adds virtual tokens: use another method, such as LoRA."
            )
        core = called.get_base_model()
    _check_model(core)
    return called, core


def _check_model(model: Any) -> None:
    name = own_class(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "loss_function"):
        raise TSTError(
            f"Token superposition needs a PreTrainedModel of Transformers, but got {name}: load the model with AutoModelForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TSTError(
            f"Token superposition needs a decoder-only model, but {name} is an encoder-decoder: use another model."
        )
    if not _is_causal(model):
        raise TSTError(
            f"{name} is not a text-only causal language model: load it with AutoModelForCausalLM, or with its own ...ForCausalLM class."
        )
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding = head = None
    if embedding is None or head is None:
        raise TSTError(
            f"{name} does not say which module is its embedding or its head: give its class the methods get_input_embeddings and "
            "get_output_embeddings, which return them."
        )
    inside = set(embedding.modules())
    for part in model.modules():
        # A body passes ids to the input embedding inside it; any other module that takes ids looks them up itself,
        # unless it is a table of positions.
        names = inspect.signature(type(part).forward).parameters
        takes_ids = any(argument.endswith("input_ids") for argument in names) and part not in inside
        is_table_of_positions = isinstance(part, nn.Embedding) and "position_ids" in names
        if takes_ids and not is_table_of_positions and embedding not in part.modules():
            taker = own_class(part).__name__
            raise TSTError(
                f"{name} also reads token ids outside its input embedding ({taker} takes `input_ids`), where bags do not reach: set tst_phase_ratio=0."
            )


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    own = own_class(model)
    # A user's subclass of a causal language model is one, whatever its name.
    known = next((parent for parent in own.__mro__ if parent.__name__ in listed), own)
    name = known.__name__
    # A class of the user's own may have any name that does not tell of another task: its loss is checked.
    loss_types = ("ForCausalLM",) if own.__module__.startswith("transformers.") else ("ForCausalLM", None)
    if name not in listed and getattr(model, "loss_type", None) not in loss_types:
        return False
    # BERT-like models share a class between both directions and are causal only as decoders. Families that
    # are always causal leave `is_decoder` at its default and have no masked-LM sibling.
    sibling = name.replace("LMHeadModel", "ForMaskedLM").replace("ForCausalLM", "ForMaskedLM")
    has_sibling = sibling != name and hasattr(inspect.getmodule(known), sibling)
    return not has_sibling or bool(getattr(model.config, "is_decoder", False))


@dataclass(eq=False)
class _BagInput:
    """Hooks that average the embeddings of a bag where a model looks tokens up; the model's forward sees 2-D ids.

    What a family does to its embeddings, such as scaling, it does to the mean. In place of ids the model sees stand-ins: the numbers
    of the bags, counted down from `FIRST_STAND_IN`. No table has such a row, so a look-up without averaging fails, and no stand-in
    counts as padding. The embedding may get them in another order, or in parts. They are int32, so that `torch.compile` recompiles:
    it does not notice new hooks.

    It holds no reference to the model, so a deep copy of a hooked model has its own hooks.

    Args:
        bag_size (`int`): Tokens per bag, s.
        mode (`str`): See [`token_superposition`].
        weights (`torch.FloatTensor` of shape `(s,)`, *optional*), has_short_bags (`bool`): See
            [`average_embeddings`].
    """

    bag_size: int
    mode: TSTMode
    weights: Tensor | None
    has_short_bags: bool
    _bags: Tensor | None = None
    _looked_up: Tensor | None = None  # the bags that the embedding was last asked for
    _has_checked_labels: bool = False
    _has_checked_numbers: bool = False

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: records `input_ids` of shape `(B, l, s)`, and passes stand-ins of shape `(B, l)` to the model."""
        self._bags = self._looked_up = None  # of a pass that was interrupted, where no other hook runs
        input_ids = args[0] if args else kwargs.get("input_ids")
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        if input_ids is None:
            return None
        are_bags, positions = input_ids.dim() == 3, tuple(input_ids.shape[:2])
        if are_bags and self.mode == "output":
            raise TSTError("mode='output' reads single tokens: give input_ids of shape (B, l), not bags.")
        if are_bags and input_ids.shape[2:] != (self.bag_size,):
            raise TSTError(
                f"input_ids has shape {tuple(input_ids.shape)}, but the last dimension must be bag_size={self.bag_size}: give the collator and "
                "token_superposition the same bag_size."
            )
        if isinstance(labels, Tensor) and (are_bags or labels.dim() == 3):
            check_shape("labels", labels, (*positions, self.bag_size))
        if not are_bags:
            return None
        if isinstance(mask, Tensor) and mask.dim() in (2, 3):
            check_shape("attention_mask", mask, positions)
        if isinstance(labels, Tensor) and not self._has_checked_labels and not torch.compiler.is_compiling():
            self._has_checked_labels = True  # once, since it synchronizes with the device
            _refuse_copied_labels(input_ids, labels)
        self._bags = input_ids
        count = positions[0] * positions[1]
        numbers = torch.arange(count, dtype=torch.int32, device=input_ids.device).view(positions)
        stand_ins = FIRST_STAND_IN - numbers
        return ((stand_ins, *args[1:]), kwargs) if args else ((), {**kwargs, "input_ids": stand_ins})

    def before_body(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model's body, which sees stand-ins: bags reach it where it is called on its own."""
        _refuse_bags(args[0] if args else kwargs.get("input_ids"))

    def before_embedding(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: the embedding looks up the tokens of the bags whose numbers it is given."""
        ids, *others = args or (kwargs.get("input"),)
        if self._bags is None:
            _refuse_bags(ids)
            return None
        numbers, bags = FIRST_STAND_IN - ids, self._bags.flatten(0, 1).to(ids.device)
        if not self._has_checked_numbers and not torch.compiler.is_compiling():
            self._has_checked_numbers = True  # once, since it synchronizes with the device
            if bool(((numbers < 0) | (numbers >= len(bags))).any()):
                raise TSTError(
                    "The model looks up other ids than those that it is given, such as a padding token, which bags do not have: set "
                    "tst_phase_ratio=0."
                )
        bags = self._looked_up = bags[numbers]
        if self.has_short_bags:
            bags = bags.masked_fill(bags == IGNORE_INDEX, 0)
        return (bags.flatten(-2), *others), {name: value for name, value in kwargs.items() if name != "input"}

    def after_embedding(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        """Forward hook: averages the embeddings `(B, l·s, d)` of the tokens to one vector per bag, `(B, l, d)`."""
        if self._looked_up is None:
            return None
        bags, self._looked_up = self._looked_up, None
        return average_embeddings(embedded, bags, self.weights, self.has_short_bags)

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: ends the pass, also after an exception."""
        self._bags = self._looked_up = None


def _refuse_bags(input_ids: Any) -> None:
    """Raise `TSTError` if a part of the model is given bags, which some families would take for rows of tokens."""
    if isinstance(input_ids, Tensor) and input_ids.dim() == 3:
        raise TSTError(
            f"input_ids of shape {tuple(input_ids.shape)} are bags, but a part of the model, or its forward, was called with them: "
            "call the model itself, as in model(**inputs), which averages them."
        )


def _refuse_copied_labels(bags: Tensor, labels: Tensor) -> None:
    """Raise `TSTError` if the labels of bags are the bags themselves, which a user's `compute_loss` may pass by mistake."""
    targets = labels != IGNORE_INDEX
    # The last bag of a row has no next one. In periodic text, next bags do equal the bags.
    same = bool((labels == bags)[targets].all()) and bool(targets[:, -1].any())
    if same and bool((bags != bags[0, 0, 0]).any()):
        raise TSTError(
            "The labels equal the input bags, so the model would learn to copy: pass the labels of the batch, which "
            "are those of the next bag."
        )
