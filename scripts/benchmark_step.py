#!/usr/bin/env python
"""Time and memory of a whole superposition step, and of an evaluation, against an ordinary step of the same latent shape.

    python scripts/benchmark_step.py                     # on the CPU, the shapes of docs/cost.md
    python scripts/benchmark_step.py --device cuda --autocast --batch_size 8 --length 1024 --bag_sizes 6 --config_overrides \\
      hidden_size=576,intermediate_size=1536,num_hidden_layers=30,num_attention_heads=9,num_key_value_heads=9,vocab_size=128256

A step is forward, backward and AdamW. The steps alternate:
  next_token          one token a position, the model's own loss
  next_token_fused    one token a position, loss fused with the head
  superposition       bags of s tokens, loss fused with the head (what TSTTrainer does)
  superposition_loop  bags of s tokens, all logits and s cross entropies, as the paper does
  evaluation          forward alone, the model's own loss
  evaluation_fused    forward alone, loss fused with the head (what TSTTrainer does)
Ratios are medians over rounds of the time against next_token_fused in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import append_rows, format_table, measure_alternating, median_ratio, peak_memory
from torch import Tensor
from transformers import AutoModelForCausalLM, HfArgumentParser

from hf_tst import fused_evaluation_loss, fused_next_token_loss, step_flops, token_superposition
from hf_tst.bags.folding import fold_into_bags, next_bag_labels
from hf_tst.pretraining.model import make_config
from hf_tst.pretraining.options import ModelArguments


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model_type: str = field(default="llama", metadata={"help": "Architecture, such as llama or qwen3_moe."})
    config_overrides: str = field(
        default="hidden_size=256,intermediate_size=768,num_hidden_layers=4,num_attention_heads=4,"
        "num_key_value_heads=4,vocab_size=32768",
        metadata={"help": "Changes to its configuration."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows, B."})
    length: int = field(default=256, metadata={"help": "Latent positions per row, l."})
    bag_sizes: list[int] = field(
        default_factory=lambda: [6, 16], metadata={"help": "Bag sizes s to measure."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the model."})
    autocast: bool = field(
        default=False, metadata={"help": "Compute in bfloat16 by autocast, as recipes do with bf16."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    rounds: int = field(default=7, metadata={"help": "Rounds that count."})
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak of the device in TFLOP/s: adds raw tokens per second and the share of the peak that is used."
        },
    )
    csv: str | None = field(default=None, metadata={"help": "CSV file to append the rows to."})


def loop_loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The paper's loss of bags: s ordinary cross entropies over all logits."""
    logits = logits.float().flatten(0, 1)
    losses = [F.cross_entropy(logits, targets.flatten(), ignore_index=-100) for targets in labels.unbind(-1)]
    return torch.stack(losses).mean()


class Bench:
    """One model and its optimizer, trained on the same random tokens in different ways."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        config = make_config(
            ModelArguments(model_type=args.model_type, config_overrides=args.config_overrides)
        )
        config.use_cache = False
        model = AutoModelForCausalLM.from_config(config).train()
        self.model = model.to(self.device, getattr(torch, args.dtype))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        shape = (args.batch_size, args.length * max(args.bag_sizes))
        self.tokens = torch.randint(0, config.vocab_size, shape).to(self.device)
        self.length = args.length
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=args.autocast)

    def step(self, bag_size: int) -> None:
        tokens = self.tokens[:, : self.length * bag_size]
        batch = {"input_ids": tokens, "labels": tokens}
        if bag_size > 1:
            bags = fold_into_bags(tokens, bag_size)
            batch = {"input_ids": bags, "labels": next_bag_labels(bags)}
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        tokens = self.tokens[:, : self.length]
        self.model.eval()
        with self.autocast():
            self.model(input_ids=tokens, labels=tokens)
        self.model.train()

    def superposition(self, bag_size: int) -> AbstractContextManager[Any]:
        return token_superposition(self.model, bag_size, fused_loss="on")

    @contextmanager
    def superposition_loop(self, bag_size: int) -> Iterator[None]:
        with token_superposition(self.model, bag_size, fused_loss="off"):
            self.model.loss_function = loop_loss
            yield


def main() -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.split("\n")[0])
    (args,) = parser.parse_args_into_dataclasses()
    bench = Bench(args)
    steps: dict[str, Callable[[], None]] = {
        "next_token_fused": partial(bench.step, 1),
        "next_token": partial(bench.step, 1),
        "evaluation_fused": bench.evaluate,
        "evaluation": bench.evaluate,
    }
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "next_token_fused": partial(fused_next_token_loss, bench.model, "on"),
        "next_token": nullcontext,
        "evaluation_fused": partial(fused_evaluation_loss, bench.model, "on"),
        "evaluation": nullcontext,
    }
    for s in args.bag_sizes:
        for name, context in (
            ("superposition", bench.superposition),
            ("superposition_loop", bench.superposition_loop),
        ):
            steps[f"{name} s={s}"], contexts[f"{name} s={s}"] = partial(bench.step, s), partial(context, s)
    seconds = measure_alternating(steps, bench.device, args.rounds, contexts)
    reference = seconds["next_token_fused"]
    rows = []
    for name, run in steps.items():
        kind, _, bag_size = name.partition(" s=")
        with contexts[name]():
            peak = peak_memory(run, bench.device)
        row: dict[str, Any] = {
            "step": kind,
            "s": int(bag_size or 1),
            "model": args.model_type,
            "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
            "V": bench.model.config.vocab_size,
            "latent": f"{args.batch_size}x{args.length}",
            "dtype": f"{args.dtype}, bfloat16 by autocast" if args.autocast else args.dtype,
            "seconds": statistics.median(seconds[name]),
            "time_over_next_token_fused": median_ratio(seconds[name], reference),
            "peak_mib": peak / 2**20,
        }
        if args.peak_tflops is not None:
            raw_tokens = args.batch_size * args.length * int(bag_size or 1)
            passes = 1 if kind.startswith("evaluation") else 3  # a backward pass is two forward passes
            flops = step_flops(bench.model, args.batch_size, args.length) * passes / 3
            row["raw_tokens_per_second"] = raw_tokens / row["seconds"]
            row["share_of_peak"] = flops / row["seconds"] / (args.peak_tflops * 1e12)
        rows.append(row)
    print(format_table(rows))
    if args.csv:
        append_rows(args.csv, rows, bench.device)


if __name__ == "__main__":
    main()
