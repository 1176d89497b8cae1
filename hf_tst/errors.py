"""The exceptions of the package, and errors as one-sentence messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, get_args


class TSTError(ValueError):
    """Bad input: an argument, a file, a data set or a checkpoint that cannot be used. The message says what is wrong and what to do."""

    def __str__(self) -> str:
        # A loader's process hands an error on as the text of its traceback, which ends in the message.
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip()


class RunError(RuntimeError):
    """Stops a run with valid input, for example at a full disk or a non-finite loss.

    The message says what happened, where, and how to continue. `exit_status` is that of the console command.
    """

    exit_status: ClassVar[int] = 1


class PreemptedError(RunError):
    """The process received SIGTERM, and has written a checkpoint to resume from.

    The console command raises it; [`TSTTrainer.train`] returns, with `trainer.preempted` set.
    """

    exit_status: ClassVar[int] = 143  # 128 + SIGTERM, as shells and schedulers expect it


def check_at_least(lowest: float, **values: float | None) -> None:
    """Raise `TSTError` unless each argument in `values` that is not `None` is at least `lowest`."""
    for name, value in values.items():
        if value is not None and not value >= lowest:
            raise TSTError(f"{name} must be at least {lowest}, but is {value}.")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `TSTError` unless the argument `name` is one of `choices`, a collection or a `Literal`."""
    choices = get_args(choices) or choices
    if value not in choices:
        raise TSTError(f"{name} must be one of {', '.join(choices)}, but is {value!r}.")


def check_names(
    names: Iterable[str], known: Collection[str], problem: str, otherwise: str = "see --help."
) -> None:
    """Raise `TSTError` if one of `names` is unknown, and suggest the closest known name."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else otherwise
            raise TSTError(f"{problem} {name!r}: {hint}")


def one_line(error: BaseException) -> str:
    """The message of an error, or of the first error in its chain of causes: its last line, without the full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".:")


def whole_message(error: BaseException) -> str:
    """The message of an error in one line of up to 500 characters, without the full stop."""
    return " ".join(str(error).split())[:500].rstrip(".:") or type(error).__name__


@contextmanager
def bad_input(
    what: str = "",
    kinds: type[Exception] | tuple[type[Exception], ...] = ValueError,
    reason: Callable[[BaseException], str] = one_line,
) -> Iterator[None]:
    """Context that turns a library's error into a [`TSTError`] of one line.

    Args:
        what (`str`): The beginning of the sentence, for example `"Cannot read data.txt: "`.
        kinds (*optional*, defaults to `ValueError`): The class of the error, or several.
        reason (`Callable`, *optional*, defaults to [`one_line`]): The rest of the sentence, from the error.
    """
    try:
        yield
    except TSTError:
        raise
    except kinds as error:
        raise TSTError(f"{what}{reason(error)}.") from error
