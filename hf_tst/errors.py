"""What the package raises, and turning what went wrong into one sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar


class TSTError(ValueError):
    """Bad input: an argument, a file, a data set or a checkpoint that cannot be used. The message is one sentence."""


class RunError(RuntimeError):
    """What stops a run whose input is right, such as a full disk or a loss that is not finite.

    The message says what happened, where, and what to go on from. `exit_status` is that of the console command.
    """

    exit_status: ClassVar[int] = 1


class PreemptedError(RunError):
    """The process was told to end (SIGTERM), and the checkpoint to go on from is written.

    The console command raises it; [`TSTTrainer.train`] returns, with `trainer.preempted` set.
    """

    exit_status: ClassVar[int] = 143  # 128 + SIGTERM, as shells and schedulers expect it


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `TSTError` unless the argument `name` is one of `choices`."""
    if value not in choices:
        raise TSTError(f"{name} must be one of {', '.join(choices)}, but is {value!r}.")


@contextmanager
def bad_input() -> Iterator[None]:
    """Context that turns a library's `ValueError` into a [`TSTError`] of one line."""
    try:
        yield
    except TSTError:
        raise
    except ValueError as error:
        raise TSTError(f"{one_line(error)}.") from error


def one_line(error: BaseException) -> str:
    """What an error says, as the end of a sentence: of the cause it was raised from, if there is one, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".:")
