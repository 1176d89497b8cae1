"""The losses of a sweep as tables and heat maps, bag size s against phase ratio r, as in table 4 of the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..records.report import format_columns
from .comparison import BASELINE, RateSummary, best_rate
from .report import markdown_facts, markdown_table


@dataclass(frozen=True)
class Cell:
    """One point of the grid; the baseline has no bag size."""

    bag_size: int | None
    phase_ratio: float
    weighting: str
    mode: str

    @classmethod
    def of_baseline(cls) -> Cell:
        """The run without superposition."""
        return cls(None, 0.0, "", "")

    @property
    def name(self) -> str:
        """What its runs' folders are called by."""
        if self.bag_size is None:
            return BASELINE
        return f"s{self.bag_size}-r{self.phase_ratio:g}-{self.weighting}-{self.mode}"


@dataclass(frozen=True)
class Sweep:
    """The final evaluation losses of a grid, nats a token, over seeds. `facts` says how it was done."""

    max_steps: int
    learning_rate: float
    losses: Mapping[Cell, RateSummary]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> RateSummary | None:
        """Losses without superposition; `None` if the sweep leaves them out."""
        return self.losses.get(Cell.of_baseline())

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Weighting and mode of each heat map."""
        return list(
            dict.fromkeys((cell.weighting, cell.mode) for cell in self.losses if cell.bag_size is not None)
        )

    @property
    def best(self) -> Cell | None:
        """The cell of the lowest mean loss, of those in which most runs ended well; the baseline aside."""
        cells = {cell: loss for cell, loss in self.losses.items() if cell.bag_size is not None}
        best = best_rate(list(cells.values())) if cells else None
        if best is None or best.mean_loss is None:
            return None
        return next(cell for cell, loss in cells.items() if loss is best)

    def axes(self, weighting: str, mode: str) -> tuple[list[int], list[float]]:
        """Bag sizes and phase ratios of a panel, in order."""
        cells = [cell for cell in self.losses if (cell.weighting, cell.mode) == (weighting, mode)]
        sizes = sorted({cell.bag_size for cell in cells if cell.bag_size is not None})
        return sizes, sorted({cell.phase_ratio for cell in cells})


def describe_loss(summary: RateSummary) -> str:
    """A cell: mean ± standard deviation, and how many seeds diverged or are missing."""
    if summary.mean_loss is None:
        return "diverged" if summary.diverged else "missing"
    text = f"{summary.mean_loss:.4f}" + ("" if summary.sd is None else f" ± {summary.sd:.4f}")
    left_out = [f"{len(summary.diverged)} diverged"] if summary.diverged else []
    left_out += [f"{len(summary.missing)} missing"] if summary.missing else []
    return f"{text} ({', '.join(left_out)})" if left_out else text


def panel_rows(sweep: Sweep, weighting: str, mode: str) -> list[tuple[str, ...]]:
    """The table of a panel, a row a bag size, a column a phase ratio; the header first."""
    sizes, ratios = sweep.axes(weighting, mode)
    rows = [("s \\ r", *(f"{ratio:g}" for ratio in ratios))]
    for size in sizes:
        losses = [describe_loss(sweep.losses[Cell(size, ratio, weighting, mode)]) for ratio in ratios]
        rows.append((str(size), *losses))
    return rows


def _summary(sweep: Sweep) -> list[str]:
    lines = [
        f"Final next-token loss, nats a token, after {sweep.max_steps} steps at learning rate {sweep.learning_rate:g}."
    ]
    if sweep.baseline is not None:
        lines.append(f"Without superposition: {describe_loss(sweep.baseline)}.")
    if sweep.best is not None:
        lines.append(f"Lowest: {sweep.best.name}, {describe_loss(sweep.losses[sweep.best])}.")
    return lines


def format_sweep(sweep: Sweep) -> str:
    """The sweep as tables of text."""
    parts = []
    for weighting, mode in sweep.panels:
        parts.append(f"{weighting}, {mode}\n" + format_columns(panel_rows(sweep, weighting, mode)))
    return "\n\n".join([*parts, *_summary(sweep)])


def format_sweep_markdown(sweep: Sweep, picture: str | None = None) -> str:
    """The sweep as a page of Markdown; `picture` names the heat maps beside it, if there are any."""
    parts = ["# Sweep over bag size s and phase ratio r", *_summary(sweep)]
    if picture:
        parts.append(f"![Loss by bag size and phase ratio]({picture})")
    for weighting, mode in sweep.panels:
        parts += [f"## {weighting}, {mode}", markdown_table(panel_rows(sweep, weighting, mode))]
    return "\n\n".join([*parts, *markdown_facts(sweep.facts)]) + "\n"


def sweep_to_dict(sweep: Sweep) -> dict[str, Any]:
    """The sweep as plain values, for JSON."""
    cells = []
    for cell, loss in sweep.losses.items():
        cells.append(
            {
                "name": cell.name,
                **asdict(cell),
                "mean_final_eval_loss": loss.mean_loss,
                "sd_final_eval_loss": loss.sd,
                "final_eval_losses": {str(seed): value for seed, value in loss.losses.items()},
                "diverged_seeds": loss.diverged,
                "missing_seeds": loss.missing,
            }
        )
    return {
        "max_steps": sweep.max_steps, "learning_rate": sweep.learning_rate, "facts": dict(sweep.facts), "cells": cells,
    }  # fmt: skip


def plot_sweep(sweep: Sweep, path: str | Path) -> Path:
    """Draw a heat map for each weighting and mode as a PNG, all on one scale of colours, the best cell framed.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    panels = sweep.panels
    known = [loss.mean_loss for cell, loss in sweep.losses.items() if cell.bag_size and loss.mean_loss]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    width = max(len(sweep.axes(*panel)[1]) for panel in panels)
    height = max(len(sweep.axes(*panel)[0]) for panel in panels)
    figure = Figure(figsize=((1.1 * width + 2) * len(panels) + 0.8, 0.6 * height + 1.8), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (weighting, mode) in zip(grid, panels, strict=True):
        sizes, ratios = sweep.axes(weighting, mode)
        losses = [[sweep.losses[Cell(size, ratio, weighting, mode)] for ratio in ratios] for size in sizes]
        values = [[float("nan") if loss.mean_loss is None else loss.mean_loss for loss in row] for row in losses]  # fmt: skip
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for y, row in enumerate(losses):
            for x, loss in enumerate(row):
                dark = loss.mean_loss is not None and loss.mean_loss < (low + high) / 2
                text = describe_loss(loss) if loss.mean_loss is None else f"{loss.mean_loss:.4f}"
                axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
                if sweep.best == Cell(sizes[y], ratios[x], weighting, mode):
                    axes.add_patch(
                        Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=2)
                    )
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set_yticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlabel("phase ratio r")
        axes.set_ylabel("bag size s")
        axes.set_title(f"{weighting}, {mode}")
    figure.colorbar(image, ax=list(grid), label="final loss (nats)")
    if sweep.baseline is not None:
        figure.suptitle(f"without superposition: {describe_loss(sweep.baseline)}", fontsize="medium")
    figure.savefig(path, dpi=120)
    return Path(path)


def write_sweep(sweep: Sweep, folder: str | Path) -> list[Path]:
    """Write `sweep.json`, `.md` and, with matplotlib, `.png` into a folder, and return their paths."""
    folder = Path(folder)
    try:
        picture: Path | None = plot_sweep(sweep, folder / "sweep.png")
    except ImportError:
        picture = None
    (folder / "sweep.json").write_text(json.dumps(sweep_to_dict(sweep), indent=2) + "\n", encoding="utf-8")
    text = format_sweep_markdown(sweep, picture.name if picture else None)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    return [folder / "sweep.json", folder / "sweep.md", *([picture] if picture else [])]
