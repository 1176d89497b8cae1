"""The tables of a comparison: its arms, the panels of a grid, where arms differ, and all runs."""

from __future__ import annotations

from ..records.text_tables import format_bytes
from .arms import BASELINE
from .budget import ArmRun
from .loss_breakdown import breakdown_tables
from .summary import ArmSummary, Comparison, RateSummary, rank

COLUMNS = (
    "arm", "best learning rate", "final eval loss", "vs baseline", "seeds", "raw tokens", "latent tokens", "FLOPs",
    "time", "peak memory", "steps to baseline's loss", "FLOPs to it",
)  # fmt: skip
RUN_COLUMNS = ("arm", "learning rate", "seed", "initial eval loss", "final eval loss", "status")
Rows = list[tuple[str, ...]]
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
        **breakdown_tables(comparison),
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
        return (arm.arm, "-", format_loss(best), "-", seeds, *["-"] * 7)
    end, reached = best.curve[-1], arm.reached_baseline_loss
    memory = best.peak_memory_bytes and f"{format_bytes(best.peak_memory_bytes)} ({best.memory_of})"
    difference = "reference" if arm.arm == BASELINE else "-"
    if arm.difference_to_baseline is not None:
        difference = _with_sd(arm.difference_to_baseline, arm.difference_to_baseline_sd, "+.4f")
    not_reached = "not reached" if arm.differences_to_baseline and len(best.curve) > 2 else "not measured"
    return (
        arm.arm,
        f"{best.learning_rate:g}",
        format_loss(best),
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
    return format_loss(rate) + (f" ({', '.join(left_out)})" if left_out and rate.final_eval_losses else "")


def format_loss(rate: RateSummary) -> str:
    """Mean ± standard deviation of the final losses, or why there is none."""
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


def lowest_cell(comparison: Comparison) -> ArmSummary | None:
    """The cell with the lowest mean loss, of those with the most runs that ended well; `None` if no run did."""
    cells = [arm for arm in comparison.arms if arm.arm in comparison.grid and arm.best.curve]
    return min(cells, key=lambda arm: rank(arm.best), default=None)
