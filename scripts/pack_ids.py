#!/usr/bin/env python
"""Make a file of token ids, as `--train_file ids.npy` takes it, of parts that hold ids one after the other.

    python scripts/pack_ids.py --inputs part0.u16.xz part1.u16.xz --eos_id 0 --seed 0 --output train.npy
    python scripts/pack_ids.py --inputs val.bin --output valid.npy

A part is raw little-endian ids (`.bin`, as nanoGPT writes them), a NumPy array of whole numbers (`.npy`), or raw ids packed by xz (`.xz`).
With a seed, the documents of all parts are shuffled together; `eos_id` is what each ends with (nanoGPT's GPT-2: 50256).
"""

from __future__ import annotations

import lzma
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import HfArgumentParser

from hf_tst.cli.main import run_command
from hf_tst.errors import TSTError, bad_input

# The first four bytes of a file of llm.c or modded-nanogpt: of ids of GPT-2, and of Llama 3.
LLM_C_MAGIC = tuple(number.to_bytes(4, "little") for number in (20240520, 20240801))


@dataclass
class Arguments:
    """What to write where."""

    inputs: list[str] = field(metadata={"help": "Files of ids, in their order."})
    output: str = field(metadata={"help": "File to write, .npy."})
    dtype: Literal["uint16", "uint32"] = field(
        default="uint16", metadata={"help": "Type of raw ids, and of the output."}
    )
    eos_id: int | None = field(default=None, metadata={"help": "Id that ends a document; needed by seed."})
    seed: int | None = field(
        default=None, metadata={"help": "Shuffle documents by it; without it they keep their order."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the output, if it is there."})


def read_part(path: str, dtype: str) -> NDArray[np.unsignedinteger]:
    """The ids of one part.

    Raises:
        TSTError: If it cannot be read, or holds something else than ids of that type.
    """
    with bad_input(
        f"Cannot read {path} as ids of type {dtype}: ", (OSError, EOFError, ValueError, lzma.LZMAError)
    ):
        if not path.endswith(".npy"):
            data = Path(path).read_bytes()
            data = lzma.decompress(data) if path.endswith(".xz") else data
            raw = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))
            _check_raw(raw, data, path)
            return raw
        ids: NDArray[Any] = np.load(path, mmap_mode="r")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TSTError(
            f"The file {path} must hold one row of token ids, but holds an array of shape {ids.shape} and type {ids.dtype}: "
            "write it with numpy.save(path, ids)."
        )
    for found in (ids.min(initial=0), ids.max(initial=0)):
        if not 0 <= found <= np.iinfo(dtype).max:
            raise TSTError(
                f"The file {path} holds the id {found}, which is no {dtype}: give --dtype uint32, or mend the file."
            )
    return ids.astype(dtype, copy=False)


def _check_raw(raw: NDArray[np.unsignedinteger], data: bytes, path: str) -> None:
    """Raise `TSTError` if raw bytes are ids of a larger type, or begin with a header."""
    if data[:4] in LLM_C_MAGIC:
        raise TSTError(
            f"The file {path} begins with the header of llm.c, 1024 bytes that are no ids: remove them, as with `tail -c +1025`."
        )
    # The other halves of larger ids: no vocabulary has more than a million tokens.
    if len(raw) > 32 and raw[1::2].max() < 16 < raw[::2].max():
        raise TSTError(
            f"Every second id of {path} is below 16, as where ids of a larger type are read: give the type that it holds, as in --dtype uint32."
        )


def shuffle_documents(
    ids: NDArray[np.unsignedinteger], eos_id: int, seed: int
) -> NDArray[np.unsignedinteger]:
    """The same documents in another order. What follows the last end is a document, too."""
    ends = np.flatnonzero(ids == eos_id) + 1
    documents = [part for part in np.split(ids, ends) if len(part)]
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[i] for i in order])


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if not args.output.endswith(".npy"):
        raise TSTError(f"--output must end in .npy, but is {args.output}.")
    if Path(args.output).exists() and not args.overwrite:
        raise TSTError(
            f"--output names {args.output}, which would be replaced: name another file, or give --overwrite True."
        )
    if args.seed is not None and args.eos_id is None:
        raise TSTError("--seed needs --eos_id, the id that documents end with: give both, or neither.")
    with ThreadPoolExecutor() as pool:  # lzma works without Python's lock
        ids = np.concatenate(list(pool.map(lambda path: read_part(path, args.dtype), args.inputs)))
    if args.seed is not None:
        ids = shuffle_documents(ids, args.eos_id, args.seed)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    np.save(args.output, ids.astype(args.dtype, copy=False))
    ends = "" if args.eos_id is None else f", {np.count_nonzero(ids == args.eos_id):,} ends of documents"
    print(f"{len(ids):,} ids{ends}: {args.output}")


if __name__ == "__main__":
    sys.exit(run_command("pack_ids.py", main, sys.argv[1:]))
