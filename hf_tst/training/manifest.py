"""`manifest.json`: size and SHA-256 of every file of a checkpoint, written when all of them are on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1


def write_manifest(folder: str | Path) -> None:
    """Bring all files below `folder` to the disk, and write their manifest last.

    The files are read once, from the memory they have just been written from: about a second a gigabyte and file
    (SHA-256 on one core), four files at once.

    Args:
        folder: The folder, which nobody writes to any more.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(_describe_on_disk, paths))
    files = {str(path.relative_to(folder)): entry for path, entry in zip(paths, entries, strict=True)}
    manifest = folder / MANIFEST_FILE
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=2) + "\n"
    manifest.write_text(text, encoding="utf-8")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_to_disk(path)


def manifest_problem(folder: str | Path) -> str | None:
    """What is wrong with a folder that has a manifest, as the end of a sentence; `None` if nothing is.

    Files that the manifest does not name are not looked at. Sizes are compared before anything is read.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in content["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST_FILE} cannot be read"
    for name, (size, _) in files.items():
        if not (path := folder / name).is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda name: _sha256(folder / name), files)
        for (name, (_, expected)), found_hash in zip(files.items(), hashes, strict=True):
            if found_hash != expected:
                return f"{name} does not hold what was written (its SHA-256 differs)"
    return None


def flush_to_disk(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe_on_disk(path: Path) -> dict[str, Any]:
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
