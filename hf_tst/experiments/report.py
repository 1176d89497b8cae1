"""A comparison for readers: tables, curves, and one page of HTML that holds all of it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..records.report import escape_markdown, format_columns, markdown_table
from .comparison import BASELINE, ArmSummary, Comparison, RateSummary, best_rate, comparison_to_dict
from .result import CurvePoint, RunResult

TITLE = "Comparison of training runs"
COLUMNS = (
    "arm", "best learning rate", "final eval loss", "vs baseline", "seeds", "raw tokens", "latent tokens", "FLOPs",
    "time", "peak memory", "steps to baseline's loss", "FLOPs to it",
)  # fmt: skip
RUN_COLUMNS = ("arm", "learning rate", "seed", "initial eval loss", "final eval loss", "status")
Rows = list[tuple[str, ...]]
Axis = tuple[str, Callable[[ArmSummary, CurvePoint], float]]
AXES: tuple[Axis, ...] = (
    ("optimizer steps", lambda arm, point: point.step),
    ("FLOPs", lambda arm, point: arm.flops(point)),
    ("raw tokens", lambda arm, point: point.raw_tokens),
    ("seconds of training", lambda arm, point: point.seconds),
)
# Told apart by those who do not see colors, too (Okabe and Ito).
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


class Panel(NamedTuple):
    """A part of a grid: `cells` has a row per bag size and a column per phase ratio."""

    sizes: list[int]
    ratios: list[float]
    cells: list[list[RateSummary]]


def tables(comparison: Comparison) -> dict[str, Rows]:
    """Titles and rows, the header first: the panels of a grid, the arms, all runs."""
    runs = [
        (run.arm, f"{run.learning_rate:g}", str(run.seed), *_losses(run.result), run.status)
        for run in comparison.outcomes
    ]
    return {
        **{name: _panel_rows(panel) for name, panel in panels(comparison).items()},
        "Arms": [COLUMNS, *(_arm_row(arm) for arm in comparison.arms)],
        "All runs": [RUN_COLUMNS, *runs],
    }


def panels(comparison: Comparison) -> dict[str, Panel]:
    """The cells of a grid, one panel for each weighting and mode; none if the comparison is no sweep."""
    best = {arm.arm: arm.best for arm in comparison.arms}
    found: dict[str, dict[tuple[int, float], RateSummary]] = {}
    for name, cell in comparison.grid.items():
        cells = found.setdefault(f"{cell['tst_offset_weighting']}, {cell['tst_mode']}", {})
        cells[cell["tst_bag_size"], cell["tst_phase_ratio"]] = best[name]
    made = {}
    for name, cells in found.items():
        sizes, ratios = (sorted(set(values)) for values in zip(*cells, strict=True))
        made[name] = Panel(sizes, ratios, [[cells[size, ratio] for ratio in ratios] for size in sizes])
    return made


def _panel_rows(panel: Panel) -> Rows:
    rows: Rows = [("s \\ r", *(f"{ratio:g}" for ratio in panel.ratios))]
    for size, cells in zip(panel.sizes, panel.cells, strict=True):
        rows.append((str(size), *map(describe_rate, cells)))
    return rows


def _arm_row(arm: ArmSummary) -> tuple[str, ...]:
    best = arm.best
    seeds = ", ".join([str(len(best.losses)), *_left_out(best)])
    if best.mean_loss is None:
        return (arm.arm, "-", _loss_of(best), "-", seeds, *["-"] * 7)
    end = best.curve[-1]
    memory = "-" if best.peak_memory_bytes is None else f"{_bytes(best.peak_memory_bytes)} ({best.memory_of})"
    difference = "-" if arm.difference is None else _with_sd(arm.difference, arm.difference_sd, "+.4f")
    reached: tuple[str, ...] = ("not reached" if arm.is_evaluated_between else "not measured",) * 2
    if arm.reached is not None:
        reached = (f"{arm.reached.step:,}", f"{arm.flops(arm.reached):.3g}")
    return (
        arm.arm,
        f"{best.learning_rate:g}",
        _loss_of(best),
        "reference" if arm.arm == BASELINE else difference,
        seeds,
        _count(end.raw_tokens),
        _count(end.latent_tokens),
        f"{arm.flops(end):.3g}",
        _duration(end.seconds),
        memory,
        *reached,
    )


def describe_rate(rate: RateSummary) -> str:
    """Mean ± standard deviation, and how many seeds diverged or are missing."""
    left_out = _left_out(rate)
    return _loss_of(rate) + (f" ({', '.join(left_out)})" if left_out and rate.losses else "")


def _loss_of(rate: RateSummary) -> str:
    if rate.mean_loss is None:
        return "diverged" if rate.diverged else "missing"
    return _with_sd(rate.mean_loss, rate.sd, ".4f")


def _left_out(rate: RateSummary) -> list[str]:
    counts = {"diverged": len(rate.diverged), "missing": len(rate.missing)}
    return [f"{count} {status}" for status, count in counts.items() if count]


def _with_sd(value: float, sd: float | None, spec: str) -> str:
    return format(value, spec) + ("" if sd is None else f" ± {sd:.4f}")


def _losses(result: RunResult | None) -> list[str]:
    """The first and the last loss of a run."""
    if result is None:
        return ["missing", "missing"]
    losses = (result.initial_eval_loss, result.final_eval_loss)
    return ["not finite" if loss is None else f"{loss:.4f}" for loss in losses]


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


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
    texts = [f"{title}\n{format_columns(rows)}" for title, rows in parts.items()]
    if not comparison.grid:
        texts.insert(0, format_columns([*zip(*arms, strict=True)]))
    return "\n\n".join([*texts, *_captions(comparison)[1:], *comparison.notes])


def format_comparison_markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The comparison as a page of Markdown; `picture` names the picture beside it, if there is one."""
    parts = [f"# {TITLE}", *_captions(comparison)]
    if picture:
        parts.append(f"![{'; '.join(label for label, _ in pictures(comparison))}]({picture})")
    for title, rows in tables(comparison).items():
        parts += [f"## {title}", markdown_table(rows)]
    facts = [
        f"- {escape_markdown(name)}: {_code(value) if name == 'command' else escape_markdown(value)}"
        for name, value in comparison.facts.items()
    ]
    for title, lines in (
        ("How it was done", facts),
        ("Notes", [f"- {escape_markdown(note)}" for note in comparison.notes]),
    ):
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def _captions(comparison: Comparison) -> list[str]:
    equal = {"flops": "FLOPs", "data": "raw tokens", "time": "measured time of training"}
    captions = [
        f"Equal {equal[comparison.budget]}. Loss: next-token, nats per token, at the end of training, mean ± standard deviation "
        "over seeds; vs baseline: mean difference of runs with the same seed. Tokens, FLOPs and time are those of one run."
    ]
    cells = {arm.arm: arm.best for arm in comparison.arms}
    if BASELINE in cells and comparison.grid:
        captions.append(f"Without superposition: {describe_rate(cells[BASELINE])}.")
    for name in comparison.grid:
        if cells[name] is lowest_cell(comparison):
            captions.append(f"Lowest: {name}, {describe_rate(cells[name])}.")
    return captions


def lowest_cell(comparison: Comparison) -> RateSummary | None:
    """The cell of a grid of the lowest mean loss, of those in which most runs ended well."""
    cells = [arm.best for arm in comparison.arms if arm.arm in comparison.grid]
    best = best_rate(cells) if cells else None
    return best if best and best.losses else None


def _code(text: str) -> str:
    """Text as a code span, which nothing in it ends."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def draw_curves(comparison: Comparison, axes: Any, axis: Axis) -> None:
    """Draw the mean curve of every arm over one axis, and each seed's thinly behind it."""
    label, position = axis
    shown: list[float] = []
    for number, arm in enumerate(arm for arm in comparison.arms if arm.best.curve):
        color, style = COLORS[number % len(COLORS)], ("-", "--", "-.", ":")[number % 4]

        def draw(points: Sequence[CurvePoint], *style: str, arm: ArmSummary = arm, **options: Any) -> None:
            x, y = [position(arm, point) for point in points], [point.eval_loss for point in points]
            axes.plot(x, y, *style, **options)

        for curve in arm.best.curves if len(arm.best.curves) > 1 else []:
            draw(curve, color=color, alpha=0.25, linewidth=0.8)
        curve, switch = arm.best.curve, arm.plan.schedule.switch_step
        draw(curve, style, color=color, label=arm.arm, linewidth=1.8)
        draw([point for point in curve if point.step >= switch > 0][:1], "o", color=color, markersize=5)
        # What is before the first tenth of a run is above the picture.
        late = [point for point in curve if point.step >= 0.1 * curve[-1].step]
        shown += [point.eval_loss for point in late if point.eval_loss is not None]
    baseline = next((arm.best.mean_loss for arm in comparison.arms if arm.arm == BASELINE), None)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle=":", linewidth=1)
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.legend()
    axes.locator_params(axis="x", nbins=6)
    axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    axes.set_xlabel(label)
    axes.set_ylabel("evaluation loss (nats)")
    axes.grid(alpha=0.3)


def draw_heat_map(comparison: Comparison, axes: Any, name: str) -> None:
    """Draw a panel of a grid, bag size s against phase ratio r as in table 4 of the paper, the lowest cell framed.

    All panels have one scale of colors.
    """
    from matplotlib.patches import Rectangle

    known = [
        arm.best.mean_loss or 0.0 for arm in comparison.arms if arm.arm in comparison.grid and arm.best.losses
    ]
    low, high = min(known, default=0.0), max(known, default=1.0)
    panel, lowest = panels(comparison)[name], lowest_cell(comparison)
    losses = [[cell.mean_loss or float("nan") for cell in row] for row in panel.cells]
    image = axes.imshow(losses, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(panel.cells):
        for x, cell in enumerate(row):
            text = _loss_of(cell) if cell.mean_loss is None else f"{cell.mean_loss:.4f}"
            color = "white" if losses[y][x] < (low + high) / 2 else "black"
            axes.text(x, y, text, ha="center", va="center", color=color)
            if cell is lowest:
                axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", lw=2))
    axes.set_xticks(range(len(panel.ratios)), [f"{ratio:g}" for ratio in panel.ratios])
    axes.set_yticks(range(len(panel.sizes)), [str(size) for size in panel.sizes])
    axes.set_xlabel("phase ratio r")
    axes.set_ylabel("bag size s")
    axes.set_title(name)
    axes.figure.colorbar(image, ax=axes, label="final loss (nats)")


def pictures(comparison: Comparison) -> list[tuple[str, Callable[[Any], None]]]:
    """What each picture shows, and a function that draws it on axes of matplotlib: curves, or heat maps of a grid."""
    if comparison.grid:
        return [
            (f"Loss by bag size and phase ratio, {name}", partial(draw_heat_map, comparison, name=name))
            for name in panels(comparison)
        ]
    return [(f"Evaluation loss over {axis[0]}", partial(draw_curves, comparison, axis=axis)) for axis in AXES]


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw all pictures as one PNG.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure

    drawn = pictures(comparison)
    columns = 1 if len(drawn) % 2 else 2
    rows = len(drawn) // columns
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for axes, (_, draw) in zip(figure.subplots(rows, columns, squeeze=False).flat, drawn, strict=True):
        draw(axes)
    figure.savefig(path, dpi=120)
    return Path(path)


def render_html(comparison: Comparison) -> str:
    """The comparison as one page of HTML that needs nothing beside it, for screens of any width and for paper."""
    from jinja2 import Environment

    template = files("hf_tst.records").joinpath("templates/comparison.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        title=TITLE, captions=_captions(comparison), tables=tables(comparison), facts=comparison.facts,
        notes=comparison.notes, pictures=_encoded_pictures(comparison), has_curves=not comparison.grid,
    )  # fmt: skip


def _encoded_pictures(comparison: Comparison) -> list[tuple[str, str]]:
    """What each picture shows, and it, as base64 of a PNG; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    encoded = []
    for label, draw in pictures(comparison):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160, format="png")
        encoded.append((label, base64.b64encode(buffer.getvalue()).decode("ascii")))
    return encoded


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `comparison.json`, `.md`, `.html` and, with matplotlib, `.png` into a folder, and return their paths."""
    folder = Path(folder)
    try:
        drawn = [plot_comparison(comparison, folder / "comparison.png")]
    except ImportError:
        drawn = []
    pages = {
        "json": json.dumps(comparison_to_dict(comparison), indent=2) + "\n",
        "md": format_comparison_markdown(comparison, drawn[0].name if drawn else None),
        "html": render_html(comparison),
    }
    for ending, text in pages.items():
        (folder / f"comparison.{ending}").write_text(text, encoding="utf-8")
    return [*(folder / f"comparison.{ending}" for ending in pages), *drawn]
