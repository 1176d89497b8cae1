"""What a subclass of the trainer brings of its own to a run with superposition: its loader is folded, its batches are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import TSTError, whole_message
from ..models.head import replaced
from ..models.superposition import find_language_model
from .overriding import is_superposed, overrides
from .run_data import fold_own_loader


class OwnMethods:
    """Watches the methods of a subclass in a run with superposition.

    Args:
        trainer (`TSTTrainer`): The trainer.
        base: The class `TSTTrainer`, whose methods need not be watched.
    """

    def __init__(self, trainer: Any, base: type) -> None:
        self._trainer, self._base = trainer, base
        self.start()

    def start(self, loader: Any = None) -> None:
        """Forget the run before; `loader` is what the trainer itself has made of the rows or batches of this one."""
        self._loader = loader
        self._has_trained_bags = False  # by a subclass's own compute_loss or training_step
        self._counted: tuple[int, Any] = (-1, None)

    def note_count(self, count: Any) -> None:
        """Note the number of targets that the trainer has counted for the step that begins."""
        self._counted = self._trainer.state.global_step, count

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which what a subclass gives to a run with superposition is folded, and checked."""
        trainer, base = self._trainer, self._base
        own = {"training_step": partial(self._train_on_batch, trainer.training_step)}
        if overrides(trainer, base.get_train_dataloader):  # type: ignore[attr-defined]
            own["get_train_dataloader"] = partial(self._fold_loader, trainer.get_train_dataloader)
        with ExitStack() as stack:
            for name, method in own.items() if trainer.args.tst_enabled else ():
                stack.enter_context(replaced(vars(trainer), name, method))
            yield

    def _fold_loader(self, make_own: Callable[[], Any]) -> Any:
        """What `get_train_dataloader` of a subclass gives, folded unless it is the loader of our rows, or made around it."""
        trainer = self._trainer
        trainer._data = trainer.schedule = None
        loader = make_own()
        is_another = isinstance(loader, DataLoader) and loader is not self._loader
        if trainer._data is None or is_another:
            return trainer._begin(fold_own_loader(trainer, loader))
        return loader

    def _train_on_batch(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], num_items: Any = None
    ) -> Tensor:
        """`training_step`, a subclass's own or ours, on a batch that is one of the phase."""
        trainer, base = self._trainer, self._base
        check_batch(trainer, inputs, num_items, *self._counted)
        own = any(overrides(trainer, getattr(base, name)) for name in ("compute_loss", "training_step"))
        first = own and is_superposed(inputs) and not self._has_trained_bags
        with explained_bags(type(trainer).__name__, model, inputs) if first else nullcontext():
            loss = step(model, inputs, num_items)
        self._has_trained_bags |= first
        return loss


def check_batch(trainer: Any, batch: Any, given: Any, step: int, count: Any) -> None:
    """Check that a batch, which a subclass's own methods may have made, is what the phase trains on.

    Args:
        trainer (`TSTTrainer`): The trainer.
        batch: The batch that training gets.
        given: Its number of targets, as training gets it.
        step (`int`): The optimizer step for which the trainer has counted targets last.
        count: How many it has counted.

    Raises:
        TSTError: If it is not of the phase, or its targets were not counted, or counted in another way.
    """
    name, now = type(trainer).__name__, trainer.state.global_step
    if step != now:
        raise TSTError(
            f"{name}.get_batch_samples does not call super().get_batch_samples, which counts the targets of bags: let it take the "
            "batches and their number of targets from there."
        )
    superposed = is_superposed(batch)
    phase = trainer.schedule.phase(now)
    if superposed != (phase == "superposition"):
        raise TSTError(
            f"Optimizer step {now} is {phase}, but its batch holds {'bags' if superposed else 'single tokens'}: let "
            f"get_train_dataloader of {name} return what super().get_train_dataloader() gives, or a loader of its own over other data."
        )
    is_counted = given is None or given is count or (count is not None and float(given) == float(count))
    if superposed and not is_counted:
        raise TSTError(
            f"{name} hands num_items_in_batch={float(given):g} to training_step, but the step has {float(count or 0):g} targets, since a "
            "bag is one: hand on what super().get_batch_samples gives."
        )


@contextmanager
def explained_bags(name: str, model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Context in which the `compute_loss` or `training_step` of a trainer's subclass `name` meets its first batch of bags.

    Raises:
        TSTError: If it fails, but for want of memory, or never gives the model ids of as many dimensions as the batch has.
    """
    dimensions = set()

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
        shapes = ", ".join(f"{key} {tuple(batch[key].shape)}" for key in ("input_ids", "labels"))
        raise TSTError(
            f"{name}'s own loss fails on a batch of superposition ({shapes}; the last dimension is that of bags): "
            f"{whole_message(error)}. Call another model, such as a teacher, inside of token_superposition(teacher, bag_size), and "
            "leave out what needs single tokens where labels have three dimensions."
        ) from error
    if (expected := batch["input_ids"].dim()) not in dimensions:
        raise TSTError(
            f"{name} does not give the model the input_ids of its batch, of shape {tuple(batch['input_ids'].shape)}, but others: hand "
            f"them on with their {expected} dimensions, in which the last is that of bags."
        )
