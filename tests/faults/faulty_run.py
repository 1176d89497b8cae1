"""A small run that something happens to; `fault_catalogue.py` starts it in processes of its own, forked from one server.

Faults are put in where the operating system or the hardware would: signals, limits of the kernel, audit events of Python
(before a file is opened or renamed), numbers of the model, and the data set.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
from conftest import make_blocks, make_model, set_dropout
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import TrainerCallback

from hf_tst import PreemptedError, TSTTrainer, TSTTrainingArguments
from hf_tst.cli.main import run_command

BLOCKS = 300


def die(signal_number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signal_number)


class Blocks(Dataset):
    """Blocks whose loader process dies over one of them."""

    def __init__(self, deadly: int | None) -> None:
        self.blocks = make_blocks(BLOCKS)
        self.deadly = deadly

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.deadly and get_worker_info() is not None:
            die()
        return self.blocks[index]


class Stream(IterableDataset):
    """A stream of blocks with a state, which breaks off with an error once."""

    def __init__(self, breaks_at: int | None) -> None:
        self.stream = datasets.Dataset.from_list(make_blocks(BLOCKS)).to_iterable_dataset()
        self.breaks_at = breaks_at

    def __iter__(self) -> Any:
        for index, block in enumerate(self.stream):
            if index == self.breaks_at:
                raise OSError("Connection reset by peer")
            yield block

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class FaultyTrainer(TSTTrainer):
    """Trainer to which the fault of its name happens at one step."""

    fault, at = "", -1

    def _now(self, *names: str) -> bool:
        return self.fault in names and self.state.global_step == self.at

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.is_in_train and self._now("kill in weights"):
            halve(Path(str(output_dir)) / "model.safetensors")
            die()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._now("kill before optimizer"):
            die()
        super()._save_optimizer_and_scheduler(output_dir)
        if self._now("kill in optimizer"):
            halve(Path(output_dir) / "optimizer.pt")
            die()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self._now("nan loss", "infinite loss"):
            loss = loss * float("nan" if self.fault == "nan loss" else "inf")
        return (loss, outputs) if return_outputs else loss


class Happens(TrainerCallback):
    """What happens between the trainer's own doings."""

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at = fault, at

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.at and self.fault == "nan gradient":
            weight = next(model.parameters())
            self.handle = weight.register_hook(lambda gradient: gradient * float("nan"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and self.fault == "nan gradient":
            self.handle.remove()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and self.fault == "sigterm in step":
            die(signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.at:
            return
        if self.fault == "kill after step":
            die()
        if self.fault == "sigterm":
            die(signal.SIGTERM)
        if self.fault.startswith("limit"):  # of the size of files, in bytes
            size = int(self.fault.split()[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fault == "clock":
            newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            os.utime(newest, (10**9 - 10**4 * state.global_step,) * 2)
            if state.global_step == self.at:
                die()


def halve(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def kill_at_event(fault: str, at: int) -> None:
    """Die when Python is about to rename a checkpoint, or to open the file of a card."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if (
            event == "os.rename"
            and fault == "kill before rename"
            and str(args[1]).endswith(f"checkpoint-{at}")
        ):
            die()
        if (
            event == "open"
            and fault == "kill in manifest"
            and str(args[0]).endswith(f"checkpoint-{at}/manifest.json")
        ):
            die()
        if (
            event == "open"
            and fault == "kill in card"
            and str(args[0]).endswith("README.md")
            and "w" in str(args[1])
        ):
            die()

    sys.addaudithook(hook)


def train(folder: str, options: dict[str, Any]) -> None:
    fault, at = options.pop("fault", ""), options.pop("at", -1)
    resume = options.pop("resume", None)
    breaks = at if fault == "data" else None
    data = {"blocks": Blocks, "stream": Stream}[options.pop("data", "blocks")](breaks)
    kill_at_event(fault, at)
    if fault == "clock":
        start, real = time.time(), time.time
        time.time = lambda: 2 * start - 10 * real()  # it runs backwards, fast
    torch.manual_seed(0)
    defaults = {
        "output_dir": folder, "max_steps": 10, "tst_bag_size": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    # "on": else logits are kept for the compute_loss of the trainer above, with a warning.
    args = TSTTrainingArguments(**{**defaults, "tst_fused_loss": "on", **options})
    model = set_dropout(make_model("llama"))
    trainer = FaultyTrainer(model, args, train_dataset=data, callbacks=[Happens(fault, at)])
    trainer.fault, trainer.at = fault, at
    trainer.train(resume_from_checkpoint=resume)
    if trainer.preempted:
        raise PreemptedError(f"SIGTERM after optimizer step {trainer.state.global_step}.")
    trainer.save_model()
    if fault == "kill in card":
        trainer.create_model_card()


def main(folder: str, log: str, options: dict[str, Any]) -> None:
    """Train in `folder` and end as the console command does; what is printed goes to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(run_command("run", lambda _: train(folder, options), []))
