"""Pre-training from text to model: what `hf-tst train` and `scripts/run_clm_tst.py` run."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import WARNING, basicConfig, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..checkpoints.folders import check_checkpoint_is_there
from ..checkpoints.run_identity import list_checkpoints
from ..errors import PreemptedError, TSTError
from ..records.card import CURVE_FILE, why_kept
from ..records.hub import HubError
from ..records.phase_table import phase_rows
from ..records.text_tables import format_columns
from ..training.arguments import TSTTrainingArguments
from ..training.callbacks.console import quiet_libraries
from ..training.callbacks.reinitialize import ReinitializeCallback
from ..training.trainer import TSTTrainer
from .options import DataArguments, ModelArguments, RunArguments, parse_arguments
from .overwrite import check_no_run_in, holding_folder, put_back, remove_set_aside, set_aside
from .parts import load_parts

logger = logging.get_logger(__name__)

# The sample at the end: the most tokens of its prompt, and the number of tokens generated; the most characters printed; top_k.
SAMPLE_TOKENS = 12
SAMPLE_CHARACTERS = 60
SAMPLE_TOP_K = 20


class ReplaceRunCallback(TrainerCallback):
    """Removes the run that was set aside, when the first checkpoint of the new one is on the disk."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            remove_set_aside(Path(args.output_dir))


def print_summary(trainer: TSTTrainer, final_eval: dict[str, float] | None) -> None:
    """Print the table of phases, the final evaluation loss, and the paths of model, curve and card."""
    output = Path(trainer.args.output_dir)
    switch = trainer.schedule.switch_step if trainer.schedule else 0
    print("\n" + format_columns(phase_rows(trainer.state.log_history)))
    if final_eval:
        loss = final_eval["eval_loss"]
        print(f"\nfinal evaluation loss {loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}")
    print(f"\nmodel       {output}  (load it with AutoModelForCausalLM.from_pretrained)")
    at_switch = output / f"checkpoint-{switch}"
    if switch and at_switch.is_dir():
        print(f"at switch   {at_switch}")
    card = output / "README.md"
    is_ours = why_kept(card) is None
    has_curve = (output / CURVE_FILE).is_file()
    print(
        f"card        {card if is_ours else f'not written: {card} is yours'}, "
        f"{'with' if has_curve else 'without (pip install matplotlib)'} {CURVE_FILE}"
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> TSTTrainer:
    """Train as `argv` says, by default the process's arguments: data, model, both phases, evaluation, card, push.

    Raises:
        TSTError: For bad input, before the first step. [`HubError`] if the Hub fails at the end, when everything is saved.
        RunError: If the run is stopped: by SIGTERM, by a non-finite loss, or by a full disk.
    """
    words = sys.argv[1:] if argv is None else argv
    model_args, data_args, args, run_args = parse_arguments(words, prog)
    if args.resume_from_checkpoint and run_args.overwrite_output_dir:
        raise TSTError("Both resume_from_checkpoint and overwrite_output_dir are given: leave one out.")
    logging.set_verbosity(args.get_process_log_level())
    if args.should_log:
        basicConfig(format="%(message)s")
        getLogger("hf_tst").setLevel(WARNING if args.log_level == "passive" else args.get_process_log_level())
    with quiet_libraries(), holding_folder(args.output_dir, args.process_index == 0):
        if not (args.resume_from_checkpoint or run_args.overwrite_output_dir):
            check_no_run_in(args.output_dir, f"hf-tst train {shlex.join(words)}".rstrip())
        check_checkpoint_is_there(args.resume_from_checkpoint, args.output_dir)
        return _train(model_args, data_args, args, run_args)


def _train(
    model_args: ModelArguments, data_args: DataArguments, args: TSTTrainingArguments, run_args: RunArguments
) -> TSTTrainer:
    set_seed(args.seed)
    parts, block_size = load_parts(model_args, data_args, args)
    if args.should_log:
        _print_parts(parts, block_size)
    if parts["eval_dataset"] is None:
        _leave_out_evaluations(args, data_args)
    if model_args.model_name_or_path is None and args.learning_rate == TrainingArguments.learning_rate:
        logger.warning(
            f"learning_rate={args.learning_rate:g} is Trainer's default, which is for fine-tuning. Most new models "
            "need more: the recipes have 2e-3 (30M to 270M parameters), 1e-3 (600M) and 2e-4 (3B)."
        )
    trainer = TSTTrainer(args=args, **parts)
    if model_args.reinit_at_switch:
        trainer.add_callback(ReinitializeCallback(model_args.reinit_at_switch, lambda: trainer.schedule))
    tokens = trainer.get_total_train_batch_size(args) * block_size
    if data_args.tokens_per_step not in (None, tokens):
        raise TSTError(
            f"A step trains on {tokens} tokens, not on tokens_per_step={data_args.tokens_per_step}, because processes share rows "
            "(tensor parallelism): set gradient_accumulation_steps instead."
        )
    with _replacing_run(trainer, run_args.overwrite_output_dir):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.preempted:
        raise PreemptedError(
            f"SIGTERM after optimizer step {trainer.state.global_step}, with a checkpoint in {args.output_dir}: continue with "
            "--resume_from_checkpoint last."
        )
    _finish(trainer, result.metrics, data_args.dataset_name)
    return trainer


def _print_parts(parts: Mapping[str, Any], block_size: int) -> None:
    """Print the size of the model and of the data, as [`load_parts`] returns them."""
    model, named = parts["model"], {"training": parts["train_dataset"], "evaluation": parts["eval_dataset"]}
    counts = [f"{len(data):,} {name}" for name, data in named.items() if hasattr(data, "__len__")]
    blocks = f"{' and '.join(counts) or 'a stream of'} blocks of {block_size} tokens"
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters\n{blocks}", flush=True)


def _leave_out_evaluations(args: TSTTrainingArguments, data_args: DataArguments) -> None:
    """Switch evaluation off, where there is no data for it. Raise `TSTError` if the arguments need it."""
    nothing = "there is no data to evaluate on: set validation_file or validation_split_percentage"
    if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        option = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy=best"
        raise TSTError(f"{option} needs evaluations, but {nothing}.")
    if args.eval_strategy != IntervalStrategy.NO and not data_args.is_quick_start:
        logger.warning(f"eval_strategy={args.eval_strategy.value} has no effect, because {nothing}.")
    args.eval_strategy = "no"


@contextmanager
def _replacing_run(trainer: TSTTrainer, overwrites: bool) -> Iterator[None]:
    """Context of training. An older run in the folder is set aside if asked for, and put back if the new one fails before its first
    checkpoint.
    """
    folder = Path(trainer.args.output_dir)
    if overwrites:
        trainer.add_callback(ReplaceRunCallback())
        if trainer.is_world_process_zero():
            set_aside(folder)
    try:
        yield
    except BaseException as error:
        begun = any(list_checkpoints(folder))  # of this run: those of an older one are set aside
        if trainer.is_world_process_zero():
            (remove_set_aside if begun else put_back)(folder)
        if isinstance(error, KeyboardInterrupt) and begun:
            newest = max(list_checkpoints(folder))
            raise KeyboardInterrupt(
                f"at step {trainer.state.global_step}, and the newest checkpoint is of step {newest}: continue with "
                "--resume_from_checkpoint last"
            ) from error
        raise


def _finish(trainer: TSTTrainer, metrics: dict[str, float], dataset_name: str | None) -> None:
    """Save and evaluate the trained model, write its card, push it, and print what came out."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    with suppress(HubError):  # the model is saved before it is pushed, and the push is tried again at the end
        trainer.save_model()
    if trainer.is_world_process_zero():
        remove_set_aside(folder)
    trainer.save_metrics("train", metrics)
    final_eval = None if trainer.eval_dataset is None else trainer.evaluate()
    if final_eval:
        trainer.save_metrics("eval", final_eval)
    trainer.save_state()
    on_hub = dataset_name is not None and not Path(dataset_name).exists()
    trainer.create_model_card(dataset=dataset_name if on_hub else None)
    if trainer.is_world_process_zero():
        print_summary(trainer, final_eval)
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.accelerator.num_processes == 1 and trainer.processing_class is not None:
        print_sample(trainer)


def print_sample(trainer: TSTTrainer) -> None:
    """Print the start of a block and, after a bar, the model's continuation."""
    tokenizer: Any = trainer.processing_class
    block = next(iter(trainer.eval_dataset or trainer.train_dataset))["input_ids"]
    prompt = (
        torch.as_tensor(block[: len(block) // 4]).reshape(1, -1)[:, :SAMPLE_TOKENS].to(trainer.args.device)
    )
    # Everything is saved, so a model that cannot generate must not fail the run.
    with suppress(Exception):
        trainer.model.eval()
        torch.manual_seed(trainer.args.seed)
        whole = trainer.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            top_k=SAMPLE_TOP_K,
        )
        begin, more = (tokenizer.decode(ids) for ids in whole[0].tensor_split([prompt.shape[1]]))
        print(f"sample      {f'{begin} | {more}'[:SAMPLE_CHARACTERS]!r}")
