#!/usr/bin/env python
"""Compare plain training and TST, each with AdamW and with Muon: final evaluation losses of scripts/examples/muon.py.

    python scripts/benchmark_muon.py --text runs/prose/corpus.jsonl --tokenizer runs/prose/tokenizer

Every optimizer and arm first runs with each learning rate and the first seed, then with its best rate and the other seeds. A run
that is finished in `--output_dir` is not done again. Appends to benchmarks/muon.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarking import append_rows, format_table
from transformers import AutoConfig, AutoTokenizer

EXAMPLE = Path(__file__).parent / "examples" / "muon.py"
ARMS = {"baseline": 0.0, "tst": 0.3}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="a .jsonl file of documents")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--output_dir", default="runs/muon", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of a run")
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="to choose the best of"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of a run")
    parser.add_argument("--csv", default="benchmarks/muon.csv", help="file to append to")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make folders of the model's configuration with its tokenizer, and of the text; the example's flags that name them."""
    model, text = Path(options.output_dir) / "model", Path(options.output_dir) / "text"
    text.mkdir(parents=True, exist_ok=True)
    link = text / "train.jsonl"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(options.text).absolute())
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.save_pretrained(model)
    AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(model)
    return {"model": model, "dataset": text, "block_size": 64}


def train(
    options: argparse.Namespace, data: dict[str, Any], optimizer: str, arm: str, rate: float, seed: int
) -> float:
    """The final evaluation loss of one run, in nats per token."""
    folder = Path(options.output_dir) / f"{arm}-{optimizer}-lr{rate:g}-seed{seed}"
    result = folder / "eval_results.json"
    if not result.is_file():
        flags = {
            **data, "optimizer": optimizer, "evaluate": True, "output_dir": folder, "max_steps": options.steps, "seed": seed,
            "learning_rate": rate, "tst_phase_ratio": ARMS[arm], "tst_bag_size": 4, "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 32, "adam_beta2": 0.95, "weight_decay": 0.1, "warmup_steps": options.steps // 20,
            "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": json.dumps({"num_decay_steps": options.steps // 5}),
            "logging_steps": 50, "save_strategy": "no", "tst_save_at_switch": False, "report_to": "none", "use_cpu": True,
            "bf16": True,
        }  # fmt: skip
        words = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in flags.items())
        own, sys.argv = sys.argv, [str(EXAMPLE), *words]
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        finally:
            sys.argv = own
    return json.loads(result.read_text(encoding="utf-8"))["eval_loss"]


def main() -> None:
    options = parse_arguments()
    data = prepare(options)
    rows: list[dict[str, Any]] = []
    first, *others = options.seeds
    for optimizer, arm in itertools.product(("adamw", "muon"), ARMS):
        losses = {
            (rate, first): train(options, data, optimizer, arm, rate, first)
            for rate in options.learning_rates
        }
        best, _ = min(losses, key=losses.__getitem__)
        losses |= {(best, seed): train(options, data, optimizer, arm, best, seed) for seed in others}
        rows += [
            {"optimizer": optimizer, "arm": arm, "steps": options.steps, "learning_rate": rate, "seed": seed, "eval_loss": round(loss, 4)}
            for (rate, seed), loss in losses.items()
        ]  # fmt: skip
    print(format_table(rows))
    append_rows(options.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
