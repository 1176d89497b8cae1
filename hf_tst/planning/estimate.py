"""Estimated cost of a run and of its baselines. Pure arithmetic; nothing here is measured.

Letters: P parameters, d hidden size, V vocabulary, B rows per micro-batch, l latent positions per row, s tokens per bag,
n GPUs that a model is sharded over, r copies of the sharded model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..bags.phases import Phase, PhaseSchedule
from ..errors import TSTError, check_at_least
from ..losses.linear import chunk_rows
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind
from .flops import flops_per_token
from .reference import ACCELERATORS, SOURCE, Accelerator, PublishedRun

GIB = 2**30
# Fraction of an accelerator's memory taken by driver, libraries and fragmentation.
RESERVED_MEMORY = 0.06


@dataclass(frozen=True)
class Layout:
    """How a step is split over GPUs and micro-batches.

    Args:
        shard_size (`int`): GPUs that share one copy of the model, n.
        replicas (`int`): Copies, r.
        rows (`int`): Rows of a micro-batch on a GPU, B.
        length (`int`): Latent positions per row, l.
        micro_batches (`int`, *optional*, defaults to 1): Micro-batches per step (gradient accumulation).
        activation_checkpointing (`bool`, *optional*, defaults to `False`): Recompute layers in the backward pass.
        sync_each_batch (`bool`, *optional*, defaults to `False`): Scatter the gradients of every micro-batch. Trainer does so
            only if `accelerator_config` asks for it; otherwise it keeps unreduced gradients until the last micro-batch.
    """

    shard_size: int
    replicas: int
    rows: int
    length: int
    micro_batches: int = 1
    activation_checkpointing: bool = False
    sync_each_batch: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_size", "replicas", "rows", "length", "micro_batches"):
            check_at_least(1, **{name: getattr(self, name)})

    @property
    def gpus(self) -> int:
        """All GPUs of the run."""
        return self.shard_size * self.replicas

    @property
    def rows_per_step(self) -> int:
        """Rows per step, over all GPUs."""
        return self.gpus * self.rows * self.micro_batches

    @property
    def latent_tokens(self) -> int:
        """Latent positions per step, over all GPUs."""
        return self.rows_per_step * self.length


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Args:
        weights (`int`, *optional*, defaults to 4): Of a stored weight, its gradient and its optimizer states.
        compute (`int`, *optional*, defaults to 2): Of the numbers that the model computes with; 2 for bfloat16.
        optimizer_states (`int`, *optional*, defaults to 2): Numbers that the optimizer stores per trained weight; 2 with Adam.
    """

    weights: int = 4
    compute: int = 2
    optimizer_states: int = 2


MIXED_PRECISION = Precision()


def memory_per_gpu(
    shape: ModelShape,
    layout: Layout,
    *,
    bag_size: int = 1,
    fused_loss: bool = True,
    precision: Precision = MIXED_PRECISION,
) -> dict[str, int]:
    """Bytes on one GPU, by default with FSDP2 as accelerate shards it, in bfloat16 on float32 weights, with AdamW.

    Args:
        shape (`ModelShape`): The model.
        layout (`Layout`): How the step is cut.
        bag_size (`int`, *optional*, defaults to 1): Tokens per bag, s.
        fused_loss (`bool`, *optional*, defaults to `True`): Whether the loss is fused with the head.
        precision (`Precision`): Bytes per number.

    Returns:
        By name: `state`, the sharded weights, gradients and optimizer states; `gathered`, two layers and the head in the precision
        of computing, and the gradient of a layer, or without shards a copy of all weights; `unreduced`, whole gradients
        between micro-batches; `activations` that the backward pass needs; `loss`, logits, or a chunk of them and the gradient
        of the head; `embedding`, the embeddings of s tokens per position before they are averaged, freed before the first
        layer; `peak`, the sum, with the larger of (activations and loss) and embedding.
    """
    positions, trained, byte = layout.rows * layout.length, shape.trainable_parameters, precision.compute
    held = precision.weights * (shape.parameters + trained * (1 + precision.optimizer_states))
    state = -(-held // layout.shard_size)
    if layout.shard_size > 1:
        gathered = byte * (3 * shape.layer_parameters + shape.embedding_parameters)
    else:
        gathered = byte * shape.active_parameters if precision.weights > byte else 0
    waits = layout.shard_size > 1 and layout.micro_batches > 1 and not layout.sync_each_batch
    unreduced = byte * trained if waits else 0
    # Weights that stay in float32 on one GPU keep the sums between layers in float32 as well.
    between = byte if layout.shard_size > 1 else precision.weights
    inside = _layer_activations(shape, between, byte) * positions
    states = between * positions * shape.hidden_size
    activations = shape.layers * states + inside if layout.activation_checkpointing else shape.layers * inside
    if fused_loss:
        rows = chunk_rows(positions, shape.vocab_size, shape.hidden_size, byte, "cuda")
        chunk = rows * shape.vocab_size * byte
        # Accumulated in float32; its copy in the precision of the weights goes to FSDP.
        loss = chunk + (4 + byte) * shape.embedding_parameters
    else:
        # Logits and their gradient, float32 logits and their gradient; the gradient of the head.
        loss = (2 * byte + 8) * positions * shape.vocab_size + byte * shape.embedding_parameters
    embedding = between * positions * bag_size * shape.hidden_size
    return {
        "state": state,
        "gathered": gathered,
        "unreduced": unreduced,
        "activations": activations,
        "loss": loss,
        "embedding": embedding,
        "peak": state + gathered + unreduced + max(activations + loss, embedding),
    }


def communication_per_step(
    shape: ModelShape, layout: Layout, precision: Precision = MIXED_PRECISION
) -> dict[str, int]:
    """Bytes that one GPU receives in an optimizer step, the same in both phases.

    Every micro-batch gathers the weights for the forward pass and again for the backward pass (the head stays). The
    gradients are scattered once per step, or in every micro-batch with `sync_each_batch`. Copies of the model sum their shards of
    the gradients. All numbers are in the precision of computing.

    Args:
        shape (`ModelShape`): The model.
        layout (`Layout`): How the step is cut.
        precision (`Precision`): Bytes per number.

    Returns:
        By name: `gather`, `scatter`, and `replicate`, which crosses nodes where the model is sharded inside a node.
    """
    n, r, byte = layout.shard_size, layout.replicas, precision.compute
    whole = byte * shape.parameters * (n - 1) // n
    head = byte * shape.embedding_parameters * (n - 1) // n
    scatters = layout.micro_batches if layout.sync_each_batch else 1
    shard = byte * -(-shape.trainable_parameters // n)
    return {
        "gather": layout.micro_batches * (2 * whole - head),
        "scatter": scatters * (byte * shape.trainable_parameters * (n - 1) // n),
        "replicate": scatters * (2 * shard * (r - 1) // r),
    }


def checkpoint_bytes(shape: ModelShape, precision: Precision = MIXED_PRECISION) -> dict[str, int]:
    """Sizes of the saved model and of a checkpoint to resume from. An adapter is saved without its base model."""
    model = shape.trainable_parameters * precision.weights
    return {"model": model, "checkpoint": model * (1 + precision.optimizer_states)}


def _layer_activations(shape: ModelShape, between: int, byte: int) -> int:
    """Bytes that one layer keeps for the backward pass, per position, with attention that does not store scores.

    Counted from what autograd saves in Llama, Qwen3 and Qwen3-MoE: norms keep their input in float32 and their
    output; attention its queries, keys, values and result; an MLP gate, its SiLU, up and their product; an expert
    the same of each position it sees, and the position itself.

    Args:
        shape (`ModelShape`): The model.
        between (`int`): Bytes per number of the sum that runs through the layers.
        byte (`int`): Bytes per number inside of attention and MLP.
    """
    d = shape.hidden_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 + between) * d
    casts = 5 if between != byte else 2  # of the norms' results, for queries, keys, values, gate and up
    attention = casts * byte * d + 2 * byte * (queries + keys)
    if shape.norms_per_head:
        attention += (4 + 2 if byte == 2 else 8) * (queries + keys)
    if not shape.experts_per_position:
        return norms + attention + 4 * byte * shape.intermediate_size
    return norms + attention + shape.experts_per_position * byte * (2 * d + 4 * shape.intermediate_size)


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase of the run; a phase may have no steps."""

    phase: str
    steps: int
    raw_tokens: int
    latent_tokens: int
    flops: int
    gpu_hours: float


@dataclass(frozen=True)
class Alternative:
    """A run to compare with. It has a `loss` only if one was published, by `source`."""

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

    `raw_tokens`, `latent_tokens`, `flops` (over all GPUs) and `gpu_hours` are those of the whole run. `mtp_parameters` are those
    of the extra heads during training. `memory_bytes` is what [`memory_per_gpu`] returns.
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
                "activation_checkpointing, or plan with more or larger GPUs."
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
    published: PublishedRun | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        shape (`ModelShape`): The model.
        schedule (`PhaseSchedule`): The phases.
        layout (`Layout`): How a step is cut, and for how many GPUs.
        accelerator (`Accelerator`): The kind of GPU.
        mfu (`float`, *optional*, defaults to 0.4): Share of the peak that training reaches, in (0, 1].
        precision (`Precision`): Bytes per number.
        fused_loss (`bool`, *optional*, defaults to `True`): Whether the loss is fused with the head.
        mtp_num_heads (`int`, *optional*, defaults to 1), mtp_kind (`str`, defaults to `"parallel"`): Multi-token prediction in
            the recovery phase, see [`MTPHeads`].
        published (`PublishedRun`, *optional*): The same run in the paper, if it has it.
    """
    switch, steps, tokens = schedule.switch_step, schedule.max_steps, layout.latent_tokens
    training_shape = shape.with_mtp_heads(mtp_num_heads, mtp_kind)

    def cost(phase: Phase, first: int, end: int) -> PhaseCost:
        raw = schedule.amount_read(end, tokens) - schedule.amount_read(first, tokens)
        positions = schedule.positions_per_row(phase, layout.length) if end > first else layout.length
        per_token = flops_per_token(shape, positions, phase, mtp_num_heads, mtp_kind)
        latent = (end - first) * tokens
        flops = latent * per_token
        return PhaseCost(phase, end - first, raw, latent, flops, accelerator.gpu_hours(flops, mfu))

    bag_size = schedule.bag_size if switch else 1
    memory = memory_per_gpu(
        training_shape, layout, bag_size=bag_size, fused_loss=fused_loss, precision=precision
    )
    # The extra heads are in a checkpoint, but not in the model.
    with_heads = checkpoint_bytes(training_shape, precision)["checkpoint"]
    phases = [cost("superposition", 0, switch), cost("recovery", switch, steps)]
    flops = sum(phase.flops for phase in phases)
    plan = RunPlan(
        max_steps=steps,
        switch_step=switch,
        phases=phases,
        blocks=schedule.blocks_needed(layout.rows_per_step),
        raw_tokens=schedule.amount_read(steps, tokens),
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
        memory_bytes=memory,
        usable_memory_bytes=int(accelerator.memory_gib * GIB * (1 - RESERVED_MEMORY)),
        communication_bytes_per_step=communication_per_step(training_shape, layout, precision),
        checkpoint_bytes=checkpoint_bytes(shape, precision) | {"checkpoint": with_heads},
        comparison=[],
    )
    return _compare(plan, accelerator, published) if switch else plan


def _compare(plan: RunPlan, accelerator: Accelerator, published: PublishedRun | None) -> RunPlan:
    """The plan beside baselines of equal FLOPs, equal data and equal loss, with notes on the losses."""
    shape, tokens = plan.model, plan.latent_tokens_per_step
    step_flops = tokens * flops_per_token(shape, plan.layout.length)

    def row(name: str, steps: int, loss: float | None, known: str = "loss", **own: int) -> Alternative:
        """A row for a baseline of `steps` steps, or for the run itself with its tokens and FLOPs in `own`."""
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
        notes = [
            "The paper has no run of this model, steps, rows, batch and options of TST: no loss is predicted."
        ]
        return replace(plan, comparison=comparison, notes=notes)
    notes = [f"Losses are those of the paper's {published.name} ({SOURCE}), not a forecast of your run."]
    if published.equal_loss_steps:
        comparison[-1] = row(
            "baseline, equal loss", published.equal_loss_steps, published.equal_loss, "steps and loss"
        )
    if published.gpu_hours and published.equal_loss_gpu_hours:
        ratio = published.gpu_hours / published.equal_loss_gpu_hours
        mfu = ACCELERATORS["b200"].gpu_hours(plan.flops, mfu=1) / published.gpu_hours
        notes.append(
            f"Published: {published.gpu_hours:,.0f} B200-hours with TST and {published.equal_loss_gpu_hours:,.0f} for the "
            f"baseline of equal loss: {ratio:.3f} times as many. By this count of FLOPs, that is {mfu:.1%} of a B200's peak."
        )
    return replace(plan, comparison=comparison, notes=notes)
