"""TSTArguments: the fields of token superposition. TSTTrainingArguments: TrainingArguments with these fields."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import integration_utils
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.utils import logging

from ..bags.folding import DocumentBoundaries
from ..bags.phases import (
    SuperpositionRows,
    TSTMode,
    check_bag_size,
    check_phase_ratio,
    superposes,
)
from ..bags.weighting import InputWeighting, OffsetWeighting, resolve_weighting
from ..errors import TSTError, bad_input, check_at_least, check_choice
from ..models.fused import FusedLoss
from ..mtp.heads import MTPKind, check_loss_weight, check_mtp

logger = logging.get_logger(__name__)

NonFiniteLoss = Literal["stop", "skip", "ignore"]
Spikes = Literal["ignore", "skip", "stop"]
# The lowest values of some of Trainer's own arguments. Lower ones would fail long after the start, or train nonsense.
LOWEST = {
    1: ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    0: ("dataloader_num_workers", "learning_rate", "weight_decay", "adam_epsilon"),
}

# Schedules that lower the learning rate when a metric of evaluation does not improve.
FOLLOW_METRIC = ("reduce_lr_on_plateau", "greedy")

_Base: Any = TrainingArguments if TYPE_CHECKING else object


@dataclass
class TSTArguments(_Base):
    """The training arguments of token superposition and multi-token prediction.

    [`TSTTrainer`] accepts any dataclass that inherits this class and [`~transformers.TrainingArguments`]. Put this class first,
    as in `class Mine(TSTArguments, OtherArguments)`: then the values are checked when the arguments are made, and not only when
    the trainer is made.

    With `tst_phase_ratio=0` or `tst_bag_size=1`, training gives the weights of the plain `Trainer`, bit for bit, unless
    `tst_fused_loss="on"` or `mtp_num_heads` select another loss. A non-finite loss still stops the run (`tst_nonfinite_loss`).

    Args:
        tst_phase_ratio (`float`, *optional*, defaults to 0.3): Phase ratio r, in [0, 1]: the fraction of the optimizer steps
            that train on bags. The first `round(r · steps)` steps are superposition, the others next-token training.
        tst_bag_size (`int`, *optional*, defaults to 6): Tokens per bag, s, at least 1. A superposition step reads s times the
            tokens of an ordinary step with the same FLOPs.
        tst_offset_weighting (`str`, *optional*, defaults to `"uniform"`): Weight of a token in the target bag by its offset
            i = 1 … s: `"uniform"`; `"power_law"`, 1/i; `"fitted_power_law"`, the paper's fit; `"exponential"`, exp(-i);
            `"first_token"`, only i = 1. The paper prefers uniform for s < 8 and a power law for s ≥ 8.
        tst_input_weighting (`str`, *optional*, defaults to `"uniform"`): Weight of a token's embedding in the mean of its bag
            by its offset i = 1 … s: `"uniform"`, the paper's mean; `"linear"`, i; `"exponential"`, exp(i).
        tst_mode (`str`, *optional*, defaults to `"full"`): `"full"` averages the input and predicts the next bag; `"input"`
            averages the input and predicts the first token of the next bag; `"output"` reads single tokens and predicts the
            next s.
        tst_superposition_rows (`str`, *optional*, defaults to `"longer"`): How s blocks of L tokens become rows of bags.
            `"longer"`, as in the paper, joins them into one row of L bags. `"more"` folds each block into its own row of L/s
            bags. Both have the same number of positions per step. With `"more"`, attention costs less, no context is longer
            than a block, and L must be a multiple of s.
        tst_save_at_switch (`bool`, *optional*, defaults to `True`): Save a checkpoint when superposition ends.
        tst_fused_loss (`str`, *optional*, defaults to `"auto"`): Fuse the loss with the language-model head, so that the logits
            of a whole batch are never in memory. `"auto"`: in both phases of a run with superposition, if the model allows it.
            `"on"`: also in plain training, with an error if the model does not allow it. `"off"`: never. Evaluation is fused,
            too, if only the loss is needed.
        tst_document_boundaries (`str`, *optional*, defaults to `"ignore"`): `"respect"` ends bags and their targets where
            documents end, restarts `position_ids` there and keeps attention inside documents, in both phases of training.
            Evaluation does not change. See [`DataCollatorForTokenSuperposition`].
        tst_allow_data_change (`bool`, *optional*, defaults to `False`): Resume even if the data, or a setting that decides its
            order, has changed since the checkpoint.
        mtp_num_heads (`int`, *optional*, defaults to 1): Multi-token prediction: the number n of tokens that each position
            predicts in next-token training, the next token included. The n - 1 extra heads are not saved with the model.
        mtp_kind (`str`, *optional*, defaults to `"parallel"`): `"parallel"` heads beside the last layer (arXiv 2404.19737), or
            `"sequential"` heads after it, each of which reads one more token (DeepSeek-V3, arXiv 2412.19437).
        mtp_loss_weight (`float`, *optional*): Weight of the extra heads' losses: of their sum if parallel, of their mean
            if sequential. Defaults to 0.1 if parallel (1 in arXiv 2404.19737), to 0.3 if sequential.
        mtp_loss_weight_end (`float`, *optional*): Weight in the last step of the run. The weight changes linearly from
            `mtp_loss_weight` in the first next-token step. Defaults to a constant weight.
        tst_nonfinite_loss (`str`, *optional*, defaults to `"stop"`): What to do at a non-finite loss or gradient, in both
            phases and in plain training. `"stop"` the run when it next logs or saves, before a checkpoint is written; the
            message names the step and its blocks. `"skip"` the optimizer step; training then waits for the device once per
            step. `"ignore"` it, as the plain `Trainer` does.
        tst_spikes (`str`, *optional*, defaults to `"ignore"`): What to do at a spike: a finite loss or gradient norm that is
            more than `tst_spike_threshold` standard deviations above the mean of the last `tst_spike_window` steps of its
            phase. `"skip"` the optimizer step and record it in `trainer_state.json`, or `"stop"` the run before this step.
        tst_spike_threshold (`float`, *optional*, defaults to 6.0): In standard deviations.
        tst_spike_window (`int`, *optional*, defaults to 128): In optimizer steps. No step counts as a spike before half of them
            are done.
        tst_peak_tflops (`float`, *optional*): Dense peak of one device in TFLOP/s (10¹² FLOPs per second), in the precision of
            training. `tst_model_flops_utilization` is relative to it. Defaults to the bfloat16 peak of the device, if known.

    `enable_jit_checkpoint` works: at SIGTERM the step is finished, a checkpoint is written, and `train` returns with
    `trainer.preempted` set. A pickled copy, such as `training_args.bin`, does not contain `hub_token`.

    Raises:
        TSTError: If a field is out of range, or another argument does not work with superposition.

    Source: arXiv 2605.06546; ranges that work: s from 4 to 8, r from 0.2 to 0.4.
    """

    tst_phase_ratio: float = HfArg(
        default=0.3,
        help="Phase ratio r: fraction of the optimizer steps, from 0 to 1, that trains on bags of tokens. 0 disables superposition.",
    )
    tst_bag_size: int = HfArg(
        default=6,
        help="Bag size s (tokens per bag): a superposition step reads s times the tokens. 1 disables superposition.",
    )
    tst_offset_weighting: OffsetWeighting = HfArg(
        default="uniform",
        help="Weight of a token in the target bag by its offset i: uniform, power_law (1/i), fitted_power_law "
        "(the paper's fit), exponential (exp(-i)) or first_token. For s of 8 or more, prefer a power law.",
    )
    tst_input_weighting: InputWeighting = HfArg(
        default="uniform",
        help="Weight of a token's embedding in the mean of its bag by its offset i: uniform (the paper's mean), linear (i) "
        "or exponential (exp(i)), where the last token weighs most.",
    )
    tst_mode: TSTMode = HfArg(
        default="full",
        help="What is superposed: full (average the input, predict the next bag), input (average the input, "
        "predict the first token of the next bag) or output (read tokens, predict the next s).",
    )
    tst_superposition_rows: SuperpositionRows = HfArg(
        default="longer",
        help="How s blocks become rows of bags: longer (joined into one row of L bags, as in the paper) or more (each block becomes a row of "
        "L/s bags, so attention costs less).",
    )
    tst_save_at_switch: bool = HfArg(
        default=True, help="Save a checkpoint when superposition ends, whatever save_strategy says."
    )
    tst_fused_loss: FusedLoss = HfArg(
        default="auto",
        help="Fuse loss and head, so that the logits of a batch are never computed: auto (in runs with superposition, if "
        "the model allows it), on (also in plain training; an error if the model does not allow it), off.",
    )
    tst_document_boundaries: DocumentBoundaries = HfArg(
        default="ignore",
        help="respect: bags, targets, positions and attention stay inside documents; ignore: they cross document boundaries.",
    )
    tst_allow_data_change: bool = HfArg(
        default=False,
        help="Resume although the data or its order has changed, and accept that data is read twice or never.",
    )
    mtp_num_heads: int = HfArg(
        default=1,
        help="Multi-token prediction: number of tokens that each position predicts in next-token training, the next one "
        "included. The extra heads are not saved with the model. 1 disables it.",
    )
    mtp_kind: MTPKind = HfArg(
        default="parallel",
        help="Extra heads: parallel (beside the last layer) or sequential (after it, as in DeepSeek-V3).",
    )
    mtp_loss_weight: float | None = HfArg(
        default=None,
        help="Weight of the extra heads' losses: of their sum if parallel (default 0.1), of their mean if sequential (0.3).",
    )
    mtp_loss_weight_end: float | None = HfArg(
        default=None,
        help="Weight in the last step. It changes linearly from mtp_loss_weight in the first next-token step. Constant by default.",
    )
    tst_nonfinite_loss: NonFiniteLoss = HfArg(
        default="stop",
        help="At a non-finite loss or gradient: stop (the message names the step and its blocks), skip the optimizer step or ignore.",
    )
    tst_spikes: Spikes = HfArg(
        default="ignore",
        help="At a loss or gradient norm far above its running level: ignore, skip the optimizer step (and record it) or stop.",
    )
    tst_spike_threshold: float = HfArg(
        default=6.0,
        help="A loss or gradient norm this many standard deviations above the mean of the window is a spike.",
    )
    tst_spike_window: int = HfArg(
        default=128,
        help="Optimizer steps that the running level covers. No step counts as a spike before half of them are done.",
    )
    tst_peak_tflops: float | None = HfArg(
        default=None,
        help="Peak of one device in TFLOP/s, for tst_model_flops_utilization; by default its bfloat16 peak, if known.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to, and PyTorch would warn
        self.check()
        self.__dict__.update(_has_trainer=False)

    def check(self) -> None:
        """Raise `TSTError` if a field is out of range, or another argument does not work with superposition."""
        for lowest, names in LOWEST.items():
            check_at_least(lowest, **{name: getattr(self, name) for name in names})
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TSTError(f"{name} must be from 0 to below 1, but is {getattr(self, name)}.")
        self._check_schedule()
        self._check_trackers()
        check_phase_ratio(self.tst_phase_ratio, "tst_phase_ratio")
        check_bag_size(self.tst_bag_size, "tst_bag_size")
        for name, hint in get_type_hints(TSTArguments).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), hint)
        resolve_weighting(self.tst_mode, self.tst_offset_weighting, self.tst_input_weighting, "tst_")
        check_mtp(self.mtp_num_heads, self.mtp_kind, prefix="mtp_")
        for name in ("mtp_loss_weight", "mtp_loss_weight_end"):
            check_loss_weight(name, getattr(self, name))
        check_at_least(2, tst_spike_window=self.tst_spike_window)
        if not self.tst_spike_threshold > 0:
            raise TSTError(f"tst_spike_threshold must be more than 0, but is {self.tst_spike_threshold}.")
        if self.tst_peak_tflops is not None and not self.tst_peak_tflops > 0:
            raise TSTError(f"tst_peak_tflops must be more than 0, but is {self.tst_peak_tflops}.")
        if self.tst_enabled:
            self._check_superposition()
        elif self.tst_document_boundaries == "respect":
            raise TSTError(
                f"tst_document_boundaries='respect' needs superposition, but tst_phase_ratio={self.tst_phase_ratio} and "
                f"tst_bag_size={self.tst_bag_size} switch it off: leave it at 'ignore', and for plain training pass "
                "data_collator=DataCollatorForTokenSuperposition(1, document_boundaries='respect')."
            )
        if self.tst_replaces_loss:
            self._check_loss()

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into training_args.bin, beside the model, and pushes it.
        return {name: value for name, value in vars(self).items() if name != "_has_trainer"} | {
            "hub_token": None
        }

    def __copy__(self) -> TSTArguments:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> TSTArguments:
        other = copy.copy(self)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @property
    def tst_enabled(self) -> bool:
        """Whether any superposition is asked for: r > 0 and s > 1."""
        return superposes(self.tst_phase_ratio, self.tst_bag_size)

    @property
    def tst_replaces_loss(self) -> bool:
        """Whether training replaces the model's own loss function, by a superposed loss, a fused loss, or both."""
        return self.tst_enabled or self.tst_fused_loss == "on"

    def note_trainer(self) -> None:
        """Note that a [`TSTTrainer`] has these arguments, so that they do not warn of another one."""
        self.__dict__.update(_has_trainer=True)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The steps of warm-up. Every `Trainer` asks for them when training begins, so a warning is logged if none is a [`TSTTrainer`]."""
        if self.tst_enabled and not vars(self).get("_has_trainer", True):
            logger.warning(
                f"tst_phase_ratio={self.tst_phase_ratio:g} asks for superposition, but no TSTTrainer was made with these arguments: Trainer "
                "ignores tst_ options and trains on single tokens. Use TSTTrainer, or set tst_phase_ratio=0."
            )
        return int(super().get_warmup_steps(num_training_steps))

    def schedule_options(self, steps: int) -> dict[str, Any] | None:
        """`lr_scheduler_kwargs` of a run of `steps` optimizer steps.

        If they do not set the lengths of its stages, `warmup_stable_decay` decays over the last tenth of the steps, as in the paper.
        """
        options = self.lr_scheduler_kwargs or {}
        is_wsd = SchedulerType(self.lr_scheduler_type) == SchedulerType.WARMUP_STABLE_DECAY
        if not is_wsd or options.keys() & {"num_decay_steps", "num_stable_steps"}:
            return self.lr_scheduler_kwargs
        return {
            **options,
            "num_decay_steps": min(math.ceil(steps / 10), steps - self.get_warmup_steps(steps)),
        }

    def _check_schedule(self) -> None:
        kind = SchedulerType(self.lr_scheduler_type)
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        for name in self.lr_scheduler_kwargs or {}:
            if name not in known and not takes_any:
                raise TSTError(
                    f"lr_scheduler_kwargs: the schedule {kind.value} has no option {name!r}, only {', '.join(known)}."
                )
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        what = f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} do not fit the schedule {kind.value}: "
        with bad_input(what, (TypeError, ValueError)):
            get_scheduler(kind, optimizer, 0, 10, self.schedule_options(10))

    def _check_trackers(self) -> None:
        # report_to=None is allowed, but Trainer turns it into [None] and then finds no tracker of this name.
        names = [name for name in self.report_to or () if name is not None]
        self.__dict__.update(report_to=names)
        for name in names:
            check_choice("report_to", name, integration_utils.INTEGRATION_TO_CALLBACK)
            is_available = getattr(integration_utils, f"is_{name.split('_')[0]}_available", None)
            if is_available is not None and not is_available():
                raise TSTError(f"report_to={name} needs the package {name}: install it, or leave {name} out.")

    def _check_superposition(self) -> None:
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise TSTError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs} give no step to train: set "
                "max_steps to the number of optimizer steps, or leave it out and set num_train_epochs above 0."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise TSTError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} sorts rows by length, but superposition needs "
                "blocks of equal length in their order: use 'random' or 'sequential'."
            )
        if (kind := SchedulerType(self.lr_scheduler_type).value) in FOLLOW_METRIC:
            logger.warning(
                f"lr_scheduler_type={kind} lowers the learning rate when evaluation does not improve, but next-token evaluation hardly "
                "improves in superposition: take another schedule, or give it a patience that lasts until the switch."
            )
        if self.tst_superposition_rows == "more" and self.tst_mode == "output":
            raise TSTError(
                "tst_superposition_rows='more' folds blocks into bags, but tst_mode='output' reads single tokens: leave one of them out."
            )

    def _check_loss(self) -> None:
        if self.label_smoothing_factor:
            raise TSTError(
                f"label_smoothing_factor={self.label_smoothing_factor} does not work with bags or the fused loss: set it to 0."
            )
        liger = self.liger_kernel_config or {}
        if self.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
            raise TSTError(
                "use_liger_kernel replaces the loss of superposition and the fused loss: set "
                'liger_kernel_config={"fused_linear_cross_entropy": False} or use_liger_kernel=False.'
            )


@dataclass
class TSTTrainingArguments(TSTArguments, TrainingArguments):
    """Arguments of [`TSTTrainer`]: those of [`~transformers.TrainingArguments`] and of [`TSTArguments`]."""
