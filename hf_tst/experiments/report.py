"""The report of a comparison: tables, curves, and one HTML page with both."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..records.report import escape_markdown, format_bytes, format_columns, markdown_table
from .arms import BASELINE
from .budget import ArmRun
from .options import UNITS
from .summary import ArmPoint, ArmSummary, Comparison, RateSummary, rank
from .where import TITLES, where_tables

COLUMNS = (
    "arm", "best learning rate", "final eval loss", "vs baseline", "seeds", "raw tokens", "latent tokens", "FLOPs",
    "time", "peak memory", "steps to baseline's loss", "FLOPs to it",
)  # fmt: skip
RUN_COLUMNS = ("arm", "learning rate", "seed", "initial eval loss", "final eval loss", "status")
Rows = list[tuple[str, ...]]
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


# A part of a grid, by bag size and phase ratio, both in order.
Panel = dict[int, dict[float, RateSummary]]


def tables(comparison: Comparison) -> dict[str, Rows]:
    """Titles and rows, the header first: the panels of a grid, the arms, where they differ, all runs."""
    found: dict[str, Rows] = {}
    for title, panel in panels(comparison).items():
        ratios = next(iter(panel.values()))
        rows = [(str(size), *map(describe_rate, cells.values())) for size, cells in panel.items()]
        found[title] = [("s \\ r", *(f"{ratio:g}" for ratio in ratios)), *rows]
    return found | {
        "Arms": [COLUMNS, *(_arm_row(arm) for arm in comparison.arms)],
        **where_tables(comparison),
        "All runs": [RUN_COLUMNS, *map(_run_row, comparison.runs)],
    }


def panels(comparison: Comparison) -> dict[str, Panel]:
    """The cells of a grid, one panel for each weighting and mode; empty if the comparison is no sweep."""
    best = {arm.arm: arm.best for arm in comparison.arms}
    found: dict[str, Panel] = {}
    names = ("tst_bag_size", "tst_phase_ratio", "tst_offset_weighting", "tst_mode")
    cells = [(*(cell[option] for option in names), best[name]) for name, cell in comparison.grid.items()]
    for size, ratio, weighting, mode, rate in sorted(cells, key=lambda cell: cell[:2]):
        found.setdefault(f"{weighting}, {mode}", {}).setdefault(size, {})[ratio] = rate
    return found


def _arm_row(arm: ArmSummary) -> tuple[str, ...]:
    best = arm.best
    seeds = ", ".join([str(len(best.final_eval_losses)), *_left_out(best)])
    if not best.curve:
        return (arm.arm, "-", _loss_of(best), "-", seeds, *["-"] * 7)
    end, reached = best.curve[-1], arm.reached_baseline_loss
    memory = best.peak_memory_bytes and f"{format_bytes(best.peak_memory_bytes)} ({best.memory_of})"
    difference = "reference" if arm.arm == BASELINE else "-"
    if arm.difference_to_baseline is not None:
        difference = _with_sd(arm.difference_to_baseline, arm.difference_to_baseline_sd, "+.4f")
    not_reached = "not reached" if len(best.curve) > 2 else "not measured"
    return (
        arm.arm,
        f"{best.learning_rate:g}",
        _loss_of(best),
        difference,
        seeds,
        _count(end.raw_tokens),
        _count(end.latent_tokens),
        f"{end.flops:.3g}",
        _duration(end.seconds),
        memory or "-",
        f"{reached.step:,}" if reached else not_reached,
        f"{reached.flops:.3g}" if reached else not_reached,
    )


def describe_rate(rate: RateSummary) -> str:
    """Mean ± standard deviation, and how many seeds diverged or are missing."""
    left_out = _left_out(rate)
    return _loss_of(rate) + (f" ({', '.join(left_out)})" if left_out and rate.final_eval_losses else "")


def _loss_of(rate: RateSummary) -> str:
    if rate.mean_final_eval_loss is None:
        return "diverged" if rate.diverged_seeds else "missing"
    return _with_sd(rate.mean_final_eval_loss, rate.sd_final_eval_loss, ".4f")


def _left_out(rate: RateSummary) -> list[str]:
    counts = {"diverged": len(rate.diverged_seeds), "missing": len(rate.missing_seeds)}
    return [f"{count} {status}" for status, count in counts.items() if count]


def _with_sd(value: float, sd: float | None, spec: str) -> str:
    return format(value, spec) + ("" if sd is None else f" ± {sd:.4f}")


def _run_row(run: ArmRun) -> tuple[str, ...]:
    losses = ["missing", "missing"]
    if run.result is not None:
        ends = (run.result.initial_eval_loss, run.result.final_eval_loss)
        losses = ["not finite" if loss is None else f"{loss:.4f}" for loss in ends]
    rate, seed = run.settings["learning_rate"], run.settings["seed"]
    return (run.arm.name, f"{rate:g}", str(seed), *losses, run.status)


def _count(number: int) -> str:
    """Exact below a million; the JSON has all digits."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:,}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds:,.1f} s"


def format_comparison(comparison: Comparison) -> str:
    """The comparison as tables of text, for a terminal: arms in columns, or the panels of a grid."""
    parts = tables(comparison)
    arms = parts.pop("Arms")
    # An arm is a column where it has many values.
    texts = [
        f"{title}\n{format_columns([*zip(*rows, strict=True)] if title in TITLES else rows)}"
        for title, rows in parts.items()
    ]
    if not comparison.grid:
        texts.insert(0, format_columns([*zip(*arms, strict=True)]))
    ends = verdicts(comparison) if not comparison.grid else []
    return "\n\n".join([*texts, *_captions(comparison)[1:], *comparison.notes, *ends])


def make_title(comparison: Comparison) -> str:
    """What is compared, and what is equal."""
    equal = f"at equal {UNITS[comparison.budget]}"
    if comparison.grid:
        return f"Sweep over {len(comparison.grid)} kinds of superposition, {equal}"
    names = [arm.arm for arm in comparison.arms]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) + f", {equal}"


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each arm: ahead of the baseline or behind, by how much, in how many seeds."""
    sentences = []
    for arm in comparison.arms:
        mean, sd, by_seed = (
            arm.difference_to_baseline,
            arm.difference_to_baseline_sd,
            arm.differences_to_baseline,
        )
        if mean is None:
            continue
        same = sum(difference * mean > 0 for difference in by_seed.values())
        seeds = f"{same} of {len(by_seed)} seeds" if len(by_seed) > 1 else "one seed only"
        spread = "" if sd is None else f" ± {sd:.3f}"
        place = "ahead of" if mean < 0 else "behind"
        sentences.append(f"{arm.arm} is {place} the baseline by {abs(mean):.3f}{spread} nats, {seeds}.")
    return sentences


def _captions(comparison: Comparison) -> list[str]:
    captions = [
        f"Equal {UNITS[comparison.budget]}. Loss: next-token, nats per token, at the end of training, mean ± standard deviation "
        "over seeds; vs baseline: mean difference of runs with the same seed. Tokens, FLOPs and time are those of one run."
    ]
    for arm in comparison.arms if comparison.grid else []:
        if arm.arm == BASELINE:
            captions.append(f"Without superposition: {describe_rate(arm.best)}.")
    if lowest := lowest_cell(comparison):
        alone = ", of one seed" if len(lowest.best.final_eval_losses) == 1 else ""
        captions.append(f"Lowest: {lowest.arm}, {describe_rate(lowest.best)}{alone}.")
    return captions


def lowest_cell(comparison: Comparison) -> ArmSummary | None:
    """The cell with the lowest mean loss, of those with the most runs that ended well; `None` if no run did."""
    cells = [arm for arm in comparison.arms if arm.arm in comparison.grid and arm.best.curve]
    return min(cells, key=lambda arm: rank(arm.best), default=None)


def _code(text: str) -> str:
    """Text as a code span, whatever backticks it contains."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


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
        text = f"{loss:.4f}\n{count} seed{'s' if count > 1 else ''}" if count else _loss_of(cell)
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
    if verdicts(comparison):
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


def render_page(comparison: Comparison, template: str, images: Mapping[str, str] | None = None) -> str:
    """The comparison as `comparison.md`, or as `comparison.html`, which needs no file beside it and fits screens and paper.

    Args:
        comparison ([`Comparison`]): The comparison.
        template (`str`): `"comparison.md"` or `"comparison.html"`.
        images (`dict`, *optional*): Of [`encode_pictures`]; Markdown names `comparison.png` if there are any.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("hf_tst.records"), autoescape=select_autoescape(), trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"markdown": escape_markdown, "code": _code, "table": markdown_table}
    return environment.get_template(template).render(
        title=make_title(comparison), verdicts=[] if comparison.grid else verdicts(comparison),
        captions=_captions(comparison), tables=tables(comparison), facts=comparison.facts,
        notes=comparison.notes, pictures=images or {}, has_curves=not comparison.grid,
    )  # fmt: skip


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `comparison.json`, `.md`, `.html` and, with matplotlib, `.png` into a folder, and return their paths."""
    images, files = {}, {"json": (json.dumps(comparison.to_dict(), indent=2) + "\n").encode()}
    with suppress(ImportError):
        files["png"] = draw(pictures(comparison).values(), 5.5, 4, dpi=120)
        images = encode_pictures(comparison)
    for ending in ("md", "html"):
        files[ending] = render_page(comparison, f"comparison.{ending}", images).encode()
    for ending, content in files.items():
        (Path(folder) / f"comparison.{ending}").write_bytes(content)
    return [Path(folder) / f"comparison.{ending}" for ending in files]
