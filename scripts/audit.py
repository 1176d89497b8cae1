#!/usr/bin/env python
"""Print which blocks of the training data each optimizer step reads, without reading the data.

    python scripts/audit.py --num_blocks 100000 --block_size 1024 --max_steps 1000 --steps 0,299,300
    python scripts/audit.py config.yaml --num_blocks 100000 --world_size 8 --verify
    python scripts/audit.py --checkpoint out/checkpoint-300 --steps 300

Prints a JSON object for each step: phase, raw tokens, and the blocks by rank, micro-batch and row.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields

from hf_tst import TSTTrainingArguments
from hf_tst.batches.resume_position import DataPosition
from hf_tst.cli.main import run_command
from hf_tst.errors import TSTError
from hf_tst.experiments.options import parse_list
from hf_tst.pretraining.options import (
    DataArguments,
    ModelArguments,
    micro_batches,
    parse_values,
    pick,
)
from hf_tst.pretraining.recipes import quick_start
from hf_tst.training.audit import audit_step, plan_of_arguments, plan_of_position, verify_plan


@dataclass
class AuditArguments:
    """What to audit."""

    num_blocks: int | None = field(default=None, metadata={"help": "Blocks in the training data."})
    world_size: int = field(default=1, metadata={"help": "Processes that read data of their own."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "Take all of the above, and the arguments, from this checkpoint."}
    )
    steps: str = field(default="", metadata={"help": "Optimizer steps to list, counted from 0: 0,299,300"})
    verify: bool = field(
        default=False, metadata={"help": "Check that no block is read twice in a pass, over all steps."}
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    kinds = [AuditArguments, ModelArguments, DataArguments, TSTTrainingArguments]
    # Trainer's own defaults, also where no data is named.
    defaults = {
        entry.name: entry.default for kind in kinds for entry in fields(kind) if entry.name in quick_start()
    }
    values = parse_values(argv, kinds, __doc__.split("\n")[0], defaults=defaults)
    audit = pick(vars(values), AuditArguments)
    length = values.block_size
    if audit.checkpoint is not None:
        position = DataPosition.load(audit.checkpoint)
        if position is None:
            raise TSTError(f"There is no data_position.json in {audit.checkpoint}.")
        plan, layout = plan_of_position(position)
        length = position.block_length
    elif audit.num_blocks is None:
        raise TSTError("The number of blocks is not known: set num_blocks, or name a checkpoint.")
    else:
        values.gradient_accumulation_steps = micro_batches(values, audit.world_size)
        args = pick(vars(values), TSTTrainingArguments)
        plan, layout = plan_of_arguments(args, audit.num_blocks, audit.world_size)
    for step in parse_list("steps", audit.steps, int) if audit.steps else []:
        record = audit_step(plan, layout, step, length or 1)
        print(json.dumps(record if length else record | {"raw_tokens": None}))
    if audit.verify:
        print(json.dumps(verify_plan(plan)))


if __name__ == "__main__":
    sys.exit(run_command("audit.py", main, sys.argv[1:]))
