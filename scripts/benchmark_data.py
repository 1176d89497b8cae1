#!/usr/bin/env python
"""Measure packing and the loader alone, against `datasets.map` packing and the stock Trainer's loader.

    python scripts/benchmark_data.py
    python scripts/benchmark_data.py --tokens 20000000 --block_size 1024 --bag_size 6 --rounds 5

Candidates alternate within a round, and ratios are medians over the rounds of a round's ratio. The loaders give the
same raw tokens: superposition in rows of s blocks, recovery and the stock loader in rows of one. Appends to
benchmarks/data.csv.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from benchmarking import append_rows, format_table, measure_alternating, median_ratio
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.data.packing import pack_blocks
from hf_tst.errors import TSTError

SCALE = 64  # vocabulary of a model that only has to exist


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8_000_000, help="raw tokens to pack and to load")
    parser.add_argument("--document_length", type=int, default=600, help="mean tokens per document")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens per block, L")
    parser.add_argument("--bag_size", type=int, default=6, help="tokens per bag, s")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="loader processes to try")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--csv", default="benchmarks/data.csv", help="file to append to")
    return parser.parse_args()


def make_documents(tokens: int, mean_length: int, folder: str) -> datasets.Dataset:
    """Tokenized documents of random lengths, memory-mapped."""
    generator = np.random.default_rng(0)
    lengths = generator.geometric(1 / mean_length, size=max(1, tokens // mean_length))
    ids = generator.integers(0, SCALE, size=int(lengths.sum()), dtype=np.int32)
    documents = datasets.Dataset.from_dict({"input_ids": np.split(ids, np.cumsum(lengths)[:-1])})
    documents.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def group_texts(documents: datasets.Dataset, block_size: int) -> datasets.Dataset:
    """The packing of the Transformers examples: it drops a remainder in every batch of 1000 documents."""

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        total = len(joined) // block_size * block_size
        blocks = [joined[i : i + block_size] for i in range(0, total, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return documents.map(group, batched=True, load_from_cache_file=False, new_fingerprint=fresh_name())


def fresh_name() -> str:
    """A fingerprint that no cache holds."""
    return f"{os.getpid():x}{time.perf_counter_ns():x}"


def pack_afresh(documents: datasets.Dataset, block_size: int) -> datasets.Dataset:
    documents = datasets.load_from_disk(Path(documents.cache_files[0]["filename"]).parent)
    documents._fingerprint = fresh_name()
    return pack_blocks(documents, block_size)


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SCALE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )


def common_arguments(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": options.batch_size,
        "dataloader_num_workers": workers,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def stock_loader(blocks: datasets.Dataset, options: argparse.Namespace, workers: int) -> Callable[[], int]:
    """Reads as many batches of the stock Trainer as hold the tokens that are asked for."""
    args = TrainingArguments(**common_arguments(options, workers))
    trainer = Trainer(tiny_model(), args, default_data_collator, train_dataset=blocks)
    batches = options.tokens // (options.batch_size * options.block_size)
    return lambda: read(trainer.get_train_dataloader(), batches)


def our_loader(
    blocks: datasets.Dataset, options: argparse.Namespace, workers: int, ratio: float
) -> Callable[[], int]:
    """The same raw tokens by TSTTrainer: all of them superposed with ratio 1, none with a ratio below a step."""
    per_row = options.bag_size if ratio == 1 else 1
    steps = options.tokens // (options.batch_size * options.block_size * per_row)
    args = TSTTrainingArguments(
        max_steps=steps,
        tst_phase_ratio=ratio,
        tst_bag_size=options.bag_size,
        **common_arguments(options, workers),
    )
    trainer = TSTTrainer(tiny_model(), args, train_dataset=blocks)
    return lambda: read(trainer.get_train_dataloader(), steps)


def read(loader: Any, batches: int) -> int:
    tokens = 0
    for _, batch in zip(range(batches), loader, strict=False):
        tokens += batch["input_ids"].numel()
    return tokens


def rows_of(
    what: str, seconds: dict[str, list[float]], tokens: dict[str, int], reference: str, workers: int | str
) -> list[dict[str, Any]]:
    return [
        {
            "what": what,
            "candidate": name,
            "workers": workers,
            "raw_tokens": tokens[name],
            "tokens_per_second": round(tokens[name] / statistics.median(times)),
            # Time a token against the reference's: below 1 is faster.
            "time_ratio": round(
                median_ratio(times, seconds[reference]) * tokens[reference] / tokens[name], 3
            ),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parse_arguments()
    datasets.disable_progress_bars()
    logging.getLogger("hf_tst").setLevel(logging.ERROR)
    device = torch.device("cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        documents = make_documents(options.tokens, options.document_length, f"{folder}/documents")
        packers: dict[str, Callable[[], Any]] = {
            "map group_texts": lambda: group_texts(documents, options.block_size),
            "pack_blocks": lambda: pack_afresh(documents, options.block_size),
        }
        read_tokens = dict.fromkeys(packers, int(sum(map(len, documents.with_format("numpy")["input_ids"]))))
        seconds = measure_alternating(packers, device, max(1, options.rounds // 2))
        results += rows_of("packing", seconds, read_tokens, "map group_texts", "")

        stock = group_texts(documents, options.block_size)
        packed = pack_blocks(documents, options.block_size)
        options.tokens = min(len(stock), len(packed)) * options.block_size
        group = options.batch_size * options.block_size * options.bag_size
        options.tokens = options.tokens // group * group
        for workers in options.workers:
            loaders = {
                "stock Trainer": stock_loader(stock, options, workers),
                "superposition": our_loader(packed, options, workers, ratio=1),
                "recovery": our_loader(packed, options, workers, ratio=1e-9),
            }
            counts = {name: load() for name, load in loaders.items()}
            if len(set(counts.values())) > 1:
                raise TSTError(f"The loaders do not give equal raw tokens, but {counts}.")
            seconds = measure_alternating(loaders, device, options.rounds)
            results += rows_of("loader", seconds, counts, "stock Trainer", workers)
    print(format_table(results))
    append_rows(options.csv, results, device)


if __name__ == "__main__":
    main()
