"""Runs of TSTTrainer that give the same result on one process and on two; started by `test_ddp.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from conftest import losses, make_blocks, make_model
from datasets.distributed import split_dataset_by_node
from safetensors.torch import save_file
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback, default_data_collator

from hf_tst import TSTError, TSTTrainer, TSTTrainingArguments

STEPS, SWITCH = 8, 3
ROWS = 2  # a micro-batch
AUX = {"router_aux_loss_coef": 0.5}
MTP = {"mtp_num_heads": 3, "weight_decay": 0.1}
# With gradient checkpointing Trainer tells DDP that every parameter gets a gradient in every step.
MTP_SEQUENTIAL = {
    "model": ("qwen3_moe", AUX),
    "mtp_num_heads": 2,
    "mtp_kind": "sequential",
    "gradient_checkpointing": True,
}
# What a case asks of two processes; one process does the same with twice the accumulation.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"model": ("qwen3_moe", AUX)},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation_moe": {"model": ("qwen3_moe", AUX), "gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.05},
    "unequal_targets": {"unequal": True},
    "fused_off": {"tst_fused_loss": "off"},
    "tokens_of_a_rank": {"average_tokens_across_devices": False},
    "tokens_of_a_rank_unequal": {"average_tokens_across_devices": False, "unequal": True},
    "mtp": MTP,
    "mtp_sequential_moe": MTP_SEQUENTIAL,
    "mtp_plain": {**MTP, "tst_phase_ratio": 0},
    "resumed_in_superposition": {"resume": ("llama", 2)},
    "resumed_at_the_switch": {"resume": ("llama", 3)},
    "resumed_in_recovery": {"resume": ("llama", 6)},
    "mtp_resumed_in_superposition": {**MTP, "resume": ("mtp", 2)},
    "mtp_resumed_at_the_switch": {**MTP, "resume": ("mtp", 3)},
    "mtp_resumed_in_recovery": {**MTP, "resume": ("mtp", 6)},
    # With so narrow a level some steps of random data are spikes, and both processes must skip the same.
    "spikes": {"tst_spikes": "skip", "tst_spike_window": 2, "tst_spike_threshold": 0.5, "unequal": True},
    "more_rows": {"tst_superposition_rows": "more"},
    "own_loader": {"own": "loader"},
    "own_sampler": {"own": "sampler", "gradient_accumulation_steps": 2},
    "own_loader_resumed_in_superposition": {"own": "loader", "resume": ("own_loader", 2)},
    "own_loader_resumed_at_the_switch": {"own": "loader", "resume": ("own_loader", 3)},
    "own_loader_resumed_in_recovery": {"own": "loader", "resume": ("own_loader", 6)},
    "mtp_sequential_moe_resumed_in_recovery": {**MTP_SEQUENTIAL, "resume": ("mtp_sequential_moe", 6)},
}


RESUMED = {options["resume"][0] for options in CASES.values() if "resume" in options}


class Record(TrainerCallback):
    """Notes for each forward pass in training the optimizer step and the dimensions of the ids; extra heads at the end."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []
        self.first_batch: dict[str, Any] | None = None
        self.heads: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        def note(module: Any, args: Any, kwargs: Any) -> None:
            if module.training:
                self.passes.append((state.global_step, kwargs["input_ids"].dim()))
                if self.first_batch is None:
                    self.first_batch = {k: kwargs[k].tolist() for k in ("input_ids", "labels")}

        model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if hasattr(model, "mtp_heads"):
            self.heads = {f"mtp_heads.{k}": v.clone() for k, v in model.mtp_heads.state_dict().items()}


class OwnLoader(TSTTrainer):
    """Batches of a loader that accelerate shares out to the processes."""

    prepares = True

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(
            self.train_dataset,
            batch_size=ROWS,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
            collate_fn=default_data_collator,
        )
        return self.accelerator.prepare(loader) if self.prepares else loader


class NotSharedOut(OwnLoader):
    """The same, and each process reads all of it."""

    prepares = False


class OwnSampler(TSTTrainer):
    """Rows in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


TRAINERS = {None: TSTTrainer, "loader": OwnLoader, "sampler": OwnSampler}


def make_data(unequal: bool) -> list[dict[str, Any]]:
    blocks = make_blocks(200)
    for i, block in enumerate(blocks if unequal else []):
        hidden = i % 7
        block["labels"] = [-100] * hidden + block["labels"][hidden:]
    return blocks


def run_case(name: str, folder: Path, world_size: int, runs: Path | None = None) -> dict[str, Any]:
    """Train, write the weights to `folder`, and return what was logged and seen.

    Args:
        name: A key of `CASES`.
        folder: Where to write.
        world_size: Processes that train together, of two the batch is cut for.
        runs: Folder with the runs of other cases, for those that resume.
    """
    options = dict(CASES[name])
    model_type, overrides = options.pop("model", ("llama", {}))
    resume, unequal = options.pop("resume", None), options.pop("unequal", False)
    kind = TRAINERS[options.pop("own", None)]
    accumulation = options.pop("gradient_accumulation_steps", 1) * 2 // world_size
    args = TSTTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        tst_bag_size=4,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # otherwise Adam makes steps out of the rounding of gradients that are 0
        logging_steps=1,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps" if name in RESUMED else "no",
        save_steps=2,
        tst_save_at_switch=name in RESUMED,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        tst_peak_tflops=1e-6,
        **({"tst_phase_ratio": SWITCH / STEPS} | options),
    )
    record = Record()
    model = make_model(model_type, **overrides)
    trainer = kind(
        model, args, train_dataset=make_data(unequal), eval_dataset=make_blocks(8, seed=9), callbacks=[record]
    )
    checkpoint = None
    if resume is not None and runs is not None:
        checkpoint = str(runs / resume[0] / "run" / f"checkpoint-{resume[1]}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.process_index == 0:
        weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        save_file(weights | record.heads, folder / "weights.safetensors")
    return {
        "world_size": args.world_size,
        "losses": losses(trainer),
        "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "passes": record.passes,
        "first_batch": record.first_batch,
    }


def data_of_rank(kind: str, rank: int) -> Any:
    """Data that a process has in another way than the others do."""
    blocks = datasets.Dataset.from_list(make_data(False))
    stream = blocks.to_iterable_dataset(num_shards=4)
    return {
        "shuffled without a seed": lambda: blocks.shuffle(seed=rank),
        "divided by rank": lambda: split_dataset_by_node(blocks, rank, 2),
        "stream shuffled without a seed": lambda: stream.shuffle(),
        "stream divided by rank": lambda: split_dataset_by_node(stream, rank, 2),
        "stream that divides itself": lambda: EveryOther(make_data(False), rank),
    }[kind]()


class EveryOther(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """A stream that gives each of two processes its own blocks."""

    def __init__(self, blocks: list[dict[str, Any]], rank: int) -> None:
        self.blocks = blocks[rank::2]

    def __iter__(self) -> Any:
        return iter(self.blocks)


OWN_DATA = [
    "shuffled without a seed",
    "divided by rank",
    "stream shuffled without a seed",
    "stream divided by rank",
    "stream that divides itself",
]


def refusal(folder: Path, kind: type[TSTTrainer], data: Any) -> str:
    """What a run is told whose processes do not read the rows of one data set."""
    args = TSTTrainingArguments(
        output_dir=str(folder), max_steps=4, tst_phase_ratio=0.5, tst_bag_size=4, per_device_train_batch_size=ROWS,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = kind(make_model("llama"), args, train_dataset=data)
    try:
        trainer.train()
    except TSTError as error:
        return f"{trainer.state.global_step} steps: {error}"
    return "trained"


def main(out: Path) -> None:
    results = {}
    torch.set_num_threads(1)
    for name in CASES:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        results[name] = run_case(name, folder, world_size=2, runs=out)
        torch.distributed.barrier()
    rank = torch.distributed.get_rank()
    results["not_shared_out"] = refusal(out / "refused", NotSharedOut, make_data(False))
    for kind in OWN_DATA:
        results[kind] = refusal(out / "refused", TSTTrainer, data_of_rank(kind, rank))
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
