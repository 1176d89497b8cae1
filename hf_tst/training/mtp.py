"""Multi-token prediction in a run of the trainer: when its heads are there, in which checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import TSTError
from ..models.sharding import full_state_dict, left_out_of_optimizer, load_full_state_dict
from ..mtp.heads import MTPHeads, attached_heads
from ..mtp.losses import extra_losses
from .arguments import TSTTrainingArguments
from .fsdp import uses_fsdp1

FILE_NAME = "mtp_heads.safetensors"
# Whether the optimizer of the checkpoint knows the heads: it does from their first step on.
TRAINED = "trained"
NO_HEADS = {"mtp_num_heads": "1"}


class MTPCallback(TrainerCallback):
    """Makes the extra heads of a trainer's model, and keeps them while it trains; does nothing if there are none.

    The heads are made at the start, so that the optimizer knows them, and take part in next-token steps. They begin
    from weights that follow from `seed` alone. In superposition steps the optimizer leaves them as they are.

    Args:
        trainer (`TSTTrainer`): The trainer, with its model, arguments and accelerator.

    Raises:
        TSTError: If the model, or the way it is trained, cannot go with multi-token prediction.
    """

    def __init__(self, trainer: Any) -> None:
        args: TSTTrainingArguments = trainer.args
        self._trainer = trainer
        self._heads: MTPHeads | None = None
        self._reported_step = 0
        self._inside: Any = None  # an ExitStack for the hooks and a ModelEnd while the heads are attached
        self._loaded_untrained = False
        if args.mtp_num_heads > 1:
            _check_trainer(trainer)
            self._heads = MTPHeads(trainer.model, args.mtp_num_heads, args.mtp_kind, seed=args.seed)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which the model has its extra heads; their losses come with the start of training.

        By then the model is wrapped, and their hooks are in front of those of FSDP.
        """
        if self._heads is None:
            yield
            return
        with attached_heads(self._trainer.model, self._heads) as end, ExitStack() as hooks:
            self._inside, self._loaded_untrained = (hooks, end), False
            try:
                yield
            finally:
                self._inside = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._heads is None:
            return
        self._reported_step = state.global_step
        self._heads.take_loss()  # of a run that was broken off
        known = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        if not all(id(p) in known for p in self._heads.parameters()):
            raise TSTError(
                "The optimizer was made before the extra heads of multi-token prediction were there, and would not train "
                "them: give the trainer optimizer_cls_and_kwargs, or let it make the optimizer."
            )
        hooks, end = self._inside
        hooks.close()  # those of a beginning that ran out of memory, after which auto_find_batch_size begins anew
        hooks.enter_context(extra_losses(self._trainer.model, self._heads, end, args.mtp_loss_weight))

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._heads is not None and self._trainer.schedule.phase(state.global_step) == "superposition":
            # The zeros that DDP asks for would make the optimizer decay the heads, and count steps that they did not make.
            for parameter in self._heads.parameters():
                parameter.grad = None

    def count_as(self, micro_batches: int) -> None:
        """Say that the next loss is a mean over one of so many micro-batches, and counts as that part of the step's."""
        if self._heads is not None:
            self._heads.share = 1 / micro_batches

    def report(self) -> dict[str, float]:
        """`mtp_loss`: what the extra heads have added to `loss` since the last report; nothing where they did not train.

        Every rank must take part.
        """
        loss = None if self._heads is None else self._heads.take_loss()
        trainer, args = self._trainer, self._trainer.args
        steps = trainer.state.global_step - self._reported_step
        self._reported_step += steps
        if loss is None or steps < 1:
            return {}
        # Losses are divided by the targets of the step, else each by those of its micro-batch.
        by_step = trainer.model_accepts_loss_kwargs
        summed = by_step and args.average_tokens_across_devices
        total = trainer.accelerator.reduce(loss.float(), "sum" if summed else "mean").item()
        return {"mtp_loss": round(total / steps / (1 if by_step else args.gradient_accumulation_steps), 6)}

    def save(self, folder: str | Path) -> None:
        """Write the extra heads beside the model in a checkpoint. Every rank must take part."""
        if self._heads is None:
            return
        weights = full_state_dict(self._heads) if self._trainer.is_fsdp_enabled else self._heads.state_dict()
        if not self._trainer.args.should_save:
            return
        from safetensors.torch import save_file

        state = self._trainer.optimizer.state
        trained = any(parameter in state for parameter in self._heads.parameters())
        description = self._description() | {TRAINED: str(trained)}
        Path(folder).mkdir(parents=True, exist_ok=True)  # where FSDP writes shards later
        save_file({k: v.contiguous() for k, v in weights.items()}, Path(folder) / FILE_NAME, description)

    def load(self, folder: str | Path) -> None:
        """Read the extra heads of a checkpoint.

        Raises:
            TSTError: If the checkpoint has other heads than this run, or only one of the two has any.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = Path(folder) / FILE_NAME
        found = dict(NO_HEADS)
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                found = file.metadata()
        self._loaded_untrained = found.pop(TRAINED, None) == "False"
        wanted = self._description()
        if found != wanted:
            before, now = (", ".join(f"{k}={v}" for k, v in sorted(x.items())) for x in (found, wanted))
            raise TSTError(
                f"{folder} was trained with {before}, but this run has {now}: set mtp_num_heads and mtp_kind to what they were."
            )
        if self._heads is not None:
            load = (
                load_full_state_dict if self._trainer.is_fsdp_enabled else type(self._heads).load_state_dict
            )
            load(self._heads, load_file(path))

    @contextmanager
    def loading_optimizer(self) -> Iterator[None]:
        """Context in which the optimizer's state is read, after [`load`]: shards from superposition have none of the heads."""
        if self._heads is None or not (self._loaded_untrained and self._trainer.is_fsdp_enabled):
            yield
            return
        with left_out_of_optimizer(self._trainer.optimizer, self._heads.parameters()):
            yield

    def _description(self) -> dict[str, str]:
        """What a file of the heads says of them."""
        if self._heads is None:
            return NO_HEADS
        return {"mtp_kind": self._heads.kind, "mtp_num_heads": str(self._heads.num_heads)}


def _check_trainer(trainer: Any) -> None:
    """Raise `TSTError` for what multi-token prediction does not work with, or has not been tried with."""
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    parallelism = getattr(accelerator, "parallelism_config", None)
    split = [name for name in ("cp", "sp", "tp") if (getattr(parallelism, f"{name}_size", 1) or 1) > 1]
    fsdp = accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    reasons = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP1 (FSDP2 is fsdp_version: 2)": uses_fsdp1(trainer),
        "fsdp_cpu_ram_efficient_loading": fsdp is not None and bool(fsdp.cpu_ram_efficient_loading),
        "torch_compile": args.torch_compile,
        "nn.DataParallel (start one process a GPU with `accelerate launch`)": args.n_gpu > 1,
        "context, sequence or tensor parallelism": bool(split),
        "PEFT": isinstance(model, nn.Module) and hasattr(model, "peft_config"),
        "model_init": trainer.model_init is not None,
        "label_smoothing_factor": bool(args.label_smoothing_factor),
        "compute_loss_func": trainer.compute_loss_func is not None,
    }
    if refused := [name for name, given in reasons.items() if given]:
        raise TSTError(
            f"mtp_num_heads={args.mtp_num_heads} does not go with {', '.join(refused)}: leave it out, or set "
            "mtp_num_heads=1."
        )
