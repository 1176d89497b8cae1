"""A run on two processes, to one of which something happens at step 4; started by `test_failures.py`."""

import json
import os
import signal
import sys

from conftest import make_blocks, make_model, set_dropout
from transformers import TrainerCallback

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.checkpoints import manifest
from hf_tst.checkpoints.folders import UNFINISHED
from hf_tst.cli.main import run_command


class SignalOne(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


class OneIsNotFinite(TSTTrainer):
    def compute_loss(self, model, *args, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, *args, return_outputs=True, **kwargs)
        if self.args.process_index == 1 and self.state.global_step == 4:
            loss = loss * float("nan")
        return (loss, outputs) if return_outputs else loss


class OneCannotSave(TSTTrainer):
    """The disk of one process takes no more: the weights of the first, what the second draws random numbers from."""

    failing = -1

    def _fail(self, rank):
        if rank == self.failing == self.args.process_index and self.state.global_step == 6:
            raise OSError(28, "No space left on device")

    def _save(self, *args, **kwargs):
        super()._save(*args, **kwargs)
        self._fail(0)

    def _save_rng_state(self, output_dir):
        self._fail(1)
        super()._save_rng_state(output_dir)


def refuse_to_rename(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("checkpoint-6"):
        raise OSError(28, "No space left on device")


def refuse_to_flush(path):
    if path.parent.name == "checkpoint-3" and path.parent.parent.name != UNFINISHED:
        raise OSError(5, "Input/output error")


def train(output_dir: str, what: str, resume: str) -> None:
    args = TSTTrainingArguments(
        output_dir=output_dir,
        max_steps=8,
        tst_phase_ratio=0.25,
        tst_bag_size=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=3,
        save_total_limit=2,
        logging_steps=8,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        enable_jit_checkpoint=True,
        eval_strategy="steps"
        if what.startswith("full")
        else "no",  # so that there is a best checkpoint to look for
        eval_steps=3,
        metric_for_best_model="loss",
    )
    trainer_class = {"nan": OneIsNotFinite, "full on": OneCannotSave}.get(what[:7], TSTTrainer)
    callbacks = [SignalOne()] if what == "sigterm" else []
    model = set_dropout(make_model("llama"))
    trainer = trainer_class(
        model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4), callbacks=callbacks
    )
    if what.startswith("full on"):
        trainer.failing = int(what[-1])
    if what == "full at the end":
        sys.addaudithook(refuse_to_rename)
    if what == "lost":
        manifest.flush_to_disk = refuse_to_flush
    trainer.train(resume_from_checkpoint=resume or None)
    print(
        json.dumps(
            {"rank": args.process_index, "step": trainer.state.global_step, "preempted": trainer.preempted}
        )
    )


if __name__ == "__main__":
    sys.exit(run_command(f"rank {os.environ['RANK']}", lambda arguments: train(*arguments), sys.argv[1:]))
