"""One run of a comparison, in a process of its own: `python -m hf_tst.experiments.worker <folder>/arguments.yaml`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..pretraining.run import main as train
from ..records.run import run_entry
from ..training.checkpoint_folders import last_complete_checkpoint
from .queue import REFUSAL_FILE, read_settings
from .result import result_of_run, write_whole

WORLD_SIZE_FILE = "world_size.txt"


def main(argv: Sequence[str]) -> None:
    """Train as [`hf_tst.pretraining.run.main`] does, on from the last complete checkpoint if there is one, and write `result.json`.

    Raises:
        TSTError: For bad input.
    """
    config = Path(argv[0])
    if int(os.environ.get("RANK", 0)):
        _train(config)
        return
    try:
        with FileLock(config.with_name(".lock"), timeout=0):
            _check_processes(config)
            _train(config)
    except Timeout:
        raise TSTError(f"Another process is at work in {config.parent}: wait for it, or end it.") from None


def _check_processes(config: Path) -> None:
    """Note how many processes do the runs of a comparison, and check that all have as many, unless their step is given in
    tokens: no setting of a run tells how large a launcher makes its steps.

    Raises:
        TSTError: If an earlier run had another number.
    """
    if read_settings(config).get("tokens_per_step"):
        return
    now, note = os.environ.get("WORLD_SIZE", "1"), config.parent.parent / WORLD_SIZE_FILE
    before = note.read_text(encoding="utf-8").strip() if note.is_file() else now
    if before != now:
        raise TSTError(
            f"Runs in {note.parent} were begun with a world size of {before}, and are to go on with {now}, which makes steps of "
            "another size: start as many processes, or name another output_dir."
        )
    write_whole(note, f"{now}\n")


def _train(config: Path) -> None:
    checkpoint = last_complete_checkpoint(config.parent)
    resume = ["--resume_from_checkpoint", checkpoint] if checkpoint else []
    trainer = train([str(config), *resume], prog="run_worker")
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    rows = trainer.get_total_train_batch_size(args)
    schedule = trainer.schedule or PhaseSchedule(trainer.state.max_steps, 0, 1)
    length = len(next(iter(trainer.eval_dataset))["input_ids"])
    run = run_entry(args, trainer.accelerator.unwrap_model(trainer.model), schedule.switch_step, rows)
    result_of_run(trainer.state.log_history, schedule, rows * length, run).save(config.parent)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TSTError as error:
        # A launcher ends with a status and a last line of its own.
        Path(sys.argv[1]).with_name(REFUSAL_FILE).write_text(f"{error}\n", encoding="utf-8")
        print(error, file=sys.stderr)
        sys.exit(2)
