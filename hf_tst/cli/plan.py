"""From a recipe to a plan, and the plan as a table, JSON and a picture: what `hf-tst plan` and `scripts/plan.py` run."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bags.phases import PhaseSchedule, check_bag_size, check_phase_ratio
from ..errors import TSTError
from ..models.shape import ModelShape
from ..mtp.heads import check_mtp
from ..planning.costs import Layout, Precision
from ..planning.flops import FORMULA
from ..planning.hardware import ACCELERATORS, Accelerator
from ..planning.run import GIB, Machines, RunPlan, plan_run
from ..pretraining.options import (
    DataArguments,
    ModelArguments,
    check_names,
    micro_batches,
    parse_values,
    pick,
)
from ..pretraining.run import QUICK_START_VOCABULARY, explained_loading, make_config
from ..records.report import format_columns
from ..training.arguments import TSTTrainingArguments

DESCRIPTION = """Plan a run before paying for it: steps, tokens, data, FLOPs, hours, memory, traffic, sizes.

Takes a recipe and the flags of training, and those of the machines, which are listed first. Downloads nothing where the
recipe names vocab_size.

  hf-tst plan recipe.yaml --gpu b200 --num_gpus 8 --mfu 0.4
  hf-tst plan recipe.yaml --tst_bag_size 8 --json
"""


@dataclass
class PlanArguments:
    """What a run is planned on, and where the plan goes."""

    gpu: str = field(default="h100", metadata={"help": f"Accelerator: {', '.join(ACCELERATORS)}."})
    num_gpus: int = field(default=1, metadata={"help": "How many of them."})
    shard_size: int | None = field(
        default=None,
        metadata={
            "help": "GPUs that hold one copy of the model between them (FSDP); all by default, 1 for DDP."
        },
    )
    mfu: float = field(
        default=0.4, metadata={"help": "Share of the peak that training reaches, from 0 to 1."}
    )
    gpu_memory_gib: float | None = field(default=None, metadata={"help": "Memory, instead of the GPU's."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})
    plot: str | None = field(default=None, metadata={"help": "Write a picture of the comparison here (PNG)."})


def plan_from_arguments(argv: Sequence[str], prog: str | None = None) -> tuple[RunPlan, PlanArguments]:
    """The plan of a recipe and flags, as [`parse_arguments`] takes them, and of [`PlanArguments`].

    Raises:
        TSTError: If an argument is unknown or out of range, or the number of steps or the vocabulary is not told.
    """
    types = [PlanArguments, ModelArguments, DataArguments, TSTTrainingArguments]
    values = parse_values(argv, types, description=DESCRIPTION, prog=prog)
    args: PlanArguments = pick(values, PlanArguments)
    model_args: ModelArguments = pick(values, ModelArguments)
    data_args: DataArguments = pick(values, DataArguments)
    if values.max_steps <= 0:
        raise TSTError(
            f"max_steps is {values.max_steps}: set it, as a plan cannot know how many steps num_train_epochs would give."
        )
    check_phase_ratio(values.tst_phase_ratio, "tst_phase_ratio")
    check_bag_size(values.tst_bag_size, "tst_bag_size")
    check_mtp(values.mtp_num_heads, values.mtp_kind, prefix="mtp_")
    config = make_config(model_args, _vocabulary(model_args, data_args))
    shape = ModelShape.from_config(config, model_args.lora_config())
    schedule = PhaseSchedule(values.max_steps, values.tst_phase_ratio, values.tst_bag_size, values.tst_mode)
    machines = Machines(_accelerator(args, values.tst_peak_tflops), args.num_gpus, args.mfu)
    superposed = schedule.phase_ratio > 0 and schedule.bag_size > 1
    plan = plan_run(
        shape,
        schedule,
        _layout(values, args, config),
        machines,
        precision=_precision(values, model_args),
        fused_loss=values.tst_fused_loss == "on" or (values.tst_fused_loss == "auto" and superposed),
        mtp_num_heads=values.mtp_num_heads,
        mtp_kind=values.mtp_kind,
    )
    return plan, args


def main(argv: Sequence[str], prog: str | None = None) -> RunPlan:
    """Print the plan of a recipe and flags, then check that it fits into memory.

    Raises:
        TSTError: As [`plan_from_arguments`], and if the run does not fit.
    """
    plan, args = plan_from_arguments(argv, prog)
    print(json.dumps(plan_to_dict(plan), indent=2) if args.json else format_plan(plan))
    if args.plot:
        plot_plan(plan, args.plot)
    plan.check_memory()
    return plan


def _vocabulary(args: ModelArguments, data_args: DataArguments) -> int | None:
    """Vocabulary of a new model whose configuration does not name one."""
    if args.model_name_or_path or args.config_name or "vocab_size" in (args.config_overrides or ""):
        return None
    if not args.tokenizer_name:
        if data_args.is_quick_start:
            return QUICK_START_VOCABULARY
        raise TSTError(
            "The size of the model follows from its vocabulary: set vocab_size in config_overrides, or tokenizer_name."
        )
    from transformers import AutoTokenizer

    with explained_loading(args.tokenizer_name):
        return len(AutoTokenizer.from_pretrained(args.tokenizer_name, cache_dir=args.cache_dir))


def _accelerator(args: PlanArguments, peak_tflops: float | None) -> Accelerator:
    check_names([args.gpu], ACCELERATORS, f"gpu must be one of {', '.join(ACCELERATORS)}, not")
    accelerator = ACCELERATORS[args.gpu]
    if peak_tflops is not None:
        accelerator = replace(accelerator, name=f"{peak_tflops:g} TFLOP/s", tflops=peak_tflops)
    if args.gpu_memory_gib is not None:
        accelerator = replace(accelerator, memory_gib=args.gpu_memory_gib)
    return accelerator


def _layout(values: Namespace, args: PlanArguments, config: Any) -> Layout:
    length = values.block_size or min(1024, getattr(config, "max_position_embeddings", None) or 1024)
    context = getattr(config, "max_position_embeddings", None)
    if context and length > context:
        raise TSTError(f"block_size={length} is more than the model's context of {context} tokens.")
    shard_size = args.shard_size or args.num_gpus
    if args.num_gpus < 1 or shard_size < 1 or args.num_gpus % shard_size:
        raise TSTError(
            f"shard_size={shard_size} must divide num_gpus={args.num_gpus}, and both must be at least 1."
        )
    return Layout(
        shard_size=shard_size,
        replicas=args.num_gpus // shard_size,
        rows=values.per_device_train_batch_size,
        length=length,
        micro_batches=micro_batches(values, args.num_gpus),
        activation_checkpointing=bool(
            values.gradient_checkpointing or getattr(values, "activation_checkpointing", False)  # newer name
        ),
    )


def _precision(values: Namespace, args: ModelArguments) -> Precision:
    weights = 2 if args.dtype in ("bfloat16", "float16") else 4
    return Precision(weights=weights, compute=2 if values.bf16 or values.fp16 or weights == 2 else 4)


def format_plan(plan: RunPlan) -> str:
    """The plan as tables of text."""
    shape, layout, machines = plan.shape, plan.layout, plan.machines
    hours = plan.gpu_hours / machines.count
    trained = "" if shape.trains_everything else f", {shape.trainable_parameters:,} of them trained"
    heads = f"; {plan.mtp_parameters:,} more in extra heads while it trains" if plan.mtp_parameters else ""
    facts = [
        ("model", f"{shape.parameters:,} parameters{trained}; {shape.active_parameters:,} multiply a position's state{heads}"),
        (
            "step",
            f"{layout.rows_per_step:,} rows of {layout.length:,} = {layout.latent_tokens:,} latent tokens "
            f"({layout.rows} rows x {layout.micro_batches} micro-batches x {layout.gpus} GPUs)",
        ),
        ("data", f"{plan.blocks:,} blocks, {plan.raw_tokens:,} tokens, each read once"),
        (
            "time",
            f"{plan.gpu_hours:,.1f} GPU-hours, {_duration(hours)} on {machines.count} x {machines.accelerator.name}, if "
            f"{machines.mfu:.0%} of its peak of {machines.accelerator.tflops:g} TFLOP/s is reached",
        ),
        (
            "checkpoints",
            f"model {_size(plan.checkpoints['model'])}, to resume from {_size(plan.checkpoints['checkpoint'])} each",
        ),
        (
            "memory",
            f"{_size(plan.memory['peak'])} a GPU at its peak, of {_size(plan.usable_memory)} usable: "
            + ", ".join(f"{k} {_size(v)}" for k, v in plan.memory.items() if v and k != "peak"),
        ),
    ]  # fmt: skip
    if any(plan.communication.values()):
        traffic = ", ".join(f"{k} {_size(v)}" for k, v in plan.communication.items() if v)
        facts.append(("traffic", f"a GPU and step: {traffic}"))
    phases = [("phase", "steps", "raw tokens", "latent tokens", "FLOPs", "GPU-hours")]
    switch, end = plan.schedule.switch_step, plan.schedule.max_steps
    superposition, recovery = plan.phases
    for name, steps, cost in (
        ("superposition", f"0-{switch - 1}" if switch else "-", superposition),
        ("recovery", f"{switch}-{end - 1}" if switch < end else "-", recovery),
        ("whole run", f"{end:,} steps", plan),
    ):
        tokens = (f"{cost.raw_tokens:,}", f"{cost.latent_tokens:,}")
        phases.append((name, steps, *tokens, f"{cost.flops:.3g}", f"{cost.gpu_hours:,.1f}"))
    parts = [format_columns(facts), format_columns(phases)]
    if plan.alternatives:
        formats = {"steps": ",", "raw_tokens": ",", "flops": ".3g", "gpu_hours": ",.1f", "loss": ".3f"}
        rows: list[tuple[str, ...]] = [
            ("comparison", "steps", "raw tokens", "FLOPs", "GPU-hours", "loss", "source")
        ]
        for other in plan.alternatives:
            numbers = [_number(getattr(other, name), spec) for name, spec in formats.items()]
            rows.append((other.name, *numbers, other.source))
        parts.append(format_columns(rows))
    parts += plan.notes
    parts.append(
        f"FLOPs: {FORMULA}.\nWhat activation checkpointing computes twice is not counted. Memory is an estimate."
    )
    return "\n\n".join(parts)


def plan_to_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain values, with units in the names of what is not a count."""
    machines = plan.machines
    totals = ("blocks", "raw_tokens", "latent_tokens", "flops", "gpu_hours", "mtp_parameters", "notes")
    return {
        "max_steps": plan.schedule.max_steps,
        "switch_step": plan.schedule.switch_step,
        "phases": [asdict(phase) for phase in plan.phases],
        **{name: getattr(plan, name) for name in totals},
        "latent_tokens_per_step": plan.layout.latent_tokens,
        "gpu": machines.accelerator.name,
        "num_gpus": machines.count,
        "mfu": machines.mfu,
        "peak_tflops": machines.accelerator.tflops,
        "model": asdict(plan.shape),
        "layout": asdict(plan.layout),
        "memory_bytes": plan.memory,
        "usable_memory_bytes": int(plan.usable_memory),
        "communication_bytes_per_step": plan.communication,
        "checkpoint_bytes": plan.checkpoints,
        "comparison": [asdict(other) for other in plan.alternatives],
    }


def plot_plan(plan: RunPlan, path: str | Path) -> Path:
    """Draw what the run and its alternatives read and cost, as a PNG.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure

    rows = [other for other in plan.alternatives if other.gpu_hours is not None]
    names = [other.name for other in rows] or ["this run"]
    hours = [other.gpu_hours for other in rows] or [plan.gpu_hours]
    tokens = [(other.raw_tokens or 0) / 1e9 for other in rows] or [plan.raw_tokens / 1e9]
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    machines = plan.machines
    left.barh(names, hours, color="tab:blue")
    left.set_xlabel(f"GPU-hours ({machines.accelerator.name}, {machines.mfu:.0%} of peak)")
    right.barh(names, tokens, color="tab:orange")
    right.set_xlabel("raw tokens (billions)")
    for index, other in enumerate(rows):
        if other.loss is not None:
            left.text(0, index, f"  loss {other.loss:.3f} (published)", va="center", color="white")
    left.invert_yaxis()
    figure.savefig(path, dpi=120)
    return Path(path)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
