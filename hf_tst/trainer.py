"""TSTTrainer: the Hugging Face Trainer with a superposition phase before next-token training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from .arguments import TSTTrainingArguments
from .bags import offset_weights, resolve_weighting
from .callbacks import PhaseProgressCallback, PhaseSwitchCallback, TokenMeterCallback
from .collator import DataCollatorForTokenSuperposition
from .data import (
    DataPlan,
    EpochSampler,
    PhaseCollator,
    PlannedRows,
    StreamedRows,
    check_blocks,
    plan_for_passes,
    plan_for_steps,
)
from .expert_load import ExpertLoadMeter, experts_per_position
from .fused import check_fusable
from .loss import count_target_bags
from .phases import PhaseSchedule
from .sharding import warn_of_missing_fsdp, weights_to_save
from .superposition import find_language_model

logger = logging.get_logger(__name__)


class TSTTrainer(Trainer):
    """Trainer for causal language models that trains on bags of tokens first (token superposition).

    Use it as [`~transformers.Trainer`]. `train_dataset` holds blocks: rows of L tokens in `input_ids`, in the
    order of the text. Superposition joins `tst_bag_size` consecutive blocks to a row of L bags; recovery
    reads blocks that superposition did not. Evaluation and prediction are next-token in both phases.

    `max_steps` must fit into one pass over the data. Without it, `num_train_epochs` says how many passes to
    read, and the number of steps follows from the two phases' appetites; what Trainer calls an epoch is then
    an equal share of the steps. One pass is the last remainder shorter than an optimizer step.

    Args:
        model, args, data_collator, ...: As for [`~transformers.Trainer`], with `args` a [`TSTTrainingArguments`].
            `data_collator` serves recovery and evaluation; by default labels are a copy of `input_ids`.

    Raises:
        ValueError: If the arguments, the model or the data cannot go with superposition.

    Overrides:
        - `train`: leaves superposition however training ends.
        - `save_model`: writes whole weights, each once, where FSDP has sharded them.
        - `get_train_dataloader`, `set_initial_training_values`: rows by phase, and how many steps they give.
        - `_get_num_items_in_batch`: counts target bags, so that accumulation equals one large batch.
        - `training_step`: notes the latent length, for the token counts.
        - `floating_point_ops`: a bag costs one latent position.
        - `compute_loss`: counts the load of experts in training.
        - `log`: phase, raw and latent tokens, load of experts.
        - `_determine_best_metric`: `save_strategy="best"` keeps the checkpoint of the switch.
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
        if not isinstance(args, TSTTrainingArguments):
            raise ValueError(
                f"TSTTrainer needs TSTTrainingArguments, but got {type(args).__name__}: change the class name where "
                "the arguments are made."
            )
        if args.tst_enabled and args.n_gpu > 1:
            raise ValueError(
                f"This process sees {args.n_gpu} GPUs and would train with nn.DataParallel, which superposition does "
                "not support: start one process a GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
            )
        superposition, recovery = _make_collators(args, data_collator)
        collator = PhaseCollator(superposition, recovery) if args.tst_enabled else recovery
        self._switch = PhaseSwitchCallback()
        self._meter = TokenMeterCallback()
        self._expert_load = ExpertLoadMeter()
        super().__init__(model, args, collator, *positional, **kwargs)
        self._recovery_collator = recovery
        self._plan: DataPlan | None = None
        self.add_callback(self._switch)
        self.add_callback(self._meter)
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(PhaseProgressCallback(self._meter))
        warn_of_missing_fsdp(self)
        if args.tst_replaces_loss:
            self._check_loss()
        if args.tst_enabled:
            self._check_superposition()

    @property
    def schedule(self) -> PhaseSchedule | None:
        """The run's phases; known from the moment the training data is loaded."""
        return self._meter.schedule

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train through both phases. Arguments and result are those of [`~transformers.Trainer.train`]."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._switch.close()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as an ordinary checkpoint, also where its weights are sharded by FSDP."""
        weights = None if _internal_call else weights_to_save(self)
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    def get_train_dataloader(self) -> DataLoader:
        """The training batches of both phases; the plain Trainer's if there is no superposition step.

        Raises:
            ValueError: If the data has no full blocks of equal length, or too few of them.
        """
        self._plan = self._switch.schedule = self._meter.schedule = None
        if not self.args.tst_enabled or self.train_dataset is None:
            return super().get_train_dataloader()
        rows_per_step = self.get_total_train_batch_size(self.args)
        rows: PlannedRows | StreamedRows
        if isinstance(self.train_dataset, TorchIterableDataset):
            schedule = self._make_schedule(self.args.max_steps)
            rows = self._stream_rows(schedule, rows_per_step)
        else:
            check_blocks(self.train_dataset, self._padding_token_id())
            self._plan = self._make_plan(rows_per_step)
            schedule = self._plan.schedule
            rows = self._plan_rows(self._plan)
        self._meter.schedule = schedule
        if schedule.switch_step == 0:
            logger.warning(
                f"tst_phase_ratio={schedule.phase_ratio} of {schedule.max_steps} steps is less than one step: there "
                "will be no superposition."
            )
        self._switch.schedule = schedule
        return self._get_dataloader(
            dataset=rows,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._make_sampler,
            is_training=True,
        )

    def set_initial_training_values(
        self, args: TSTTrainingArguments, dataloader: DataLoader, *rest: Any
    ) -> tuple[Any, ...]:
        """Steps and epochs of the run, with the number of steps that the data plan gives."""
        if self._plan is not None:
            args = copy.copy(args)
            args.max_steps = self._plan.schedule.max_steps
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self._meter.schedule is None:
            self._meter.schedule = PhaseSchedule(max_steps=values[-1], phase_ratio=0, bag_size=1)
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
        """The loss of a batch; in training, also counts what its routers send to each expert."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and isinstance(outputs, Mapping):
            mask = inputs.get("attention_mask")
            self._expert_load.add(outputs.get("router_logits"), experts_per_position(self.model.config), mask)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a forward and backward pass over `inputs`; a bag counts as one token."""
        input_ids = inputs.get("input_ids")
        if isinstance(input_ids, Tensor) and input_ids.dim() == 3:
            inputs = {**inputs, "input_ids": input_ids[..., 0]}
        return super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; during training with the phase, the tokens so far and the load of experts."""
        if not self.is_in_train:
            super().log(logs, start_time)
            return
        entries = {**logs, **self._meter.report(self.state.global_step, with_speed="loss" in logs)}
        if "loss" in logs:
            entries |= self._expert_load.report(lambda counts: self.accelerator.reduce(counts, "sum"))
        super().log(entries, start_time)
        if "epoch" in entries:
            logs["epoch"] = entries["epoch"]

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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        schedule = self._switch.schedule
        at_switch = schedule is not None and self.state.global_step == schedule.switch_step
        keep_switch = (
            at_switch and self.args.tst_save_at_switch and self.args.save_strategy == SaveStrategy.BEST
        )
        return is_best or keep_switch

    def _check_loss(self) -> None:
        _, model = find_language_model(self.model)
        check_fusable(model, self.args.tst_fused_loss)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace the loss of superposition and the fused loss: leave it out, or set "
                "tst_phase_ratio=0 and tst_fused_loss='auto'."
            )

    def _check_superposition(self) -> None:
        for name, size in (("Context", self._parallel_size("cp")), ("Sequence", self._parallel_size("sp"))):
            if size > 1:
                raise ValueError(
                    f"{name} parallelism (size {size}) splits rows of bags, which is not supported."
                )
        if isinstance(self.train_dataset, TorchIterableDataset) and self.args.dataloader_num_workers > 0:
            raise ValueError(
                f"dataloader_num_workers={self.args.dataloader_num_workers} would read a streamed data set several "
                "times over: set it to 0, or load the data set without streaming."
            )

    def _parallel_size(self, kind: str) -> int:
        config = getattr(self.accelerator, "parallelism_config", None)
        return getattr(config, f"{kind}_size", 1) or 1

    def _make_schedule(self, steps: int) -> PhaseSchedule:
        return PhaseSchedule(steps, self.args.tst_phase_ratio, self.args.tst_bag_size, self.args.tst_mode)

    def _make_plan(self, rows_per_step: int) -> DataPlan:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = getattr(args, "train_sampling_strategy", "random") != "sequential"
        num_blocks = len(self.train_dataset)
        if args.max_steps > 0:
            return plan_for_steps(
                num_blocks, self._make_schedule(args.max_steps), rows_per_step, seed, shuffle
            )
        return plan_for_passes(
            num_blocks, args.num_train_epochs, self._make_schedule, rows_per_step, seed, shuffle
        )

    def _plan_rows(self, plan: DataPlan) -> PlannedRows:
        first = self.train_dataset[0]
        own_collator = isinstance(self._recovery_collator, DataCollatorForTokenSuperposition)
        return PlannedRows(self.train_dataset, plan, self._used_columns(list(first)), as_arrays=own_collator)

    def _stream_rows(self, schedule: PhaseSchedule, rows_per_step: int) -> StreamedRows:
        return StreamedRows(self.train_dataset, schedule, rows_per_step, self._used_columns(None))

    def _used_columns(self, columns: list[str] | None) -> Any:
        """Columns that reach the collator: all, or those that the model's forward takes."""
        if not self.args.remove_unused_columns:
            return columns
        self._set_signature_columns_if_needed()
        return (
            [name for name in columns if name in self._signature_columns]
            if columns
            else self._signature_columns
        )

    def _make_sampler(self, rows: Any) -> EpochSampler:
        assert self._plan is not None
        steps = self._plan.schedule.max_steps
        if self.args.max_steps <= 0:
            steps = min(steps, math.ceil(steps / self.args.num_train_epochs))
        return EpochSampler(self._plan, steps, lambda: self.state.global_step)

    def _padding_token_id(self) -> int | None:
        """The tokenizer's padding token, if it stands for nothing but padding."""
        pad = getattr(self.processing_class, "pad_token_id", None)
        others = [getattr(self.processing_class, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
        return None if pad in others else pad


def _is_superposed(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.dim() == 3


def _make_collators(args: TSTTrainingArguments, data_collator: Any) -> tuple[Any, Any]:
    """Collators of superposition rows and of recovery rows, from the one the user gave, if any."""
    superposition = DataCollatorForTokenSuperposition(args.tst_bag_size, mode=args.tst_mode)
    recovery = DataCollatorForTokenSuperposition(bag_size=1)
    if data_collator is None:
        return superposition, recovery
    if not isinstance(data_collator, DataCollatorForTokenSuperposition) or data_collator.bag_size == 1:
        return superposition, data_collator
    if args.tst_enabled and (data_collator.bag_size, data_collator.mode) != (
        args.tst_bag_size,
        args.tst_mode,
    ):
        raise ValueError(
            f"data_collator makes bags of {data_collator.bag_size} in mode {data_collator.mode!r}, but the arguments "
            f"say tst_bag_size={args.tst_bag_size} and tst_mode={args.tst_mode!r}: leave data_collator out."
        )
    return data_collator, recovery
