"""What a [`TSTTrainer`] refuses or warns of before the first step, apart from the values of single arguments."""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DynamoBackend
from torch import nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..errors import TSTError, bad_input, whole_message
from ..models.fused import TSTLoss, check_fusable, is_next_token_loss
from ..models.head import computes_own_loss
from ..models.shape import embedding_size
from ..models.superposition import find_language_model
from .arguments import TSTArguments

logger = logging.get_logger(__name__)


def check_arguments(args: Any) -> None:
    """Raise `TSTError` if `args` is no [`TSTArguments`] or has contradictory values."""
    if not isinstance(args, TSTArguments):
        raise TSTError(
            f"TSTTrainer needs TSTTrainingArguments, but got {type(args).__name__}: make the arguments with that class, or "
            f"let your class inherit hf_tst.TSTArguments."
        )
    args.check()


def check_optimizer(args: TSTArguments, model: Any) -> None:
    """Raise `TSTError` if the optimizer cannot be made, for example because its package is missing."""
    with bad_input(f"optim={args.optim.value} cannot be used: ", (ImportError, ValueError), whole_message):
        Trainer.get_optimizer_cls_and_kwargs(args, model)


def check_model(args: TSTArguments, model: Any) -> None:
    """Raise `TSTError` if a model does not work with the loss that the arguments select."""
    if args.tst_replaces_loss:
        _, core = find_language_model(model)
        check_fusable(core, args.tst_fused_loss)
        if args.tst_enabled:
            own = core.loss_function
            if isinstance(own, TSTLoss):
                raise TSTError(
                    "The model was made or copied inside token_superposition or fused_next_token_loss, as in training: leave that context "
                    "before you make the trainer, or load the state_dict of the copy into a new model."
                )
            if not is_next_token_loss(own):
                raise TSTError(
                    f"The model's loss_function is not Transformers' next-token loss, but was set to "
                    f"{getattr(own, '__name__', type(own).__name__)} or replaced in part, which superposition would drop: leave that out, or "
                    "set tst_phase_ratio=0."
                )
            computes_own_loss(core)  # or its refusal


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Raise `TSTError` if a tokenizer has ids without an embedding. The padding token may be one: packed text does not have it."""
    size = embedding_size(model)
    highest = max((i for i in tokenizer.get_vocab().values() if i != tokenizer.pad_token_id), default=0)
    if size is not None and highest >= size:
        raise TSTError(
            f"The tokenizer has ids up to {highest}, but the model has embeddings for 0 to {size - 1}: use the model's own tokenizer, "
            f"or add rows with model.resize_token_embeddings({highest + 1}) and save the model."
        )


def check_trainer(trainer: Any) -> None:
    """Raise `TSTError` if a trainer's model, loss or processes do not work with its arguments."""
    args = trainer.args
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        check_optimizer(args, trainer.model)
    _warn_of_missing_fsdp(trainer)
    if args.tst_spikes != "ignore" and (args.fp16 or trainer.is_deepspeed_enabled):
        raise TSTError(
            f"tst_spikes={args.tst_spikes!r} needs the gradients, but fp16 scales them and DeepSpeed hides them: use bf16 "
            "without DeepSpeed, or leave tst_spikes at 'ignore'."
        )
    if args.mtp_num_heads > 1:
        _check_multi_token_prediction(trainer)
    if not args.tst_replaces_loss:
        return
    if args.n_gpu > 1:  # Trainer has set it to 1 for a model that is spread over them
        raise TSTError(
            f"This process sees {args.n_gpu} GPUs and would train with nn.DataParallel, which superposition and the fused "
            "loss do not support: start one process per GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
        )
    if isinstance(trainer.model, nn.DataParallel):
        raise TSTError(
            "The model is wrapped in nn.DataParallel, which superposition and the fused loss do not support: pass the model itself, and start "
            "one process per GPU with `accelerate launch`."
        )
    if getattr(trainer.accelerator, "mixed_precision", "no") == "fp8":
        raise TSTError(
            "mixed_precision='fp8' replaces linear layers and has not been tested with superposition and the fused loss: use bf16."
        )
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    compiles = getattr(plugin, "backend", DynamoBackend.NO) != DynamoBackend.NO
    if compiles and getattr(plugin, "use_regional_compilation", False):
        raise TSTError(
            "Accelerate's regional compilation trains a copy of the model, which lacks superposition and the fused loss: set "
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=false, and use torch_compile=True."
        )
    if _uses_fsdp1(trainer):
        raise TSTError(
            "FSDP1 flattens the weights that superposition and the fused loss need: set fsdp_version: 2 in the "
            "configuration of accelerate, as in hf_tst/pretraining/accelerate/fsdp2.yaml."
        )
    check_loss(trainer)
    if not args.tst_enabled:
        return
    if (tensor := _parallel_sizes(trainer)["tensor"]) > 1:
        logger.warning(
            f"Tensor parallelism (size {tensor}) has not been tested with superposition: compare its first losses with those of one process."
        )
    for kind, size in _parallel_sizes(trainer).items():
        if kind != "tensor" and size > 1:
            raise TSTError(
                f"{kind.capitalize()} parallelism (size {size}) splits rows of bags: set its size to 1."
            )
    if getattr(args.accelerator_config, "split_batches", False):
        raise TSTError(
            "accelerator_config's split_batches=True would split the rows of a step: leave it at False."
        )


def check_loss(trainer: Any) -> None:
    """Raise `TSTError` if a loss was set, or a model chosen, that superposition or the fused loss would replace."""
    check_model(trainer.args, trainer.model)
    if trainer.args.tst_replaces_loss and trainer.compute_loss_func is not None:
        raise TSTError(
            "compute_loss_func would replace the loss of superposition and the fused loss: leave it out, or set "
            "tst_phase_ratio=0 and tst_fused_loss='auto'."
        )


def warn_of_another_run(trainer: Any) -> None:
    """Warn if a trainer that has trained begins with superposition again."""
    if trainer.state.global_step and trainer.model_init is None and trainer.args.tst_enabled:
        logger.warning(
            "train is called again, so a model that was trained on next tokens begins with superposition again: for a later stage of plain "
            "training, make a trainer with tst_phase_ratio=0."
        )


def warn_of_early_stopping(trainer: Any) -> None:
    """Warn if early stopping may end a run before the switch."""
    patiences = [
        callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    ]
    by_steps, switch_step = trainer.args.eval_strategy == IntervalStrategy.STEPS, trainer.schedule.switch_step
    if patiences and not (by_steps and min(patiences) * trainer.state.eval_steps > switch_step):
        logger.warning(
            f"EarlyStoppingCallback(early_stopping_patience={min(patiences)}) may end the run in superposition (until step {switch_step}), "
            "where next-token evaluation hardly improves: give it a patience that lasts until the switch."
        )


def _check_multi_token_prediction(trainer: Any) -> None:
    """Raise `TSTError` for what does not work, or has not been tested, with multi-token prediction."""
    args = trainer.args
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    reasons = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1 (FSDP2 is fsdp_version: 2)": _uses_fsdp1(trainer),
        "fsdp_cpu_ram_efficient_loading": fsdp is not None and bool(fsdp.cpu_ram_efficient_loading),
        "torch_compile": args.torch_compile,
        "nn.DataParallel (start one process per GPU with `accelerate launch`)": args.n_gpu > 1,
        "context, sequence or tensor parallelism": max(_parallel_sizes(trainer).values()) > 1,
        "PEFT": isinstance(trainer.model, nn.Module) and hasattr(trainer.model, "peft_config"),
        "model_init": trainer.model_init is not None,
        "label_smoothing_factor": bool(args.label_smoothing_factor),
        "compute_loss_func": trainer.compute_loss_func is not None,
    }
    if refused := [name for name, given in reasons.items() if given]:
        raise TSTError(
            f"mtp_num_heads={args.mtp_num_heads} does not work with {', '.join(refused)}: leave it out, or set "
            "mtp_num_heads=1."
        )


def _parallel_sizes(trainer: Any) -> dict[str, int]:
    """The number of processes that share one row, by kind of parallelism."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    kinds = {"context": "cp_size", "sequence": "sp_size", "tensor": "tp_size"}
    return {kind: getattr(config, name, 1) or 1 for kind, name in kinds.items()}


def _uses_fsdp1(trainer: Any) -> bool:
    """Whether a trainer uses FSDP1, which flattens weights."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and getattr(plugin, "fsdp_version", 1) != 2


def _warn_of_missing_fsdp(trainer: Any) -> None:
    """Warn if FSDP is requested, by the arguments or by `accelerate launch`, but not used.

    On CPU, accelerate silently falls back to DDP.
    """
    asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    accelerator = trainer.accelerator
    if asked and not trainer.is_fsdp_enabled and accelerator.is_main_process:
        logger.warning(
            f"fsdp is set, but accelerate runs {accelerator.distributed_type.value} on {accelerator.device.type}: "
            "nothing is sharded, and every process holds the whole model. FSDP needs GPUs or other accelerators, and "
            "`accelerate launch` or `torchrun`."
        )
