"""What the oldest supported packages do otherwise than those of constraints.txt."""

from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


def fails_before(package: str, newer: str, reason: str) -> pytest.MarkDecorator:
    """The mark of a test that fails, or may fail, with a `package` older than the version `newer`."""
    return pytest.mark.xfail(
        Version(version(package)) < Version(newer), reason=f"{package} < {newer}: {reason}"
    )


def params(values: Iterable[Any], failing: Collection[str], mark: pytest.MarkDecorator) -> list[Any]:
    """Parameters of a test, of which those that are named, by themselves or by their attribute `name`, carry a mark."""
    named = [(value, getattr(value, "name", value)) for value in values]
    return [pytest.param(value, id=name, marks=[mark] if name in failing else []) for value, name in named]
