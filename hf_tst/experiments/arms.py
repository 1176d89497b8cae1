"""The arms of a comparison: named changes to one configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..pretraining.options import check_names
from ..training.arguments import TSTTrainingArguments

# What an arm changes in the configuration, and nothing else.
ARMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "baseline": {"tst_phase_ratio": 0.0},
        "tst": {},
        "mtp": {"mtp_num_heads": 4, "tst_phase_ratio": 0.0},
        "tst+mtp": {"mtp_num_heads": 4},
    }
)
# What else than these an arm could change would make it another model, other data or another budget.
ARM_PREFIXES = ("tst_", "mtp_")


def define_arms(values: Mapping[str, Any], more_arms: str | None = None) -> dict[str, dict[str, Any]]:
    """What every arm changes, by name: the arms of [`ARMS`], and further ones.

    `mtp_num_heads` of the configuration replaces the 4 of the arms of [`ARMS`] with multi-token prediction. It does not
    apply to the others.

    Args:
        values (`dict`): The configuration.
        more_arms (`str`, *optional*): JSON of names with the options that each changes: `{"tst-s4": {"tst_bag_size": 4}}`.

    Raises:
        TSTError: If these are no such names and options, or a name is taken.
    """
    heads = setting(values, "mtp_num_heads")
    arms = {name: dict(changes) for name, changes in ARMS.items()}
    if heads > 1:
        for changes in arms.values():
            changes.update({"mtp_num_heads": heads} if "mtp_num_heads" in changes else {})
    try:
        further = json.loads(more_arms or "{}")
    except json.JSONDecodeError as error:
        raise TSTError(f"more_arms is not JSON: {error} in {more_arms!r}.") from error
    if not isinstance(further, dict) or not all(isinstance(changes, dict) for changes in further.values()):
        raise TSTError(
            f'more_arms must be names, each with the options that it changes, such as {{"tst-s4": {{"tst_bag_size": 4}}}}, '
            f"but is {more_arms}."
        )
    options = [name for name in TSTTrainingArguments.__dataclass_fields__ if name.startswith(ARM_PREFIXES)]
    for name, changes in further.items():
        if name in arms or not re.fullmatch(r"[\w.+=-]+", name):
            raise TSTError(
                f"more_arms names an arm {name!r}: take a name of letters, digits and . + = - _ that is none of "
                f"{', '.join(ARMS)}."
            )
        check_names(changes, ["seeds", *options], f"An arm changes options of TST and MTP, but {name} has")
    return arms | further


def check_arms(arms: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> None:
    """Check that arms can have what the configuration `values` asks for.

    Raises:
        TSTError: If not, or for a TST arm without superposition.
    """
    for name, changes in arms.items():
        if changes.get("mtp_num_heads", 1) > 1 and values.get("lora_rank"):
            raise TSTError(
                f"The arm {name} has extra heads, which LoRA does not go with: leave it, or lora_rank, out."
            )
        superposed = is_superposed({**values, **changes})
        if not superposed and setting({**values, **changes}, "tst_document_boundaries") == "respect":
            raise TSTError(
                f"The arm {name} has no superposition, which tst_document_boundaries='respect' is a part of, and would see "
                "other documents than TST does: set it to 'ignore'."
            )
        if not superposed and name in ARMS and "tst_phase_ratio" not in changes:
            raise TSTError(
                f"The arm {name} needs superposition, but the configuration has tst_phase_ratio="
                f"{setting(values, 'tst_phase_ratio')} and tst_bag_size={setting(values, 'tst_bag_size')}: set both."
            )


def arm_values(
    changes: Mapping[str, Any], values: Mapping[str, Any], *, fusable: bool = True
) -> dict[str, Any]:
    """The configuration `values` with the changes of an arm.

    An arm without superposition computes its loss as TST does, fused with the head, unless it says otherwise: so steps of all
    arms cost the same but for what an arm adds.

    Args:
        changes (`dict`): What the arm changes, of [`define_arms`].
        values (`dict`): The configuration. Its `mtp_num_heads` are for arms that have any.
        fusable (`bool`, defaults to `True`): Whether the model's loss can be fused with its head. Where it cannot, or
            `tst_fused_loss` of the configuration is `"off"`, no arm fuses it.
    """
    changed = {**values, "mtp_num_heads": 1, **changes}
    changed.pop("seeds", None)
    if changed["mtp_num_heads"] == 1:
        del changed["mtp_num_heads"]
    if not fusable or values.get("tst_fused_loss") == "off":
        changed["tst_fused_loss"] = "off"
    elif not is_superposed(changed) and "tst_fused_loss" not in changes:
        changed["tst_fused_loss"] = "on"
    return changed


def setting(values: Mapping[str, Any], name: str) -> Any:
    """What a configuration gives a training argument: its value there, or else its default."""
    return values.get(name, TSTTrainingArguments.__dataclass_fields__[name].default)


def arm_schedule(values: Mapping[str, Any], max_steps: int) -> PhaseSchedule:
    """The phases of a run of `max_steps` optimizer steps with a configuration."""
    ratio, size, mode = (setting(values, name) for name in ("tst_phase_ratio", "tst_bag_size", "tst_mode"))
    return PhaseSchedule(max_steps, ratio, size, mode)


def is_superposed(values: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for superposition."""
    return setting(values, "tst_phase_ratio") > 0 and setting(values, "tst_bag_size") > 1
