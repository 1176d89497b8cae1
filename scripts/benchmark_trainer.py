#!/usr/bin/env python
"""Whole training steps of real Trainers on random tokens: speed, utilization, memory, and where the time goes.

    python scripts/benchmark_trainer.py                                   # on a GPU, the model of the 270M recipe
    python scripts/benchmark_trainer.py --variants liger --torch_compile True
    python scripts/benchmark_trainer.py --device cpu --tiny True

Variants, all with bfloat16 autocast and AdamW:
  plain          Trainer with the model's own loss
  liger          Trainer with use_liger_kernel (if installed); alone in its process, since Liger changes classes
  recovery       TSTTrainer, one token per position, loss fused with the head
  superposition  TSTTrainer, bags of s tokens, loss fused with the head
Seconds are the mean over `steps` steps after `warmup_steps`, with the device waited for at both ends only; ms_batches are those in
which the host gets the batches of a step, and puts them on the device. The profiler then
records `profile_steps` more: milliseconds of the device per step in matrix products, attention, our kernel and everything
else, the gaps between them, and how often the host reads a number from the device or waits for it.
"""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml
from benchmarking import append_rows, format_table
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.planning.flops import step_flops
from hf_tst.planning.reference import peak_tflops
from hf_tst.pretraining.recipes import RECIPES

RECIPE = RECIPES / "270m-20k-tst.yaml"
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip
# The first that fits: attention of some libraries is built from the pieces of their matrix products.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|nvjet|cutlass|cublas|xmma",
    "our_kernel": r"multi_hot",
}
WAITS = (
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)


@dataclass
class BenchmarkArguments:
    """What to measure."""

    variants: list[str] = field(
        default_factory=lambda: ["plain", "recovery", "superposition"],
        metadata={"help": "Trainers to measure."},
    )
    bag_sizes: list[int] = field(
        default_factory=lambda: [6, 16], metadata={"help": "Bag sizes s to measure."}
    )
    rows: int = field(default=8, metadata={"help": "Rows per step, B."})
    length: int = field(default=2048, metadata={"help": "Latent positions per row, l."})
    steps: int = field(default=20, metadata={"help": "Steps that are timed."})
    warmup_steps: int = field(default=5, metadata={"help": "Steps before them."})
    profile_steps: int = field(default=3, metadata={"help": "Steps that are profiled."})
    num_workers: int = field(default=0, metadata={"help": "Processes that load the data."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model."})
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Peak of the device in TFLOP/s; by default that of a device whose name is known."},
    )
    tiny: bool = field(
        default=False, metadata={"help": "A model of two layers and a few steps, to try this script."}
    )
    csv: str | None = field(default=None, metadata={"help": "CSV file to append the rows to."})


class Blocks(torch.utils.data.Dataset):
    """Blocks of random tokens; few are held, and read again and again."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        self.count = count
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, (64, length))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}


class Stopwatch(TrainerCallback):
    """Times steps in the middle of a run, and profiles some after them."""

    def __init__(self, args: BenchmarkArguments, device: torch.device) -> None:
        self.device = device
        self.first = args.warmup_steps
        self.last = args.warmup_steps + args.steps
        self.end = self.last + args.profile_steps
        self.profile: Any = None
        self.started = self.seconds = self.getting = 0.0
        self.peak_bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.first, self.last, self.end) and self.device.type == "cuda":
            torch.cuda.synchronize()
        if state.global_step == self.first:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.started, self.getting = time.perf_counter(), 0.0
        elif state.global_step == self.last:
            self.seconds = time.perf_counter() - self.started
            self.ms_batches = 1000 * self.getting / (self.last - self.first)
            if self.device.type == "cuda":
                self.peak_bytes = torch.cuda.max_memory_allocated()
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CPU] + [kinds.CUDA] * (self.device.type == "cuda")
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()
        elif state.global_step == self.end:
            self.profile.stop()

    def watch(self, get: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is added up."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            found = get(*args)
            self.getting += time.perf_counter() - start
            return found

        return timed


def split_time(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Time by kind of kernel, and of gaps in which none runs.

    Args:
        kernels (`Iterable[tuple[str, float, float]]`): Name, begin and end of everything that ran on the device.
    """
    spent = dict.fromkeys([*KINDS, "other", "gaps"], 0.0)
    reached = None
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")
        spent[kind] += end - begin
        spent["gaps"] += max(0.0, begin - (begin if reached is None else reached))
        reached = end if reached is None else max(reached, end)
    return spent


def read_profile(profile: Any, steps: int) -> dict[str, float]:
    """Milliseconds of the device by kind, and reads of and waits for it, per step."""
    events = profile.profiler.kineto_results.events()
    kernels = [
        (event.name(), event.start_ns(), event.end_ns())
        for event in events
        if event.device_type() == torch.profiler.DeviceType.CUDA and not event.is_user_annotation()
    ]
    counts = Counter(event.name() for event in events)
    row = {f"ms_{kind}": spent / steps / 1e6 for kind, spent in split_time(kernels).items()}
    return row | {name.replace("aten::_local_scalar_dense", "reads"): counts[name] / steps for name in WAITS}


def train(args: BenchmarkArguments, variant: str, bag_size: int, folder: str) -> dict[str, Any]:
    """Run a variant; its row."""
    device = torch.device(args.device)
    overrides = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["config_overrides"] | (
        TINY if args.tiny else {}
    )
    config = LlamaConfig(**overrides)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config)
    stopwatch = Stopwatch(args, device)
    options: dict[str, Any] = {
        "output_dir": folder, "max_steps": stopwatch.end, "per_device_train_batch_size": args.rows,
        "learning_rate": 1e-4, "bf16": True, "use_cpu": device.type == "cpu", "torch_compile": args.torch_compile,
        "dataloader_num_workers": args.num_workers, "logging_steps": stopwatch.last - 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    if args.tiny and args.torch_compile:
        options["torch_compile_backend"] = "eager"  # the graphs alone: inductor takes a minute
    blocks = Blocks(args.rows * bag_size * (stopwatch.end + 1), args.length, config.vocab_size)
    if variant in ("plain", "liger"):
        arguments = TrainingArguments(**options, use_liger_kernel=variant == "liger")
        trainer = Trainer(
            model, arguments, default_data_collator, train_dataset=blocks, callbacks=[stopwatch]
        )
    else:
        ratio = 1.0 if variant == "superposition" else 0.0
        options |= {"tst_phase_ratio": ratio, "tst_bag_size": bag_size, "tst_fused_loss": "on"}
        arguments = TSTTrainingArguments(**options, tst_save_at_switch=False)
        trainer = TSTTrainer(model, arguments, train_dataset=blocks, callbacks=[stopwatch])
    trainer.get_batch_samples = stopwatch.watch(trainer.get_batch_samples)
    trainer.train()
    seconds = stopwatch.seconds / args.steps
    row = {
        "variant": variant,
        "s": bag_size,
        "compiled": args.torch_compile,
        "workers": args.num_workers,
        "parameters": model.num_parameters(),
        "latent": f"{args.rows}x{args.length}",
        "loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "seconds": seconds,
        "ms_batches": stopwatch.ms_batches,
        "latent_tokens_per_second": args.rows * args.length / seconds,
        "raw_tokens_per_second": args.rows * args.length * bag_size / seconds,
        "model_flops_utilization": "",
        "peak_mib": stopwatch.peak_bytes / 2**20,
    }
    peak = args.peak_tflops or peak_tflops(device)
    if peak:
        row["model_flops_utilization"] = step_flops(config, args.rows, args.length) / seconds / (peak * 1e12)
    return row | read_profile(stopwatch.profile, args.profile_steps)


def main() -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.split("\n")[0])
    (args,) = parser.parse_args_into_dataclasses()
    if args.tiny:
        args.rows, args.length, args.steps, args.warmup_steps, args.profile_steps = 2, 16, 2, 1, 1
    rows, failed = [], []
    for variant in args.variants:
        for bag_size in args.bag_sizes if variant == "superposition" else [1]:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(train(args, variant, bag_size, folder))
            except torch.OutOfMemoryError as error:
                failed.append(f"{variant}, s = {bag_size}: {error}")
                continue
            finally:
                if args.torch_compile:
                    torch._dynamo.reset()
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
            if args.csv:
                append_rows(args.csv, rows[-1:], torch.device(args.device))
    if rows:
        print(format_table(rows))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
