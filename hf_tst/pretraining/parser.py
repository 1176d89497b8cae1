"""The parser of flags: errors in one sentence, and help in sections. The last section needs `--help_all`."""

from __future__ import annotations

from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import TrainingArguments
from transformers.hf_argparser import HfArgumentParser

from ..errors import TSTError, check_names

# Trainer's own arguments that `--help` shows. `--help_all` shows all.
TRAINER_ARGUMENTS = (
    "output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "bf16", "activation_checkpointing", "seed", "logging_steps", "eval_strategy", "eval_steps",
    "save_strategy", "save_steps", "report_to",
)  # fmt: skip
# What Trainer's own help does not say.
HELP = {"resume_from_checkpoint": "Checkpoint folder to resume from, or last: the newest complete one."}
# More choices than these are not listed.
MOST_CHOICES = 6
LONGEST_DEFAULT = 40


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, shows defaults, and shows one spelling per flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return (
                action.option_strings[0]
                if action.option_strings
                else super()._format_action_invocation(action)
            )
        if action.choices and len(list(action.choices)) <= MOST_CHOICES:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        else:
            value = "NAME" if action.choices else _kind(action)
        return f"{action.option_strings[0]} {value}".rstrip()

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, False, SUPPRESS) or len(str(action.default)) > LONGEST_DEFAULT:
            return action.help
        return super()._get_help_string(action)


def _kind(action: Action) -> str:
    if action.nargs == "?":
        return "BOOL" if action.default else ""
    name = getattr(action.type, "__name__", "str")
    return {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "BOOL"}.get(name, "VALUE")


class ArgumentParser(HfArgumentParser):
    """A parser that raises `TSTError` with one sentence, where `argparse` would print its usage and exit.

    Args:
        kinds: Dataclasses of arguments; each is a section of the help, named by the first line of its docstring. The help does not
            list the arguments that one names as `impossible`.
        usage (`str`): The line above the help.
        options: As for `argparse.ArgumentParser`.
    """

    def __init__(
        self, kinds: Sequence[type], usage: str = "%(prog)s [recipe] [--flag value ...]", **options: Any
    ) -> None:
        super().__init__(kinds, usage=usage, formatter_class=HelpFormatter, allow_abbrev=False, **options)
        hidden = {name for kind in kinds for name in getattr(kind, "impossible", ())}
        for action in self._actions:
            action.help = SUPPRESS if action.dest in hidden else HELP.get(action.dest, action.help)
        self._shows_all = False
        if any(issubclass(kind, TrainingArguments) for kind in kinds):
            self.add_argument(
                "--help_all", "--help-all", action=_HelpAll, nargs=0, default=SUPPRESS, help="Show all flags."
            )

    def format_help(self) -> str:
        """The help: usage, description, and a section for each kind of arguments, those of superposition first."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for title, actions in self._sections().items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _sections(self) -> dict[str, list[Action]]:
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of a name
        sections: dict[str, list[Action]] = {}
        of_trainer: list[str] = []
        for kind in self.dataclass_types:
            names = [entry.name for entry in fields(kind) if entry.init]
            title = str(kind.__doc__).splitlines()[0].rstrip(".")
            if issubclass(kind, TrainingArguments):
                of_trainer = [entry.name for entry in fields(TrainingArguments) if entry.init]
                names = [name for name in names if name not in of_trainer]
                title = "Token superposition and multi-token prediction"
            sections[title] = [actions.pop(name) for name in names]
        shown = [actions.pop(name) for name in TRAINER_ARGUMENTS if name in of_trainer]
        others = [actions.pop(name) for name in of_trainer if name in actions]
        if shown:
            sections["Training"] = shown
            if self._shows_all:
                sections["Training, all other arguments of Transformers' Trainer"] = others
        sections["Help"] = list(reversed(actions.values()))
        return sections

    def error(self, message: str) -> NoReturn:
        raise TSTError(f"{message[:1].upper()}{message[1:]}.")

    def parse_flags(self, argv: Sequence[str]) -> Namespace:
        """The values of all arguments. An unknown flag raises a `TSTError` that names the closest known one."""
        namespace, rest = self.parse_known_args(argv)
        check_names(flag_names(rest), vars(namespace), "There is no flag")
        if rest:
            raise TSTError(
                f"{rest[0]!r} does not belong to a flag: write {self._right_spelling(argv, rest[0])}."
            )
        return namespace

    def _right_spelling(self, argv: Sequence[str], stray: str) -> str:
        """The right spelling for a stray word: values of a flag that takes a list are separated by commas."""
        end = list(argv).index(stray)
        begin = max((place for place in range(end) if argv[place].startswith("--")), default=end)
        flag = next((a for a in self._actions if argv[begin].split("=")[0] in a.option_strings), None)
        if flag is None or flag.type is not str or not flag.dest.endswith("s") or "=" in argv[begin]:
            return "--name value, and patterns of files in quotes"
        values = list(argv[begin + 1 :])
        following = [place for place, word in enumerate(values) if word.startswith("--")]
        return f"--{flag.dest} {','.join(values[: following[0] if following else None])}"


class _HelpAll(Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser._shows_all = True
        parser.print_help()
        parser.exit()


def flag_names(argv: Iterable[str]) -> list[str]:
    """The names of the flags on a command line."""
    return [flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")]
