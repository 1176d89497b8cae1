#!/usr/bin/env python
"""What head and loss cost on a GPU by reckoning, and the tables of docs/cost.md.

    python scripts/reckon_loss.py            # writes them
    python scripts/reckon_loss.py --output - # prints them

An operation is its FLOPs and the bytes that it moves to and from the GPU's memory, each operand once. A time is a range:
from all traffic of an operation hidden behind its arithmetic, to none. Launches, and products that do not fill the GPU, are
left out. Inputs, weights and their gradients are bfloat16; memory is the peak beyond them.

Shapes: N positions, d hidden size, V vocabulary, s tokens per target bag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tables import write_table
from transformers import HfArgumentParser

from hf_tst.losses.linear import chunk_rows

# An H100 SXM: bytes per second as its maker states them, FLOPs per second as large products in bfloat16 reach them.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 3.35e12, 0.8e15
POSITIONS = 8192
SHAPES = [(576, 32_000), (576, 128_256), (2048, 32_000), (2048, 128_256)]  # d, V
BEGIN, END = "<!-- reckoning: begin -->", "<!-- reckoning: end -->"

Operation = tuple[int, int]  # FLOPs and bytes


@dataclass(frozen=True)
class Cost:
    """Operations of the forward and backward pass, and the bytes held at the peak beyond inputs and gradients."""

    operations: list[Operation]
    memory: int

    @property
    def milliseconds(self) -> tuple[float, float]:
        """With all traffic of an operation hidden behind its arithmetic, and with none."""
        times = [(flops / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND) for flops, moved in self.operations]
        return 1e3 * sum(map(max, times)), 1e3 * sum(map(sum, times))


def products(n: int, d: int, v: int) -> Cost:
    """The three matrix products alone: logits, and the gradients of hidden states and weight. The limit."""
    return Cost([(2 * n * d * v, 2 * (n * d + d * v + n * v))] * 3, 2 * n * v)


def ours(n: int, d: int, v: int, rows: int | None = None) -> Cost:
    """`linear_multi_hot_cross_entropy` in chunks of so many rows, its own choice by default, for any s."""
    rows = rows or chunk_rows(n, v, d, 2, "cuda")
    operations = []
    for start in range(0, n, rows):
        m = min(rows, n - start)
        flops, small = 2 * m * d * v, 2 * m * (d + v)
        operations += [
            (flops, small + 2 * d * v),  # logits
            (0, 6 * m * v),  # two sweeps read them, one writes their gradient
            (flops, small + 2 * d * v),  # gradient of the hidden states
            (flops, small + (8 if start else 4) * d * v),  # added to the float32 gradient of the weight
        ]
    operations.append((0, 6 * d * v + 4 * n * d))  # times the loss's own gradient, and cast
    return Cost(operations, max(2 * d * v + 2 * rows * v, 4 * d * v))


def liger(n: int, d: int, v: int) -> Cost:
    """Liger's fused linear cross entropy, s = 1, as of 2026-08: its rows per chunk, the weight's gradient in bfloat16."""
    rows = _power_of_two(math.ceil(n / math.ceil(v / d)))
    operations = [(0, 2 * d * v)]
    for start in range(0, n, rows):
        m = min(rows, n - start)
        flops, small = 2 * m * d * v, 2 * m * (d + v)
        operations += [
            (flops, small + 2 * d * v),
            (0, 6 * m * v),
            (flops, small + 2 * d * v),
            (flops, small + 2 * d * v),
            (0, 6 * d * v),  # the product cast to float32
            (0, 8 * d * v),  # and added to the gradient of the weight
        ]
    return Cost(operations, 2 * rows * v + 6 * d * v)


def loop(n: int, d: int, v: int, s: int = 1) -> Cost:
    """The paper's s cross entropies over all logits, in float32."""
    of_a_target = (
        8 + 8 + 12
    )  # log-softmax; backward, a gradient that is zero but for the target, and log-softmax's
    cast = [(0, 6 * n * v)] * 2
    sums = [(0, 12 * n * v)] * (s - 1)
    return Cost(
        [*products(n, d, v).operations, *cast, *[(0, of_a_target * n * v)] * s, *sums], 4 * (s + 2) * n * v
    )


def make_tables() -> str:
    """The tables of docs/cost.md: every way, and ours by the size of its chunks."""
    ways: dict[str, Callable[[int, int, int], Cost]] = {
        "three products, the limit": products,
        "ours, any s": ours,
        "Liger, s = 1": liger,
        "loop, s = 1": loop,
        "loop, s = 6": partial(loop, s=6),
    }
    chunks = {f"{rows:,}": partial(ours, rows=rows) for rows in (256, 512, 1024, 2048, 4096, 8192)}
    return f"{_table('way', ways)}\n\n{_table('rows per chunk', chunks)}"


def _table(title: str, ways: Mapping[str, Callable[[int, int, int], Cost]]) -> str:
    lines = [[title, *(f"d = {d}, V = {v:,}" for d, v in SHAPES)], ["---"] * (len(SHAPES) + 1)]
    lines += [[name, *(_cell(way(POSITIONS, d, v)) for d, v in SHAPES)] for name, way in ways.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cost: Cost) -> str:
    low, high = cost.milliseconds
    return f"{low:.1f} to {high:.1f} ms, {cost.memory / 2**20:,.0f} MiB"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass
class ReckonArguments:
    """Where the tables go."""

    output: str = "docs/cost.md"


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(ReckonArguments).parse_args_into_dataclasses()
    write_table(arguments.output, BEGIN, END, make_tables())
