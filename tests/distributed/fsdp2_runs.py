"""Training loops with torch's `fully_shard` that one process can repeat; started by `test_fsdp2.py`.

accelerate reaches FSDP only on accelerators, so here the loop is written by hand, as a user without Trainer would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from conftest import VOCAB_SIZE, make_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedConfig, PreTrainedModel

from hf_tst import fused_next_token_loss, token_superposition
from hf_tst.bags.folding import fold_into_bags, next_bag_labels
from hf_tst.bags.weighting import INPUT_WEIGHTINGS
from hf_tst.losses.multi_hot import count_target_bags
from hf_tst.models.sharding import full_state_dict

STEPS, SWITCH, BAG_SIZE, LENGTH = 6, 3, 4, 8
CLIP = 0.5


def shard_root(model: Any) -> None:
    fully_shard(model)


def shard_layers(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def shard_head(model: Any) -> None:
    fully_shard(model.lm_head)
    shard_layers(model)


def shard_head_and_embedding(model: Any) -> None:
    fully_shard(model.model.embed_tokens)
    shard_head(model)


def shard_as_accelerate_does(model: Any) -> None:
    """Embedding, layers, and a group of final norm and head, which is left gathered; tied weights in one group."""
    for layer in model.model.layers:
        fully_shard(layer)
    tail = [model.model.norm, model.lm_head]
    if model.lm_head.weight is model.model.embed_tokens.weight:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def shard_gpt2(model: Any) -> None:
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)


# name: model type, changes to its configuration, sharding, fused loss
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], None], str]] = {
    "root": ("llama", {}, shard_root, "on"),
    "layers": ("llama", {}, shard_layers, "on"),
    "head": ("llama", {}, shard_head, "on"),
    "head_and_embedding": ("llama", {}, shard_head_and_embedding, "on"),
    "accelerate": ("llama", {}, shard_as_accelerate_does, "on"),
    "accelerate_tied": ("llama", {"tie_word_embeddings": True}, shard_as_accelerate_does, "on"),
    "accelerate_moe": ("qwen3_moe", {"router_aux_loss_coef": 0.5}, shard_as_accelerate_does, "on"),
    "unfused": ("llama", {}, shard_head, "off"),
    "tied": ("llama", {"tie_word_embeddings": True}, shard_layers, "on"),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, shard_gpt2, "on"),
    "qwen3_moe": ("qwen3_moe", {"router_aux_loss_coef": 0.5}, shard_layers, "on"),
    "bias": ("phi", {}, shard_head, "on"),
    "softcap": ("gemma2", {"attention_dropout": 0.0}, shard_layers, "on"),
}
CHECKPOINTED = "head"  # saved in shards at the switch, and read again


def batch(step: int, rows: slice) -> dict[str, torch.Tensor]:
    """The micro-batch of `rows` of the global batch of two rows a rank; some targets do not count."""
    superposed = step < SWITCH
    length = LENGTH * BAG_SIZE if superposed else LENGTH
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB_SIZE, (4, length), generator=generator)
    targets = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
    tokens, targets = tokens[rows], targets[rows]
    if not superposed:
        return {"input_ids": tokens, "labels": targets}
    return {
        "input_ids": fold_into_bags(tokens, BAG_SIZE),
        "labels": next_bag_labels(fold_into_bags(targets, BAG_SIZE)),
    }


def count_targets(step: int) -> torch.Tensor:
    labels = batch(step, slice(None))["labels"]
    return count_target_bags(labels if labels.dim() == 3 else labels[:, 1:].unsqueeze(-1))


def train(
    model: Any, optimizer: Any, ranks: list[int], world_size: int, fused: str, steps: range
) -> list[float]:
    """Train on the rows of `ranks`, one micro-batch each; the losses are those of the rows of these ranks."""
    losses = []
    for step in steps:
        context = (
            token_superposition(model, BAG_SIZE, input_weighting=INPUT_WEIGHTINGS[step], fused_loss=fused)
            if step < SWITCH
            else fused_next_token_loss(model, fused)
        )
        with context:
            total = 0.0
            for rank in ranks:
                rows = batch(step, slice(2 * rank, 2 * rank + 2))
                loss = model(**rows, num_items_in_batch=count_targets(step)).loss
                (loss * world_size).backward()  # FSDP averages the gradients over the ranks
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def make(name: str) -> Any:
    model_type, overrides, _, _ = CASES[name]
    return make_model(model_type, **overrides).train()


def make_optimizer(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def save_shards(model: Any, optimizer: Any, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_shards(model: Any, optimizer: Any, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def export(model: Any, folder: Path) -> None:
    """Gather the weights and write an ordinary checkpoint, as the last step of a run."""
    weights = full_state_dict(model)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


def run_case(name: str, out: Path, rank: int) -> dict[str, Any]:
    _, _, shard, fused = CASES[name]
    model = make(name)
    shard(model)
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, [rank], 2, fused, range(SWITCH))
    if name == CHECKPOINTED:
        save_shards(model, optimizer, out / "shards")
    losses += train(model, optimizer, [rank], 2, fused, range(SWITCH, STEPS))
    export(model, out / name)
    return {"losses": losses, "sharded": all(hasattr(p, "full_tensor") for p in model.parameters())}


def resume(out: Path, rank: int) -> dict[str, Any]:
    _, _, shard, fused = CASES[CHECKPOINTED]
    model = make(CHECKPOINTED)
    shard(model)
    optimizer = make_optimizer(model)
    load_shards(model, optimizer, out / "shards")
    losses = train(model, optimizer, [rank], 2, fused, range(SWITCH, STEPS))
    export(model, out / "resumed")
    return {"losses": losses}


def ratio_of_divisors(fused: str) -> float:
    """Loss divided by 257 over a 257th of the loss, with a policy that casts what the model is given to bfloat16."""
    model = make("root")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rows = batch(0, slice(None))
    with token_superposition(model, BAG_SIZE, fused_loss=fused):
        one, many = (model(**rows, num_items_in_batch=torch.tensor(n)).loss.item() for n in (1.0, 257.0))
    return many * 257 / one


class OwnBody(nn.Module):
    """Returns a tuple, so that no stand-in can take its place in the checks before training."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(VOCAB_SIZE, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.mix(self.tokens(input_ids))[0], None


class OwnForCausalLM(PreTrainedModel):
    """A user's own small model, which computes its loss itself."""

    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model, self.lm_head = OwnBody(), nn.Linear(8, VOCAB_SIZE, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tokens

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.model(input_ids)
        logits = self.lm_head(hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def losses_of_own_model() -> list[float]:
    """The loss of a user's own model in superposition, whole and sharded."""
    torch.manual_seed(0)
    model, rows = OwnForCausalLM(PreTrainedConfig(vocab_size=VOCAB_SIZE)).train(), batch(0, slice(None))
    losses = []
    for shards in (False, True):
        if shards:
            fully_shard(model.model.mix)
            fully_shard(model)
        with token_superposition(model, BAG_SIZE):
            losses.append(model(**rows)["loss"].item())
    return losses


def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {name: run_case(name, out, rank) for name in CASES}
    results["own_model"] = losses_of_own_model()
    results["divisors"] = [ratio_of_divisors(fused) for fused in ("on", "off")]
    results["resumed"] = resume(out, rank)
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
