#!/usr/bin/env python
"""Write a corpus from text on this machine, and a tokenizer for it: sources of Python, or text files of folders.

    python scripts/local_corpus.py --output_dir runs/corpus --vocab_size 16384 --packages True
    python scripts/local_corpus.py --output_dir runs/prose --folders /usr/share/doc ~/books

Then train or compare with `--train_file runs/corpus/corpus.jsonl --tokenizer_name runs/corpus/tokenizer`.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_tst.data.quickstart import standard_library_files, train_tokenizer
from hf_tst.data.text_files import ending, read_text
from hf_tst.errors import TSTError

TEXT_SUFFIXES = (".txt", ".rst", ".md", ".dict")
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
            "help": "Take the text files (.txt, .rst, .md, .dict, also compressed) of these folders, not sources."
        },
    )
    max_bytes: int = field(default=200_000_000, metadata={"help": "Stop after so many bytes of text."})
    tokenizer_bytes: int = field(default=20_000_000, metadata={"help": "Bytes to make the vocabulary from."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of files."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what is there."})


def text_files(folders: list[str]) -> list[Path]:
    """The text files of `folders`, plain or compressed, in a fixed order."""
    found = []
    for folder in folders:
        if not Path(folder).is_dir():
            sys.exit(f"--folders names {folder}, which is not a folder.")
        for path in sorted(Path(folder).rglob("*")):
            if ending(str(path)) in TEXT_SUFFIXES and path.is_file():
                found.append(path)
    return found


def read(path: Path) -> str:
    """The text of a file; none, and a word on stderr, if it cannot be read or is not UTF-8."""
    try:
        return read_text(str(path))
    except TSTError as error:
        print(f"Left out: {error}", file=sys.stderr)
        return ""


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


def sources(packages: bool, seed: int) -> Iterator[str]:
    """The files of Python's standard library, and of installed packages, in shuffled order."""
    installed = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")) if packages else []
    files = standard_library_files() + installed
    random.Random(seed).shuffle(files)
    return (read(file) for file in files)


def folder_texts(folders: list[str], seed: int) -> list[str]:
    """The documents of the text files of `folders`, in shuffled order."""
    texts = list(dict.fromkeys(text for file in text_files(folders) for text in documents(file)))
    if not any(text.strip() for text in texts):
        sys.exit(f"--folders names {', '.join(folders)}, where no text file was found.")
    random.Random(seed).shuffle(texts)
    return texts


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    there = [str(path) for path in (output / "corpus.jsonl", output / "tokenizer") if path.exists()]
    if there and not args.overwrite:
        sys.exit(
            f"{' and '.join(there)} would be replaced: name another --output_dir, or give --overwrite True."
        )
    texts = folder_texts(args.folders, args.seed) if args.folders else sources(args.packages, args.seed)
    output.mkdir(parents=True, exist_ok=True)
    size, for_tokenizer, seen = 0, [], set()
    with open(output / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        for text in texts:
            if not text.strip() or text in seen:
                continue
            seen.add(text)
            corpus.write(json.dumps({"text": text}) + "\n")
            if size < args.tokenizer_bytes:
                for_tokenizer.append(text)
            size += len(text.encode())
            if size >= args.max_bytes:
                break
    tokenizer = train_tokenizer(for_tokenizer, args.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")
    print(f"{len(seen)} documents, {size} bytes, {len(tokenizer)} tokens of vocabulary: {output}")


if __name__ == "__main__":
    main()
