"""Multi-token prediction in the trainer: attaching the extra heads, their loss weight, and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ...errors import TSTError
from ...models.sharding import full_state_dict, left_out_of_optimizer, load_full_state_dict
from ...mtp.heads import MTPHeads, attached_heads
from ...mtp.losses import LOSS_WEIGHTS, extra_losses
from ..arguments import TSTArguments

FILE_NAME = "mtp_heads.safetensors"
# Whether the optimizer of the checkpoint has states for the heads: it has them from the first next-token step on.
TRAINED = "trained"


class MTPCallback(TrainerCallback):
    """Makes the extra heads of a trainer's model, trains them in next-token steps, and saves and loads them.

    The heads are made at the start, so that the optimizer has their parameters. Their first weights depend on `seed` alone.
    Superposition steps do not change them.

    Args:
        trainer (`TSTTrainer`): The trainer, with its model, arguments and accelerator.

    Raises:
        TSTError: If the model cannot have extra heads.
    """

    def __init__(self, trainer: Any) -> None:
        args: TSTArguments = trainer.args
        self._trainer = trainer
        self.heads = MTPHeads(trainer.model, args.mtp_num_heads, args.mtp_kind, seed=args.seed)
        self._reported_step = 0
        self._hooks = ExitStack()
        self._loaded_untrained = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which the model has its extra heads.

        Their losses are added when training starts. The model is wrapped then, and their hooks run before those of FSDP.
        """
        self._loaded_untrained = False
        with attached_heads(self._trainer.model, self.heads), self._hooks:
            yield

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._reported_step = state.global_step
        self.heads.take_loss()  # of an interrupted run
        known = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        if not all(id(p) in known for p in self.heads.parameters()):
            raise TSTError(
                "The optimizer was made before the extra heads of multi-token prediction and would not train them: pass "
                "optimizer_cls_and_kwargs to the trainer, or let it make the optimizer."
            )
        self._hooks.close()  # after out-of-memory, auto_find_batch_size starts training again
        self._hooks.enter_context(extra_losses(self._trainer.model, self.heads, self.loss_weight))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._trainer.schedule.phase(state.global_step) == "superposition":
            # DDP needs gradients of zero. With them, the optimizer would apply weight decay and count a step.
            for parameter in self.heads.parameters():
                parameter.grad = None
        elif self._left_out(kwargs["model"]):
            raise TSTError(
                f"mtp_num_heads={args.mtp_num_heads}, but the loss does not include the extra heads: {type(self._trainer).__name__} uses "
                "another loss than the one that the model returns. Set mtp_num_heads=1."
            )

    def _left_out(self, model: Any) -> bool:
        """Whether the model has gradients and the heads have none. After a skipped step nothing has gradients."""
        ours = {id(parameter) for parameter in self.heads.parameters()}
        trained = {id(p) for p in model.parameters() if p.grad is not None}
        return bool(trained) and not trained & ours

    def loss_weight(self, step: int | None = None) -> float:
        """The weight of the extra heads' losses in an optimizer step, by default in the current one.

        It changes linearly from the first next-token step to the last step of the run.
        """
        args, schedule, state = self._trainer.args, self._trainer.schedule, self._trainer.state
        start = LOSS_WEIGHTS[args.mtp_kind] if args.mtp_loss_weight is None else args.mtp_loss_weight
        if args.mtp_loss_weight_end is None:
            return float(start)
        step = state.global_step if step is None else step
        done = (step - schedule.switch_step) / max(1, schedule.max_steps - 1 - schedule.switch_step)
        return float(start + (args.mtp_loss_weight_end - start) * done)

    def report(self) -> dict[str, float]:
        """Log entries: `mtp_loss`, the part of `loss` since the last report that comes from the extra heads, and `mtp_loss_weight`
        of the last step. Empty if the heads did not train.

        Every rank must take part.
        """
        trainer, args, loss = self._trainer, self._trainer.args, self.heads.take_loss()
        steps = trainer.state.global_step - self._reported_step
        self._reported_step += steps
        if loss is None or steps < 1:
            return {}
        # Losses are divided by the targets of the step if the model accepts their number, else by those of the micro-batch.
        by_step = trainer.model_accepts_loss_kwargs
        summed = by_step and args.average_tokens_across_devices
        total = trainer.accelerator.reduce(loss.float(), "sum" if summed else "mean").item()
        added = total / steps / (1 if by_step else args.gradient_accumulation_steps)
        weight = self.loss_weight(trainer.state.global_step - 1)
        return {"mtp_loss": round(added, 6), "mtp_loss_weight": round(weight, 6)}

    def save(self, folder: str | Path) -> None:
        """Write the extra heads into a checkpoint. Every rank must take part."""
        weights = full_state_dict(self.heads) if self._trainer.is_fsdp_enabled else self.heads.state_dict()
        if not self._trainer.args.should_save:
            return
        from safetensors.torch import save_file

        state = self._trainer.optimizer.state
        trained = any(parameter in state for parameter in self.heads.parameters())
        description = _description(self._trainer.args) | {TRAINED: str(trained)}
        Path(folder).mkdir(parents=True, exist_ok=True)  # FSDP makes it later, for its shards
        save_file({k: v.contiguous() for k, v in weights.items()}, Path(folder) / FILE_NAME, description)

    def load(self, folder: str | Path) -> None:
        """Load the extra heads of a checkpoint, after [`check_same_heads`]."""
        from safetensors.torch import load_file

        self._loaded_untrained = _saved_description(folder).get(TRAINED) == "False"
        load = load_full_state_dict if self._trainer.is_fsdp_enabled else MTPHeads.load_state_dict
        load(self.heads, load_file(Path(folder) / FILE_NAME))

    def loading_optimizer(self) -> AbstractContextManager[None]:
        """Context to load the optimizer's state in, after [`load`]. Shards saved in superposition have no states of the heads."""
        if self._loaded_untrained and self._trainer.is_fsdp_enabled:
            return left_out_of_optimizer(self._trainer.optimizer, self.heads.parameters())
        return nullcontext()


def check_same_heads(folder: str | Path, args: TSTArguments) -> None:
    """Raise `TSTError` if the extra heads of a checkpoint are not those of the run."""
    saved = {name: value for name, value in _saved_description(folder).items() if name != TRAINED}
    if saved != (wanted := _description(args)):
        before, now = (", ".join(f"{k}={v}" for k, v in sorted(x.items())) for x in (saved, wanted))
        raise TSTError(
            f"{folder} was trained with {before}, but this run has {now}: set mtp_num_heads and mtp_kind as they were."
        )


@contextmanager
def keeping_heads(args: TSTArguments) -> Iterator[None]:
    """Context in which a trial of `hyperparameter_search` sets arguments.

    Raises:
        TSTError: If it sets one of the extra heads, which the trainer has made already.
    """
    names = [field.name for field in fields(TSTArguments) if field.name.startswith("mtp_")]
    before = {name: getattr(args, name) for name in names}
    yield
    for name, value in before.items():
        if (now := getattr(args, name)) != value:
            raise TSTError(
                f"hyperparameter_search sets {name}={now}, but the trainer has made its extra heads with {value}: search other "
                "arguments, and compare heads with `hf-tst compare`."
            )


def _description(args: TSTArguments) -> dict[str, str]:
    """The metadata of the heads' file."""
    kind = {"mtp_kind": args.mtp_kind} if args.mtp_num_heads > 1 else {}
    return {**kind, "mtp_num_heads": str(args.mtp_num_heads)}


def _saved_description(folder: str | Path) -> dict[str, str]:
    """The metadata of the heads' file in a checkpoint; that of one head if there is no such file."""
    from safetensors import safe_open

    if not (path := Path(folder) / FILE_NAME).is_file():
        return {"mtp_num_heads": "1"}
    with safe_open(path, framework="pt") as file:
        return file.metadata()
