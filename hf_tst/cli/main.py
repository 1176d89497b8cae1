"""The console command `hf-tst`. A subcommand's module is imported when it runs, so that `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from ..errors import RunError, TSTError, check_names
from ..version import __version__

# Values of Trainer's own flag `--debug`; without one of them, `--debug` asks for a traceback.
TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
DESCRIPTION = """Token Superposition Training for Hugging Face models.

commands:
  train    pre-train a model from a recipe or from flags; without arguments,
           run the quick start (a few minutes)
  plan     estimate a run before it starts: steps, tokens, GPU-hours, memory;
           and those of its baselines
  compare  train a baseline, TST and other arms with an equal budget, for
           several seeds and learning rates, and write a report
  sweep    train a grid of bag sizes, phase ratios, weightings and modes, and
           draw the losses as a heat map
  card     rewrite the model card of a finished run
  recipes  list the recipes of the package with their parameters, tokens and
           GPU-hours
  env      print versions and devices, for bug reports
"""
EXAMPLES = """examples:
  hf-tst train                               the quick start, in runs/quickstart
  hf-tst train recipe.yaml --max_steps 1000  a recipe; flags override it
  hf-tst train 30m-laptop-tst --dry_run      check everything, train nothing
  hf-tst plan recipe.yaml --gpu h100 --num_gpus 8
  hf-tst compare recipe.yaml --budget data
  hf-tst sweep recipe.yaml --bag_sizes 2,4,6
  hf-tst card runs/quickstart --license apache-2.0
  accelerate launch --num_processes 8 -m hf_tst train recipe.yaml

`hf-tst COMMAND --help` lists the flags of a command. If a command fails, the
last line on stderr says why; --debug also shows the traceback.

Exit status:
  0    done
  1    the run was stopped, for example by a full disk
  2    bad input, or refused by the Hub
  130  interrupted
  143  terminated (SIGTERM, with enable_jit_checkpoint), after a checkpoint
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-tst` with `argv`, by default `sys.argv`, and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-tst",
        usage="hf-tst [-h] [--version] {" + ",".join(COMMANDS) + "} ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-tst {__version__}")
    parser.add_argument("command", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0] == "--debug":
        arguments = [*arguments[1:], "--debug"]
    command = parser.parse_args(arguments[:1]).command
    try:
        check_names(
            [command], COMMANDS, "There is no command", otherwise=f"choose from {', '.join(COMMANDS)}."
        )
    except TSTError as error:
        print(f"hf-tst: {error}", file=sys.stderr)
        return 2
    return run_command(f"hf-tst {command}", COMMANDS[command], arguments[1:])


def run_command(name: str, command: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """Run `command` with `arguments` and return its exit status. If it fails, print one sentence on stderr.

    With `--debug` among the arguments, the traceback is printed before the sentence.

    Args:
        name (`str`): Start of the sentence.
        command: Takes the arguments, without `--debug`.
        arguments: The words of the command line.

    Returns:
        `int`: 0 done, 1 stopped by a [`RunError`], 2 bad input or refused by the Hub, 130 interrupted, 143 terminated by
        SIGTERM. Other errors are bugs, and are raised with their traceback.
    """
    pairs = zip(arguments, [*arguments, ""][1:], strict=True)
    words = [word for word, following in pairs if word != "--debug" or following in TRAINER_DEBUG]
    try:
        command(words)
    except (TSTError, RunError) as error:
        if len(words) < len(arguments):
            traceback.print_exc()
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, RunError) else 2
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
    except KeyboardInterrupt as interrupt:
        print(": ".join([name, "interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0


def _run(command: str, module: str, argv: list[str], function: str = "main") -> None:
    from ..pretraining.first_look import announce

    # Threads of torch that wait for each other leave their cores to others. Beside another busy process, a training step on the CPU
    # is four times as fast then. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    announce(command, argv)
    getattr(import_module(f"hf_tst.{module}"), function)(argv, prog=f"hf-tst {command}")


# The function that runs each command, by its module.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": partial(_run, "train", "cli.train"),
    "plan": partial(_run, "plan", "cli.plan"),
    "compare": partial(_run, "compare", "experiments.compare"),
    "sweep": partial(_run, "sweep", "experiments.compare", function="sweep"),
    "card": partial(_run, "card", "cli.card"),
    "recipes": partial(_run, "recipes", "cli.recipes"),
    "env": partial(_run, "env", "cli.env"),
}


if __name__ == "__main__":
    sys.exit(main())
