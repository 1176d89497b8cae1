#!/usr/bin/env python
"""Time and memory of the multi-hot loss, forward and backward, against other ways to compute it.

    python scripts/benchmark_loss.py                                  # on the CPU, the shapes of docs/cost.md
    python scripts/benchmark_loss.py --device cuda --dtype bfloat16 --rows 8192 --hidden_size 1024 --vocab_size 128256

Every candidate gets the same hidden states, head and labels, and computes the same loss of bags of s tokens:
  ours         linear_multi_hot_cross_entropy
  loop         all logits, then s cross entropies, as the paper does
  gather       all logits, one log-softmax, s gathers
  one_target   all logits, one cross entropy with the first token of each bag (ordinary training, for scale)
  liger        Liger's fused linear cross entropy, s times (CUDA, if installed)
  cce          cut-cross-entropy, s times (CUDA, if installed)
Candidates alternate; ratios are medians over rounds of the time against ours in the same round. Memory is the peak
beyond inputs and gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import append_rows, format_table, measure_alternating, median_ratio, peak_memory
from torch import Tensor
from transformers import HfArgumentParser

from hf_tst import linear_multi_hot_cross_entropy

IGNORE_INDEX = -100

Candidate = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, d), weight (V, d), labels (N, s) -> loss


@dataclass
class BenchmarkArguments:
    """What to measure."""

    rows: int = field(default=1024, metadata={"help": "Positions, N."})
    hidden_size: int = field(default=128, metadata={"help": "Hidden size, d."})
    vocab_size: int = field(default=32768, metadata={"help": "Vocabulary, V."})
    bag_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 4, 6, 8, 16], metadata={"help": "Bag sizes s to measure."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of hidden states and head."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    rounds: int = field(default=7, metadata={"help": "Rounds that count."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's choice by default."})
    candidates: list[str] | None = field(default=None, metadata={"help": "Only these candidates, and ours."})
    csv: str | None = field(default=None, metadata={"help": "CSV file to append the rows to."})
    plot: str | None = field(default=None, metadata={"help": "Where to draw time and memory over s (PNG)."})


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_multi_hot_cross_entropy(hidden, weight, labels)


def loop(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    losses = [F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX) for targets in labels.unbind(-1)]
    return torch.stack(losses).mean()


def gather(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probabilities = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    valid = labels != IGNORE_INDEX
    targets = labels.masked_fill(~valid, 0)
    losses = [log_probabilities.gather(-1, column.unsqueeze(-1)).squeeze(-1) for column in targets.unbind(-1)]
    return -(torch.stack(losses, dim=-1) * valid).sum() / valid.sum()


def one_target(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels[..., 0], ignore_index=IGNORE_INDEX)


def find_candidates(device: torch.device) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {
        "ours": ours,
        "loop": loop,
        "gather": gather,
        "one_target": one_target,
    }
    if device.type != "cuda":
        return candidates
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        print("liger: not installed")
    else:

        def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            columns = [column.contiguous() for column in labels.unbind(-1)]
            return torch.stack([liger_fused_linear_cross_entropy(hidden, weight, y) for y in columns]).mean()

        candidates["liger"] = liger
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        print("cce: not installed")
    else:

        def cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            columns = [column.contiguous() for column in labels.unbind(-1)]
            return torch.stack([linear_cross_entropy(hidden, weight, y) for y in columns]).mean()

        candidates["cce"] = cce
    return candidates


class Case:
    """Hidden states, head and labels of one bag size."""

    def __init__(self, args: BenchmarkArguments, bag_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)
        hidden = torch.randn(args.rows, args.hidden_size, generator=generator)
        weight = torch.randn(args.vocab_size, args.hidden_size, generator=generator) * args.hidden_size**-0.5
        labels = torch.randint(0, args.vocab_size, (args.rows, bag_size), generator=generator)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.labels = labels.to(device)

    def run(self, candidate: Candidate) -> float:
        """Forward and backward; returns the loss."""
        self.clear()
        loss = candidate(self.hidden, self.weight, self.labels)
        loss.backward()
        return loss.item()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))


def measure_bag_size(args: BenchmarkArguments, bag_size: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for every candidate at one bag size."""
    case = Case(args, bag_size, device)
    runs = {
        name: partial(case.run, candidate)
        for name, candidate in find_candidates(device).items()
        if args.candidates is None or name in [*args.candidates, "ours"]
    }
    seconds = measure_alternating(runs, device, args.rounds)
    rows = []
    for name, run in runs.items():
        case.clear()
        peak = peak_memory(run, device) - case.gradient_bytes
        rows.append(
            {
                "candidate": name,
                "s": bag_size,
                "N": args.rows,
                "d": args.hidden_size,
                "V": args.vocab_size,
                "dtype": args.dtype,
                "seconds": statistics.median(seconds[name]),
                "time_over_ours": median_ratio(seconds[name], seconds["ours"]),
                "peak_mib": peak / 2**20,
                "peak_over_logits": peak / (4 * args.rows * args.vocab_size),
                "loss": run(),
            }
        )
    return rows


def measure_growth(args: BenchmarkArguments, device: torch.device) -> float:
    """Our time at the last bag size over that at the first, alternating."""
    runs = {str(s): partial(Case(args, s, device).run, ours) for s in (args.bag_sizes[0], args.bag_sizes[-1])}
    first, last = measure_alternating(runs, device, 2 * args.rounds).values()
    return median_ratio(last, first)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("seconds", "peak_mib"),
        ("seconds, forward and backward", "peak memory (MiB)"),
        strict=True,
    ):
        for name in dict.fromkeys(row["candidate"] for row in rows):
            points = [(row["s"], row[column]) for row in rows if row["candidate"] == name]
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set_xlabel("tokens a bag, s")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(
        BenchmarkArguments, description=__doc__.split("\n")[0]
    ).parse_args_into_dataclasses()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for bag_size in args.bag_sizes for row in measure_bag_size(args, bag_size, device)]
    print(format_table(rows))
    growth = measure_growth(args, device)
    print(f"\nours, time at s={args.bag_sizes[-1]} over time at s={args.bag_sizes[0]}: {growth:.3f}")
    if args.csv:
        append_rows(args.csv, rows, device)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
