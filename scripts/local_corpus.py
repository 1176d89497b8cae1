#!/usr/bin/env python
"""Write a corpus of the text that this machine has, and a tokenizer for it: sources of Python, or text files of folders.

    python scripts/local_corpus.py --output_dir runs/corpus --vocab_size 16384 --packages True
    python scripts/local_corpus.py --output_dir runs/prose --folders /usr/share/doc ~/books

Then train or compare with `--train_file runs/corpus/corpus.jsonl --tokenizer_name runs/corpus/tokenizer`.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_tst.quickstart import installed_package_files, standard_library_files, train_tokenizer

# .dz, a dictionary's file, is gzip, too.
TEXT_SUFFIXES = (".txt", ".rst", ".md", ".dict")
GZIP_SUFFIXES = (".gz", ".dz")
DOCUMENT_CHARACTERS = 100_000


@dataclass
class Arguments:
    """What to write where."""

    output_dir: str = field(default="runs/corpus", metadata={"help": "Folder to write to."})
    vocab_size: int = field(default=16384, metadata={"help": "Tokens of the byte-level BPE vocabulary."})
    packages: bool = field(default=False, metadata={"help": "Add the sources of installed packages."})
    folders: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Take the text files (.txt, .rst, .md, also as .gz) of these folders instead of sources."
        },
    )
    max_bytes: int = field(default=200_000_000, metadata={"help": "Stop after so many bytes of text."})
    tokenizer_bytes: int = field(default=20_000_000, metadata={"help": "Bytes to make the vocabulary from."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of files."})


def text_files(folders: list[str]) -> list[Path]:
    """The text files of `folders`, plain or compressed, in a fixed order."""
    found = []
    for folder in folders:
        if not Path(folder).is_dir():
            sys.exit(f"--folders names {folder}, which is not a folder.")
        for path in sorted(Path(folder).rglob("*")):
            name = path.with_suffix("") if path.suffix in GZIP_SUFFIXES else path
            if name.suffix in TEXT_SUFFIXES and path.is_file():
                found.append(path)
    return found


def read(path: Path) -> str:
    """The text of a file, which may be compressed."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in GZIP_SUFFIXES else data).decode("utf-8", errors="replace")


def documents(path: Path) -> Iterator[str]:
    """A file's text, in parts of whole lines if it is long, so that one book is not one document."""
    part: list[str] = []
    size = 0
    for line in read(path).splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.folders:
        files = text_files(args.folders)
    else:
        files = standard_library_files() + (installed_package_files() if args.packages else [])
    texts = list(dict.fromkeys(text for file in files for text in documents(file) if text.strip()))
    if not texts:
        sys.exit(f"No text was found in {args.folders or 'this Python'}.")
    random.Random(args.seed).shuffle(texts)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    size, written, for_tokenizer = 0, 0, []
    with open(output / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        for text in texts:
            corpus.write(json.dumps({"text": text}) + "\n")
            if size < args.tokenizer_bytes:
                for_tokenizer.append(text)
            written += 1
            size += len(text.encode())
            if size >= args.max_bytes:
                break
    tokenizer = train_tokenizer(for_tokenizer, args.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")
    print(f"{written} documents, {size} bytes, {len(tokenizer)} tokens of vocabulary: {output}")


if __name__ == "__main__":
    main()
