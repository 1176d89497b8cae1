"""What a [`TSTTrainer`] refuses before the first step, beyond values of single arguments."""

from __future__ import annotations

from typing import Any

from ..errors import TSTError
from ..models.fused import check_fusable
from ..models.head import check_loss_is_replaceable
from ..models.superposition import find_language_model
from .arguments import TSTTrainingArguments
from .fsdp import uses_fsdp1


def check_arguments(args: Any) -> None:
    """Raise `TSTError` if arguments are not those of this package, or ask for several GPUs in one process."""
    if not isinstance(args, TSTTrainingArguments):
        raise TSTError(
            f"TSTTrainer needs TSTTrainingArguments, but got {type(args).__name__}: change the class name where "
            "the arguments are made."
        )
    if args.tst_replaces_loss and args.n_gpu > 1:
        raise TSTError(
            f"This process sees {args.n_gpu} GPUs and would train with nn.DataParallel, which superposition and the fused "
            "loss do not support: start one process a GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )


def check_trainer(trainer: Any) -> None:
    """Raise `TSTError` if a trainer's model, loss or processes cannot go with what its arguments ask for."""
    if trainer.args.tst_replaces_loss:
        _check_loss(trainer)
    if trainer.args.tst_enabled:
        _check_superposition(trainer)


def _check_loss(trainer: Any) -> None:
    if uses_fsdp1(trainer):
        raise TSTError(
            "FSDP1 flattens the weights that superposition and the fused loss look for: set fsdp_version: 2 in the "
            "configuration of accelerate, as scripts/configs/accelerate/fsdp2.yaml does."
        )
    _, model = find_language_model(trainer.model)
    check_fusable(model, trainer.args.tst_fused_loss)
    if trainer.compute_loss_func is not None:
        raise TSTError(
            "compute_loss_func would replace the loss of superposition and the fused loss: leave it out, or set "
            "tst_phase_ratio=0 and tst_fused_loss='auto'."
        )


def _check_superposition(trainer: Any) -> None:
    check_loss_is_replaceable(find_language_model(trainer.model)[1])
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name, kind in (("Context", "cp"), ("Sequence", "sp")):
        size = getattr(parallel, f"{kind}_size", 1) or 1
        if size > 1:
            raise TSTError(f"{name} parallelism (size {size}) splits rows of bags, which is not supported.")
    if getattr(trainer.args.accelerator_config, "split_batches", False):
        raise TSTError(
            "accelerator_config's split_batches=True would give every process a part of the rows that "
            "superposition counts on: leave it at False."
        )
