"""Thousands of steps with logs, evaluations, checkpoints and a resume; prints memory and open files as they go."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import make_blocks, make_model
from transformers import TrainerCallback

from hf_tst import TSTTrainer, TSTTrainingArguments

STEPS, EVERY = 3000, 100


class Sample(TrainerCallback):
    """Notes memory (bytes) and open files of this process, and ends training at a step."""

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            entry = {"step": state.global_step, "memory": pages * os.sysconf("SC_PAGE_SIZE"), "files": files}
            print(json.dumps(entry), flush=True)
        control.should_training_stop |= state.global_step == self.stop


def main(folder: str) -> None:
    args = TSTTrainingArguments(
        output_dir=folder, max_steps=STEPS, tst_phase_ratio=0.3, tst_bag_size=4, per_device_train_batch_size=2,
        save_strategy="steps", save_steps=EVERY, save_total_limit=2, eval_strategy="steps", eval_steps=EVERY,
        logging_steps=20, report_to="none", disable_tqdm=True, use_cpu=True, log_level="error", dataloader_num_workers=0,
    )  # fmt: skip
    model, blocks = make_model("llama"), make_blocks(12_000)
    for stop, resume in ((STEPS // 2, None), (STEPS, "last")):
        trainer = TSTTrainer(
            model, args, train_dataset=blocks, eval_dataset=make_blocks(4), callbacks=[Sample(stop)]
        )
        trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    main(sys.argv[1])
