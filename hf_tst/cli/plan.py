"""`hf-tst plan`: estimate a run, and print the plan as tables or JSON, or draw it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from ..bags.phases import check_bag_size, check_phase_ratio, superposes
from ..errors import TSTError, bad_input, check_at_least, check_names
from ..models.shape import ModelShape
from ..mtp.heads import check_mtp
from ..planning.estimate import Alternative, Layout, Precision, RunPlan, plan_run
from ..planning.flops import FORMULA
from ..planning.reference import ACCELERATORS, Accelerator, find_published
from ..pretraining.model import QUICK_START_VOCABULARY, load_tokenizer, make_config
from ..pretraining.options import (
    DataArguments,
    ModelArguments,
    RunArguments,
    choose_block_size,
    micro_batches,
    parse_values,
    pick,
)
from ..records.text_tables import format_bytes, format_columns
from ..training.arguments import TSTTrainingArguments
from ..training.schedule import make_schedule

DESCRIPTION = """Plan a run before paying for it: steps, tokens, FLOPs, hours, memory, traffic.

Takes a recipe and the flags of training, and those of the machines, which are
listed first. Downloads nothing where the recipe names vocab_size.

  hf-tst plan recipe.yaml --gpu b200 --num_gpus 8 --mfu 0.4
  hf-tst plan recipe.yaml --tst_bag_size 8 --json
"""


# How figures of a plan that are not counts are printed.
FORMATS = {"flops": ".3g", "gpu_hours": ",.1f", "loss": ".3f"}
# Options of TST that decide which published run a plan is of, without their prefix.
PUBLISHED_OPTIONS = (
    "bag_size", "phase_ratio", "offset_weighting", "input_weighting", "mode", "superposition_rows", "document_boundaries",
)  # fmt: skip


@dataclass
class PlanArguments:
    """The hardware of the plan, and its output."""

    gpu: str = HfArg(default="h100", help=f"Accelerator: {', '.join(ACCELERATORS)}.")
    num_gpus: int = HfArg(default=1, help="Number of accelerators.")
    shard_size: int | None = HfArg(
        default=None, help="GPUs that share one copy of the model (FSDP); by default all, 1 for DDP."
    )
    mfu: float = HfArg(default=0.4, help="Share of the peak that training reaches, from 0 to 1.")
    gpu_memory_gib: float | None = HfArg(default=None, help="GPU memory in GiB; by default that of gpu.")
    json: bool = HfArg(default=False, help="Print JSON instead of tables.")
    plot: str | None = HfArg(
        default=None, help="Path of a PNG picture that compares the run with its baselines."
    )

    def __post_init__(self) -> None:
        check_names([self.gpu], ACCELERATORS, f"gpu must be one of {', '.join(ACCELERATORS)}, not")
        check_at_least(1, num_gpus=self.num_gpus, shard_size=self.shard_size)
        if self.num_gpus % (self.shard_size or 1):
            raise TSTError(f"shard_size={self.shard_size} must divide num_gpus={self.num_gpus}.")
        if not 0 < self.mfu <= 1:
            raise TSTError(f"mfu must be more than 0 and at most 1, but is {self.mfu}.")

    def accelerator(self, peak_tflops: float | None) -> Accelerator:
        """The accelerator, with the given peak and memory instead of its own."""
        found = ACCELERATORS[self.gpu]
        if peak_tflops is not None:
            found = replace(found, name=f"{peak_tflops:g} TFLOP/s", tflops=peak_tflops)
        if self.gpu_memory_gib is not None:
            found = replace(found, memory_gib=self.gpu_memory_gib)
        return found


def plan_from_arguments(argv: Sequence[str], prog: str | None = None) -> tuple[RunPlan, PlanArguments]:
    """The plan of a recipe and flags, as [`parse_arguments`] takes them, and of [`PlanArguments`].

    Raises:
        TSTError: If an argument is unknown or out of range, or the number of steps or the vocabulary is not known.
    """
    values = parse_values(
        argv,
        [PlanArguments, TSTTrainingArguments, DataArguments, ModelArguments, RunArguments],
        DESCRIPTION,
        prog,
    )
    args: PlanArguments = pick(vars(values), PlanArguments)
    model_args: ModelArguments = pick(vars(values), ModelArguments)
    data_args: DataArguments = pick(vars(values), DataArguments)
    if values.max_steps <= 0:
        raise TSTError(
            f"max_steps is {values.max_steps}, and a plan reads no data to count the steps of num_train_epochs: set max_steps, or use "
            "`hf-tst train ... --dry_run`, which reads it."
        )
    check_phase_ratio(values.tst_phase_ratio, "tst_phase_ratio")
    check_bag_size(values.tst_bag_size, "tst_bag_size")
    check_mtp(values.mtp_num_heads, values.mtp_kind, prefix="mtp_")
    config = make_config(model_args, _vocabulary(model_args, data_args))
    shard_size = args.shard_size or args.num_gpus
    # `activation_checkpointing` is the newer name.
    recomputes = values.gradient_checkpointing or getattr(values, "activation_checkpointing", False)
    layout = Layout(
        shard_size=shard_size,
        replicas=args.num_gpus // shard_size,
        rows=values.per_device_train_batch_size,
        length=choose_block_size(data_args, config),
        micro_batches=micro_batches(values, args.num_gpus),
        activation_checkpointing=bool(recomputes),
    )
    weights = 2 if model_args.dtype in ("bfloat16", "float16") else 4
    superposed = superposes(values.tst_phase_ratio, values.tst_bag_size)
    shape = ModelShape.from_config(config, model_args.lora_config())
    plan = plan_run(
        shape,
        make_schedule(values, values.max_steps),
        layout,
        args.accelerator(values.tst_peak_tflops),
        args.mfu,
        precision=Precision(weights, compute=2 if values.bf16 or values.fp16 else weights),
        fused_loss=values.tst_fused_loss == "on" or (values.tst_fused_loss == "auto" and superposed),
        mtp_num_heads=values.mtp_num_heads,
        mtp_kind=values.mtp_kind,
        published=find_published(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, layers=shape.layers, row_length=layout.length,
            steps=values.max_steps, tokens_per_step=layout.latent_tokens, mtp_num_heads=values.mtp_num_heads,
            **{name: getattr(values, f"tst_{name}") for name in PUBLISHED_OPTIONS},
        ),
    )  # fmt: skip
    return plan, args


def main(argv: Sequence[str], prog: str | None = None) -> RunPlan:
    """Print the plan of a recipe and flags, then check that it fits into memory.

    Raises:
        TSTError: As [`plan_from_arguments`], and if the run does not fit.
    """
    plan, args = plan_from_arguments(argv, prog)
    print(json.dumps(asdict(plan), indent=2) if args.json else format_plan(plan))
    if args.plot:
        print(f"\nThe picture is in {plot_plan(plan, args.plot)}.", file=sys.stderr)
    plan.check_memory()
    return plan


def _vocabulary(args: ModelArguments, data_args: DataArguments) -> int | None:
    """Vocabulary of a new model whose configuration does not name one."""
    if args.model_name_or_path or args.config_name or "vocab_size" in (args.config_overrides or ""):
        return None
    if data_args.is_quick_start and not args.tokenizer_name:
        return QUICK_START_VOCABULARY
    tokenizer = load_tokenizer(args, data_args, documents=[])
    if tokenizer is None:
        raise TSTError(
            "The size of the vocabulary is unknown: set tokenizer_name, or vocab_size in config_overrides."
        )
    return len(tokenizer)


def format_plan(plan: RunPlan) -> str:
    """The plan as tables of text."""
    model, layout, memory = plan.model, plan.layout, plan.memory_bytes
    trained = "" if model.trains_everything else f", {model.trainable_parameters:,} of them trained"
    heads = f"; {plan.mtp_parameters:,} more in extra heads while it trains" if plan.mtp_parameters else ""
    facts = [
        ("model", f"{model.parameters:,} parameters{trained}; {model.active_parameters:,} multiply a position's state{heads}"),
        (
            "step",
            f"{layout.rows_per_step:,} rows of {layout.length:,} = {layout.latent_tokens:,} latent tokens "
            f"({layout.rows} rows x {layout.micro_batches} micro-batches x {layout.gpus} GPUs)",
        ),
        ("data", f"{plan.blocks:,} blocks, {plan.raw_tokens:,} tokens, each read once"),
        (
            "time",
            f"{plan.gpu_hours:,.1f} GPU-hours, {_duration(plan.gpu_hours / plan.num_gpus)} on {plan.num_gpus} x {plan.gpu}, if "
            f"{plan.mfu:.0%} of its peak of {plan.peak_tflops:g} TFLOP/s is reached",
        ),
        ("checkpoints", "model {model}, to resume from {checkpoint} each".format(**_sizes(plan.checkpoint_bytes))),
        (
            "memory",
            f"{format_bytes(memory['peak'])} per GPU at its peak, of {format_bytes(plan.usable_memory_bytes)} usable: "
            + ", ".join(f"{name} {size}" for name, size in _sizes(memory).items() if name != "peak"),
        ),
    ]  # fmt: skip
    if traffic := _sizes(plan.communication_bytes_per_step):
        facts.append(("traffic", "per GPU and step: " + ", ".join(map(" ".join, traffic.items()))))
    names = ["raw_tokens", "latent_tokens", "flops", "gpu_hours"]
    switch, end = plan.switch_step, plan.max_steps
    superposition, recovery = plan.phases
    phases = [
        ("phase", "steps", "raw tokens", "latent tokens", "FLOPs", "GPU-hours"),
        ("superposition", f"0-{switch - 1}" if switch else "-", *_figures(superposition, names)),
        ("recovery", f"{switch}-{end - 1}" if switch < end else "-", *_figures(recovery, names)),
        ("whole run", f"{end:,} steps", *_figures(plan, names)),
    ]
    parts = [format_columns(facts), format_columns(phases)]
    if plan.comparison:
        names = ["steps", "raw_tokens", "flops", "gpu_hours", "loss"]
        header = ("comparison", "steps", "raw tokens", "FLOPs", "GPU-hours", "loss", "source")
        rows = [(other.name, *_figures(other, names), other.source) for other in plan.comparison]
        parts.append(format_columns([header, *rows]))
    parts += plan.notes
    parts.append(
        f"FLOPs: {FORMULA}.\nRecomputation by activation checkpointing is not counted. Memory is an estimate."
    )
    return "\n\n".join(parts)


def plot_plan(plan: RunPlan, path: str | Path) -> Path:
    """Draw what the run and its alternatives read and cost, as a PNG. Its folder is made.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
        TSTError: If the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [other for other in plan.comparison if other.gpu_hours is not None]
    rows = rows or [Alternative("this run", raw_tokens=plan.raw_tokens, gpu_hours=plan.gpu_hours)]
    names = [other.name + (f"\nloss {other.loss:.3f} (published)" if other.loss else "") for other in rows]
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [other.gpu_hours for other in rows], color="tab:blue")
    left.set_xlabel(f"GPU-hours ({plan.gpu}, {plan.mfu:.0%} of peak)")
    right.barh(names, [(other.raw_tokens or 0) / 1e9 for other in rows], color="tab:orange")
    right.set_xlabel("raw tokens (billions)")
    left.invert_yaxis()
    with bad_input(f"Cannot write plot={path}: ", OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return Path(path)


def _figures(row: Any, names: Sequence[str]) -> list[str]:
    """The figures of a row of the plan as text; `-` for a missing one."""
    values = {name: getattr(row, name) for name in names}
    return ["-" if value is None else format(value, FORMATS.get(name, ",")) for name, value in values.items()]


def _sizes(counts: dict[str, int]) -> dict[str, str]:
    """The numbers of bytes that are not 0, as text."""
    return {name: format_bytes(count) for name, count in counts.items() if count}


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
