"""TSTTrainer with multi-token prediction and accelerate's FSDP2 on the CPU; started by `test_mtp_trainer_fsdp2.py`.

accelerate takes FSDP for accelerators only. Here it is told, while the trainer makes its Accelerator, that the processes
have GPUs; what it shards with, saves and loads is what it does on GPUs, over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_blocks, make_model
from ddp_runs import OwnLoader
from transformers import TrainerCallback

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.models.sharding import full_state_dict

STEPS, SWITCH = 8, 3
AUX = {"router_aux_loss_coef": 0.5}
# What a case asks of two processes; one process does the same with twice the accumulation.
CASES: dict[str, dict[str, Any]] = {
    "tst": {},
    "tst_sequential": {"mtp_kind": "sequential", "weight_decay": 0.1, "model": ("llama", {"tie_word_embeddings": True})},
    "baseline": {"tst_phase_ratio": 0, "mtp_loss_weight": 0.5},
    "baseline_sequential": {"tst_phase_ratio": 0, "mtp_kind": "sequential"},
    "bf16_moe": {"model": ("qwen3_moe", AUX), "bf16": True, "mtp_kind": "sequential"},
    "own_loader": {"own_loader": True},
    "accumulation_moe": {"model": ("qwen3_moe", AUX), "gradient_accumulation_steps": 2},
}  # fmt: skip
RESUMED = {"tst": [2, 3, 6], "tst_sequential": [6], "own_loader": [2, 3], "baseline_sequential": [4]}
SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


class LastHeads(TrainerCallback):
    """The extra heads at the end of training, in one piece."""

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.weights = full_state_dict(model.mtp_heads)
        self.sharded = all(hasattr(p, "full_tensor") for p in model.parameters())


@contextmanager
def fsdp_on_cpu(**settings: str):  # type: ignore[no-untyped-def]
    """Context in which an Accelerator is made that runs FSDP2."""
    AcceleratorState._reset_state()
    os.environ |= SETTINGS | settings
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        for name in SETTINGS | settings:
            del os.environ[name]


def make_trainer(
    name: str,
    folder: Path,
    world_size: int,
    settings: dict[str, str] | None = None,
    callbacks: Any = (),
    **more: Any,
) -> TSTTrainer:
    """A trainer of one process, or of one under FSDP with `settings`."""
    options = CASES[name] | more
    model_type, overrides = options.pop("model", ("llama", {}))
    kind = OwnLoader if options.pop("own_loader", False) else TSTTrainer
    accumulation = options.pop("gradient_accumulation_steps", 1) * 2 // world_size
    options = {"tst_phase_ratio": SWITCH / STEPS, "mtp_num_heads": 3, "save_strategy": "no"} | options
    args = TSTTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        tst_bag_size=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # otherwise Adam makes steps out of the rounding of gradients that are 0
        logging_steps=1,
        per_device_eval_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    model = make_model(model_type, **overrides)
    data = {"train_dataset": make_blocks(200), "eval_dataset": make_blocks(8, seed=9)}
    if settings is None:
        return kind(model, args, **data, callbacks=list(callbacks))
    assert args.world_size == world_size  # which makes accelerate's PartialState
    with fsdp_on_cpu(**settings):
        return kind(model, args, **data, callbacks=list(callbacks))


def logs(trainer: TSTTrainer) -> list[dict[str, float]]:
    keys = ("loss", "grad_norm", "mtp_loss", "tst_raw_tokens")
    return [{k: e.get(k, 0) for k in keys} for e in trainer.state.log_history if "loss" in e]


def run(name: str, folder: Path, checkpoint: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train on two processes; the final model is an ordinary checkpoint in `folder`."""
    heads = LastHeads()
    trainer = make_trainer(name, folder / "run", 2, {}, [heads], **options)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder))
    if torch.distributed.get_rank() == 0:
        torch.save(heads.weights, folder / "heads.pt")
    torch.distributed.barrier()
    return {
        "logs": logs(trainer),
        "sharded": heads.sharded,
        "fsdp2": trainer.accelerator.is_fsdp2,
        "left": hasattr(trainer.model, "mtp_heads"),
    }


def evaluations(folder: Path, world_size: int, settings: dict[str, str] | None = None) -> dict[str, Any]:
    """Evaluation losses during and after training, and the widths of the logits that they made.

    Before training, accelerate refuses to shard a model without its optimizer, with the plain Trainer, too.
    """
    options = {"mtp_num_heads": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = make_trainer("tst", folder, world_size, settings, **options)
    widths = set()

    def note(module: Any, args: Any, output: Any) -> None:
        if not module.training and output.loss is not None:
            widths.add(output.logits.shape[-1])

    trainer.model.register_forward_hook(note)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    found.append(trainer.evaluate()["eval_loss"])
    return {"losses": found, "widths": sorted(widths)}


def refusal(out: Path, **settings: str) -> str:
    try:
        make_trainer("tst", out / "refused", 2, settings)
    except ValueError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in CASES:
        saves = {"save_strategy": "steps", "save_steps": 1} if name in RESUMED else {}
        results[name] = run(name, out / name, **saves)
        for step in RESUMED.get(name, ()):
            checkpoint = out / name / "run" / f"checkpoint-{step}"
            results[f"{name}-{step}"] = run(name, out / f"{name}-{step}", checkpoint)
    results["evaluations"] = evaluations(out / "evaluations", 2, {})
    results["refusals"] = [
        refusal(out, FSDP_VERSION="1", FSDP_SHARDING_STRATEGY="FULL_SHARD"),
        refusal(out, FSDP_CPU_RAM_EFFICIENT_LOADING="true"),
    ]
    (out / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
