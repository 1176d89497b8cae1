"""What a run costs before it starts, and what it is compared with. Arithmetic on the costs and the phases."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..bags.phases import Phase, PhaseSchedule
from ..errors import TSTError
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind
from . import costs
from .costs import MIXED_PRECISION, Layout, Precision
from .flops import flops_per_token
from .reference import ACCELERATORS, SOURCE, Accelerator, find_published

GIB = 2**30
# Share of an accelerator's memory that its driver, libraries and fragmentation take.
RESERVED_MEMORY = 0.06


@dataclass(frozen=True)
class PhaseCost:
    """What one phase of the run takes; a phase may have no step."""

    phase: str
    steps: int
    raw_tokens: int
    latent_tokens: int
    flops: int
    gpu_hours: float


@dataclass(frozen=True)
class Alternative:
    """A run to compare with. It has a `loss` only where `source` says who published it."""

    name: str
    steps: int | None = None
    raw_tokens: int | None = None
    flops: int | None = None
    gpu_hours: float | None = None
    loss: float | None = None
    source: str = "computed"


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run, with the names that `hf-tst plan --json` prints; made by [`plan_run`].

    `raw_tokens`, `latent_tokens`, `flops` (over all GPUs) and `gpu_hours` are those of the whole run. `mtp_parameters` are
    of extra heads, which are there while the run trains. `memory_bytes` is what [`memory_per_gpu`] returns.
    """

    max_steps: int
    switch_step: int
    phases: list[PhaseCost]
    blocks: int
    raw_tokens: int
    latent_tokens: int
    flops: int
    gpu_hours: float
    mtp_parameters: int
    notes: list[str]
    latent_tokens_per_step: int
    gpu: str
    num_gpus: int
    mfu: float
    peak_tflops: float
    model: ModelShape
    layout: Layout
    memory_bytes: dict[str, int]
    usable_memory_bytes: int
    communication_bytes_per_step: dict[str, int]
    checkpoint_bytes: dict[str, int]
    comparison: list[Alternative]

    def check_memory(self) -> None:
        """Raise `TSTError` if the run does not fit into memory, and say by how much."""
        peak, usable = self.memory_bytes["peak"], self.usable_memory_bytes
        if peak > usable:
            raise TSTError(
                f"The run needs about {peak / GIB:.1f} GiB on each of {self.num_gpus} x {self.gpu}, {(peak - usable) / GIB:.1f} "
                f"GiB more than the {usable / GIB:.1f} GiB that it can use: lower per_device_train_batch_size, set "
                "gradient_checkpointing, or plan with more or larger GPUs."
            )


def plan_run(
    shape: ModelShape,
    schedule: PhaseSchedule,
    layout: Layout,
    accelerator: Accelerator,
    mfu: float = 0.4,
    *,
    precision: Precision = MIXED_PRECISION,
    fused_loss: bool = True,
    mtp_num_heads: int = 1,
    mtp_kind: MTPKind = "parallel",
) -> RunPlan:
    """Plan a run.

    Args:
        shape (`ModelShape`): The model.
        schedule (`PhaseSchedule`): The phases.
        layout (`Layout`): How a step is cut, and for how many GPUs.
        accelerator (`Accelerator`): The kind of GPU.
        mfu (`float`, defaults to 0.4): Share of the peak that training reaches, in (0, 1].
        precision (`Precision`): Bytes per number.
        fused_loss (`bool`, defaults to `True`): Whether the loss is fused with the head.
        mtp_num_heads (`int`, defaults to 1), mtp_kind (`str`, defaults to `"parallel"`): Multi-token prediction in the
            recovery phase, see [`MTPHeads`].
    """
    switch, steps, tokens = schedule.switch_step, schedule.max_steps, layout.latent_tokens
    training_shape = shape.with_mtp_heads(mtp_num_heads, mtp_kind)

    def cost(phase: Phase, first: int, end: int) -> PhaseCost:
        raw = schedule.tokens_seen(end, tokens) - schedule.tokens_seen(first, tokens)
        per_token = flops_per_token(shape, layout.length, phase, mtp_num_heads, mtp_kind)
        latent = (end - first) * tokens
        flops = latent * per_token
        return PhaseCost(phase, end - first, raw, latent, flops, accelerator.gpu_hours(flops, mfu))

    phases = [cost("superposition", 0, switch), cost("recovery", switch, steps)]
    flops = sum(phase.flops for phase in phases)
    plan = RunPlan(
        max_steps=steps,
        switch_step=switch,
        phases=phases,
        blocks=schedule.blocks_needed(layout.rows_per_step),
        raw_tokens=schedule.tokens_seen(steps, tokens),
        latent_tokens=steps * tokens,
        flops=flops,
        gpu_hours=accelerator.gpu_hours(flops, mfu),
        mtp_parameters=training_shape.parameters - shape.parameters,
        notes=[],
        latent_tokens_per_step=tokens,
        gpu=accelerator.name,
        num_gpus=layout.gpus,
        mfu=mfu,
        peak_tflops=accelerator.tflops,
        model=shape,
        layout=layout,
        memory_bytes=costs.memory_per_gpu(
            training_shape,
            layout,
            bag_size=schedule.bag_size if switch else 1,
            fused_loss=fused_loss,
            precision=precision,
        ),
        usable_memory_bytes=int(accelerator.memory_gib * GIB * (1 - RESERVED_MEMORY)),
        communication_bytes_per_step=costs.communication_per_step(training_shape, layout, precision),
        # The extra heads are in a checkpoint, but not in the model.
        checkpoint_bytes=costs.checkpoint_bytes(shape, precision)
        | {"checkpoint": costs.checkpoint_bytes(training_shape, precision)["checkpoint"]},
        comparison=[],
    )
    return _compare(plan, schedule, accelerator) if switch else plan


def _compare(plan: RunPlan, schedule: PhaseSchedule, accelerator: Accelerator) -> RunPlan:
    """The plan beside baselines of equal FLOPs, equal data and equal loss, with notes on the losses."""
    shape, tokens = plan.model, plan.latent_tokens_per_step
    step_flops = tokens * flops_per_token(shape, plan.layout.length)
    published = find_published(
        shape.vocab_size, hidden_size=shape.hidden_size, layers=shape.layers, steps=plan.max_steps,
        tokens_per_step=tokens, bag_size=schedule.bag_size, phase_ratio=schedule.phase_ratio,
    )  # fmt: skip
    if plan.mtp_parameters:
        published = None

    def row(name: str, steps: int, loss: float | None, known: str = "loss", **own: int) -> Alternative:
        """A baseline of so many steps, unless `own` says what the run reads and computes."""
        figures = {"raw_tokens": steps * tokens, "flops": steps * step_flops} | own
        hours = accelerator.gpu_hours(figures["flops"], plan.mfu)
        source = f"{known}: published, {SOURCE}" if loss else "computed"
        return Alternative(name, steps, **figures, gpu_hours=hours, loss=loss, source=source)

    name = "TST and MTP, this run" if plan.mtp_parameters else "TST, this run"
    loss, baseline_loss = getattr(published, "loss", None), getattr(published, "baseline_loss", None)
    comparison = [
        row(name, plan.max_steps, loss, raw_tokens=plan.raw_tokens, flops=plan.flops),
        row("baseline, equal FLOPs", round(plan.flops / step_flops), baseline_loss),
        row("baseline, equal data", math.ceil(plan.raw_tokens / tokens), None),
        Alternative("baseline, equal loss", source="no published figure"),
    ]
    if published is None:
        notes = ["The paper has no run of this model, length, batch, s and r: nothing is said about loss."]
        return replace(plan, comparison=comparison, notes=notes)
    notes = [f"Losses are those of the paper's {published.name} ({SOURCE}), no forecast of your run."]
    if published.equal_loss_steps:
        comparison[-1] = row(
            "baseline, equal loss", published.equal_loss_steps, published.equal_loss, "steps and loss"
        )
    if published.gpu_hours and published.equal_loss_gpu_hours:
        ratio = published.gpu_hours / published.equal_loss_gpu_hours
        mfu = ACCELERATORS["b200"].gpu_hours(plan.flops, mfu=1) / published.gpu_hours
        notes.append(
            f"Published: {published.gpu_hours:,.0f} B200-hours with TST and {published.equal_loss_gpu_hours:,.0f} for the "
            f"baseline of equal loss: {ratio:.3f} times as many. By this count of FLOPs that is {mfu:.1%} of a B200's peak."
        )
    return replace(plan, comparison=comparison, notes=notes)
