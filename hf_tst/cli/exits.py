"""How a command ends: its exit status, and one sentence on stderr where it fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from ..errors import RunError, TSTError

# Values of Trainer's own flag `--debug`; without one of them, `--debug` asks for a traceback.
TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")


def run_command(name: str, command: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """Run `command` with `arguments` and return its exit status.

    `--debug`, anywhere among the arguments, shows the traceback in front of the sentence.

    Args:
        name (`str`): What the sentence begins with.
        command: Takes the arguments, without `--debug`.
        arguments: What the command line says.

    Returns:
        `int`: 0 done, 1 stopped by a [`RunError`], 2 bad input or refused by the Hub, 130 interrupted, 143 told to end.
        Errors of other kinds are ours, and are raised with their traceback.
    """
    arguments, debug = _take_debug(arguments)
    try:
        command(arguments)
    except (TSTError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, RunError) else 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    following = [*arguments, ""][1:]
    ours = [a == "--debug" and b not in TRAINER_DEBUG for a, b in zip(arguments, following, strict=True)]
    return [a for a, is_ours in zip(arguments, ours, strict=True) if not is_ours], any(ours)
