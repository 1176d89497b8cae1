"""TSTTrainer: the Hugging Face Trainer with a superposition phase before next-token training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.phases import Phase, PhaseSchedule
from ..data.rows import PhaseCollator
from ..errors import bad_input
from ..models.moe import ExpertLoadMeter, adds_to_loss, experts_per_position
from ..models.shape import ModelShape
from ..models.superposition import fused_evaluation_loss
from ..planning.flops import find_shape, flops_per_token
from ..records.card import write_card_of_trainer
from ..records.hub import check_repo_holds_no_other_model, explained_hub_errors
from .arguments import TSTTrainingArguments, changed_arguments
from .callbacks import PhaseProgressCallback, PhaseSwitchCallback, TokenMeterCallback
from .checkpoints import STATE_FILE, check_output_dir, choose_checkpoint, rotate_checkpoints, write_checkpoint
from .data import RunData, count_targets, end_token_id, make_collators, make_loader, open_run_data
from .document_attention import DocumentAttentionCallback
from .fsdp import warn_of_missing_fsdp, weights_to_save
from .mtp import MTPCallback
from .non_finite import NonFiniteCallback
from .preemption import PreemptionCallback
from .renamed_weights import load_renamed_weights
from .validation import check_arguments, check_trainer


class TSTTrainer(Trainer):
    """Trainer for causal language models that trains on bags of tokens first (token superposition).

    Use it as [`~transformers.Trainer`]. `train_dataset` holds blocks: rows of L tokens in `input_ids`, in the
    order of the text. Superposition joins `tst_bag_size` consecutive blocks to a row of L bags; recovery
    reads blocks that superposition did not. Evaluation and prediction are next-token in both phases.

    `max_steps` must fit into one pass over the data. Without it, `num_train_epochs` says how many passes to
    read, and the number of steps follows from the two phases' appetites; what Trainer calls an epoch is then
    an equal share of the steps. One pass is the last remainder shorter than an optimizer step.

    Args:
        model (`PreTrainedModel`): As for [`~transformers.Trainer`].
        args (`TSTTrainingArguments`): See [`TSTTrainingArguments`].
        data_collator (*optional*): Serves recovery and evaluation; by default labels are a copy of `input_ids`.
        positional, kwargs: All other arguments of [`~transformers.Trainer`].

    Raises:
        TSTError: If the arguments, the model or the data cannot go with superposition.
        RunError: From `train`, if the run is stopped: by a loss that is not finite, by a full disk.

    `schedule` has the phases of the run; `preempted` is true once SIGTERM has ended it (`enable_jit_checkpoint`).

    Overrides, in the order of a run:
        - `init_hf_repo`: a Hub that refuses is told in one sentence, before training.
        - `train`: chooses a complete checkpoint, puts extra heads into the model, and leaves superposition however it ends.
        - `get_train_dataloader`, `set_initial_training_values`: rows by phase, and how many steps they give.
        - `_load_from_checkpoint`, `_load_best_model`: experts, too, which Trainer leaves out; extra heads.
        - `_load_optimizer_and_scheduler`: shards in which extra heads have no state yet.
        - `get_batch_samples`: counts target bags, so that accumulation equals one large batch; measures the wait for data.
        - `training_step`, `_get_grad_norm`: hand on the numbers that must be finite.
        - `compute_loss`: averages what the model adds to its loss, and counts the load of experts in training.
        - `floating_point_ops`: the count of [`step_flops`], in which a bag is one position.
        - `log`: phase, raw and latent tokens, load of experts, loss of extra heads.
        - `evaluation_loop`: no logits where nothing but the loss is asked for.
        - `_determine_best_metric`: `save_strategy="best"` keeps the checkpoint of the switch.
        - `_save_checkpoint`, `_get_output_dir`, `_push_from_checkpoint`: a checkpoint is complete or not there.
        - `save_model`: whole weights, each once, where FSDP has sharded them.
        - `push_to_hub`, `create_model_card`: errors in one sentence; a card from the record of the run.
    """

    args: TSTTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TSTTrainingArguments | None = None,
        data_collator: Any = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = TSTTrainingArguments(output_dir="tmp_trainer")
        check_arguments(args)
        self._data: RunData | None = None
        self._checkpoint: str | None = None  # that training resumes from
        self._unfinished: Path | None = None  # where a checkpoint is being written
        self._expert_load = ExpertLoadMeter()
        self._shape: ModelShape | None = None
        default_collator = DataCollatorForTokenSuperposition(bag_size=1)
        # PreemptionCallback takes the place of Trainer's own.
        with bad_input(), changed_arguments(args, enable_jit_checkpoint=False):
            super().__init__(model, args, data_collator or default_collator, *positional, **kwargs)
        collators = make_collators(args, data_collator, end_token_id(self.processing_class, self.model))
        self.data_collator = PhaseCollator(*collators) if args.tst_enabled else collators[1]
        self._switch, self._meter, self._mtp = PhaseSwitchCallback(), TokenMeterCallback(), MTPCallback(self)
        self._non_finite = NonFiniteCallback(self)
        self._preemption = PreemptionCallback()
        if args.tst_document_boundaries == "respect":
            self.add_callback(DocumentAttentionCallback())
        for callback in (self._switch, self._meter, self._mtp, self._non_finite):
            self.add_callback(callback)
        if args.enable_jit_checkpoint:
            self.add_callback(self._preemption)
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(PhaseProgressCallback(self._meter))
        warn_of_missing_fsdp(self)
        check_trainer(self)

    @property
    def schedule(self) -> PhaseSchedule | None:
        """The run's phases; known from the moment the training data is loaded."""
        return self._meter.schedule

    @property
    def preempted(self) -> bool:
        """Whether the last training ended early because of SIGTERM, with a checkpoint to go on from."""
        return self._preemption.stopped

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository to push to, or find it; refuses one that holds another model.

        Raises:
            HubError: If the Hub refuses or does not answer.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained_hub_errors(f"Making the repository {name}", "Nothing was changed."):
            # It takes no `private` in the older Transformers.
            super().init_hf_repo(token, *([] if private is None else [private]))
            if self.is_world_process_zero():
                config, token = self.accelerator.unwrap_model(self.model).config, token or self.args.hub_token
                check_repo_holds_no_other_model(self.hub_model_id, config, token, self.args.hub_revision)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train through both phases. Arguments and result are those of [`~transformers.Trainer.train`].

        Raises:
            TSTError: If no file can be made in the output folder, or the checkpoint is damaged, or was trained on other data
                positions than the arguments and the data give.
            RunError: At a loss that is not finite, and if a checkpoint cannot be written.
        """
        args = self.args
        check_output_dir(args)
        self._checkpoint = choose_checkpoint(resume_from_checkpoint, args)
        filters = args.logging_nan_inf_filter and args.tst_bad_loss != "stop"  # it waits for the device
        kept = {
            name: getattr(args, name) for name in ("ignore_data_skip", "save_total_limit")
        }  # changed below
        try:
            with changed_arguments(args, logging_nan_inf_filter=filters, **kept), self._mtp.attached():
                return super().train(self._checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._switch.close()
            self._preemption.close()
            self._checkpoint = None
            self.is_in_train = False  # Trainer leaves it set when training fails

    def get_train_dataloader(self) -> DataLoader:
        """The training batches of both phases; the plain Trainer's if there is no superposition step.

        Raises:
            TSTError: If the data has no full blocks of equal length, or too few of them.
        """
        self._data = self._switch.schedule = self._meter.schedule = self._meter.epoch = None
        if not self.args.tst_enabled or self.train_dataset is None:
            return super().get_train_dataloader()
        self._data = data = open_run_data(self)
        self._switch.schedule = self._meter.schedule = data.schedule
        self._meter.epoch = data.epoch
        self._expert_load.clear()
        self._meter.count_left_out(0 if self.args.tst_document_boundaries == "respect" else None)
        if self._checkpoint is not None:
            saved = data.resume(self._checkpoint, self.args.tst_allow_data_change)
            if saved is not None and self._meter.tokens_left_out is not None:
                self._meter.count_left_out(saved.tokens_left_out)
        return make_loader(self, data)

    def set_initial_training_values(
        self, args: TSTTrainingArguments, dataloader: DataLoader
    ) -> tuple[Any, ...]:
        """Steps and epochs of the run, with the number of steps that the data plan gives."""
        if self._data is not None:
            self.args.ignore_data_skip = True  # the rows begin where training stands; `train` puts it back
            args = copy.copy(args)
            args.max_steps = self._data.schedule.max_steps
        values = super().set_initial_training_values(args, dataloader)
        if self._meter.schedule is None:
            self._meter.schedule = PhaseSchedule(max_steps=values[-1], phase_ratio=0, bag_size=1)
        self._shape = find_shape(self.model)
        self._meter.rows_per_step = self.get_total_train_batch_size(args)
        return values

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, and their number of targets: of target bags, in superposition."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last checkpoint, Trainer would see that the run is over after one step more.
            self.control.should_training_stop = True
            return [], None
        batches = epoch_iterator if self._data is None else self._data.received(epoch_iterator)
        samples = list(islice(self._meter.watch(batches), num_batches))
        if not samples or not _is_superposed(samples[0]):
            return super().get_batch_samples(iter(samples), num_batches, device)
        if not self.model_accepts_loss_kwargs:
            return samples, None
        bags = count_targets(samples, self.args).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            bags = self.accelerator.gather(bags).sum()
        return samples, bags / self.get_tp_size()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass; notes the loss, which must be finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._non_finite.note_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._non_finite.note_norm(model, norm)
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; in training, also counts what its routers send to each expert.

        What a model adds to its loss, such as a router's auxiliary loss, is a mean over a micro-batch. Where superposition
        or the fused loss is on, its weight is one over the micro-batches of a step on all ranks, so that a step trains
        on their mean, and evaluation is that of one rank. Plain training adds them up, as [`~transformers.Trainer`] does.
        """
        parts = 1
        if num_items_in_batch is not None and self.args.tst_replaces_loss and adds_to_loss(self.model.config):
            parts = self.current_gradient_accumulation_steps if model.training else 1
            if self.args.average_tokens_across_devices:
                # Trainer multiplies the loss by so many ranks, since gradients are averaged over them.
                parts *= self.accelerator.num_processes // self.get_tp_size()
        if parts > 1:
            num_items_in_batch = num_items_in_batch / parts
        self._mtp.count_as(parts)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss / parts if parts > 1 else loss
        if model.training and isinstance(outputs, Mapping) and outputs.get("router_logits") is not None:
            mask = inputs.get("attention_mask")
            self._expert_load.add(outputs["router_logits"], experts_per_position(self.model.config), mask)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of this process for a forward and backward pass over `inputs`, in training; 0 if they cannot be counted."""
        input_ids, args = inputs.get("input_ids"), self.args
        if self._shape is None or not isinstance(input_ids, Tensor):
            return 0
        rows, length = input_ids.shape[:2]
        phase: Phase = "superposition" if _is_superposed(inputs) else "recovery"
        per_token = flops_per_token(self._shape, length, phase, args.mtp_num_heads, args.mtp_kind)
        return rows * length * per_token // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; during training with the phase, the tokens so far, the load of experts and the extra heads' loss."""
        if not self.is_in_train:
            super().log(logs, start_time)
            return
        if "train_loss" in logs:
            # Training is over: with a limit of 1, Trainer would now remove all checkpoints but the best, also that to go on
            # from. `train` puts the limit back.
            self.args.save_total_limit = None
        self._meter.gather_left_out(self.accelerator.reduce)
        speed = self._meter.report(self.state.global_step, self.state.total_flos, with_speed="loss" in logs)
        entries = {**logs, **speed}
        if "loss" in logs:
            entries |= self._expert_load.report(self.accelerator.reduce)
            entries |= self._mtp.report()
        if self._non_finite.skipped_steps:
            entries["tst_skipped_steps"] = self._non_finite.skipped_steps
        super().log(entries, start_time)
        if "epoch" in entries:
            logs["epoch"] = entries["epoch"]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate or predict; with the fused loss, where training has it and nothing but the loss is asked for."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        fuses = prediction_loss_only and self.args.tst_replaces_loss
        with fused_evaluation_loss(self.model, self.args.tst_fused_loss) if fuses else nullcontext():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._mtp.load(resume_from_checkpoint)
        if not self.is_fsdp_enabled:
            load_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._mtp.loading_optimizer():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed_weights(self.model, self.state.best_model_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        at_switch = self._data is not None and self.state.global_step == self._data.schedule.switch_step
        saves = self.args.tst_save_at_switch and self.args.save_strategy == SaveStrategy.BEST
        return is_best or (at_switch and saves)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._non_finite.check()  # every checkpoint is from before the first bad number
        self._meter.gather_left_out(self.accelerator.reduce)
        args, state = self.args, self.state
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{state.global_step}"
        write_checkpoint(checkpoint, args, lambda folder: self._write_checkpoint(model, trial, folder))
        if args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if args.should_save:
            keep = {checkpoint.name, Path(state.best_model_checkpoint or "").name}
            if self._data is not None and args.tst_save_at_switch:
                keep.add(f"checkpoint-{self._data.schedule.switch_step}")
            rotate_checkpoints(checkpoint.parent, args.save_total_limit, keep)

    def _write_checkpoint(self, model: Any, trial: Any, folder: Path) -> None:
        """Write this rank's files of a checkpoint into `folder`, which lies in `_unfinished`."""
        state, run_dir = self.state, Path(self._get_output_dir(trial))
        # Trainer would look for the best checkpoint in `_unfinished`, and wait there for other ranks, which may have failed.
        best_step, state.best_global_step = state.best_global_step, None
        self._unfinished = folder.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished, state.best_global_step = None, best_step
        self._mtp.save(folder)
        if self._data is not None:
            left_out = self._meter.tokens_left_out or 0
            self._data.save(folder, state.global_step, left_out, self.args.should_save)
        best = run_dir / f"checkpoint-{best_step}"
        if best_step and (best_step == state.global_step or best.is_dir()):
            state.best_model_checkpoint = str(best)
        if self.args.should_save:
            state.save_to_json(str(folder / STATE_FILE))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it has no name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary checkpoint, also where its weights are sharded by FSDP."""
        weights = None if _internal_call else weights_to_save(self)
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # The Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            HubError: If the Hub refuses or does not answer; the model is saved in `output_dir` then.
        """
        if private is not None:  # the older Transformers do not know it
            kwargs["private"] = private
        kept = f"The model is saved in {self.args.output_dir}."
        with explained_hub_errors(f"Pushing {self.args.output_dir}", kept):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` in the output folder from the record of the run, with its loss curve.

        Arguments as for [`~transformers.Trainer.create_model_card`]; `tasks`, `dataset_tags` and `dataset_args` are for
        results that a card of this kind does not hold. A card that no trainer wrote is left as it is.
        """
        if self.is_world_process_zero():
            write_card_of_trainer(
                self,
                repo_id=self.hub_model_id or model_name,
                base_model=finetuned_from,
                datasets=dataset,
                language=language,
                license=license,
                tags=tags,
            )


def _is_superposed(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3
