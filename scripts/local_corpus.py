#!/usr/bin/env python
"""Write a corpus of the text that this machine has, and a tokenizer for it: sources of Python and of installed packages.

    python scripts/local_corpus.py --output_dir runs/corpus --vocab_size 16384 --packages True

Then train or compare with `--train_file runs/corpus/corpus.jsonl --tokenizer_name runs/corpus/tokenizer`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_tst.quickstart import installed_package_files, standard_library_files, train_tokenizer


@dataclass
class Arguments:
    """What to write where."""

    output_dir: str = field(default="runs/corpus", metadata={"help": "Folder to write to."})
    vocab_size: int = field(default=16384, metadata={"help": "Tokens of the byte-level BPE vocabulary."})
    packages: bool = field(default=False, metadata={"help": "Add the sources of installed packages."})
    max_bytes: int = field(default=200_000_000, metadata={"help": "Stop after so many bytes of text."})
    tokenizer_bytes: int = field(default=20_000_000, metadata={"help": "Bytes to make the vocabulary from."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of files."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    files = standard_library_files() + (installed_package_files() if args.packages else [])
    random.Random(args.seed).shuffle(files)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    size, texts, seen = 0, [], set()
    with open(output / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if not text.strip() or text in seen:
                continue
            seen.add(text)
            corpus.write(json.dumps({"text": text}) + "\n")
            if size < args.tokenizer_bytes:
                texts.append(text)
            size += len(text.encode())
            if size >= args.max_bytes:
                break
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(output / "tokenizer")
    print(f"{len(seen)} files, {size} bytes, {len(tokenizer)} tokens of vocabulary: {output}")


if __name__ == "__main__":
    main()
