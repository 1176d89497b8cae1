"""Memory and communication of a run on many GPUs, on paper. Pure arithmetic; bytes and operations, no measurement.

Letters: P parameters, d hidden size, V vocabulary, B rows a micro-batch, l latent positions a row, s tokens a bag,
n GPUs that a model is sharded over, r copies of the sharded model.
"""

from __future__ import annotations

from dataclasses import dataclass

from .linear_loss import chunk_rows

MASTER_BYTES, COMPUTE_BYTES = 4, 2  # FSDP2 keeps float32 and computes in bfloat16


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs, grouped-query attention and untied embeddings (Llama, SmolLM3, Qwen3-MoE).

    Args:
        hidden_size (`int`): d.
        layers (`int`): Layers.
        heads, kv_heads, head_dim (`int`): Of the attention.
        intermediate_size (`int`): Width of an MLP, or of one expert.
        vocab_size (`int`): V.
        experts, experts_per_token (`int`, defaults to 1): MLPs a layer, and how many of them see a position.
        norms_per_head (`bool`, defaults to `False`): Norms on queries and keys (Qwen3).
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    experts: int = 1
    experts_per_token: int = 1
    norms_per_head: bool = False

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer."""
        return self._shared_parameters + self.experts * self._expert_parameters

    @property
    def parameters(self) -> int:
        """All parameters, P."""
        return self.layers * self.layer_parameters + 2 * self.embedding_parameters + self.hidden_size

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply a position's state: without the embedding, and with its own experts only."""
        layer = self._shared_parameters + self.experts_per_token * self._expert_parameters
        return self.layers * layer + self.embedding_parameters + self.hidden_size

    @property
    def _shared_parameters(self) -> int:
        d, width = self.hidden_size, self.head_dim
        attention = 2 * d * self.heads * width + 2 * d * self.kv_heads * width
        router = d * self.experts if self.experts > 1 else 0
        return attention + router + 2 * d + (2 * width if self.norms_per_head else 0)

    @property
    def _expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


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
    """

    shard_size: int
    replicas: int
    rows: int
    length: int
    micro_batches: int = 1
    activation_checkpointing: bool = False

    @property
    def gpus(self) -> int:
        return self.shard_size * self.replicas

    @property
    def latent_tokens(self) -> int:
        """Latent positions a step, over all GPUs."""
        return self.gpus * self.rows * self.length * self.micro_batches


def memory_per_gpu(
    shape: ModelShape, layout: Layout, *, bag_size: int = 1, fused_loss: bool = True
) -> dict[str, int]:
    """Bytes on one GPU with FSDP2 as accelerate shards it, in bfloat16 on float32 master weights, with AdamW.

    Args:
        shape (`ModelShape`): The model.
        layout (`Layout`): How the step is cut.
        bag_size (`int`, defaults to 1): Tokens a bag, s.
        fused_loss (`bool`, defaults to `True`): Whether the loss is fused with the head.

    Returns:
        By name: `state`, the sharded weights, gradients and both moments; `gathered`, two layers and the head in
        bfloat16, and the gradient of a layer; `activations`, what the backward pass needs; `loss`, logits, or a chunk of them and the
        gradient of the head; `embedding`, the vectors of s tokens a position before they are averaged, gone before the
        first layer. `peak`: state, gathered, activations and the larger of loss and embedding.
    """
    positions = layout.rows * layout.length
    state = (2 * MASTER_BYTES + 8) * -(-shape.parameters // layout.shard_size)
    gathered = COMPUTE_BYTES * (3 * shape.layer_parameters + shape.embedding_parameters)
    states = COMPUTE_BYTES * positions * shape.hidden_size
    inside = _layer_activations(shape) * positions * COMPUTE_BYTES
    activations = shape.layers * states + inside if layout.activation_checkpointing else shape.layers * inside
    if fused_loss:
        chunk = chunk_rows(positions, shape.vocab_size, "cuda") * shape.vocab_size * COMPUTE_BYTES
        # Accumulated in float32; its bfloat16 copy goes to FSDP.
        loss = chunk + (4 + COMPUTE_BYTES) * shape.embedding_parameters
    else:
        # bfloat16 logits and their gradient, float32 logits and their gradient; the gradient of the head.
        loss = (
            2 * COMPUTE_BYTES + 8
        ) * positions * shape.vocab_size + COMPUTE_BYTES * shape.embedding_parameters
    embedding = COMPUTE_BYTES * positions * bag_size * shape.hidden_size
    return {
        "state": state,
        "gathered": gathered,
        "activations": activations,
        "loss": loss,
        "embedding": embedding,
        "peak": state + gathered + max(activations + loss, embedding),
    }


def communication_per_step(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """Bytes that one GPU receives in an optimizer step, the same in both phases.

    Every micro-batch gathers the weights for the forward pass and again for the backward pass (the head stays), and
    scatters the gradients, all in bfloat16. Copies of the model add up their shards of the gradients.

    Args:
        shape (`ModelShape`): The model.
        layout (`Layout`): How the step is cut.

    Returns:
        By name: `gather`, `scatter`, and `replicate`, which crosses nodes where the model is sharded inside a node.
    """
    n, r = layout.shard_size, layout.replicas
    whole = COMPUTE_BYTES * shape.parameters * (n - 1) // n
    head = COMPUTE_BYTES * shape.embedding_parameters * (n - 1) // n
    shard = COMPUTE_BYTES * -(-shape.parameters // n)
    return {
        "gather": layout.micro_batches * (2 * whole - head),
        "scatter": layout.micro_batches * whole,
        "replicate": layout.micro_batches * 2 * shard * (r - 1) // r,
    }


def operations_per_gpu(shape: ModelShape, layout: Layout) -> int:
    """Floating-point operations of one GPU in an optimizer step: 6 a parameter and latent position, and attention's.

    A third more with activation checkpointing. The same in both phases: a bag is one position.
    """
    positions = layout.rows * layout.length * layout.micro_batches
    attention = 6 * shape.layers * shape.heads * shape.head_dim * layout.length  # causal: half of 12
    operations = positions * (6 * shape.active_parameters + attention)
    return operations * 4 // 3 if layout.activation_checkpointing else operations


def _layer_activations(shape: ModelShape) -> int:
    """Numbers that one layer keeps for the backward pass, a position, with attention that keeps no scores.

    Inputs of two norms and of attention, MLP and both sums; queries, keys, values and their result; and of each
    expert that sees the position its input, gate, up and their product.
    """
    d = shape.hidden_size
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    dispatched = d if shape.experts > 1 else 0
    return 4 * d + attention + shape.experts_per_token * (dispatched + 3 * shape.intermediate_size)
