"""What it takes to watch a model's own forward with modules and attributes replaced for a moment, and their undo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard` put one of its own, of another name, in front."""
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if FSDPModule in classes else type(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module itself."""
    return isinstance(module, FSDPModule)


class StandIn(nn.Module):
    """Takes the place of a module: answers calls with `answer`, and anything else as the module would."""

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


@contextmanager
def trial_pass(device: torch.device) -> Iterator[None]:
    """Context for a forward pass on trial: without gradients, and with the random state as before afterwards."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which the instance `owner` has its own attribute `name`; afterwards it is as it was before."""
    attributes = vars(owner)
    had_own = name in attributes
    own = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had_own:
            attributes[name] = own
        else:
            attributes.pop(name, None)


@contextmanager
def replaced_module(root: nn.Module, module: nn.Module, stand_in: nn.Module) -> Iterator[None]:
    """Context in which `stand_in` has the place of `module`, wherever that is inside `root`."""
    places = [
        (parent._modules, name)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if child is module
    ]
    for modules, name in places:
        modules[name] = stand_in
    try:
        yield
    finally:
        for modules, name in places:
            modules[name] = module
