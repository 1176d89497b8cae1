"""The arms of a comparison: named changes to one configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ..bags.phases import Phase, PhaseSchedule, folds_single_blocks, superposes
from ..errors import TSTError, check_names
from ..models.shape import ModelShape
from ..planning.flops import flops_per_token
from ..pretraining.options import parse_mapping
from ..training.arguments import TSTTrainingArguments

BASELINE = "baseline"
# The changes of each arm to the configuration.
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"tst_phase_ratio": 0.0},
    "tst": {},
    "mtp": {"mtp_num_heads": 4, "tst_phase_ratio": 0.0},
    "tst+mtp": {"mtp_num_heads": 4},
}
# Options that an arm may change. With others it would have another model, other data or another budget.
ARM_PREFIXES = ("tst_", "mtp_")


@dataclass(frozen=True)
class StepCost:
    """A cost by phase, of an optimizer step or of a latent token: FLOPs, raw tokens or seconds."""

    superposition: float
    recovery: float

    def of_run(self, schedule: PhaseSchedule, steps: int | None = None) -> float:
        """The cost of a run, or of its first `steps` steps."""
        steps = schedule.max_steps if steps is None else steps
        switch = min(steps, schedule.switch_step)
        return switch * self.superposition + (steps - switch) * self.recovery


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison.

    Args:
        name (`str`): Its name.
        changes (`dict`): Its changes to the common configuration.
        values (`dict`): Its configuration.
        flops (`StepCost`): FLOPs per latent token, by phase.
    """

    name: str
    changes: Mapping[str, Any]
    values: Mapping[str, Any]
    flops: StepCost

    @property
    def schedule(self) -> PhaseSchedule:
        """The phases of its runs."""
        names = ("max_steps", "tst_phase_ratio", "tst_bag_size", "tst_mode", "tst_superposition_rows")
        return PhaseSchedule(*(setting(self.values, name) for name in names))

    @property
    def raw_tokens(self) -> StepCost:
        """Raw tokens per latent token, by phase."""
        return StepCost(self.schedule.blocks_per_row, 1)

    def flops_until(self, step: int, latent_tokens: int) -> float:
        """FLOPs of the first `step` steps, which computed `latent_tokens` positions."""
        return self.flops.of_run(self.schedule, step) * latent_tokens / step if step else 0.0


def define_arms(values: Mapping[str, Any], more_arms: str | None = None) -> dict[str, dict[str, Any]]:
    """The changes of every arm, by name: the arms of [`ARMS`], and further ones.

    `mtp_num_heads` of the configuration replaces the 4 of the arms of [`ARMS`] with multi-token prediction. It does not
    apply to the others.

    Args:
        values (`dict`): The configuration.
        more_arms (`str`, *optional*): JSON of names with the options that each changes: `{"tst-s4": {"tst_bag_size": 4}}`.

    Raises:
        TSTError: If `more_arms` has another form, an unknown option, or a name that is taken.
    """
    configured = setting(values, "mtp_num_heads")
    heads = {"mtp_num_heads": configured} if configured > 1 else {}
    arms = {name: changes | (heads if "mtp_num_heads" in changes else {}) for name, changes in ARMS.items()}
    further = parse_mapping("more_arms", more_arms)
    options = [name for name in TSTTrainingArguments.__dataclass_fields__ if name.startswith(ARM_PREFIXES)]
    for name, changes in further.items():
        if name in arms or not re.fullmatch(r"[\w.+=-]+", name):
            raise TSTError(
                f"more_arms names an arm {name!r}: use only letters, digits and . + = - _, and not {', '.join(ARMS)}."
            )
        if not isinstance(changes, dict):
            raise TSTError(
                f'more_arms must have the options of each arm, such as {{"{name}": {{"tst_bag_size": 4}}}}.'
            )
        check_names(changes, ["seeds", *options], f"An arm changes options of TST and MTP, but {name} has")
    return arms | further


def check_arms(arms: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> None:
    """Check that the arms fit the configuration `values`.

    Raises:
        TSTError: If one does not, or if a TST arm has no superposition.
    """
    for name, changes in arms.items():
        changed = {**values, **changes}
        if changes.get("mtp_num_heads", 1) > 1 and values.get("lora_rank"):
            raise TSTError(f"The arm {name} has extra heads, which LoRA cannot train: leave out one of them.")
        if asks_for_superposition(changed):
            continue
        if setting(changed, "tst_document_boundaries") == "respect":
            raise TSTError(
                f"The arm {name} has no superposition, so it would ignore tst_document_boundaries='respect' and see "
                "other documents than TST does: set it to 'ignore'."
            )
        if name in ARMS and "tst_phase_ratio" not in changes:
            raise TSTError(
                f"The arm {name} needs superposition, but the configuration has tst_phase_ratio="
                f"{setting(values, 'tst_phase_ratio')} and tst_bag_size={setting(values, 'tst_bag_size')}: set both."
            )


def make_arm(
    name: str, changes: Mapping[str, Any], values: Mapping[str, Any], shape: ModelShape, length: int
) -> Arm:
    """An arm of the configuration `values`.

    An arm without superposition also fuses its loss with the head, unless it sets `tst_fused_loss`, so that the steps of all
    arms cost the same. No arm fuses if the configuration has `tst_fused_loss="off"`.

    Args:
        name (`str`), changes (`dict`): The arm, of [`define_arms`].
        values (`dict`): The configuration. Its `mtp_num_heads` are for arms that have any.
        shape (`ModelShape`), length (`int`): The model, and latent positions per row.
    """
    changed = {**values, "mtp_num_heads": 1, **changes}
    changed.pop("seeds", None)
    if changed["mtp_num_heads"] == 1:
        del changed["mtp_num_heads"]
    if values.get("tst_fused_loss") == "off":
        changed["tst_fused_loss"] = "off"
    elif not asks_for_superposition(changed) and "tst_fused_loss" not in changes:
        changed["tst_fused_loss"] = "on"
    heads = setting(changed, "mtp_num_heads"), setting(changed, "mtp_kind")
    # Settings that are out of range are refused when the run's arguments are made.
    size, *rows = (setting(changed, f"tst_{name}") for name in ("bag_size", "mode", "superposition_rows"))
    lengths = {
        "superposition": length // size if folds_single_blocks(size, *rows) else length,
        "recovery": length,
    }
    flops = [flops_per_token(shape, lengths[phase], phase, *heads) for phase in get_args(Phase)]
    return Arm(name, changes, changed, StepCost(*flops))


def setting(values: Mapping[str, Any], name: str) -> Any:
    """The value that a configuration gives a training argument, or the argument's default."""
    return values.get(name, TSTTrainingArguments.__dataclass_fields__[name].default)


def asks_for_superposition(values: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for superposition."""
    return superposes(setting(values, "tst_phase_ratio"), setting(values, "tst_bag_size"))
