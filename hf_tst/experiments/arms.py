"""The arms of a comparison: named changes to one configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..training.arguments import TSTTrainingArguments

# What an arm changes in the configuration, and nothing else. Arms without superposition compute their loss as TST does, fused
# with the head, so that steps of all cost the same but for what an arm adds.
ARMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "baseline": {"tst_phase_ratio": 0.0, "tst_fused_loss": "on"},
        "tst": {},
        "mtp": {"mtp_num_heads": 4, "tst_phase_ratio": 0.0, "tst_fused_loss": "on"},
        "tst+mtp": {"mtp_num_heads": 4},
    }
)


def check_arms(names: Iterable[str], values: Mapping[str, Any]) -> None:
    """Check that the arms exist and differ from each other, given a configuration.

    Args:
        names: Names of arms.
        values (`dict`): The configuration that they change.

    Raises:
        TSTError: For an unknown arm, a TST arm without superposition, or arms that cannot have what the configuration asks for.
    """
    for name in names:
        if name not in ARMS:
            raise TSTError(f"arms must be of {', '.join(ARMS)}, but one is {name!r}.")
        if "mtp_num_heads" in ARMS[name] and values.get("lora_rank"):
            raise TSTError(
                f"The arm {name} has extra heads, which LoRA does not go with: leave it, or lora_rank, out."
            )
        if "tst_phase_ratio" in ARMS[name] and setting(values, "tst_document_boundaries") == "respect":
            raise TSTError(
                f"The arm {name} has no superposition, which tst_document_boundaries='respect' is a part of, and would see "
                "other documents than TST does: set it to 'ignore'."
            )
        if name.startswith("tst") and not is_superposed(values):
            raise TSTError(
                f"The arm {name} needs superposition, but the configuration has tst_phase_ratio="
                f"{setting(values, 'tst_phase_ratio')} and tst_bag_size={setting(values, 'tst_bag_size')}: set both."
            )


def arm_values(name: str, values: Mapping[str, Any], *, fusable: bool = True) -> dict[str, Any]:
    """The configuration `values` with the changes of an arm.

    `mtp_num_heads` of the configuration is how many tokens the arms with multi-token prediction predict, in the place of
    their 4; it is nothing to the others.

    Args:
        name (`str`): An arm of [`ARMS`].
        values (`dict`): The configuration.
        fusable (`bool`, defaults to `True`): Whether the model's loss can be fused with its head. Where it cannot, or
            `tst_fused_loss` is `"off"`, no arm fuses it.
    """
    changed = {**values, **ARMS[name]}
    changed.pop("mtp_num_heads", None)
    if "mtp_num_heads" in ARMS[name]:
        heads = setting(values, "mtp_num_heads")
        changed["mtp_num_heads"] = heads if heads > 1 else ARMS[name]["mtp_num_heads"]
    if not fusable or values.get("tst_fused_loss") == "off":
        changed["tst_fused_loss"] = "off"
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
