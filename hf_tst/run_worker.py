"""One run of a comparison, in a process of its own: `python -m hf_tst.run_worker <folder>/arguments.yaml`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoints import last_complete_checkpoint
from .errors import TSTError
from .phases import PhaseSchedule
from .pretrain import main as train
from .run_queue import REFUSAL_FILE
from .run_record import run_entry
from .run_result import result_of_run


def main(argv: Sequence[str]) -> None:
    """Train as [`hf_tst.pretrain.main`] does, on from the last complete checkpoint if there is one, and write `result.json`.

    Raises:
        TSTError: For bad input.
    """
    config = Path(argv[0])
    if int(os.environ.get("RANK", 0)):
        _train(config)
        return
    try:
        with FileLock(config.with_name(".lock"), timeout=0):
            _train(config)
    except Timeout:
        raise TSTError(f"Another process is at work in {config.parent}: wait for it, or end it.") from None


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
