"""The loops of `fsdp2_runs.py` with multi-token prediction; started by `test_mtp_fsdp2.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_model
from fsdp2_runs import (
    STEPS,
    SWITCH,
    batch,
    export,
    load_shards,
    make_optimizer,
    save_shards,
    shard_as_accelerate_does,
    shard_head,
    shard_head_and_embedding,
    shard_layers,
    shard_root,
    train,
)
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_tst import MTPHeads, fused_next_token_loss, multi_token_prediction
from hf_tst.models.sharding import full_state_dict, left_out_of_optimizer, load_full_state_dict

AUX = {"router_aux_loss_coef": 0.5}
TIED = {"tie_word_embeddings": True}
WHOLE, PLAIN = range(STEPS), range(SWITCH, STEPS)  # through the switch, or next-token training from the start


def shard_extra_layers(model: Any) -> None:
    for head in model.mtp_heads.heads:
        fully_shard(getattr(head, "layer", head))


def shard_all_layers(model: Any) -> None:
    shard_extra_layers(model)
    shard_as_accelerate_does(model)


def shard_norm(model: Any) -> None:
    shard_extra_layers(model)
    fully_shard(model.model.norm)
    shard_head_and_embedding(model)


def shard_tail(model: Any) -> None:
    """Norm and head in one group that is not left gathered."""
    shard_extra_layers(model)
    fully_shard([model.model.norm, model.lm_head])
    shard_layers(model)


def shard_body(model: Any) -> None:
    fully_shard(model.model)
    fully_shard(model)


# name: model type, changes to its configuration, sharding, fused loss, kind, steps
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], None], str, Any, range]] = {
    "root": ("llama", {}, shard_root, "on", "parallel", WHOLE),
    "root_sequential": ("llama", {}, shard_root, "on", "sequential", WHOLE),
    "layers_plain": ("llama", {}, shard_layers, "off", "parallel", PLAIN),
    "layers_plain_sequential": ("llama", {}, shard_layers, "off", "sequential", PLAIN),
    "head": ("llama", {}, shard_head, "on", "parallel", WHOLE),
    "head_unfused": ("llama", {}, shard_head, "off", "parallel", WHOLE),
    "norm_sequential": ("llama", {}, shard_norm, "on", "sequential", WHOLE),
    "tail": ("llama", {}, shard_tail, "on", "parallel", WHOLE),
    "tail_unfused_sequential": ("llama", {}, shard_tail, "off", "sequential", WHOLE),
    "accelerate": ("llama", {}, shard_all_layers, "on", "parallel", WHOLE),
    "accelerate_sequential": ("llama", {}, shard_all_layers, "on", "sequential", WHOLE),
    "accelerate_plain": ("llama", {}, shard_all_layers, "on", "parallel", PLAIN),
    "accelerate_tied": ("llama", TIED, shard_all_layers, "on", "parallel", WHOLE),
    "accelerate_tied_sequential": ("llama", TIED, shard_all_layers, "off", "sequential", WHOLE),
    "accelerate_moe": ("qwen3_moe", AUX, shard_all_layers, "on", "parallel", WHOLE),
    "bias": ("phi", {}, shard_head, "on", "parallel", WHOLE),
}
# In superposition, at the switch, and in recovery.
CHECKPOINTED = {"root": SWITCH - 1, "accelerate": SWITCH, "accelerate_sequential": SWITCH + 1}


def make(name: str) -> tuple[Any, MTPHeads]:
    model_type, overrides, *_, kind, _ = CASES[name]
    model = make_model(model_type, **overrides).train()
    return model, MTPHeads(model, 3, kind, seed=1)


def train_alone(name: str) -> tuple[Any, MTPHeads, list[float]]:
    model, heads = make(name)
    *_, fused, _, steps = CASES[name]
    with multi_token_prediction(model, heads):
        return model, heads, train(model, make_optimizer(model), [0, 1], 1, fused, steps)


def export_all(model: Any, heads: MTPHeads, folder: Path) -> None:
    export(model, folder)
    weights = full_state_dict(heads)
    if torch.distributed.get_rank() == 0:
        save_file(weights, folder / "heads.safetensors")


def run_case(name: str, out: Path, rank: int) -> dict[str, Any]:
    _, _, shard, fused, _, steps = CASES[name]
    model, heads = make(name)
    losses = []
    with multi_token_prediction(model, heads):
        shard(model)
        optimizer = make_optimizer(model)
        sharded = all(hasattr(p, "full_tensor") for p in model.parameters())
        for step in steps:
            if step == CHECKPOINTED.get(name):
                save_shards(model, optimizer, out / f"{name}-shards")
                export_all(model, heads, out / f"{name}-saved")
            losses += train(model, optimizer, [rank], 2, fused, range(step, step + 1))
    export_all(model, heads, out / name)
    return {"losses": losses, "sharded": sharded}


def resume(name: str, out: Path, rank: int) -> dict[str, Any]:
    """Go on from a checkpoint with other heads to begin with, entering the context for each step anew."""
    _, _, shard, fused, kind, steps = CASES[name]
    model, _ = make(name)
    heads = MTPHeads(model, 3, kind, seed=2)
    losses = []
    with multi_token_prediction(model, heads):
        shard(model)
        optimizer = make_optimizer(model)
        untrained = heads.parameters() if CHECKPOINTED[name] <= SWITCH else ()
        with left_out_of_optimizer(optimizer, untrained):
            load_shards(model, optimizer, out / f"{name}-shards")
        load_full_state_dict(heads, load_file(out / f"{name}-saved" / "heads.safetensors"))
    for step in range(CHECKPOINTED[name], steps.stop):
        with multi_token_prediction(model, heads):
            losses += train(model, optimizer, [rank], 2, fused, range(step, step + 1))
    export_all(model, heads, out / f"{name}-resumed")
    return {"losses": losses}


def refusals() -> list[str]:
    """What is said of heads that nothing would synchronise, and of divisors that a cast has rounded."""
    said = []
    model, heads = make("root")
    shard_layers(model)
    for refused in (lambda: MTPHeads(model, 2), lambda: multi_token_prediction(model, heads).__enter__()):
        try:
            refused()
        except ValueError as error:
            said.append(str(error))
    for shard, divisor in ((shard_no_root, 9), (shard_body, 9), (shard_bfloat16, 9.0)):
        model, heads = make("root")
        with multi_token_prediction(model, heads):
            shard(model)
            try:
                model(**batch(SWITCH, slice(None)), num_items_in_batch=torch.tensor(divisor))
            except ValueError as error:
                said.append(str(error))
    return said


def shard_no_root(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)


def shard_bfloat16(model: Any) -> None:
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def ratio_of_divisors() -> list[float]:
    """Loss divided by 257 over a 257th of the loss: whole numbers, and others when the context is entered last."""
    model, heads = make("root")
    rows, ratios = batch(SWITCH, slice(None)), []
    with multi_token_prediction(model, heads):
        shard_bfloat16(model)
        ratios.append([model(**rows, num_items_in_batch=torch.tensor(n)) for n in (1, 257)])
    with multi_token_prediction(model, heads), fused_next_token_loss(model, "on"):
        ratios.append([model(**rows, num_items_in_batch=torch.tensor(n)) for n in (1.0, 257.0)])
    return [many.loss.item() * 257 / one.loss.item() for one, many in ratios]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {name: run_case(name, out, rank) for name in CASES}
    results["resumed"] = {name: resume(name, out, rank) for name in CHECKPOINTED}
    results["divisors"] = ratio_of_divisors()
    results["refusals"] = refusals()
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
