"""Methods that a subclass of the trainer overrides, in a run with superposition: fold its loader, check its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..bags.collator import holds_bags
from ..errors import TSTError, whole_message
from ..models.shape import embedding_size
from ..models.superposition import find_language_model
from ..models.temporary import replaced
from .overriding import overrides
from .train_dataloader import fold_own_loader

logger = logging.get_logger(__name__)


class SubclassMethods:
    """Folds the loader and checks the batches of a subclass that has its own, in a run with superposition.

    Args:
        trainer (`TSTTrainer`): The trainer.
        base: The class `TSTTrainer`.
    """

    def __init__(self, trainer: Any, base: type) -> None:
        self._trainer, self._base = trainer, base
        self._has_own_step = False  # set when training begins
        self.clear()

    def clear(self) -> None:
        """Forget the batches of an earlier run."""
        self._has_trained_bags = False  # with a subclass's compute_loss or training_step
        self._has_checked_loss = False
        self._counted_step, self._count = -1, None

    def note_count(self, count: Any) -> None:
        """Store the number of targets that the trainer has counted for the coming step."""
        self._counted_step, self._count = self._trainer.state.global_step, count

    def check_logged_loss(self, loss: float) -> None:
        """Warn once if a subclass's loss of bags is far above that of a uniform guess: its scale is then probably wrong."""
        if not self._has_trained_bags or self._has_checked_loss:
            return
        self._has_checked_loss = True
        size = embedding_size(self._trainer.model)
        if size is not None and loss > 2 * (guess := math.log(size)):
            logger.warning(
                f"{type(self._trainer).__name__}'s own loss is {loss:.1f} in superposition, above the {guess:.1f} of a random guess. If it weights "
                "micro-batches by their targets, count bags, not tokens: hf_tst.count_target_bags(labels)."
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which the loader of a subclass is folded and its batches are checked."""
        trainer, base = self._trainer, self._base
        methods = ("compute_loss", "training_step", "_prepare_inputs")
        self._has_own_step = any(overrides(trainer, base, name) for name in methods)
        own = {"training_step": partial(self._train_on_batch, trainer.training_step)}
        if overrides(trainer, base, "get_train_dataloader"):
            own["get_train_dataloader"] = partial(self._fold_loader, trainer.get_train_dataloader)
        with replaced(vars(trainer), **own):
            yield

    def _fold_loader(self, make_own: Callable[[], Any]) -> Any:
        """The loader of a subclass, folded unless it is the trainer's own loader or a wrapper of it."""
        trainer = self._trainer
        trainer._newest_data = None
        loader = make_own()
        if not trainer.args.tst_enabled:
            return loader
        data = trainer._newest_data
        if data is None or (isinstance(loader, DataLoader) and loader is not data.loader):
            return trainer._loader_of(fold_own_loader(trainer, loader))
        return loader

    def _train_on_batch(
        self,
        step: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Run `training_step` on a batch, and store the loss for the checks of `tst_nonfinite_loss` and `tst_spikes`."""
        trainer = self._trainer
        if trainer.args.tst_enabled:
            loss = self._check_and_train(step, model, inputs, num_items_in_batch)
        else:
            loss = step(model, inputs, num_items_in_batch)
        trainer._non_finite.note_loss(loss)
        trainer._spikes.note_loss(loss)
        return loss

    def _check_and_train(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """Check a batch of a run with superposition and run `training_step` on it."""
        trainer = self._trainer
        check_batch(trainer, inputs, num_items_in_batch, self._counted_step, self._count)
        if not holds_bags(inputs):
            return step(model, inputs, num_items_in_batch)
        loss_function = trainer._switch.superposed_loss()  # raises an error if the model has another one
        if not self._has_own_step:
            return step(model, inputs, num_items_in_batch)
        is_first, self._has_trained_bags = not self._has_trained_bags, True
        explained = explained_bags(type(trainer).__name__, model, inputs) if is_first else nullcontext()
        with loss_function.expecting(inputs["labels"]), explained:
            return step(model, inputs, num_items_in_batch)


def check_batch(trainer: Any, batch: Any, given: Any, step: int, count: Any) -> None:
    """Check that a batch, which a subclass may have made, fits the phase, and that its targets are counted correctly.

    Args:
        trainer (`TSTTrainer`): The trainer.
        batch: The batch that `training_step` gets.
        given: `num_items_in_batch`, as `training_step` gets it.
        step (`int`): The optimizer step for which the trainer last counted targets.
        count: The number that it counted.

    Raises:
        TSTError: If the batch is of the other phase, or its targets are not counted or counted differently.
    """
    name, now = type(trainer).__name__, trainer.state.global_step
    if step != now:
        raise TSTError(
            f"{name}.get_batch_samples does not call super().get_batch_samples, which counts the targets of bags: let it call that "
            "method and return its batches and number of targets."
        )
    superposed = holds_bags(batch)
    phase = trainer.schedule.phase(now)
    if superposed != (phase == "superposition"):
        raise TSTError(
            f"Optimizer step {now} is {phase}, but its batch holds {'bags' if superposed else 'single tokens'}: let "
            f"{name}.get_train_dataloader return the loader of super().get_train_dataloader(), or its own loader over other data."
        )
    is_counted = given is None or given is count or (count is not None and float(given) == float(count))
    if superposed and not is_counted:
        raise TSTError(
            f"{name} passes num_items_in_batch={float(given):g} to training_step, but the step has {float(count or 0):g} targets (a bag is "
            "one target): pass on the number from super().get_batch_samples."
        )


@contextmanager
def explained_bags(name: str, model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Context in which the subclass `name` runs its own `compute_loss` or `training_step` on its first batch of bags.

    Raises:
        TSTError: If it fails for another reason than memory, or never passes ids of the batch's dimensions to the model.
    """
    dimensions: set[int | None] = set()
    ids_shape = tuple(batch["input_ids"].shape)  # taken before, since the subclass may change the batch
    shapes = ", ".join(f"{key} {tuple(batch[key].shape)}" for key in ("input_ids", "labels"))

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        dimensions.add(ids.dim() if isinstance(ids, Tensor) else None)

    called, _ = find_language_model(model)
    try:
        with called.register_forward_pre_hook(note, prepend=True, with_kwargs=True):
            yield
    except TSTError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
            raise
        raise TSTError(
            f"{name}'s own loss fails on a batch of bags ({shapes}; the last dimension is the bag's): "
            f"{whole_message(error)}. Take the loss that the model returns, model(**inputs).loss, and skip code that needs single tokens where labels "
            "have three dimensions. If it calls another model, such as a teacher, do so inside token_superposition(teacher, bag_size)."
        ) from error
    if (expected := len(ids_shape)) not in dimensions:
        raise TSTError(
            f"{name} must pass the batch's input_ids, of shape {ids_shape}, to the model unchanged, with all {expected} dimensions: the last "
            "one is the bag's."
        )
