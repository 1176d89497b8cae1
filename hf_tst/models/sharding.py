"""Models sharded by FSDP: their classes, their full weights, and optimizers without some of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module itself."""
    return isinstance(module, FSDPModule)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard` replaced it by its own."""
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if FSDPModule in classes else type(module)


def full_state_dict(model: Any) -> dict[str, Any]:
    """All weights of a model that `fully_shard` has sharded, in the form that `save_pretrained` takes.

    Every rank must call it. The first rank gets the weights, on its CPU; other ranks get an empty dict. Tied weights appear
    once, as in an ordinary checkpoint.

    Args:
        model (`PreTrainedModel`): The sharded model, not wrapped in anything else.

    Returns:
        `dict`: The weights by name.

    Example:
        >>> weights = full_state_dict(model)
        >>> if torch.distributed.get_rank() == 0:
        ...     model.save_pretrained("final", state_dict=weights)
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return without_tied(model, get_model_state_dict(model, options=options))


def load_full_state_dict(module: Any, weights: dict[str, Any]) -> None:
    """Load full weights, as [`full_state_dict`] returns them, into a module that may be sharded.

    Every rank must call it, with all weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))


@contextmanager
def left_out_of_optimizer(optimizer: Any, parameters: Iterable[Any]) -> Iterator[None]:
    """Context that hides parameters from an optimizer, to load a state that does not contain them.

    PyTorch requires a sharded optimizer state to contain every parameter, even those that had no gradient yet.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, with these parameters.
        parameters: The parameters to hide.
    """
    unknown = {id(parameter) for parameter in parameters}
    whole = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in unknown]
    try:
        yield
    finally:
        for group, known in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = known


def without_tied(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights of a model without tied duplicates."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
