"""TSTTrainer: the Hugging Face Trainer with a superposition phase before next-token training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput

from ..bags.collator import holds_bags
from ..bags.phases import Phase, PhaseSchedule
from ..batches.collators import CheckingCollator, DefaultCollator
from ..checkpoints.saving_trainer import SavingTrainer, signature_of
from ..errors import bad_input
from ..models.moe import ExpertLoadMeter, adds_to_loss
from ..models.shape import ModelShape
from ..models.superposition import fused_evaluation_loss
from ..models.temporary import replaced
from ..planning.flops import find_shape, flops_per_token
from ..records.card import write_card_of_trainer
from .arguments import TSTArguments, TSTTrainingArguments
from .callbacks.console import replace_progress_callback
from .callbacks.extra_heads import MTPCallback, check_same_heads, keeping_heads
from .callbacks.non_finite import NonFiniteCallback
from .callbacks.phase_switch import PhaseSwitchCallback
from .callbacks.preemption import PreemptionCallback
from .callbacks.run_note import RunNoteCallback
from .callbacks.spikes import SpikeCallback
from .callbacks.token_meter import TokenMeterCallback
from .overriding import (
    arguments_by_name,
    choose_fused_losses,
    is_patch,
    other_parent,
    overrides,
)
from .refusals import check_arguments, check_trainer, warn_of_another_run
from .row_checks import batch_rules, check_stored_rows
from .run_collators import make_collator, without_added_labels
from .run_data import RunData
from .subclass_methods import SubclassMethods
from .target_bags import TargetBagMeter
from .train_dataloader import (
    check_plain_resume,
    fold_own_loader,
    make_loader,
    open_run_data,
    plain_loader,
    with_own_generator,
)


class TSTTrainer(SavingTrainer):
    """Trainer for causal language models that first trains on bags of tokens (superposition), then on single tokens (recovery).

    Use it like [`~transformers.Trainer`]. `train_dataset` holds blocks: rows of L tokens in `input_ids`, in the order of the
    text. Superposition joins `tst_bag_size` consecutive blocks into one row of L bags. Recovery reads other blocks. Evaluation
    and prediction are next-token in both phases.

    A subclass may have its own `get_train_dataloader` or `_get_train_sampler`. Its batches of rows of L tokens are then folded
    in their order: superposition joins `tst_bag_size` batches and cuts each row into L/s bags (see [`FoldedBatches`]).

    The class can be combined with another trainer, `class Mine(TSTTrainer, OtherTrainer)`. Superposition then uses the model's own
    loss, and recovery the other trainer's `compute_loss`. The batches of the other trainer's own loader or sampler are folded
    like those of a subclass.

    `max_steps` must fit into one pass over the data. Without it, `num_train_epochs` is the number of passes, and the number of
    steps is derived from the blocks that each phase consumes; an epoch is then an equal share of the steps. Blocks at the end that
    do not fill a whole optimizer step are not read.

    Args:
        model (`PreTrainedModel`): As for [`~transformers.Trainer`].
        args ([`TSTTrainingArguments`]): The arguments, of this class or of any training arguments that inherit [`TSTArguments`].
        data_collator (*optional*): Collates blocks in both phases and in evaluation. By default labels are a copy of `input_ids`.
        positional, kwargs: All other arguments of [`~transformers.Trainer`].

    Attributes:
        schedule ([`PhaseSchedule`]): The phases of the run, once it has begun.
        fused_loss (`str`): `tst_fused_loss` as it is used in superposition: `"auto"` becomes `"off"` if a subclass has its own
            `compute_loss`, which may read logits.
        fused_recovery (`str`): The same for recovery and evaluation, where the `compute_loss` of another parent counts, too.
        preempted (`bool`): Whether SIGTERM has ended training (`enable_jit_checkpoint`).

    Raises:
        TSTError: If the arguments, the model or the data do not work with superposition.
        RunError: From `train`, if the run is stopped, for example by a non-finite loss or a full disk.
    """

    args: TSTArguments

    @signature_of(Trainer.__init__)
    def __init__(
        self,
        model: nn.Module | None = None,
        args: TSTArguments | None = None,
        data_collator: Any = None,
        *positional: Any,
        **kwargs: Any,
    ) -> None:
        args = args or TSTTrainingArguments(output_dir="tmp_trainer")
        check_arguments(args)
        args.note_trainer()
        self.schedule: PhaseSchedule | None = None
        self._newest_data: RunData | None = None  # by the last call of `get_train_dataloader`
        self._data: RunData | None = None  # of the run
        self._given_arguments: dict[str, Any] = {}  # the user's values of arguments that training changes
        self._subclass_methods = SubclassMethods(self, TSTTrainer)
        self._expert_load, self._target_bags = ExpertLoadMeter(), TargetBagMeter(self)
        self._shape: ModelShape | None = None
        given = arguments_by_name(model, args, data_collator, *positional)
        # PreemptionCallback replaces the callback that Trainer adds for this option.
        with bad_input(), replaced(args.__dict__, enable_jit_checkpoint=False):
            super().__init__(**given, **kwargs)
        if data_collator is None:
            self.data_collator: Any = DefaultCollator(self.data_collator)
        self._prepare_losses()
        self._switch, self._meter = PhaseSwitchCallback(self), TokenMeterCallback(self)
        self._mtp = MTPCallback(self) if args.mtp_num_heads > 1 else None
        self._non_finite, self._spikes = NonFiniteCallback(self), SpikeCallback(self)
        self._preemption = PreemptionCallback()
        ours = (self._switch, RunNoteCallback(self), self._meter, self._mtp, self._non_finite, self._spikes)
        for callback in filter(None, (*ours, args.enable_jit_checkpoint and self._preemption)):
            self.add_callback(callback)
        self._console = replace_progress_callback(self)

    def _prepare_losses(self) -> None:
        """Choose the losses, and check model, collator and processes, for the current arguments."""
        self.fused_loss, self.fused_recovery = choose_fused_losses(self, TSTTrainer)
        make_collator(self)  # for its checks; the loader makes it again
        check_trainer(self)

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM ended the last training early, with a checkpoint to resume from."""
        return self._preemption.stopped

    # Training

    @signature_of(Trainer.train)
    def train(
        self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train through both phases. Arguments and result are those of [`~transformers.Trainer.train`].

        Raises:
            TSTError: If the output folder is not writable, the checkpoint is damaged, or the data or its order has changed since
                the checkpoint.
            RunError: At a non-finite loss, and if a checkpoint cannot be written.
        """
        args = self.args
        if "compute_loss" in vars(self):
            self._prepare_losses()  # set on the trainer after it was made
        check_stored_rows(self)
        if not resume_from_checkpoint:
            warn_of_another_run(self)
        # Training changes both; checkpoints have the user's values.
        self._given_arguments = {
            name: getattr(args, name) for name in ("logging_nan_inf_filter", "ignore_data_skip")
        }
        # Trainer's filter of logged losses waits for the device in each step. With "stop" it has nothing to filter.
        filters_loss = args.logging_nan_inf_filter and args.tst_nonfinite_loss != "stop"
        try:
            with (
                replaced(args.__dict__, **self._given_arguments | {"logging_nan_inf_filter": filters_loss}),
                nullcontext() if self._mtp is None else self._mtp.attached(),
                self._subclass_methods.watched(),
            ):
                return super().train(resume_from_checkpoint, *positional, **kwargs)
        finally:
            self._switch.close()
            self._preemption.close()
            if self._console is not None:
                self._console.close()

    def _hp_search_setup(self, trial: Any) -> None:
        with keeping_heads(self.args):
            super()._hp_search_setup(trial)
        if self.hp_search_backend is not None:
            check_arguments(self.args)
            self._prepare_losses()

    def get_train_dataloader(self) -> DataLoader:
        """The loader of both phases; the plain Trainer's if superposition is off. A call during training does not affect the run.

        Raises:
            TSTError: If the data has no full blocks of equal length, or too few of them.
        """
        self._newest_data = None
        if not self.args.tst_enabled or self.train_dataset is None:
            check_plain_resume(self._checkpoint, self.args)
            loader = super().get_train_dataloader()
            return plain_loader(loader, self.args) if self._checkpoint else loader
        # A subclass's own loader is folded by `SubclassMethods`.
        if (
            overrides(self, Trainer, "_get_train_sampler")
            or other_parent(self, TSTTrainer, "get_train_dataloader")
            or is_patch(Trainer.get_train_dataloader)
        ):
            return self._loader_of(fold_own_loader(self, super().get_train_dataloader()))
        return self._loader_of(open_run_data(self))

    @signature_of(Trainer._get_dataloader)
    def _get_dataloader(self, *positional: Any, **kwargs: Any) -> DataLoader:
        """Trainer's loader, with a collator that also checks the ids."""
        checking = CheckingCollator(make_collator(self), batch_rules(self.model))
        with replaced(self.__dict__, data_collator=checking):
            loader = super()._get_dataloader(*positional, **kwargs)
        # A user's own order of training data is seeded by `FoldedBatches`.
        evaluates = self.args.tst_enabled and not kwargs.get("is_training")
        return with_own_generator(loader, self.args) if evaluates else loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch_rules(self.model).check_batch(inputs)  # the loader may be a user's own
        return super()._prepare_inputs(inputs)

    def _loader_of(self, data: RunData) -> Any:
        """The loader of `data`, at the position of the checkpoint that training resumes from."""
        self._newest_data = data
        if self._checkpoint is not None:
            # During training, the argument has another value than the user's.
            skips_nothing = self._given_arguments.get("ignore_data_skip", self.args.ignore_data_skip)
            data.resume(self._checkpoint, self.args.tst_allow_data_change, bool(skips_nothing))
        data.loader = make_loader(self, data)
        return data.loader

    def set_initial_training_values(self, args: TSTArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """Begin a run on the data of the loader: its steps and epochs. The number of steps comes from the data plan."""
        self._data, self.schedule = self._newest_data, None
        self._expert_load.clear()
        self._target_bags.clear()
        self._subclass_methods.clear()
        if self._data is not None:
            self._data.check_same_data()
            self.schedule = self._data.start.schedule
            self.args.ignore_data_skip = True  # the loader starts at the current step; `train` restores it
            args = copy.copy(args)
            args.max_steps = self._data.start.max_steps
        values = super().set_initial_training_values(args, dataloader)
        if self.schedule is None:  # plain training
            self.schedule = PhaseSchedule(max_steps=values[-1], phase_ratio=0, bag_size=1)
        self._shape = find_shape(self.model)
        return values

    @signature_of(Trainer.create_scheduler)
    def create_scheduler(self, num_training_steps: int, *positional: Any, **kwargs: Any) -> Any:
        """The learning rate schedule, with the options of [`TSTArguments.schedule_options`]."""
        options = self.args.schedule_options(num_training_steps)
        with replaced(self.args.__dict__, lr_scheduler_kwargs=options):
            return super().create_scheduler(num_training_steps, *positional, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step, and their number of targets. In superposition a target is a bag."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last checkpoint of a finished run, Trainer would do one more step before it stops.
            self.control.should_training_stop = True
            return [], None
        batches = epoch_iterator
        if self._data is not None:
            self._data.check_accumulation(self.args.gradient_accumulation_steps)
            batches = self._data.received(epoch_iterator)
        samples = list(islice(self._meter.watch(batches), num_batches))
        if not samples or not self._trains_on_bags(samples[0]):
            samples, count = super().get_batch_samples(iter(samples), num_batches, device)
        elif not self.model_accepts_loss_kwargs:
            count = None
        else:
            # The ranks of tensor parallelism have the same batch.
            count = self._target_bags.note_step(samples, device) / self.get_tp_size()
        self._subclass_methods.note_count(count)
        return samples, count

    def _trains_on_bags(self, batch: Any) -> bool:
        """Whether a batch holds bags. In plain training, labels may have three dimensions for reasons of their own."""
        return self._data is not None and holds_bags(batch)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass."""
        skips_parent = self._trains_on_bags(inputs) and other_parent(self, TSTTrainer, "compute_loss")
        has_models_loss = skips_parent and not overrides(self, TSTTrainer, "compute_loss")
        # `loss_is_scaled_for_ga` describes the loss of the other parent, and bags get the model's own.
        with replaced(self.__dict__, loss_is_scaled_for_ga=None) if has_models_loss else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._non_finite.note_norm(model, norm)
        self._spikes.note_norm(model, norm)
        return norm

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch. In training it also counts how many positions the routers send to each expert.

        A model may add a term to its loss that is a mean over a micro-batch, such as a router's auxiliary loss. With superposition
        or the fused loss, this term is divided by the number of micro-batches of a step on all ranks, so that a step trains on
        the mean. In plain training the terms are summed, as in [`~transformers.Trainer`].

        If another parent has its own `compute_loss`, it computes the loss of single tokens. It never gets bags, because it does
        not expect labels with three dimensions.
        """
        if not self._trains_on_bags(inputs) and other_parent(self, TSTTrainer, "compute_loss"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        parts = 1 if num_items_in_batch is None else self._parts_of_step(model.training)
        if parts > 1:
            num_items_in_batch = num_items_in_batch / parts
        if self._mtp is not None:
            self._mtp.heads.share = 1 / parts
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        loss = loss / parts if parts > 1 else loss
        if model.training:
            config = getattr(self.model, "config", None)
            self._expert_load.note_outputs(config, outputs, inputs.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    def _parts_of_step(self, in_training: bool) -> int:
        """The number of micro-batches that share one step on all ranks, if the model adds a mean over each to its loss; else 1."""
        if not (self.args.tst_replaces_loss and adds_to_loss(self.model.config)):
            return 1
        parts = self.current_gradient_accumulation_steps if in_training else 1
        if self.args.average_tokens_across_devices:
            # Trainer multiplies the loss by this number, since gradients are averaged over these ranks.
            parts *= self.accelerator.num_processes // self.get_tp_size()
        return parts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of this process for a forward and backward pass over `inputs` in training; 0 if unknown."""
        input_ids, args = inputs.get("input_ids"), self.args
        if self._shape is None or not isinstance(input_ids, Tensor):
            return 0
        rows, length = input_ids.shape[:2]
        phase: Phase = "superposition" if self._trains_on_bags(inputs) else "recovery"
        per_token = flops_per_token(self._shape, length, phase, args.mtp_num_heads, args.mtp_kind)
        return rows * length * per_token // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`. During training, add bag size, tokens, speed, expert load, loss above the floor and the extra heads' loss."""
        if not self.is_in_train:
            super().log(logs, start_time)
            return
        # Trainer logs these on all ranks, as `gather_left_out` needs; a script may log others on one.
        if "train_runtime" in logs or "loss" in logs:
            self._meter.gather_left_out()
        entries = {**logs, **self._meter.report(with_speed="loss" in logs)}
        if "loss" in logs:
            entries |= self._expert_load.report(self.accelerator.reduce)
            entries |= self._target_bags.report(logs["loss"])
            entries |= {} if self._mtp is None else self._mtp.report()
            self._subclass_methods.check_logged_loss(logs["loss"])
        if skipped := self._non_finite.skipped_steps + self._spikes.skipped_steps:
            entries["tst_skipped_steps"] = skipped
        ours = set(entries)
        super().log(entries, start_time)
        # Trainer chooses the best model from the caller's `logs`, so entries that Trainer and callbacks have added go there, too.
        logs.update({name: value for name, value in entries.items() if name == "epoch" or name not in ours})

    @signature_of(Trainer.evaluation_loop)
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        *positional: Any,
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Evaluate or predict. Uses the fused loss if training does and only the loss is needed."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        # A subclass's `prediction_step` may read logits in any case.
        reads_logits = not prediction_loss_only or overrides(self, Trainer, "prediction_step")
        fuses = self.args.tst_replaces_loss and not reads_logits
        positional = (dataloader, description, prediction_loss_only, *positional)
        with fused_evaluation_loss(self.model, self.fused_recovery) if fuses else nullcontext():
            return super().evaluation_loop(*positional, **kwargs)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The loader of prediction. It adds no labels."""
        with replaced(self.__dict__, data_collator=without_added_labels(self)):
            return super().get_test_dataloader(test_dataset)

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_same_heads(resume_from_checkpoint, self.args)
        if self._mtp is not None:
            self._mtp.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with nullcontext() if self._mtp is None else self._mtp.loading_optimizer():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy="best" Trainer saves only if this is true; the checkpoint at the switch is saved, too.
        is_best = super()._determine_best_metric(metrics, trial)
        at_switch = self._data is not None and self.state.global_step == self._data.start.schedule.switch_step
        saves = self.args.tst_save_at_switch and self.args.save_strategy == SaveStrategy.BEST
        return is_best or (at_switch and saves)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._non_finite.check()  # no checkpoint is written after a non-finite loss or gradient
        self._meter.gather_left_out()
        with replaced(self.args.__dict__, **self._given_arguments):  # Trainer saves its arguments, too
            super()._save_checkpoint(model, trial)

    def _kept_checkpoints(self) -> set[str]:
        if self.schedule is None or not self.args.tst_save_at_switch:
            return set()
        return {f"checkpoint-{self.schedule.switch_step}"}

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Write what this rank adds to Trainer's files: the extra heads, and the position in the data."""
        if self._mtp is not None:
            self._mtp.save(folder)
        if self._data is not None:
            self._data.save(folder, self.state.global_step, self.args.should_save)

    # The card

    @signature_of(Trainer.create_model_card)
    def create_model_card(self, *positional: Any, **kwargs: Any) -> None:
        """Write `README.md` and the loss curve into the output folder, from the record of the run.

        Arguments are those of [`~transformers.Trainer.create_model_card`], but `tasks`, `dataset_tags` and `dataset_args` are
        ignored. A card that no trainer has written, or that was edited since, is not changed.
        """
        if self.is_world_process_zero():
            write_card_of_trainer(self, *positional, **kwargs)
