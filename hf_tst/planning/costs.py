"""Memory and communication of a run on many GPUs, on paper. Pure arithmetic; nothing here is measured.

Letters: P parameters, d hidden size, V vocabulary, B rows a micro-batch, l latent positions a row, s tokens a bag,
n GPUs that a model is sharded over, r copies of the sharded model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import check_at_least
from ..losses.linear import chunk_rows
from ..models.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """How a step is cut.

    Args:
        shard_size (`int`): GPUs that hold one copy of the model between them, n.
        replicas (`int`): Copies, r.
        rows (`int`): Rows of a micro-batch on a GPU, B.
        length (`int`): Latent positions a row, l.
        micro_batches (`int`, defaults to 1): Micro-batches a step (gradient accumulation).
        activation_checkpointing (`bool`, defaults to `False`): Compute the inside of layers again in the backward pass.
        sync_each_batch (`bool`, defaults to `False`): Scatter the gradients of every micro-batch. Trainer does so only
            if `accelerator_config` says it, and else keeps them whole until the last micro-batch.
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
        """Rows a step, over all GPUs."""
        return self.gpus * self.rows * self.micro_batches

    @property
    def latent_tokens(self) -> int:
        """Latent positions a step, over all GPUs."""
        return self.rows_per_step * self.length


@dataclass(frozen=True)
class Precision:
    """Bytes a number.

    Args:
        weights (`int`, defaults to 4): Of a weight as it is stored, and of its gradient and optimizer states.
        compute (`int`, defaults to 2): Of what the model computes with; 2 for bfloat16.
        optimizer_states (`int`, defaults to 2): Numbers that the optimizer keeps of a trained weight; 2 with Adam.
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
        bag_size (`int`, defaults to 1): Tokens a bag, s.
        fused_loss (`bool`, defaults to `True`): Whether the loss is fused with the head.
        precision (`Precision`): Bytes a number.

    Returns:
        By name: `state`, the sharded weights, gradients and optimizer states; `gathered`, two layers and the head as
        they are computed with, and the gradient of a layer, or without shards a copy of all weights; `unreduced`,
        whole gradients between micro-batches; `activations`, what the backward pass needs; `loss`, logits, or a
        chunk of them and the gradient of the head; `embedding`, the vectors of s tokens a position before they are
        averaged, gone before the first layer. `peak`: all of them, of activations with loss and embedding the larger.
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
    gradients are scattered once a step, or every micro-batch with `sync_each_batch`. Copies of the model add up their
    shards of the gradients. All in the precision that is computed in.

    Args:
        shape (`ModelShape`): The model.
        layout (`Layout`): How the step is cut.
        precision (`Precision`): Bytes a number.

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
    """Size of the model as it is pushed, and of a checkpoint to resume from. An adapter is saved without its base."""
    model = shape.trainable_parameters * precision.weights
    return {"model": model, "checkpoint": model * (1 + precision.optimizer_states)}


def _layer_activations(shape: ModelShape, between: int, byte: int) -> int:
    """Bytes that one layer keeps for the backward pass, a position, with attention that keeps no scores.

    Counted from what autograd saves in Llama, Qwen3 and Qwen3-MoE: norms keep their input in float32 and what they
    hand on; attention its queries, keys, values and result; an MLP gate, its SiLU, up and their product; an expert
    the same of each position it sees, and the position itself.

    Args:
        shape (`ModelShape`): The model.
        between (`int`): Bytes a number of the sum that runs through the layers.
        byte (`int`): Bytes a number inside of attention and MLP.
    """
    d = shape.hidden_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 + between) * d
    casts = 5 if between != byte else 2  # of the norms' results, for queries, keys, values, gate and up
    attention = casts * byte * d + 2 * byte * (queries + keys)
    if shape.norms_per_head:
        attention += (4 + 2 if byte == 2 else 8) * (queries + keys)
    if not shape.experts_per_token:
        return norms + attention + 4 * byte * shape.intermediate_size
    return norms + attention + shape.experts_per_token * byte * (2 * d + 4 * shape.intermediate_size)
