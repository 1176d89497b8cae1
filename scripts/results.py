#!/usr/bin/env python
"""Write the tables of docs/results.md and README, and their plots, from the comparisons on record in model_cards/comparisons.

python scripts/results.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tables import ROOT, write_table

from hf_tst.records.text_tables import markdown_table

RECORDS = ROOT / "model_cards" / "comparisons"
IMAGES = ROOT / "docs" / "images" / "results"
S4, SWEEPS = "s4-r0.3-uniform-full", ("prose-16k-sweep", "prose-16k-sweep-seeds")
COLORS = ("#0072b2", "#d55e00", "#009e73")


@dataclass(frozen=True)
class Row:
    """A row of a table: one arm against its baseline.

    Args:
        labels (`tuple[str, ...]`): The first cells of the row.
        record (`str`): Folder of `model_cards/comparisons`, and name of the configuration that makes it.
        arm (`str`): Its arm.
        rate (`float`, *optional*): Learning rate of both; by default each arm's best.
        also (`tuple[str, ...]`, *optional*): Records with further seeds, or with the baseline.
        also_arm (`str`, *optional*): Name of the arm in them, if it has another one there.
    """

    labels: tuple[str, ...]
    record: str
    arm: str = "tst"
    rate: float | None = None
    also: tuple[str, ...] = ()
    also_arm: str | None = None

    def losses(self, arm: str, also_arm: str) -> dict[str, float]:
        """The final evaluation losses of an arm, by seed."""
        found = read_losses(self.record, arm, self.rate)
        for record in self.also:
            found = read_losses(record, also_arm, self.rate) | found
        return dict(sorted(found.items()))

    @property
    def baseline(self) -> dict[str, float]:
        """The losses of the baseline, by seed."""
        return self.losses("baseline", "baseline")

    @property
    def differences(self) -> list[float]:
        """The loss minus the baseline's, seed by seed."""
        ours, base = self.losses(self.arm, self.also_arm or self.arm), self.baseline
        return [loss - base[seed] for seed, loss in ours.items()]


def read_losses(record: str, arm: str, rate: float | None = None) -> dict[str, float]:
    """The final evaluation losses of an arm in a record, by seed; empty if the record has no such arm."""
    (path,) = (RECORDS / record).glob("*.json")
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for cell in known.get("cells", []):  # of a sweep, in the form that sweeps had first
        if cell["name"] == arm:
            return cell["final_eval_losses"]
    for found in known.get("arms", []):
        if found["arm"] == arm:
            rates = found["learning_rates"] if rate else [found["best"]]
            (chosen,) = (each for each in rates if rate in (None, each["learning_rate"]))
            return chosen["final_eval_losses"]
    return {}


STEPS = (1000, 4000, 16000)
# By weights of input and targets: the runs of each length, where there are any.
WEIGHTINGS = {
    (inputs, targets): {
        steps: Row((f"{steps:,}", inputs, targets), f"bag-weighting-{steps}", f"tst{name}{power}")
        for steps in STEPS
        if read_losses(f"bag-weighting-{steps}", f"tst{name}{power}")
    }
    for inputs, name in (("uniform", ""), ("linear", "-linear"), ("exponential", "-exponential"))
    for targets, power in (("uniform", ""), ("power law", "-power"))
}

MEAN, LINEAR = "mean of the bag (the paper)", "linear input, power-law targets"


def by_weighting(record: str, *also: str) -> dict[str, Row]:
    """The runs of a record with each of the two weightings, where it has any."""
    arms = {MEAN: "tst", LINEAR: "tst-linear-power"}
    rows = {name: Row((), record, arm, also=also) for name, arm in arms.items()}
    return {name: row for name, row in rows.items() if row.differences}


# What README shows: the runs by steps, on the text that is read at most once.
CURVE = {
    1000: by_weighting("one-pass-1000"),
    4000: by_weighting("one-pass-4000"),
    16000: by_weighting("one-pass-16000"),
    64000: by_weighting("one-pass-64000", "one-pass-64000-more", "one-pass-64000-linear"),
}
# By steps, text and vocabulary: the runs of each length.
LENGTHS = {
    ("1,000", "prose", "16k"): by_weighting("bag-weighting-1000"),
    ("4,000", "prose", "16k"): by_weighting("bag-weighting-4000"),
    ("16,000", "prose", "16k"): by_weighting("bag-weighting-16000"),
    ("16,000, older", "prose", "16k"): by_weighting("prose-16k-16000"),
    ("16,000, rate 5e-4", "prose", "16k"): by_weighting("prose-16k-5e-4"),
    ("4,000", "prose", "32k"): by_weighting("prose-32k-4000"),
    ("8,000", "prose", "32k"): by_weighting("prose-32k-8000"),
    **{(f"{steps:,}", "mixed", "16k"): runs for steps, runs in CURVE.items()},
    ("16,000, rate 2e-3", "mixed", "16k"): by_weighting("one-pass-16000-2e-3"),
}  # fmt: skip


# By question: the columns that tell rows apart, and the rows.
QUESTIONS: dict[str, tuple[tuple[str, ...], Sequence[Row]]] = {
    "steps": (
        ("steps", "text", "vocabulary", "bag weights"),
        [
            replace(runs[name], labels=(*labels, weights))
            for name, weights in ((MEAN, "uniform"), (LINEAR, "linear, power law"))
            for labels, runs in LENGTHS.items()
            if name in runs
        ],
    ),
    "vocabulary": (
        ("vocabulary", "width"),
        [
            Row(("1k", "64"), "prose-1k"),
            Row(("4k", "256"), "prose-4k-d256"),
            Row(("16k", "64"), SWEEPS[1], S4, also=SWEEPS[:1]),
            Row(("16k", "256"), "prose-16k-d256"),
            Row(("32k", "64"), "prose-32k-4000"),
        ],
    ),
    "tokens": (
        ("tokens per step", "learning rate"),
        [
            Row(("256", "2e-3"), SWEEPS[1], S4, also=SWEEPS[:1]),
            Row(("2,048", "1e-3"), "prose-16k-2048-rates", rate=1e-3),
            Row(("2,048", "2e-3"), "prose-16k-2048"),
            Row(("2,048", "4e-3"), "prose-16k-2048-rates", rate=4e-3),
        ],
    ),
    "text": (
        ("text",),
        [
            Row(("prose",), SWEEPS[1], S4, also=SWEEPS[:1]),
            Row(("code",), "code-16k-4000"),
        ],
    ),
    "bag-size": (
        ("s",),
        [
            Row(("2",), "prose-16k-s2", also=SWEEPS, also_arm="s2-r0.3-uniform-full"),
            Row(("3",), SWEEPS[1], "s3-r0.3-uniform-full", also=SWEEPS[:1]),
            Row(("4",), SWEEPS[1], S4, also=SWEEPS[:1]),
            Row(("6",), SWEEPS[0], "s6-r0.3-uniform-full"),
            Row(("8",), SWEEPS[0], "s8-r0.3-uniform-full"),
        ],
    ),
    "rows": (
        ("s", "superposition rows", "bag weights"),
        [
            Row(("4", "longer", "uniform"), "bag-size-rows-4000"),
            Row(("4", "more", "uniform"), "bag-size-rows-4000", "tst-more"),
            Row(("8", "longer", "uniform"), "bag-size-rows-4000", "tst-s8"),
            Row(("8", "longer", "linear, power law"), "bag-size-rows-4000", "tst-s8-linear-power"),
        ],
    ),
    "bag-weighting": (
        ("steps", "input", "targets"),
        [runs[steps] for steps in STEPS for runs in WEIGHTINGS.values() if steps in runs],
    ),
    "offset-weighting": (
        ("targets",),
        [
            Row(("uniform",), SWEEPS[1], S4, also=SWEEPS[:1]),
            *(
                Row((weighting.replace("_", " "),), "prose-16k-weightings", f"s4-r0.3-{weighting}-full", also=SWEEPS)
                for weighting in ("power_law", "fitted_power_law", "exponential", "first_token")
            ),
        ],
    ),
    "mode": (
        ("mode",),
        [
            Row(("full",), SWEEPS[1], S4, also=SWEEPS[:1]),
            *(
                Row((mode,), "prose-16k-modes", f"s4-r0.3-uniform-{mode}", also=SWEEPS)
                for mode in ("input", "output")
            ),
        ],
    ),
    "gpu": (
        ("parameters", "steps", "latent tokens", "s"),
        [Row(("83M", "1,500", "25M", "6"), "100m-gpu-1500")],
    ),
    "mtp": (
        ("arm", "weight of the extra head"),
        [
            Row(("TST", ""), "mtp-weight-4000"),
            *(
                Row((name, weight.replace("-", " ")), "mtp-weight-4000", f"{arm}-{weight}")
                for name, arm in (("MTP", "mtp"), ("TST and MTP", "tst+mtp"))
                for weight in ("0.1", "0.3-to-0.1", "1")
            ),
        ],
    ),
}  # fmt: skip


def describe(values: Sequence[float], spec: str) -> str:
    """Mean ± standard deviation, without a sign for a difference that rounds to 0."""
    mean = statistics.mean(values)
    text = format(mean if f"{abs(mean):.3f}" != "0.000" else 0.0, spec)
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"


def make_table(name: str) -> str:
    """The table of a question. A record that all rows share stands below it, others in the rows."""
    columns, rows = QUESTIONS[name]
    shared = len({row.record for row in rows}) == 1
    cells = [(*columns, "baseline", "loss - baseline", "seeds ahead", *(() if shared else ("record",)))]
    for row in rows:
        apart = row.differences
        ahead = f"{sum(each < 0 for each in apart)} of {len(apart)}"
        figures = describe([*row.baseline.values()], ".3f"), describe(apart, "+.3f"), ahead
        cells.append((*row.labels, *figures, *(() if shared else (link_record(row.record),))))
    table = markdown_table(cells)
    return f"{table}\n\nRecord: {link_record(rows[0].record)}." if shared else table


def link_record(record: str) -> str:
    """Links to a record's page and to its configuration."""
    (page,) = (RECORDS / record).glob("*.md")
    return f"[page](../model_cards/comparisons/{record}/{page.name}), [YAML](../scripts/configs/comparisons/{record}.yaml)"


def make_weightings() -> str:
    """The differences by weights of input and targets, a column per number of steps; the baseline first."""
    columns = WEIGHTINGS["uniform", "uniform"]
    cells = [("input", "targets", *(f"{steps:,} steps" for steps in STEPS))]
    cells.append(("baseline", "", *(describe([*row.baseline.values()], ".3f") for row in columns.values())))
    for labels, runs in WEIGHTINGS.items():
        cells.append(
            (
                *labels,
                *(describe(runs[steps].differences, "+.3f") if steps in runs else "" for steps in STEPS),
            )
        )
    links = "; ".join(f"{steps:,} steps: {link_record(row.record)}" for steps, row in columns.items())
    return f"{markdown_table(cells)}\n\nRecords, three seeds each: {links}."


def make_grid() -> str:
    """The losses of the sweep, bag size against phase ratio."""
    ratios = (0.1, 0.2, 0.3, 0.4)
    rows = [
        (str(size), *(f"{read_losses(SWEEPS[0], f's{size}-r{ratio}-uniform-full')['0']:.3f}" for ratio in ratios))
        for size in (2, 3, 4, 6, 8)
    ]  # fmt: skip
    return markdown_table([("s", *(f"r = {ratio}" for ratio in ratios)), *rows])


def make_lengths() -> str:
    """The differences to the baseline by steps, text and vocabulary, a column per weighting."""
    cells: list[tuple[str, ...]] = [
        ("steps", "text", "vocabulary", "baseline", MEAN, LINEAR, "seeds", "record")
    ]
    for labels, runs in LENGTHS.items():
        mean = runs[MEAN]
        record = link_record(mean.record)
        cells.append((*labels, *describe_runs(runs), str(len(mean.differences)), record))
    return markdown_table(cells)


def make_summary() -> str:
    """README's table: the difference to the baseline by steps."""
    cells = [("steps", "baseline", f"TST, {MEAN}", f"TST, {LINEAR}")]
    return markdown_table([*cells, *((f"{steps:,}", *describe_runs(runs)) for steps, runs in CURVE.items())])


def describe_runs(runs: Mapping[str, Row]) -> tuple[str, ...]:
    """The loss of the baseline, and the difference to it with each of the two weightings; empty without runs."""
    apart = (describe(runs[name].differences, "+.3f") if name in runs else "" for name in (MEAN, LINEAR))
    return (describe([*runs[MEAN].baseline.values()], ".3f"), *apart)


def draw_rows(name: str) -> Any:
    """The differences of a question's rows, with the standard deviation over seeds, as a figure."""
    from matplotlib.figure import Figure

    rows = QUESTIONS[name][1]
    figure = Figure(figsize=(7.2, 0.9 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        apart = row.differences
        mean = statistics.mean(apart)
        spread = statistics.stdev(apart) if len(apart) > 1 else 0.0
        color = COLORS[0] if mean + spread < 0 else COLORS[1] if mean - spread > 0 else "#666666"
        axes.errorbar(mean, place, xerr=spread, fmt="o", color=color, capsize=3)
        axes.plot(apart, [place] * len(apart), "|", color=color, alpha=0.5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [", ".join(row.labels) for row in rows])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("loss minus the baseline's (nats)\nleft of 0, TST is ahead")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_summary() -> Any:
    """README's plot: the difference over the number of steps, with its spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, color, style in zip((MEAN, LINEAR), COLORS, ("o-", "s--"), strict=False):
        apart = [runs[name].differences for runs in CURVE.values()]
        means, spreads = [*map(statistics.mean, apart)], [*map(statistics.stdev, apart)]
        axes.errorbar([*CURVE], means, yerr=spreads, fmt=style, color=color, capsize=4, label=f"TST, {name}")
    axes.axhline(0, color="black", linewidth=1)
    axes.text(max(CURVE), 0.004, "baseline", ha="right")
    axes.set_xscale("log")
    axes.set_xticks([*CURVE], [f"{steps:,}" for steps in CURVE])
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps of the run")
    axes.set_ylabel("loss minus the baseline's (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def all_tables() -> list[tuple[str, str, str]]:
    """File, name between the markers, and table."""
    found = {"steps": make_lengths(), "bag-weighting": make_weightings(), "grid": make_grid()}
    found |= {name: make_table(name) for name in QUESTIONS if name not in found}
    tables = [("docs/results.md", name, table) for name, table in found.items()]
    return [*tables, ("README.md", "results", make_summary())]


if __name__ == "__main__":
    for file, name, text in all_tables():
        write_table(file, name, text)
    IMAGES.mkdir(exist_ok=True)
    for name in QUESTIONS:
        draw_rows(name).savefig(IMAGES / f"{name}.png", dpi=110)
    draw_summary().savefig(IMAGES.parent / "results.png", dpi=120)
