"""The faults that a run is put through, and what is seen of each: how it ends, what is kept, what a resume makes of it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from faulty_run import halve, main
from processes import PATIENCE, start_process

from hf_tst.checkpoints.folders import last_complete_checkpoint
from hf_tst.checkpoints.manifest import manifest_problem

COLUMNS = ("fault", "how the run ends", "checkpoints that are there", "resumed from", "weights at the end")
# Of messages, what differs between machines and versions.
VARYING = (
    (r"[\d.]+ GB are free", "… GB are free"),
    (r"\[enforce fail at .* vs \d+", "[enforce fail …]"),
    (r"DataLoader worker \(.*", "DataLoader worker …"),
)
Options = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name (`str`): What happens.
        options (`dict`): For `faulty_run`; others than `fault` and `at` hold for the resume and for the run to compare with.
        damage: What is done to the folder when the run has ended.
    """

    name: str
    options: Options = field(default_factory=dict)
    damage: Callable[[Path], None] | None = None

    @property
    def common(self) -> Options:
        return {name: value for name, value in self.options.items() if name not in ("fault", "at")}


@dataclass(frozen=True)
class Outcome:
    """What was seen of a fault: a row of the table."""

    name: str
    ending: str
    kept: list[int]
    resumed_from: int
    same: bool

    @property
    def row(self) -> str:
        kept = ", ".join(map(str, self.kept)) or "none"
        weights = "those of the uninterrupted run" if self.same else "others"
        start = self.resumed_from or "the beginning"
        return f"| {self.name} | {self.ending} | {kept} | {start} | {weights} |"


def flip(path: Path) -> None:
    """Turn one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damaged(file: str, how: Callable[[Path], None]) -> Fault:
    """The newest checkpoint of a run that was killed has a file that is damaged."""
    text = {halve: "is cut in half", flip: "has one bit flipped", Path.unlink: "is gone"}[how]
    return Fault(
        f"`{file}` of the newest checkpoint {text}",
        {"fault": "kill after step", "at": 7},
        damage=lambda folder: how(folder / "checkpoint-6" / file),
    )


FILES = ("model.safetensors", "optimizer.pt", "data_position.json", "trainer_state.json", "manifest.json")
ONE_WORKER = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
JIT = {"enable_jit_checkpoint": True}
FAULTS = (
    Fault("SIGKILL in superposition", {"fault": "kill after step", "at": 1}),
    Fault("SIGKILL after a step of recovery", {"fault": "kill after step", "at": 7}),
    Fault("SIGKILL at the switch, before its checkpoint", {"fault": "kill after step", "at": 3}),
    Fault("SIGKILL while the weights of a checkpoint are written", {"fault": "kill in weights", "at": 6}),
    Fault("SIGKILL while the switch's weights are written", {"fault": "kill in weights", "at": 3}),
    Fault("SIGKILL between weights and optimizer", {"fault": "kill before optimizer", "at": 6}),
    Fault("SIGKILL while the optimizer is written", {"fault": "kill in optimizer", "at": 6}),
    Fault("SIGKILL before the manifest", {"fault": "kill in manifest", "at": 6}),
    Fault("SIGKILL before the checkpoint gets its name", {"fault": "kill before rename", "at": 6}),
    Fault("SIGKILL in a stream", {"fault": "kill before rename", "at": 6, "data": "stream"}),
    Fault(
        "SIGKILL while the first checkpoint is written, keeping one",
        {"fault": "kill in optimizer", "at": 4, "save_total_limit": 1},
    ),
    Fault("SIGKILL while the card is written", {"fault": "kill in card"}),
    Fault(
        "SIGKILL while the card is written, plain training at a constant rate",
        {"fault": "kill in card", "tst_phase_ratio": 0, "lr_scheduler_type": "constant"},
    ),
    Fault("SIGKILL in plain training", {"fault": "kill before optimizer", "at": 6, "tst_phase_ratio": 0}),
    Fault("SIGTERM within a step", {"fault": "sigterm in step", "at": 5}),
    Fault("SIGTERM within a step, `enable_jit_checkpoint`", {"fault": "sigterm in step", "at": 4, **JIT}),
    Fault("SIGTERM at the switch, `enable_jit_checkpoint`", {"fault": "sigterm", "at": 3, **JIT}),
    Fault("SIGTERM in a stream, `enable_jit_checkpoint`", {"fault": "sigterm in step", "at": 6, "data": "stream", **JIT}),
    Fault("the disk takes no more in the weights", {"fault": "limit 4096", "at": 6}),
    Fault("the disk takes no more in the optimizer", {"fault": "limit 40000", "at": 6}),
    *(damaged(file, how) for file in FILES for how in (halve, flip)),
    damaged("optimizer.pt", Path.unlink),
    damaged("rng_state.pth", Path.unlink),
    Fault("the loss is NaN in superposition", {"fault": "nan loss", "at": 2}),
    Fault("the loss is NaN in recovery", {"fault": "nan loss", "at": 6}),
    Fault("the loss is infinite", {"fault": "infinite loss", "at": 5}),
    Fault("the gradient is NaN, the loss is not", {"fault": "nan gradient", "at": 5}),
    Fault("a loader process is killed", {"fault": "data", "at": 168, **ONE_WORKER}),
    Fault("a stream raises an error", {"fault": "data", "at": 60, "data": "stream"}),
    Fault("the clock runs backwards, then SIGKILL", {"fault": "clock", "at": 8, "save_total_limit": 2}),
)  # fmt: skip


def start(folder: Path, **options: Any) -> Any:
    """A process that trains in `folder`; it prints to `<folder>.log`."""
    return start_process(main, str(folder), f"{folder}.log", options)


def run(folder: Path, **options: Any) -> str:
    """Train in `folder` to the end, whichever it is; returns how it ended."""
    process = start(folder, **options)
    process.join(timeout=PATIENCE)
    assert process.exitcode is not None, "the run hangs"
    return describe_ending(process.exitcode, folder)


def describe_ending(status: int, folder: Path) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status == 0:
        return "status 0"
    lines = [line for line in Path(f"{folder}.log").read_text().splitlines() if line.strip()]
    text = lines[-1].removeprefix("run: ").replace(str(folder), "out")
    for varying, fixed in VARYING:
        text = re.sub(varying, fixed, text)
    return f"status {status}: {text}"


@cache
def uninterrupted(root: Path, common: str) -> bytes:
    """The weights at the end of a run to which nothing happens."""
    folder = root / f"whole-{abs(hash(common))}"
    assert run(folder, **json.loads(common)) == "status 0"
    return (folder / "model.safetensors").read_bytes()


def kept_checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def observe(fault: Fault, root: Path) -> Outcome:
    """Put a run through a fault, resume it, and compare. Files are left below `root`."""
    folder = root / f"fault-{FAULTS.index(fault)}"
    ending = run(folder, **fault.options)
    kept = kept_checkpoints(folder)
    assert not [step for step in kept if manifest_problem(folder / f"checkpoint-{step}")]
    if fault.damage is not None:
        fault.damage(folder)
    newest = last_complete_checkpoint(folder)
    resumed = run(folder, **fault.common, **({} if newest is None else {"resume": "last"}))
    assert resumed == "status 0", resumed
    weights = (folder / "model.safetensors").read_bytes()
    same = weights == uninterrupted(root, json.dumps(fault.common))
    return Outcome(fault.name, ending, kept, int(newest.rpartition("-")[2]) if newest else 0, same)
