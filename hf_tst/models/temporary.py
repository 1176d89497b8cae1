"""Changes that are undone at the end of a context, also after an exception: values of an object, and a probing forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def trial_pass(device: torch.device) -> Iterator[None]:
    """Context for a probing forward pass: without gradients, and with the random state restored afterwards."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def replaced(entries: dict[str, Any], /, **values: Any) -> Iterator[None]:
    """Context in which `entries`, such as the attributes or modules of an object, have other values."""
    before = {name: entries[name] for name in values if name in entries}
    entries.update(values)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                entries[name] = before[name]
            else:
                entries.pop(name, None)
