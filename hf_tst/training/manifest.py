"""`manifest.json`: size and hash of every file of a checkpoint, written when all of them are on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import xxhash

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 2


def write_manifest(folder: str | Path) -> None:
    """Bring all files below `folder` to the disk, and write their manifest last.

    The files are read once, from the memory they have just been written from. XXH3 takes a tenth of a second per gigabyte,
    so hashing costs little beside writing; it finds damage, not forgery.

    Args:
        folder: The folder, which nobody writes to any more.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        flush_to_disk(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for path in (folder / MANIFEST_FILE, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_to_disk(path)


def manifest_problem(folder: str | Path) -> str | None:
    """What is wrong with a folder that has a manifest, as the end of a sentence; `None` if nothing is.

    Files that the manifest does not name are not looked at. Sizes are compared before anything is read.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): (int(e["bytes"]), str(e["xxh3_128"])) for name, e in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST_FILE} cannot be read"
    for name, (size, _) in files.items():
        if not (path := folder / name).is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    for name, (_, expected) in files.items():
        if _hash(folder / name) != expected:
            return f"{name} does not hold what was written (its hash differs)"
    return None


def flush_to_disk(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
