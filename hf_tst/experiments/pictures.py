"""The pictures of a comparison: curves, differences to the baseline, and heat maps of a grid."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product
from typing import Any

from .arms import BASELINE
from .summary import ArmPoint, Comparison, RateSummary
from .tables import format_loss, lowest_cell, panels

# The x axes of curves: label, and attribute of a point.
AXES = {
    "optimizer steps": "step",
    "FLOPs": "flops",
    "raw tokens": "raw_tokens",
    "seconds of training": "seconds",
}
# The axis on which all arms end at the same value, by budget.
AXIS_OF_BUDGET = {"flops": "FLOPs", "data": "raw tokens", "time": "seconds of training"}
# Draws a picture on axes of matplotlib.
Picture = Callable[[Any], None]
# Distinguishable for color-blind readers (Okabe and Ito).
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def draw_curves(comparison: Comparison, axes: Any, label: str) -> None:
    """Draw the mean curve of every arm over one of [`AXES`], and each seed's thinly behind it."""

    def draw(points: Sequence[ArmPoint], *style: str, **options: Any) -> None:
        x, y = [getattr(point, AXES[label]) for point in points], [point.eval_loss for point in points]
        axes.plot(x, y, *style, **options)

    shown: list[float] = []
    for number, arm in enumerate(arm for arm in comparison.arms if arm.best.curve):
        color, style = _line_style(number)
        for curve in arm.best.curves if len(arm.best.curves) > 1 else []:
            draw(curve, color=color, alpha=0.25, linewidth=0.8)
        curve = arm.best.curve
        switch = [arm.switch] if arm.switch else []
        # From the switch on a step reads fewer tokens, so the line bends there.
        bent = sorted([*curve, *switch], key=lambda point: point.step)
        draw(bent, style, color=color, label=arm.arm, linewidth=1.8)
        draw(switch, "o", color=color, markersize=5)
        # The first tenth of a run may be above the picture.
        late = [point for point in curve if point.step >= 0.1 * curve[-1].step]
        shown += [point.eval_loss for point in late if point.eval_loss is not None]
        if arm.arm == BASELINE:
            axes.axhline(arm.best.mean_final_eval_loss, color="grey", linestyle=":", linewidth=1, zorder=3)
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.legend()
    _finish_curves(axes, label, "evaluation loss (nats)")


def draw_differences(comparison: Comparison, axes: Any) -> None:
    """Draw the difference of every arm to the baseline over the budget: the mean over seeds, and one standard deviation around it.

    The baseline's loss is that of the same seed at the same cost, interpolated between evaluations.
    """
    import numpy as np

    label = AXIS_OF_BUDGET[comparison.budget]
    (baseline,) = (arm.best for arm in comparison.arms if arm.arm == BASELINE)

    def by_seed(rate: RateSummary) -> dict[int, Any]:
        points = zip(rate.final_eval_losses, rate.curves, strict=True)
        return {
            seed: np.array(
                [(getattr(p, AXES[label]), np.nan if p.eval_loss is None else p.eval_loss) for p in curve]
            )
            for seed, curve in points
        }

    theirs = by_seed(baseline)
    for number, arm in enumerate(arm for arm in comparison.arms if arm.best.curve):
        pairs = [(curve, theirs[seed]) for seed, curve in by_seed(arm.best).items() if seed in theirs]
        if arm.arm == BASELINE or not pairs:
            continue
        costs = np.mean([ours[:, 0] for ours, _ in pairs], axis=0)
        shown = costs >= 0.1 * costs[-1]
        apart = np.array([ours[:, 1] - np.interp(ours[:, 0], *base.T) for ours, base in pairs])[:, shown]
        color, style = _line_style(number)
        axes.plot(costs[shown], apart.mean(axis=0), style, color=color, label=arm.arm, linewidth=1.8)
        if len(pairs) > 1:
            spread = apart.std(axis=0, ddof=1)
            middle = apart.mean(axis=0)
            axes.fill_between(
                costs[shown], middle - spread, middle + spread, color=color, alpha=0.2, linewidth=0
            )
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)
    axes.legend()
    _finish_curves(axes, label, "loss minus the baseline's (nats)")


def _line_style(number: int) -> tuple[str, str]:
    """Color and dashes of the curves of an arm, by its number."""
    return COLORS[number % len(COLORS)], ("-", "--", "-.", ":")[number % 4]


def _finish_curves(axes: Any, label: str, y_label: str) -> None:
    axes.locator_params(axis="x", nbins=6)
    axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    axes.set_xlabel(label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


def draw_heat_map(comparison: Comparison, axes: Any, title: str) -> None:
    """Draw a panel of a grid, bag size s against phase ratio r as in table 4 of the paper, with the number of seeds of each cell.

    All panels have the same color scale, with the baseline's loss in the middle. The lowest cell is framed if it has several seeds.
    """
    from matplotlib.patches import Rectangle

    cells = [arm.best for arm in comparison.arms if arm.arm in comparison.grid]
    known = [cell.mean_final_eval_loss or 0.0 for cell in cells if cell.final_eval_losses]
    low, high = min(known, default=0.0), max(known, default=1.0)
    middle = next((arm.best.mean_final_eval_loss for arm in comparison.arms if arm.arm == BASELINE), None)
    if middle is not None:
        reach = max(high - middle, middle - low) or 0.1
        low, high = middle - reach, middle + reach
    panel, lowest = panels(comparison)[title], lowest_cell(comparison)
    rows = [[*cells.values()] for cells in panel.values()]
    losses = [[cell.mean_final_eval_loss or float("nan") for cell in row] for row in rows]
    image = axes.imshow(
        losses, cmap="viridis" if middle is None else "RdBu_r", vmin=low, vmax=high, aspect="auto"
    )
    for (y, row), x in product(enumerate(rows), range(len(rows[0]))):
        cell, loss = row[x], losses[y][x]
        count = len(cell.final_eval_losses)
        text = f"{loss:.4f}\n{count} seed{'s' if count > 1 else ''}" if count else format_loss(cell)
        place = (loss - low) / (high - low)
        is_dark = place < 0.5 if middle is None else abs(place - 0.5) > 0.3
        axes.text(
            x, y, text, ha="center", va="center", fontsize="small", color="white" if is_dark else "black"
        )
        if lowest and cell is lowest.best and count > 1:
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", lw=2))
    ratios = next(iter(panel.values()))
    axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axes.set_yticks(range(len(panel)), [str(size) for size in panel])
    axes.set_xlabel("phase ratio r")
    axes.set_ylabel("bag size s")
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, label="final loss (nats)")


def pictures(comparison: Comparison) -> dict[str, Picture]:
    """The pictures of a comparison, by what they show: curves, or heat maps of a grid."""
    if comparison.grid:
        return {
            f"Loss by bag size and phase ratio, {title}": partial(draw_heat_map, comparison, title=title)
            for title in panels(comparison)
        }
    found: dict[str, Picture] = {
        f"Evaluation loss over {label}": partial(draw_curves, comparison, label=label) for label in AXES
    }
    if any(arm.difference_to_baseline is not None for arm in comparison.arms):
        title = f"Difference to the baseline over {AXIS_OF_BUDGET[comparison.budget]}"
        found = {title: partial(draw_differences, comparison), **found}
    return found


def draw(drawn: Collection[Picture], width: float, height: float, dpi: int) -> bytes:
    """Draw pictures into one PNG. `width` and `height` in inches are those of one picture.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure

    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, draw_on in zip(places, drawn, strict=False):
        draw_on(axes)
    for axes in places[len(drawn) :]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


def encode_pictures(comparison: Comparison) -> dict[str, str]:
    """The pictures as base64 of a PNG each, by what they show."""
    return {
        title: base64.b64encode(draw([picture], 5, 3.6, dpi=160)).decode("ascii")
        for title, picture in pictures(comparison).items()
    }
