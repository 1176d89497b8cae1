"""One run of a comparison, in its own process: `python -m hf_tst.experiments.run <folder>/arguments.yaml`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from ..bags.phases import PhaseSchedule
from ..checkpoints.folders import last_complete_checkpoint
from ..errors import TSTError
from ..evaluation.breakdown import tally_blocks
from ..pretraining.model import hub_options
from ..pretraining.options import ModelArguments, pick
from ..pretraining.pretrain import main as train
from ..records.run_record import run_note, write_atomically
from .result import REFUSAL_FILE, read_settings, result_of_run

LAUNCH_FILE = "launch.yaml"  # how a comparison was launched


def main(argv: Sequence[str]) -> None:
    """Train as [`hf_tst.pretraining.pretrain.main`] does, from the last complete checkpoint if there is one; write `result.json`.

    Raises:
        TSTError: For bad input.
    """
    config = Path(argv[0])
    if not int(os.environ.get("RANK", 0)):
        _check_launch(config)
    _train(config)


def _check_launch(config: Path) -> None:
    """Record how the first run of a comparison was launched, and check that the others were launched in the same way.

    The settings show neither the precision that a launcher chooses nor how many processes it starts, and so how large a step is,
    unless `tokens_per_step` is set.

    Raises:
        TSTError: If an earlier run was launched in another way.
    """
    now = {"mixed precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no")}
    if not (read_settings(config) or {}).get("tokens_per_step"):
        now["world size"] = os.environ.get("WORLD_SIZE", "1")
    note = config.parent.parent / LAUNCH_FILE
    before = read_settings(note) or {}
    for name, value in now.items():
        if before.get(name, value) != value:
            raise TSTError(
                f"Runs in {note.parent} were started with a {name} of {before[name]}, but this one has {value}, so they cannot be "
                "compared: start it in the same way, or name another output_dir."
            )
    write_atomically(note, yaml.safe_dump(now))


def _train(config: Path) -> None:
    checkpoint = last_complete_checkpoint(config.parent)
    begins = ["--resume_from_checkpoint", checkpoint] if checkpoint else ["--overwrite_output_dir"]
    trainer = train([str(config), *begins])
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    rows = trainer.get_total_train_batch_size(args)
    schedule = trainer.schedule or PhaseSchedule(trainer.state.max_steps, 0, 1)
    length = len(next(iter(trainer.eval_dataset))["input_ids"])
    result = result_of_run(trainer.state.log_history, schedule, rows * length, run_note(trainer))
    # Load the model as a user does: in the trainer it may be sharded.
    named = pick(read_settings(config) or {}, ModelArguments)
    model = AutoModelForCausalLM.from_pretrained(
        config.parent, **hub_options(named, named.model_name_or_path)
    )
    tally = tally_blocks(model.to(args.device), trainer.eval_dataset, args.per_device_eval_batch_size)
    by_frequency, by_position = tally.loss_by_frequency(), tally.loss_by_position()
    replace(result, loss_by_frequency=by_frequency, loss_by_position=by_position).save(config.parent)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TSTError as error:
        # A launcher has its own exit status and last line.
        Path(sys.argv[1]).with_name(REFUSAL_FILE).write_text(f"{error}\n", encoding="utf-8")
        print(error, file=sys.stderr)
        sys.exit(2)
