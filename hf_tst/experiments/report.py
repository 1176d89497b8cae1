"""A comparison for readers: tables, curves, and one page of HTML that holds all of it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..records.report import format_columns
from .comparison import BASELINE, ArmSummary, Comparison, RateSummary, comparison_to_dict
from .result import CurvePoint

TITLE = "Comparison of training runs"
COLUMNS = (
    "arm", "best learning rate", "final eval loss", "vs baseline", "seeds", "raw tokens", "latent tokens", "FLOPs",
    "time", "peak memory", "steps to baseline's loss", "FLOPs to it",
)  # fmt: skip
RUN_COLUMNS = ("arm", "learning rate", "seed", "initial eval loss", "final eval loss", "status")
Axis = tuple[str, Callable[[ArmSummary, CurvePoint], float]]
AXES: tuple[Axis, ...] = (
    ("optimizer steps", lambda arm, point: point.step),
    ("FLOPs", lambda arm, point: arm.flops(point)),
    ("raw tokens", lambda arm, point: point.raw_tokens),
    ("seconds of training", lambda arm, point: point.seconds),
)
# Told apart by those who do not see colours, too (Okabe and Ito).
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table of the arms, the header first."""
    return [COLUMNS, *(_arm_row(arm) for arm in comparison.arms)]


def run_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The table of all runs, the header first."""
    rows: list[tuple[str, ...]] = [RUN_COLUMNS]
    for run in comparison.outcomes:
        result = run.result
        rows.append(
            (
                run.arm,
                f"{run.learning_rate:g}",
                str(run.seed),
                _loss(result.initial_eval_loss) if result else "missing",
                _loss(result.final_eval_loss) if result else "missing",
                run.status,
            )
        )
    return rows


def _arm_row(arm: ArmSummary) -> tuple[str, ...]:
    best = arm.best
    if best.mean_loss is None:
        return (arm.arm, "-", _without_loss(best), "-", _seeds(best), *["-"] * 7)
    end = best.curve[-1]
    memory = "-" if best.peak_memory_bytes is None else f"{_bytes(best.peak_memory_bytes)} ({best.memory_of})"
    difference = "-" if arm.difference is None else _with_sd(arm.difference, arm.difference_sd, "+.4f")
    reached: tuple[str, ...] = ("not reached" if arm.is_evaluated_between else "not measured",) * 2
    if arm.reached is not None:
        reached = (f"{arm.reached.step:,}", f"{arm.flops(arm.reached):.3g}")
    return (
        arm.arm,
        f"{best.learning_rate:g}",
        _with_sd(best.mean_loss, best.sd, ".4f"),
        "reference" if arm.arm == BASELINE else difference,
        _seeds(best),
        _count(end.raw_tokens),
        _count(end.latent_tokens),
        f"{arm.flops(end):.3g}",
        _duration(end.seconds),
        memory,
        *reached,
    )


def _without_loss(rate: RateSummary) -> str:
    return "diverged" if rate.diverged else "missing"


def _seeds(rate: RateSummary) -> str:
    parts = [str(len(rate.losses))]
    parts += [f"{len(rate.diverged)} diverged"] if rate.diverged else []
    parts += [f"{len(rate.missing)} missing"] if rate.missing else []
    return ", ".join(parts)


def _with_sd(value: float, sd: float | None, spec: str) -> str:
    return format(value, spec) + ("" if sd is None else f" ± {sd:.4f}")


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


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
    """The comparison as tables of text, for a terminal: one column an arm."""
    columns = [*zip(*table_rows(comparison), strict=True)]
    return "\n\n".join(
        [format_columns(columns), *([format_columns(run_rows(comparison))]), *comparison.notes]
    )


def format_comparison_markdown(comparison: Comparison, curves: str | None = None) -> str:
    """The comparison as a page of Markdown; `curves` names the picture beside it, if there is one."""
    parts = [f"# {TITLE}", markdown_table(table_rows(comparison)), *_captions(comparison)]
    if curves:
        parts.append(f"![Evaluation loss over steps, FLOPs, raw tokens and seconds]({curves})")
    parts += ["## All runs", markdown_table(run_rows(comparison)), *markdown_facts(comparison.facts)]
    if comparison.notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in comparison.notes)]
    return "\n\n".join(parts) + "\n"


def _captions(comparison: Comparison) -> list[str]:
    equal = {"flops": "FLOPs", "data": "raw tokens", "time": "measured time of training"}
    return [
        f"Equal {equal[comparison.budget]}. Loss: next-token, nats a token, at the end of training, mean ± standard deviation "
        "over seeds; vs baseline: mean difference of runs with the same seed. Tokens, FLOPs and time are those of one run."
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of Markdown, the header first; what Markdown or HTML would read is escaped."""
    header, *body = rows
    return "\n".join(
        f"| {' | '.join(map(_escape, line))} |" for line in [header, ["---"] * len(header), *body]
    )


def markdown_facts(facts: Mapping[str, str]) -> list[str]:
    """The section that says how runs were done, with the command as code; nothing if nothing is known of it."""
    lines = [
        f"- {_escape(name)}: {_code(value) if name == 'command' else _escape(value)}"
        for name, value in facts.items()
    ]
    return ["## How it was done", "\n".join(lines)] if lines else []


def _escape(text: str) -> str:
    return re.sub(r"([\\|*])", r"\\\1", text).replace("<", "&lt;")


def _code(text: str) -> str:
    """Text as a code span, which nothing in it ends."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def draw_curves(comparison: Comparison, axes: Any, axis: Axis) -> None:
    """Draw the mean curve of every arm over one axis, and each seed's thinly behind it."""
    label, position = axis
    drawn = False
    for number, arm in enumerate(comparison.arms):
        colour, style = COLOURS[number % len(COLOURS)], ("-", "--", "-.", ":")[number % 4]

        def line(
            curve: Sequence[CurvePoint], arm: ArmSummary = arm
        ) -> tuple[list[float], list[float | None]]:
            return [position(arm, point) for point in curve], [point.eval_loss for point in curve]

        for curve in arm.best.curves if len(arm.best.curves) > 1 else []:
            axes.plot(*line(curve), color=colour, alpha=0.25, linewidth=0.8)
        if arm.best.curve:
            drawn = True
            axes.plot(*line(arm.best.curve), style, color=colour, label=arm.arm, linewidth=1.8)
            switch = arm.plan.schedule.switch_step
            at_switch = next((point for point in arm.best.curve if point.step >= switch > 0), None)
            if at_switch is not None:
                x, y = line([at_switch])
                axes.plot(x, y, "o", color=colour, markersize=5)
    baseline = next((arm.best.mean_loss for arm in comparison.arms if arm.arm == BASELINE), None)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle=":", linewidth=1)
    tops = [loss for arm in comparison.arms if (loss := _loss_after(arm.best.curve, 0.1)) is not None]
    if tops:
        low = min(p.eval_loss or 0.0 for arm in comparison.arms for p in arm.best.curve)
        margin = 0.05 * (max(tops) - low) or 0.1
        axes.set_ylim(low - margin, max(tops) + margin)
    axes.locator_params(axis="x", nbins=6)
    axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    axes.set_xlabel(label)
    axes.set_ylabel("evaluation loss (nats)")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()


def _loss_after(curve: Sequence[CurvePoint], share: float) -> float | None:
    """The loss at the first evaluation after a share of the run."""
    later = [point for point in curve if point.step >= share * curve[-1].step and point.eval_loss is not None]
    return later[0].eval_loss if later else None


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw the loss over steps, FLOPs, raw tokens and seconds as a PNG.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, axis in zip(figure.subplots(2, 2).flat, AXES, strict=True):
        draw_curves(comparison, axes, axis)
    figure.savefig(path, dpi=120)
    return Path(path)


def render_html(comparison: Comparison) -> str:
    """The comparison as one page of HTML that needs nothing beside it, for screens of any width and for paper."""
    from jinja2 import Environment

    template = files("hf_tst.records").joinpath("templates/comparison.html").read_text(encoding="utf-8")
    header, *rows = table_rows(comparison)
    run_header, *runs = run_rows(comparison)
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=TITLE, captions=_captions(comparison), header=header, rows=rows, run_header=run_header, runs=runs,
        facts=comparison.facts, notes=comparison.notes, pictures=_pictures(comparison),
    )  # fmt: skip


def _pictures(comparison: Comparison) -> list[tuple[str, str]]:
    """What each curve shows, and it, as base64 of a PNG; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    pictures = []
    for axis in AXES:
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        draw_curves(comparison, figure.subplots(), axis)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160, format="png")
        pictures.append(
            (f"Evaluation loss over {axis[0]}", base64.b64encode(buffer.getvalue()).decode("ascii"))
        )
    return pictures


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `comparison.json`, `.md`, `.html` and, with matplotlib, `.png` into a folder, and return their paths."""
    folder = Path(folder)
    written = [folder / f"comparison.{ending}" for ending in ("json", "md", "html")]
    try:
        curves: Path | None = plot_comparison(comparison, folder / "comparison.png")
    except ImportError:
        curves = None
    pages = (
        json.dumps(comparison_to_dict(comparison), indent=2) + "\n",
        format_comparison_markdown(comparison, curves.name if curves else None),
        render_html(comparison),
    )
    for path, text in zip(written, pages, strict=True):
        path.write_text(text, encoding="utf-8")
    return [*written, *([curves] if curves else [])]
