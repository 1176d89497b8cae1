"""`hf-tst train`, and `--dry_run`, which does everything except the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy

from ..pretraining import pretrain
from ..pretraining.model import load_model, make_config
from ..pretraining.options import ModelArguments, parse_arguments
from ..pretraining.parts import load_parts
from ..records.text_tables import format_columns
from ..training.arguments import TSTTrainingArguments
from ..training.audit import audit_step, plan_of_arguments
from .plan import format_plan, plan_from_arguments

# Bags that a dry run prints.
SHOWN_BAGS = 4


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Train, or with `--dry_run` only show what would be trained.

    Raises:
        TSTError, RunError: As [`hf_tst.pretraining.pretrain.main`].
    """
    words = [word for word in argv if word not in ("--dry_run", "--dry-run")]
    if len(words) < len(argv):
        dry_run(words, prog)
    else:
        pretrain.main(words, prog)


def dry_run(argv: list[str], prog: str | None = None) -> None:
    """Read and check data, tokenizer and configuration, and print the plan. Writes only the cache of packed data.

    Raises:
        TSTError: For bad input, and if there is too little data for the steps.
    """
    if not torch.accelerator.is_available():
        argv = [*argv, "--use_cpu", "True"]  # what needs a GPU to train can be looked at without
    model_args, data_args, args, _ = parse_arguments(argv, prog)
    parts, length = load_parts(model_args, data_args, args, load=load_on_meta)
    blocks, tokenizer = parts["train_dataset"], parts["processing_class"]
    facts = [("training data", "a stream")]
    max_steps, switch = args.max_steps, 0
    if hasattr(blocks, "__len__"):
        facts = [("training data", f"{len(blocks):,} blocks of {length:,} tokens")]
        if args.tst_enabled:
            plan, layout = plan_of_arguments(args, len(blocks))
            max_steps, switch = plan.schedule.max_steps, plan.schedule.switch_step
            facts[0] = (
                facts[0][0],
                f"{facts[0][1]}; {plan.schedule.blocks_needed(layout.rows_per_step):,} are read",
            )
            row = audit_step(plan, layout, 0, length)["blocks"][0][0][0]
            ids = [token for block in row for token in blocks[int(block)]["input_ids"]]
            facts += _show_bags(ids, args.tst_bag_size if switch else 1, tokenizer)
    if parts["eval_dataset"] is not None and hasattr(parts["eval_dataset"], "__len__"):
        facts.append(("evaluation data", f"{len(parts['eval_dataset']):,} blocks"))
    facts.append(("will write", _describe_output(args, switch)))
    print("\n" + format_columns(facts) + "\n")
    if max_steps > 0:
        print(format_plan(plan_from_arguments([*argv, "--max_steps", str(max_steps)])[0]))


def load_on_meta(args: ModelArguments, tokenizer: Any) -> Any:
    """The model that would be trained, without memory for its weights."""
    with torch.device("meta"):
        if not args.model_name_or_path:
            return load_model(args, tokenizer)
        return AutoModelForCausalLM.from_config(make_config(args), trust_remote_code=args.trust_remote_code)


def _show_bags(ids: Sequence[int], size: int, tokenizer: Any) -> list[tuple[str, str]]:
    """The first bags of a row as text, or as ids where there is no tokenizer."""
    bags = [list(ids[begin : begin + size]) for begin in range(0, SHOWN_BAGS * size, size)]
    return [
        (f"step 0, bag {number}", repr(tokenizer.decode(bag)) if tokenizer else str(bag))
        for number, bag in enumerate(bags)
    ]


def _describe_output(args: TSTTrainingArguments, switch: int) -> str:
    checkpoints = [f"checkpoint-{switch}"] if switch and args.tst_save_at_switch else []
    if args.save_strategy == SaveStrategy.STEPS:
        checkpoints.append(f"checkpoints every {args.save_steps:g} steps")
    elif args.save_strategy != SaveStrategy.NO:
        checkpoints.append(f"checkpoints by {args.save_strategy.value}")
    return (
        ", ".join(["model, README.md, trainer_state.json", *checkpoints]) + f" into {Path(args.output_dir)}"
    )
