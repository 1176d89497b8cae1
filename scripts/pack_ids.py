#!/usr/bin/env python
"""Make a file of token ids, as `--train_file ids.npy` takes it, of parts that hold ids one after the other.

    python scripts/pack_ids.py --inputs part0.u16.xz part1.u16.xz --eos_id 0 --seed 0 --output train.npy
    python scripts/pack_ids.py --inputs val.bin --output valid.npy

A part is raw little-endian ids (`.bin`, as nanoGPT writes them), a NumPy array (`.npy`), or raw ids packed by xz (`.xz`). With a
seed, the documents of all parts are shuffled together; `eos_id` is what each ends with.
"""

from __future__ import annotations

import lzma
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """What to write where."""

    inputs: list[str] = field(metadata={"help": "Files of ids, in their order."})
    output: str = field(metadata={"help": "File to write, .npy."})
    dtype: Literal["uint16", "uint32"] = field(default="uint16", metadata={"help": "Type of raw ids."})
    eos_id: int = field(default=0, metadata={"help": "Id that ends a document."})
    seed: int | None = field(
        default=None, metadata={"help": "Shuffle documents by it; without it they keep their order."}
    )


def read_part(path: str, dtype: str) -> NDArray[np.unsignedinteger]:
    """The ids of one part."""
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r")
    data = lzma.decompress(Path(path).read_bytes()) if path.endswith(".xz") else Path(path).read_bytes()
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))


def shuffle_documents(
    ids: NDArray[np.unsignedinteger], eos_id: int, seed: int
) -> NDArray[np.unsignedinteger]:
    """The same documents in another order. What follows the last end is a document, too."""
    ends = np.flatnonzero(ids == eos_id) + 1
    documents = [part for part in np.split(ids, ends) if len(part)]
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[i] for i in order])


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if not args.output.endswith(".npy"):
        sys.exit(f"--output must end in .npy, but is {args.output}.")
    with ThreadPoolExecutor() as pool:  # lzma works without Python's lock
        ids = np.concatenate(list(pool.map(lambda path: read_part(path, args.dtype), args.inputs)))
    if args.seed is not None:
        ids = shuffle_documents(ids, args.eos_id, args.seed)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    np.save(args.output, ids.astype(ids.dtype.newbyteorder("="), copy=False))
    print(f"{len(ids):,} ids, {np.count_nonzero(ids == args.eos_id):,} ends of documents: {args.output}")


if __name__ == "__main__":
    main()
