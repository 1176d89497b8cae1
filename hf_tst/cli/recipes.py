"""`hf-tst recipes`: the recipes of the package and their cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..pretraining.parser import ArgumentParser
from ..pretraining.recipes import ACCELERATE, RECIPES, read_config, recipe_names
from ..records.text_tables import format_columns
from .plan import plan_from_arguments

DESCRIPTION = "List the recipes of the package: parameters, tokens of text, and GPU-hours as `hf-tst plan` estimates them."


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Print the table.

    Raises:
        TSTError: For a flag.
    """
    ArgumentParser([], "%(prog)s", description=DESCRIPTION, prog=prog).parse_flags(argv)
    rows = [("recipe", "parameters", "tokens", "H100-hours")]
    for name in recipe_names():
        if "model_name_or_path" in read_config(str(RECIPES / f"{name}.yaml")):
            rows.append((name, "the model's", "-", "-"))  # which is on the Hub
            continue
        plan, _ = plan_from_arguments([name])
        figures = (
            f"{plan.model.parameters / 1e6:,.0f}M",
            f"{plan.raw_tokens / 1e9:,.2f}B",
            f"{plan.gpu_hours:,.1f}" if plan.gpu_hours > 0.05 else "< 0.1",
        )
        rows.append((name, *figures))
    print(format_columns(rows))
    print(
        "\nHours at 40 % of the peak. Uncompiled, the 270M model reached 15 %: see\n"
        "hf-tst plan NAME --mfu 0.15. Each pair costs the same, except 10B-A1B:\nthere the baseline runs until it reaches TST's loss, as in the paper."
    )
    print(f"\nhf-tst train NAME, hf-tst plan NAME; the files are in\n{RECIPES}\n")
    names = ", ".join(sorted(path.stem for path in ACCELERATE.glob("*.yaml")))
    print(f"For accelerate launch --config_file FOLDER/NAME.yaml:\n{names}, in\n{ACCELERATE}")
