"""`manifest.json`, the size and hash of every file of a checkpoint, and how files reach the disk."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xxhash

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 2


def write_manifest(folder: str | Path) -> None:
    """Write the manifest of all files below `folder`, and flush it and the entries of the folders to disk.

    The files are read once more, usually from the page cache, several at a time. XXH3 detects damage, not forgery.

    Args:
        folder: A complete folder.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    with ThreadPoolExecutor() as threads:
        hashes = list(threads.map(_hash, paths))
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for path in (folder / MANIFEST_FILE, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_to_disk(path)


def manifest_problem(folder: str | Path) -> str | None:
    """What is wrong with a folder that has a manifest, as the end of a sentence; `None` if it is intact.

    Files that are not in the manifest are ignored. Sizes are compared before any file is read.
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
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until all files below a folder are on the disk; what somebody removes meanwhile is left out."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            with suppress(FileNotFoundError):
                flush_to_disk(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
