"""A comparison whose arms are a grid over bag size, phase ratio, weighting and mode: what `hf-tst sweep` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

from ..errors import TSTError
from .arms import check_arms, is_superposed, setting
from .compare import run_comparison
from .comparison import BASELINE, Comparison
from .options import EVERY_RUN, ExperimentArguments, parse_list

DESCRIPTION = f"""Train over a grid of bag sizes s, phase ratios r, weightings and modes, and draw the losses as heat maps.

Takes a recipe and the flags of training, and those of the sweep, which are listed first. The cells of the grid are the arms
of a comparison. {EVERY_RUN}

  %(prog)s --output_dir runs/sweep --bag_sizes 2,4,6 --phase_ratios 0.2,0.3
  %(prog)s recipe.yaml --weightings uniform,power_law --modes full,output --seeds 0,1
"""


@dataclass
class SweepArguments(ExperimentArguments):
    """The grid."""

    is_grid: ClassVar[bool] = True
    seeds: str = field(default="0", metadata={"help": "Seeds that every run is repeated with."})
    bag_sizes: str = field(default="2,4,6,8", metadata={"help": "Tokens per bag, s."})
    phase_ratios: str = field(default="0.1,0.2,0.3,0.4", metadata={"help": "Fractions of superposition, r."})
    weightings: str | None = field(
        default=None, metadata={"help": "Offset weightings; tst_offset_weighting by default."}
    )
    modes: str | None = field(default=None, metadata={"help": "Modes; tst_mode by default."})
    baseline: bool = field(
        default=True,
        metadata={"help": "Train without superposition, too; --no_baseline leaves that run out."},
    )

    def select_arms(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        # Where the cells have extra heads, so has what they are compared with.
        heads = {"mtp_num_heads": setting(values, "mtp_num_heads")}
        arms: dict[str, dict[str, Any]] = (
            {BASELINE: {"tst_phase_ratio": 0.0, **heads}} if self.baseline else {}
        )
        for mode, weighting, size, ratio in product(
            parse_list("modes", self.modes or setting(values, "tst_mode"), str),
            parse_list("weightings", self.weightings or setting(values, "tst_offset_weighting"), str),
            parse_list("bag_sizes", self.bag_sizes, int),
            parse_list("phase_ratios", self.phase_ratios, float),
        ):
            name = f"s{size}-r{ratio:g}-{weighting}-{mode}"
            arms[name] = {
                "tst_bag_size": size, "tst_phase_ratio": ratio, "tst_offset_weighting": weighting, "tst_mode": mode, **heads,
            }  # fmt: skip
            if not is_superposed(arms[name]):
                raise TSTError(
                    f"{name} is plain training: leave bag size 1 and ratio 0 out; --baseline trains without superposition."
                )
        check_arms(arms, values)
        return arms


def main(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """Do what is missing of a sweep, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Raises:
        TSTError: For bad input, or settings that have changed.
        SystemExit: With status 1, if a run failed; the report is written with what there is.
    """
    return run_comparison("sweep", SweepArguments, DESCRIPTION, argv, prog)
