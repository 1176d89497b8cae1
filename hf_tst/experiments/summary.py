"""Summary of the runs of a comparison: means over seeds, the best learning rate of each arm, and when each arm reached the baseline's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from .arms import BASELINE, Arm
from .budget import ArmRun
from .result import CurvePoint

# Fields that only the pictures use.
NOT_IN_JSON = ("switch", "curves")


@dataclass(frozen=True)
class ArmPoint(CurvePoint):
    """A point of an arm's curve, with the FLOPs until it."""

    flops: float


@dataclass(frozen=True)
class RateSummary:
    """An arm at one learning rate, over the seeds whose runs ended well; losses in nats per token.

    The mean is `None` if no run did, `sd` (of a sample) if fewer than two did. `curves` has one curve per seed, all with
    the steps at which every seed was evaluated, and `curve` is their mean.
    """

    learning_rate: float
    mean_final_eval_loss: float | None
    sd_final_eval_loss: float | None
    final_eval_losses: dict[int, float]
    diverged_seeds: list[int]
    missing_seeds: list[int]
    peak_memory_bytes: int | None
    memory_of: str
    curve: list[ArmPoint]
    curves: list[list[ArmPoint]]


@dataclass(frozen=True)
class ArmSummary:
    """An arm at its best learning rate, with the others beside it.

    `differences_to_baseline` are the loss minus the baseline's with the same seed, by seed; `difference_to_baseline` is their mean.
    `reached_baseline_loss` is the first evaluation at which the mean loss is at or below the baseline's final one, both over the seeds
    that both have; `None` if it never is, or if there are no evaluations between start and end. `switch` is the point where
    superposition ends, with a loss interpolated between evaluations.
    """

    arm: str
    best: RateSummary
    difference_to_baseline: float | None
    difference_to_baseline_sd: float | None
    differences_to_baseline: dict[int, float]
    reached_baseline_loss: ArmPoint | None
    learning_rates: list[RateSummary]
    switch: ArmPoint | None


@dataclass(frozen=True)
class Comparison:
    """All arms. `facts` describes the runs, `notes` has what a reader must know.

    `grid` has the changes of a sweep's arms, by name. It is empty for other comparisons.
    """

    budget: str
    facts: Mapping[str, str]
    notes: list[str]
    grid: Mapping[str, Mapping[str, Any]]
    arms: list[ArmSummary]
    runs: Sequence[ArmRun]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values, for JSON. Losses in nats per token, times in seconds, memory in bytes."""

        def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in pairs if name not in NOT_IN_JSON}

        of_result = ("final_eval_loss", "initial_eval_loss", "hardware", "software")
        runs = [
            {
                "name": run.name, "arm": run.arm.name, "learning_rate": run.settings["learning_rate"],
                "seed": run.settings["seed"], "status": run.status,
                **{name: getattr(run.result, name, None) for name in of_result},
            }
            for run in self.runs
        ]  # fmt: skip
        return asdict(replace(self, runs=()), dict_factory=plain) | {"runs": runs}


def compare_runs(
    budget: str,
    runs: Sequence[ArmRun],
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    grid: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Summarize the runs. Diverged and missing runs are named, but are in no mean.

    Args:
        budget (`str`): The equal budget.
        runs: All planned runs, of the arms in their order.
        facts, notes, grid: See [`Comparison`]; further notes are added.
    """
    grouped: dict[str, dict[float, list[ArmRun]]] = {}
    for run in runs:
        by_rate = grouped.setdefault(run.arm.name, {})
        by_rate.setdefault(run.settings["learning_rate"], []).append(run)
    rates = {
        name: [_summarize_rate(*of_rate) for of_rate in by_rate.items()] for name, by_rate in grouped.items()
    }
    baseline = min(rates[BASELINE], key=rank) if BASELINE in rates else None
    arms = [
        _summarize_arm(arm, rates[arm.name], baseline)
        for arm in {run.arm.name: run.arm for run in runs}.values()
    ]
    return Comparison(budget, facts or {}, [*notes, *_notes(arms, runs)], grid or {}, arms, runs)


def _summarize_rate(rate: float, runs: Sequence[ArmRun]) -> RateSummary:
    statuses = ("finished", "diverged", "missing")
    seeds = {name: [run.settings["seed"] for run in runs if run.status == name] for name in statuses}
    results = [run.result for run in runs if run.result is not None and run.status == "finished"]
    losses, flops = [result.final_eval_loss or 0.0 for result in results], runs[0].arm.flops_until
    curves = [
        [ArmPoint(**vars(point), flops=flops(point.step, point.latent_tokens)) for point in result.curve]
        for result in results
    ]
    curves = _at_shared_steps(curves)
    return RateSummary(
        rate,
        *_mean_and_sd(losses),
        final_eval_losses=dict(zip(seeds["finished"], losses, strict=True)),
        diverged_seeds=seeds["diverged"],
        missing_seeds=seeds["missing"],
        peak_memory_bytes=max((result.peak_memory_bytes or 0 for result in results), default=0) or None,
        memory_of=results[0].memory_of if results else "",
        curve=_mean_curve(curves),
        curves=curves,
    )


def rank(rate: RateSummary) -> tuple[int, float]:
    """Sort key: the best rate comes first. It has the most runs that ended well and, of those, the lowest mean loss."""
    return -len(rate.final_eval_losses), rate.mean_final_eval_loss or 0.0


def _at_shared_steps(curves: Sequence[Sequence[ArmPoint]]) -> list[list[ArmPoint]]:
    """The curves at the steps that all of them have: a resumed run has one more, where it resumed."""
    steps = [{point.step for point in curve} for curve in curves]
    return [[point for point in curve if all(point.step in known for known in steps)] for curve in curves]


def _mean_curve(curves: Sequence[Sequence[ArmPoint]]) -> list[ArmPoint]:
    """The mean of curves with the same steps."""
    return [_mean_point(points) for points in zip(*curves, strict=True)]


def _mean_point(points: Sequence[ArmPoint]) -> ArmPoint:
    losses = [point.eval_loss for point in points if point.eval_loss is not None]
    return replace(
        points[0],
        raw_tokens=round(mean(point.raw_tokens for point in points)),
        seconds=mean(point.seconds for point in points),
        eval_loss=mean(losses) if len(losses) == len(points) else None,
    )


def _summarize_arm(arm: Arm, rates: list[RateSummary], baseline: RateSummary | None) -> ArmSummary:
    best, reached = min(rates, key=rank), None
    differences: dict[int, float] = {}
    ours, theirs = best.final_eval_losses, baseline.final_eval_losses if baseline else {}
    pairs = [(seed, curve) for seed, curve in zip(ours, best.curves, strict=True) if seed in theirs]
    if pairs and len(best.curve) > 2:
        target, curve = mean(theirs[seed] for seed, _ in pairs), _mean_curve([curve for _, curve in pairs])
        reached = next((p for p in curve if p.eval_loss is not None and p.eval_loss <= target), None)
    if arm.name != BASELINE:
        differences = {seed: ours[seed] - theirs[seed] for seed in sorted(seed for seed, _ in pairs)}
    middle = _mean_and_sd([*differences.values()])
    return ArmSummary(arm.name, best, *middle, differences, reached, rates, _switch_point(arm, best.curve))


def _switch_point(arm: Arm, curve: Sequence[ArmPoint]) -> ArmPoint | None:
    """The end of superposition on a curve; `None` without superposition, or if the curve ends before it."""
    step = arm.schedule.switch_step
    after = next((place for place, point in enumerate(curve) if point.step >= step), 0)
    if not step or not after:
        return None
    before, end = curve[after - 1], curve[after]
    share = (step - before.step) / (end.step - before.step)
    loss = None
    if before.eval_loss is not None and end.eval_loss is not None:
        loss = before.eval_loss + share * (end.eval_loss - before.eval_loss)
    per_step = end.latent_tokens // end.step
    return ArmPoint(
        step=step,
        raw_tokens=arm.schedule.amount_read(step, per_step),
        latent_tokens=step * per_step,
        seconds=before.seconds + share * (end.seconds - before.seconds),
        eval_loss=loss,
        flops=arm.flops_until(step, step * per_step),
    )


def _mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; `None` if there are too few values."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def _notes(arms: Sequence[ArmSummary], runs: Sequence[ArmRun]) -> list[str]:
    notes = []
    for status in ("diverged", "missing"):
        names = [run.name for run in runs if run.status == status]
        if names:
            notes.append(f"Left out of the means, because {status}: {', '.join(names)}.")
    for arm in arms:
        tried = sorted(rate.learning_rate for rate in arm.learning_rates)
        edge = {tried[0]: "lowest", tried[-1]: "highest"}.get(arm.best.learning_rate)
        if edge and len(tried) > 1 and arm.best.final_eval_losses:
            notes.append(
                f"{arm.arm}: the best learning rate is the {edge} of those tried, so a better one may be outside this range."
            )
    alone = [arm.arm for arm in arms if len(arm.best.final_eval_losses) == 1]
    if alone:
        notes.append(f"{', '.join(alone)}: one run only, so the spread between seeds is unknown.")
    return notes
