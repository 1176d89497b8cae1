"""Differences between arms by frequency of the target token and by position in the row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from ..evaluation.breakdown import CLASSES
from .arms import BASELINE
from .summary import ArmSummary, Comparison

TITLES = {
    "Loss by frequency of the target token": "loss_by_frequency",
    "Loss by position in the row": "loss_by_position",
}
ENDS = {"loss_by_frequency": ("most frequent", "rarest"), "loss_by_position": ("start", "end")}


def breakdown_tables(comparison: Comparison) -> dict[str, list[tuple[str, ...]]]:
    """Titles and rows, the header first: the baseline's loss in each tenth of the evaluation text, then how much other arms differ.

    A difference is the mean over seeds, in nats, of runs at each arm's best learning rate. Empty without a baseline, or if the runs
    have no such losses.
    """
    baseline = next((arm for arm in comparison.arms if arm.arm == BASELINE), None)
    tables = {}
    for title, field in TITLES.items():
        theirs = _by_seed(comparison, baseline, field) if baseline else {}
        if not theirs:
            continue
        first, last = ENDS[field]
        header = ("arm", f"1 ({first})", *map(str, range(2, CLASSES)), f"{CLASSES} ({last})")
        rows = [header, (BASELINE, *_means(theirs.values(), ".3f"))]
        for arm in comparison.arms:
            ours = _by_seed(comparison, arm, field) if arm.arm != BASELINE else {}
            if shared := ours.keys() & theirs.keys():
                differences = [
                    [a if a is None or b is None else a - b for a, b in zip(ours[s], theirs[s], strict=True)]
                    for s in shared
                ]
                rows.append((arm.arm, *_means(differences, "+.3f")))
        tables[title] = rows
    return tables


def _by_seed(comparison: Comparison, arm: ArmSummary, field: str) -> dict[int, list[float | None]]:
    """The ten means of the finished runs of an arm at its best learning rate."""
    found = {}
    for run in comparison.runs:
        is_best = run.arm.name == arm.arm and run.settings["learning_rate"] == arm.best.learning_rate
        if is_best and run.status == "finished" and (values := getattr(run.result, field)):
            found[run.settings["seed"]] = values
    return found


def _means(rows: Iterable[Sequence[float | None]], spec: str) -> list[str]:
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return [format(mean(column), spec) if column else "-" for column in columns]
