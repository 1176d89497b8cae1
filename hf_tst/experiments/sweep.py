"""A grid over bag size, phase ratio, weighting and mode: what `hf-tst sweep` and `scripts/sweep.py` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..errors import TSTError
from .arms import ARMS, check_arms, define_arms, is_superposed, setting
from .compare import Arms, BudgetArguments, run_comparison
from .comparison import BASELINE, Comparison, GridPoint
from .options import EVERY_RUN, parse_experiment, parse_list

DESCRIPTION = f"""Train over a grid of bag sizes s, phase ratios r, weightings and modes, and draw the losses as heat maps.

It is a comparison whose arms are the points of the grid. Takes a recipe and the flags of training, and those of the sweep, which
are listed first. Every run is a process with a folder of its own in output_dir. Started again, it does what is missing; half a run
continues from its last checkpoint. {EVERY_RUN}

  %(prog)s --output_dir runs/sweep --bag_sizes 2,4,6 --phase_ratios 0.2,0.3
  %(prog)s recipe.yaml --weightings uniform,power_law --modes full,output --seeds 0,1
"""


@dataclass
class SweepArguments(BudgetArguments):
    """The grid."""

    seeds: str = field(default="0", metadata={"help": "Seeds that every run is repeated with."})
    bag_sizes: str = field(default="2,4,6,8", metadata={"help": "Bag sizes s, in tokens per bag."})
    phase_ratios: str = field(default="0.1,0.2,0.3,0.4", metadata={"help": "Fractions of superposition, r."})
    weightings: str | None = field(
        default=None, metadata={"help": "Offset weightings; tst_offset_weighting by default."}
    )
    modes: str | None = field(default=None, metadata={"help": "Modes; tst_mode by default."})
    baseline: bool = field(
        default=True,
        metadata={"help": "Train without superposition, too; --no_baseline leaves that run out."},
    )


def make_grid(args: SweepArguments, values: Mapping[str, Any]) -> tuple[Arms, dict[str, GridPoint]]:
    """The arms of a sweep by name, the baseline first, and where they lie on its grid.

    Raises:
        TSTError: If a point of the grid has no superposition, or the baseline cannot have what the configuration asks for.
    """
    arms: dict[str, dict[str, Any]] = {}
    heads = setting(values, "mtp_num_heads")
    if args.baseline:
        check_arms([BASELINE], ARMS, values)
        # Where the grid has extra heads, so has what it is compared with.
        arms[BASELINE] = define_arms(values)["mtp" if heads > 1 else BASELINE]
    grid = {}
    axes = (
        parse_list("modes", args.modes or setting(values, "tst_mode"), str),
        parse_list("weightings", args.weightings or setting(values, "tst_offset_weighting"), str),
        parse_list("bag_sizes", args.bag_sizes, int),
        parse_list("phase_ratios", args.phase_ratios, float),
    )
    for mode, weighting, size, ratio in product(*axes):
        name = f"s{size}-r{ratio:g}-{weighting}-{mode}"
        arms[name] = {
            "tst_bag_size": size, "tst_phase_ratio": ratio, "tst_offset_weighting": weighting, "tst_mode": mode,
            "mtp_num_heads": heads,
        }  # fmt: skip
        grid[name] = GridPoint(f"{weighting}, {mode}", size, ratio)
        if not is_superposed(arms[name]):
            raise TSTError(
                f"{name} is plain training: leave bag size 1 and ratio 0 out; --baseline trains without superposition."
            )
    return arms, grid


def main(argv: Sequence[str], prog: str | None = None) -> Comparison:
    """Do what is missing of a sweep, and write `comparison.json`, `.md`, `.html` and `.png` into its folder.

    Raises:
        TSTError, SystemExit: See [`hf_tst.experiments.compare.main`].
    """
    values, args = parse_experiment(argv, SweepArguments, DESCRIPTION, prog, "runs/sweep")
    arms, grid = make_grid(args, values)
    return run_comparison(values, args, arms, ["hf-tst", "sweep", *argv], grid)
