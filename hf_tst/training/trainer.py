"""TSTTrainer: the Hugging Face Trainer with a superposition phase before next-token training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from ..bags.collator import DataCollatorForTokenSuperposition
from ..bags.folding import offset_weights, resolve_weighting
from ..bags.phases import Phase, PhaseSchedule
from ..data.blocks import BlockRules
from ..data.plan import BatchLayout
from ..data.rows import DOCUMENT_COLUMNS, PhaseCollator
from ..errors import bad_input
from ..losses.multi_hot import count_target_bags
from ..models.moe import ExpertLoadMeter, adds_to_loss, experts_per_position
from ..models.shape import ModelShape
from ..models.sharding import warn_of_missing_fsdp, weights_to_save
from ..models.superposition import find_language_model
from ..planning.flops import find_shape, flops_per_token
from .arguments import TSTTrainingArguments
from .bad_loss import BadNumber
from .callbacks import PhaseProgressCallback, PhaseSwitchCallback, TokenMeterCallback
from .checkpoints import load_renamed_weights
from .data import RunData, make_collators, open_run_data
from .document_attention import DocumentAttentionCallback
from .guarding import GuardedTrainer
from .lean_evaluation import LeanEvaluationTrainer
from .mtp import MTPCallback
from .validation import check_arguments, check_trainer

logger = logging.get_logger(__name__)


class TSTTrainer(LeanEvaluationTrainer, GuardedTrainer):
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
        RunError: From `train`, if the run is stopped: by a loss that is not finite, by a disk that takes no checkpoint.

    `schedule` has the phases of the run; `preempted` is true once SIGTERM has ended it (`enable_jit_checkpoint`).

    Overrides:
        - `train`: notes the checkpoint to resume from, and leaves superposition however training ends; the model has its
          extra heads inside.
        - `_load_from_checkpoint`, `_load_best_model`: experts, too, which Trainer leaves out; extra heads.
        - `_load_optimizer_and_scheduler`: shards in which extra heads have no state yet.
        - `get_train_dataloader`, `set_initial_training_values`: rows by phase, and how many steps they give.
        - `_run_epoch`: a resumed epoch begins at the step reached, without skipping through the data.
        - `get_batch_samples`: measures the wait for data, and restores the random state of a resumed run.
        - `save_model`: whole weights, each once, where FSDP has sharded them; `data_position.json` and extra heads in
          checkpoints.
        - `_get_num_items_in_batch`: counts target bags, so that accumulation equals one large batch.
        - `training_step`: notes the latent length, for the token counts.
        - `floating_point_ops`: the count of [`step_flops`], in which a bag is one position.
        - `compute_loss`: averages what the model adds to its loss, and counts the load of experts in training.
        - `log`: phase, raw and latent tokens, load of experts, loss of extra heads.
        - `_determine_best_metric`: `save_strategy="best"` keeps the checkpoint of the switch.
        - [`GuardedTrainer`] overrides what concerns losses that are not finite, [`LeanEvaluationTrainer`] evaluation,
          [`CheckpointingTrainer`] checkpoints, and [`PublishingTrainer`] the Hub and the card.
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
        self._switch = PhaseSwitchCallback()
        self._meter = TokenMeterCallback()
        self._data: RunData | None = None
        self._expert_load = ExpertLoadMeter()
        self._shape: ModelShape | None = None
        self._checkpoint: str | None = None
        self._restore_random_state = False
        default_collator = DataCollatorForTokenSuperposition(bag_size=1)
        with bad_input():
            super().__init__(model, args, data_collator or default_collator, *positional, **kwargs)
        superposition, recovery, evaluation = make_collators(args, data_collator, self._end_token_id())
        self._recovery_collator = recovery
        self.data_collator = (
            PhaseCollator(superposition, recovery, evaluation) if args.tst_enabled else recovery
        )
        if args.tst_document_boundaries == "respect":
            self.add_callback(DocumentAttentionCallback())
        self.add_callback(self._switch)
        self.add_callback(self._meter)
        self._mtp = MTPCallback(self)
        self.add_callback(self._mtp)
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

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train through both phases. Arguments and result are those of [`~transformers.Trainer.train`].

        Raises:
            TSTError: If the checkpoint is damaged, or was trained on other data positions than the arguments and the data give.
        """
        self._checkpoint = self.choose_checkpoint(resume_from_checkpoint)
        self._restore_random_state = False
        try:
            with self._mtp.attached():
                return super().train(self._checkpoint, *args, **kwargs)
        finally:
            self._switch.close()
            self._checkpoint = None
            self.is_in_train = False  # Trainer leaves it set when training fails

    def steps_to_keep(self) -> set[int]:
        """The step of the switch, if its checkpoint is asked for."""
        schedule = self.schedule
        return {schedule.switch_step} if schedule is not None and self.args.tst_save_at_switch else set()

    def phase_and_blocks(self, found: BadNumber, rank: int) -> tuple[str, list[int] | None]:
        """The phase of a step, and the blocks that the data plan gives it; a stream has no plan."""
        if self._data is None:
            return super().phase_and_blocks(found, rank)
        reader = rank // (self.args.world_size // self._data.start.world_size)
        blocks = self._data.blocks_of_step(found.step, reader, found.micro_batch)
        return self._data.schedule.phase(found.step), blocks

    def get_train_dataloader(self) -> DataLoader:
        """The training batches of both phases; the plain Trainer's if there is no superposition step.

        Raises:
            TSTError: If the data has no full blocks of equal length, or too few of them.
        """
        self._data = self._switch.schedule = self._meter.schedule = self._meter.epoch = None
        if not self.args.tst_enabled or self.train_dataset is None:
            return super().get_train_dataloader()
        self._data = data = self._open_data()
        self._switch.schedule = self._meter.schedule = data.schedule
        self._meter.epoch = data.epoch
        self._expert_load.clear()
        self._meter.count_left_out(0 if self.args.tst_document_boundaries == "respect" else None)
        if data.schedule.switch_step == 0:
            logger.warning(
                f"tst_phase_ratio={data.schedule.phase_ratio} of {data.schedule.max_steps} steps is less than one step: "
                "there will be no superposition."
            )
        if self._checkpoint is not None:
            saved = data.resume(self._checkpoint, self.args.tst_allow_data_change)
            if saved is not None and self._meter.tokens_left_out is not None:
                self._meter.count_left_out(saved.tokens_left_out)
        return self._get_dataloader(
            dataset=data.rows,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda rows: data.sampler(lambda: self.state.global_step),
            is_training=True,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and their number of targets."""
        batches = epoch_iterator if self._data is None else self._data.received(epoch_iterator)
        samples = super().get_batch_samples(self._meter.watch(batches), *args, **kwargs)
        if self._restore_random_state:
            # Starting a loader draws a random number, which the uninterrupted run drew before the checkpoint.
            self._restore_random_state = False
            self._load_rng_state(self._checkpoint)
        return samples

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary checkpoint, also where its weights are sharded by FSDP.

        In a checkpoint of training it also writes which data the model has been trained on.
        """
        weights = None if _internal_call else weights_to_save(self)
        if weights is not None:
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.is_in_train:
            self._mtp.save(output_dir)
        if _internal_call and output_dir is not None and self.is_in_train and self._data is not None:
            self._gather_left_out()
            self._data.save(
                output_dir, self.state.global_step, self._meter.tokens_left_out or 0, self.args.should_save
            )

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

    def set_initial_training_values(
        self, args: TSTTrainingArguments, dataloader: DataLoader, *rest: Any
    ) -> tuple[Any, ...]:
        """Steps and epochs of the run, with the number of steps that the data plan gives."""
        if self._data is not None:
            args = copy.copy(args)
            args.max_steps = self._data.schedule.max_steps
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self._meter.schedule is None:
            self._meter.schedule = PhaseSchedule(max_steps=values[-1], phase_ratio=0, bag_size=1)
        self._shape = find_shape(self.model)
        self._meter.rows_per_step = self.get_total_train_batch_size(args)
        return values

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; notes the latent length of the rows, for the token counts."""
        if isinstance(inputs.get("input_ids"), Tensor):
            self._meter.latent_length = inputs["input_ids"].shape[1]
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of a batch; in training, also counts what its routers send to each expert.

        What a model adds to its loss, such as a router's auxiliary loss, is a mean over a micro-batch. Where superposition
        or the fused loss is on, its weight is one over the micro-batches of a step on all ranks, so that a step trains
        on their mean, and evaluation is that of one rank. Plain training adds them up, as [`~transformers.Trainer`] does.
        """
        parts = self._micro_batches_of_a_step(model, kwargs.get("num_items_in_batch"))
        if parts > 1:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] / parts
        self._mtp.count_as(parts)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
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
        self._gather_left_out()
        entries = {
            **logs,
            **self._meter.report(self.state.global_step, self.state.total_flos, with_speed="loss" in logs),
        }
        if "loss" in logs:
            entries |= self._expert_load.report(lambda counts: self.accelerator.reduce(counts, "sum"))
            entries |= self._mtp.report()
        super().log(entries, start_time)
        if "epoch" in entries:
            logs["epoch"] = entries["epoch"]

    def _run_epoch(self, **kwargs: Any) -> None:
        batches = kwargs["steps_trained_in_current_epoch"]
        resumes = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        if self._data is not None and resumes and batches:
            # The rows begin where training stands: told that nothing is trained yet, Trainer skips nothing.
            kwargs["num_update_steps_per_epoch"] -= batches // self.args.gradient_accumulation_steps
            kwargs["steps_trained_in_current_epoch"] = 0
            self._restore_random_state = True
        super()._run_epoch(**kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if not batch_samples or not _is_superposed(batch_samples[0]):
            return super()._get_num_items_in_batch(batch_samples, device)
        if not self.model_accepts_loss_kwargs:
            return None
        args = self.args
        weights = offset_weights(
            resolve_weighting(args.tst_mode, args.tst_offset_weighting), args.tst_bag_size
        )
        bags = torch.stack(
            [count_target_bags(batch["labels"], weights=weights) for batch in batch_samples]
        ).sum()
        bags = bags.to(device)
        if args.average_tokens_across_devices and args.world_size > 1:
            bags = self.accelerator.gather(bags).sum()
        return bags / self.get_tp_size()

    def _micro_batches_of_a_step(self, model: nn.Module, num_items_in_batch: Tensor | int | None) -> int:
        """Micro-batches whose losses are added up, where what the model adds to each is to be averaged; else 1."""
        args = self.args
        averages = args.tst_replaces_loss and adds_to_loss(self.model.config)
        if not averages or num_items_in_batch is None:
            return 1
        micro_batches = self.current_gradient_accumulation_steps if model.training else 1
        # Trainer multiplies the loss by so many ranks, since gradients are averaged over them.
        ranks = (
            self.accelerator.num_processes // self.get_tp_size() if args.average_tokens_across_devices else 1
        )
        return micro_batches * ranks

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        schedule = self._switch.schedule
        at_switch = schedule is not None and self.state.global_step == schedule.switch_step
        keep_switch = (
            at_switch and self.args.tst_save_at_switch and self.args.save_strategy == SaveStrategy.BEST
        )
        return is_best or keep_switch

    def _open_data(self) -> RunData:
        args = self.args
        rows_per_step = self.get_total_train_batch_size(args)
        micro_batch = self._train_batch_size * args.gradient_accumulation_steps
        layout = BatchLayout(
            self._train_batch_size, args.gradient_accumulation_steps, rows_per_step // micro_batch
        )
        return open_run_data(
            self.train_dataset,
            args,
            layout,
            rank=args.process_index // (args.world_size // layout.world_size),
            columns=self._used_columns,
            rules=BlockRules(pad_token_id=self._padding_token_id(), vocab_size=self._vocab_size()),
            as_arrays=isinstance(self._recovery_collator, DataCollatorForTokenSuperposition),
        )

    def _gather_left_out(self) -> None:
        self._meter.gather_left_out(lambda count: self.accelerator.reduce(count, reduction="sum"))

    def _used_columns(self, columns: list[str] | None) -> Any:
        """Columns that reach the collator: all, or those that the model's forward takes."""
        if not self.args.remove_unused_columns:
            return columns
        self._set_signature_columns_if_needed()
        used = list(self._signature_columns or [])
        if self.args.tst_document_boundaries == "respect":
            used += DOCUMENT_COLUMNS
        return [name for name in columns if name in used] if columns else used

    def _end_token_id(self) -> int | None:
        """The token that ends a document: the tokenizer's, else the model's."""
        end = getattr(self.processing_class, "eos_token_id", None)
        if end is None:
            end = getattr(getattr(self.model, "config", None), "eos_token_id", None)
        return end[0] if isinstance(end, (list, tuple)) else end

    def _vocab_size(self) -> int | None:
        """Ids that the model has an embedding for."""
        return getattr(find_language_model(self.model)[1].get_input_embeddings(), "num_embeddings", None)

    def _padding_token_id(self) -> int | None:
        """The tokenizer's padding token, if it stands for nothing but padding."""
        pad = getattr(self.processing_class, "pad_token_id", None)
        others = [getattr(self.processing_class, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
        return None if pad in others else pad


def _is_superposed(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3
