"""Imports inside the package go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_tst"
# A room, and those that it may import from besides itself and the files beside the rooms.
ROOMS = {
    "losses": set(),
    "bags": set(),
    "records": set(),
    "models": {"losses", "bags"},
    "evaluation": {"models"},
    "mtp": {"models", "losses"},
    "data": set(),
    "batches": {"bags", "data"},
    "planning": {"models", "mtp", "bags", "losses"},
    "checkpoints": {"models", "records"},
}
ROOMS["training"] = {*ROOMS}
ROOMS["integrations"] = {*ROOMS}
ROOMS["pretraining"] = {*ROOMS} - {"integrations"}
ROOMS["experiments"] = {*ROOMS} - {"integrations"}
ROOMS["cli"] = {*ROOMS} - {"integrations"}


def imported_rooms(path):
    """Names directly below the package that a file imports from; fails where it imports scripts."""
    inside = ["hf_tst", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) + 1 - node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")]
            names = [".".join(part for part in [*module, alias.name] if part) for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            assert top != "scripts", f"{path} imports scripts"
            if top == "hf_tst":
                yield rest.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_below_it_alone(room):
    allowed = {room, "errors", "file_lock", "version"} | ROOMS[room]
    for path in (PACKAGE / room).rglob("*.py"):
        found = set(imported_rooms(path)) - allowed
        assert not found, f"{path.relative_to(PACKAGE)} imports {sorted(found)}"


def test_every_room_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*ROOMS}
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "file_lock.py",
        "version.py",
    }
