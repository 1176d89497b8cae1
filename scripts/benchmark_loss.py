#!/usr/bin/env python
"""Time and memory of the multi-hot loss, forward and backward, against other ways to compute it.

    python scripts/benchmark_loss.py                                  # on the CPU, the shapes of docs/cost.md
    python scripts/benchmark_loss.py --device cuda --dtype bfloat16 --rows 8192 --hidden_size 576 2048 \\
        --vocab_size 32000 128256 --repeats 10 --chunk_rows 512 2048

Every candidate gets the same hidden states, head and labels, and computes the same loss of bags of s tokens:
  ours         linear_multi_hot_cross_entropy
  ours_R_rows  the same with R rows of logits per chunk, for each R of --chunk_rows
  products     the three matrix products alone: no loss, but the limit of the time
  loop         all logits, then s cross entropies, as the paper does
  gather       all logits, one log-softmax, s gathers
  one_target   all logits, one cross entropy with the first token of each bag (ordinary training, for scale)
  liger        Liger's fused linear cross entropy, s times (CUDA, if installed)
  cce          cut-cross-entropy, s times (CUDA, if installed)
Candidates alternate; ratios are medians over rounds of the time against ours in the same round. Memory is the peak
beyond inputs and gradients. A candidate that fails, for want of memory for example, is left out with its error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from benchmarking import append_rows, format_table, measure_alternating, median_ratio, peak_memory
from torch import Tensor
from transformers import HfArgumentParser

from hf_tst import linear_multi_hot_cross_entropy
from hf_tst.losses import linear

IGNORE_INDEX = -100

# Hidden (N, d), weight (V, d), labels (N, s) -> loss, or none where the gradients are set already.
Candidate = Callable[[Tensor, Tensor, Tensor], Tensor | None]


@dataclass
class BenchmarkArguments:
    """What to measure."""

    rows: int = field(default=1024, metadata={"help": "Positions, N."})
    hidden_size: list[int] = field(default_factory=lambda: [128], metadata={"help": "Hidden sizes, d."})
    vocab_size: list[int] = field(default_factory=lambda: [32768], metadata={"help": "Vocabularies, V."})
    bag_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 4, 6, 8, 16], metadata={"help": "Bag sizes s to measure."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of hidden states and head."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    rounds: int = field(default=7, metadata={"help": "Rounds that count."})
    repeats: int = field(default=1, metadata={"help": "Calls per timing: on a GPU one takes milliseconds."})
    chunk_rows: list[int] = field(
        default_factory=list, metadata={"help": "Rows of logits per chunk to try beside our own choice."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's choice by default."})
    candidates: list[str] | None = field(default=None, metadata={"help": "Only these candidates, and ours."})
    csv: str | None = field(default=None, metadata={"help": "CSV file to append the rows to."})
    plot: str | None = field(
        default=None, metadata={"help": "Where to draw time and memory over s, of the first shape (PNG)."}
    )


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_multi_hot_cross_entropy(hidden, weight, labels)


def ours_in_chunks(rows: int, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with mock.patch.object(linear, "chunk_rows", return_value=rows):
        return linear_multi_hot_cross_entropy(hidden, weight, labels)


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    logits = hidden @ weight.t()
    hidden.grad, weight.grad = logits @ weight, logits.t() @ hidden


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


def find_candidates(args: BenchmarkArguments, device: torch.device) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {
        "ours": ours,
        **{f"ours_{rows}_rows": partial(ours_in_chunks, rows) for rows in args.chunk_rows},
        "products": products,
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
    """Hidden states, head and labels of one shape."""

    def __init__(
        self, args: BenchmarkArguments, hidden_size: int, vocabulary: int, bag_size: int, device: torch.device
    ) -> None:
        draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        dtype = getattr(torch, args.dtype)
        hidden = torch.randn(args.rows, hidden_size, **draw)
        weight = torch.randn(vocabulary, hidden_size, **draw) * hidden_size**-0.5
        labels = torch.randint(0, vocabulary, (args.rows, bag_size), **draw)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.labels = labels.to(device)

    def run(self, candidate: Candidate, repeats: int = 1) -> Tensor | None:
        """Forward and backward, so many times; returns the loss."""
        for _ in range(repeats):
            self.clear()
            loss = candidate(self.hidden, self.weight, self.labels)
            if loss is not None:
                loss.backward()
        return None if loss is None else loss.detach()

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


def measure(
    args: BenchmarkArguments, hidden_size: int, vocabulary: int, bag_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for every candidate at one shape."""
    case = Case(args, hidden_size, vocabulary, bag_size, device)
    runs, found = {}, {}
    for name, candidate in find_candidates(args, device).items():
        if args.candidates is not None and name not in [*args.candidates, "ours"] and "_rows" not in name:
            continue
        run = partial(case.run, candidate)
        try:
            run()  # compiles
            case.clear()
            peak = peak_memory(run, device) - case.gradient_bytes
            loss = run()
        except Exception as error:
            if name == "ours":
                raise
            print(f"{name} at s={bag_size}, d={hidden_size}, V={vocabulary}: {error!r}")
            continue
        runs[name] = partial(run, args.repeats)
        found[name] = {
            "peak_mib": peak / 2**20,
            "peak_over_logits": peak / (4 * args.rows * vocabulary),
            "loss": "" if loss is None else loss.item(),
        }
    seconds = measure_alternating(runs, device, args.rounds)
    return [
        {
            "candidate": name,
            "s": bag_size,
            "N": args.rows,
            "d": hidden_size,
            "V": vocabulary,
            "dtype": args.dtype,
            "seconds": statistics.median(seconds[name]) / args.repeats,
            "time_over_ours": median_ratio(seconds[name], seconds["ours"]),
            **found[name],
        }
        for name in runs
    ]


def measure_growth(
    args: BenchmarkArguments, hidden_size: int, vocabulary: int, device: torch.device
) -> float:
    """Our time at the last bag size over that at the first, alternating."""
    cases = [Case(args, hidden_size, vocabulary, s, device) for s in (args.bag_sizes[0], args.bag_sizes[-1])]
    runs = {str(i): partial(case.run, ours, args.repeats) for i, case in enumerate(cases)}
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
        axes.set_xlabel("tokens per bag, s")
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
    rows = []
    for shape in product(args.hidden_size, args.vocab_size):
        for bag_size in args.bag_sizes:
            new = measure(args, *shape, bag_size, device)
            print(format_table(new), flush=True)
            rows += new
            if args.csv:
                append_rows(args.csv, new, device)
        growth = measure_growth(args, *shape, device)
        print(f"\nours, time at s={args.bag_sizes[-1]} over time at s={args.bag_sizes[0]}: {growth:.3f}\n")
    if args.plot:
        first = (args.hidden_size[0], args.vocab_size[0])
        plot([row for row in rows if (row["d"], row["V"]) == first], args.plot)


if __name__ == "__main__":
    main()
