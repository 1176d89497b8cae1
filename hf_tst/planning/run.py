"""What a run costs before it is started, and what it is compared with. Arithmetic on the costs and the phases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ..bags.phases import Phase, PhaseSchedule
from ..errors import TSTError
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind
from .costs import (
    MIXED_PRECISION,
    Layout,
    Precision,
    checkpoint_bytes,
    communication_per_step,
    memory_per_gpu,
)
from .flops import flops_per_token
from .hardware import ACCELERATORS, Accelerator
from .published import SOURCE, PublishedRun, find_published

GIB = 2**30
# What of an accelerator's memory is left to its driver, to libraries and to fragmentation.
RESERVED_MEMORY = 0.06


@dataclass(frozen=True)
class Machines:
    """What a run is planned on.

    Args:
        accelerator (`Accelerator`): See [`ACCELERATORS`].
        count (`int`, defaults to 1): How many.
        mfu (`float`, defaults to 0.4): Share of the peak that training reaches, in (0, 1].
    """

    accelerator: Accelerator
    count: int = 1
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise TSTError(f"num_gpus must be at least 1, but is {self.count}.")
        if not 0 < self.mfu <= 1:
            raise TSTError(f"mfu must be more than 0 and at most 1, but is {self.mfu}.")
        if not (self.accelerator.tflops > 0 and self.accelerator.memory_gib > 0):
            raise TSTError(
                f"An accelerator of {self.accelerator.tflops} TFLOP/s and {self.accelerator.memory_gib} GiB cannot train: "
                "tst_peak_tflops and gpu_memory_gib must be more than 0."
            )

    def gpu_hours(self, flops: float) -> float:
        """Hours on one accelerator; on several, the sum of their hours."""
        return flops / (self.accelerator.tflops * 1e12 * self.mfu * 3600)


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
    """The plan of a run; made by [`plan_run`]. Sizes in bytes, `memory` as [`memory_per_gpu`] returns it."""

    schedule: PhaseSchedule
    shape: ModelShape
    layout: Layout
    machines: Machines
    phases: list[PhaseCost]
    memory: dict[str, int]
    communication: dict[str, int]
    checkpoints: dict[str, int]
    mtp_parameters: int = 0  # of extra heads, which are there while it trains
    alternatives: list[Alternative] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks of data that the run reads."""
        return self.schedule.blocks_needed(self.layout.rows_per_step)

    @property
    def raw_tokens(self) -> int:
        """Tokens of text that the run reads."""
        return sum(phase.raw_tokens for phase in self.phases)

    @property
    def latent_tokens(self) -> int:
        """Positions that the run computes."""
        return sum(phase.latent_tokens for phase in self.phases)

    @property
    def flops(self) -> int:
        """FLOPs of the run, over all GPUs."""
        return sum(phase.flops for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU, at the stated utilisation."""
        return self.machines.gpu_hours(self.flops)

    @property
    def usable_memory(self) -> float:
        """Bytes of an accelerator that the run can use."""
        return self.machines.accelerator.memory_gib * GIB * (1 - RESERVED_MEMORY)

    def check_memory(self) -> None:
        """Raise `TSTError` if the run does not fit into memory, and say by how much."""
        lacking = self.memory["peak"] - self.usable_memory
        if lacking <= 0:
            return
        machines = self.machines
        raise TSTError(
            f"The run needs about {self.memory['peak'] / GIB:.1f} GiB on each of {machines.count} x "
            f"{machines.accelerator.name}, {lacking / GIB:.1f} GiB more than the {self.usable_memory / GIB:.1f} GiB that it "
            "can use: lower per_device_train_batch_size, set gradient_checkpointing, or plan with more or larger GPUs."
        )


def plan_run(
    shape: ModelShape,
    schedule: PhaseSchedule,
    layout: Layout,
    machines: Machines,
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
        layout (`Layout`): How a step is cut.
        machines (`Machines`): What it runs on.
        precision (`Precision`): Bytes a number.
        fused_loss (`bool`, defaults to `True`): Whether the loss is fused with the head.
        mtp_num_heads (`int`, defaults to 1), mtp_kind (`str`, defaults to `"parallel"`): Multi-token prediction in the
            recovery phase, see [`MTPHeads`].

    Raises:
        TSTError: If `layout` is for another number of GPUs than `machines` has.
    """
    if layout.gpus != machines.count:
        raise TSTError(
            f"The step is cut for {layout.gpus} GPUs, but num_gpus is {machines.count}: shard_size must divide it."
        )
    switch, steps, tokens = schedule.switch_step, schedule.max_steps, layout.latent_tokens
    training_shape = shape.with_mtp_heads(mtp_num_heads, mtp_kind)

    def cost(phase: Phase, first: int, end: int) -> PhaseCost:
        raw = schedule.tokens_seen(end, tokens) - schedule.tokens_seen(first, tokens)
        per_token = flops_per_token(shape, layout.length, phase, mtp_num_heads, mtp_kind)
        flops = (end - first) * tokens * per_token
        return PhaseCost(phase, end - first, raw, (end - first) * tokens, flops, machines.gpu_hours(flops))

    checkpoints = checkpoint_bytes(training_shape, precision)
    plan = RunPlan(
        schedule=schedule,
        shape=shape,
        layout=layout,
        machines=machines,
        phases=[cost("superposition", 0, switch), cost("recovery", switch, steps)],
        mtp_parameters=training_shape.parameters - shape.parameters,
        memory=memory_per_gpu(
            training_shape,
            layout,
            bag_size=schedule.bag_size if switch else 1,
            fused_loss=fused_loss,
            precision=precision,
        ),
        communication=communication_per_step(training_shape, layout, precision),
        checkpoints=checkpoints | {"model": checkpoint_bytes(shape, precision)["model"]},
    )
    return _compare(plan, mtp_num_heads > 1) if switch else plan


def _compare(plan: RunPlan, has_extra_heads: bool) -> RunPlan:
    """The plan beside baselines of equal FLOPs, equal data and equal loss, and what is said of them."""
    shape, schedule, tokens = plan.shape, plan.schedule, plan.layout.latent_tokens
    published = None
    if not has_extra_heads:
        published = find_published(
            shape.vocab_size, hidden_size=shape.hidden_size, layers=shape.layers, steps=schedule.max_steps,
            tokens_per_step=tokens, bag_size=schedule.bag_size, phase_ratio=schedule.phase_ratio,
        )  # fmt: skip

    def baseline(equal: str, steps: int, loss: float | None = None, said: str = "loss") -> Alternative:
        flops = steps * tokens * flops_per_token(shape, plan.layout.length)
        source = f"{said}: published, {SOURCE}" if loss else "computed"
        hours = plan.machines.gpu_hours(flops)
        return Alternative(f"baseline, equal {equal}", steps, steps * tokens, flops, hours, loss, source)

    this_run = Alternative(
        "TST and MTP, this run" if has_extra_heads else "TST, this run",
        schedule.max_steps,
        plan.raw_tokens,
        plan.flops,
        plan.gpu_hours,
        published.loss if published else None,
        f"loss: published, {SOURCE}" if published else "computed",
    )
    equal_flops = round(plan.flops / (tokens * flops_per_token(shape, plan.layout.length)))
    equal_loss = Alternative("baseline, equal loss", source="no published figure")
    if published and published.equal_loss_steps:
        equal_loss = baseline("loss", published.equal_loss_steps, published.equal_loss, said="steps and loss")
    alternatives = [
        this_run,
        baseline("FLOPs", equal_flops, published.baseline_loss if published else None),
        baseline("data", math.ceil(plan.raw_tokens / tokens)),
        equal_loss,
    ]
    return replace(plan, alternatives=alternatives, notes=_notes(published, plan.flops))


def _notes(published: PublishedRun | None, flops: int) -> list[str]:
    if published is None:
        return ["The paper has no run of this model, length, batch, s and r: nothing is said about loss."]
    notes = [f"Losses are those of the paper's {published.name} ({SOURCE}), no forecast of your run."]
    if published.gpu_hours and published.equal_loss_gpu_hours:
        ratio = published.gpu_hours / published.equal_loss_gpu_hours
        mfu = Machines(ACCELERATORS["b200"], mfu=1).gpu_hours(flops) / published.gpu_hours
        notes.append(
            f"Published: {published.gpu_hours:,.0f} B200-hours with TST and {published.equal_loss_gpu_hours:,.0f} for the "
            f"baseline of equal loss: {ratio:.3f} times as many. By this count of FLOPs that is {mfu:.1%} of a B200's peak."
        )
    return notes
