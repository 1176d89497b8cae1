"""A run on two processes in which one dies without a word; started by `test_failures.py`."""

import os
import sys

from conftest import make_blocks, make_model
from transformers import TrainerCallback

from hf_tst import TSTTrainer, TSTTrainingArguments


class DieAfterAStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            os._exit(7)


class DiesWhileSaving(TSTTrainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.process_index == 0 and self.state.global_step == 4:
            os._exit(7)
        super()._save_optimizer_and_scheduler(output_dir)


def main(output_dir: str, when: str) -> None:
    args = TSTTrainingArguments(
        output_dir=output_dir,
        max_steps=8,
        tst_phase_ratio=0.25,
        tst_bag_size=4,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        fsdp=when == "while saving",
    )
    trainer_class = DiesWhileSaving if when == "while saving" else TSTTrainer
    callbacks = [DieAfterAStep()] if when == "after a step" else []
    trainer = trainer_class(make_model("llama"), args, train_dataset=make_blocks(200), callbacks=callbacks)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
