"""What the runs of a comparison say together: means over seeds, the best learning rate of each arm, who reached what when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

from ..bags.phases import PhaseSchedule
from .budget import StepCost
from .result import CurvePoint, RunResult

BASELINE = "baseline"


@dataclass(frozen=True)
class Outcome:
    """A planned run and what came of it.

    Args:
        name, arm (`str`), learning_rate (`float`), seed (`int`): The run.
        result (`RunResult`, *optional*): `None` if it is not finished.
    """

    name: str
    arm: str
    learning_rate: float
    seed: int
    result: RunResult | None

    @property
    def status(self) -> str:
        """`"finished"`, `"diverged"` or `"missing"`."""
        if self.result is None:
            return "missing"
        return "diverged" if self.result.has_diverged else "finished"


@dataclass(frozen=True)
class ArmPlan:
    """An arm before it ran: its phases, and floating point operations a latent token, by phase."""

    schedule: PhaseSchedule
    operations: StepCost

    def flops(self, step: int, latent_tokens: int) -> float:
        """Floating point operations of the first `step` steps, which computed `latent_tokens` positions."""
        if not step:
            return 0.0
        switch = min(step, self.schedule.switch_step)
        done = switch * self.operations.superposition + (step - switch) * self.operations.recovery
        return done * latent_tokens / step


@dataclass(frozen=True)
class RateSummary:
    """An arm at one learning rate, over the seeds whose runs ended well; losses in nats a token.

    `mean_loss` is `None` if no run did, `sd` (of a sample) if fewer than two did. `curve` is the mean over seeds, at the
    steps at which all were evaluated.
    """

    learning_rate: float
    losses: dict[int, float]
    mean_loss: float | None
    sd: float | None
    diverged: list[int]
    missing: list[int]
    curve: list[CurvePoint]
    curves: list[list[CurvePoint]]
    peak_memory_bytes: int | None
    memory_of: str


@dataclass(frozen=True)
class ArmSummary:
    """An arm at its best learning rate, with the others beside it.

    `reached` is the first evaluation at which the mean loss is down to the baseline's final one; `None` if it never is, or
    if nobody looked: `is_evaluated_between` says whether there are evaluations between the start and the end.
    `difference` is the mean over seeds of the loss minus the baseline's with the same seed, with its `difference_sd`.
    """

    arm: str
    plan: ArmPlan
    best: RateSummary
    rates: list[RateSummary]
    reached: CurvePoint | None
    difference: float | None
    difference_sd: float | None

    @property
    def is_evaluated_between(self) -> bool:
        """Whether there are evaluations between the start and the end of training."""
        return len(self.best.curve) > 2

    def flops(self, point: CurvePoint) -> float:
        """Floating point operations until a point of the curve."""
        return self.plan.flops(point.step, point.latent_tokens)


@dataclass(frozen=True)
class Comparison:
    """All arms. `facts` says how the runs were done, `notes` what a reader must know.

    `grid` has what the arms of a sweep change, by name; it is empty for other comparisons.
    """

    budget: str
    arms: list[ArmSummary]
    outcomes: list[Outcome]
    facts: Mapping[str, str]
    notes: list[str]
    grid: Mapping[str, Mapping[str, Any]]


def compare_outcomes(
    budget: str,
    plans: Mapping[str, ArmPlan],
    outcomes: Sequence[Outcome],
    facts: Mapping[str, str] = MappingProxyType({}),
    notes: Sequence[str] = (),
    grid: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Comparison:
    """Put the runs together. Runs that diverged or are missing are named, and in no mean.

    Args:
        budget (`str`): What is equal.
        plans (`dict[str, ArmPlan]`): The arms, in their order.
        outcomes: All planned runs.
        facts, notes, grid: See [`Comparison`]; further notes are added.
    """
    rates: dict[str, list[RateSummary]] = {}
    for name in plans:
        by_rate: dict[float, list[Outcome]] = {}
        for run in outcomes:
            if run.arm == name:
                by_rate.setdefault(run.learning_rate, []).append(run)
        rates[name] = [summarize_rate(runs) for runs in by_rate.values()]
    baseline = best_rate(rates[BASELINE]) if BASELINE in rates else None
    arms = [_summarize_arm(name, plan, rates[name], baseline) for name, plan in plans.items()]
    return Comparison(budget, arms, list(outcomes), facts, [*notes, *_notes(arms, outcomes)], grid)


def summarize_rate(runs: Sequence[Outcome]) -> RateSummary:
    """Runs of one arm and learning rate, over their seeds."""
    good = {run.seed: run.result for run in runs if run.status == "finished" and run.result is not None}
    losses = {seed: result.final_eval_loss or 0.0 for seed, result in good.items()}
    mean_loss, sd = _mean_and_sd(list(losses.values()))
    curves = [result.curve for result in good.values()]
    return RateSummary(
        learning_rate=runs[0].learning_rate,
        losses=losses,
        mean_loss=mean_loss,
        sd=sd,
        diverged=[run.seed for run in runs if run.status == "diverged"],
        missing=[run.seed for run in runs if run.status == "missing"],
        curve=mean_curve(curves),
        curves=curves,
        peak_memory_bytes=max((r.peak_memory_bytes or 0 for r in good.values()), default=0) or None,
        memory_of=next((result.memory_of for result in good.values()), ""),
    )


def best_rate(rates: Sequence[RateSummary]) -> RateSummary:
    """The rate of the lowest mean loss, of those at which most runs ended well."""
    most = max(len(rate.losses) for rate in rates)
    return min(
        (rate for rate in rates if len(rate.losses) == most),
        key=lambda rate: float("inf") if rate.mean_loss is None else rate.mean_loss,
    )


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean of curves, at the steps that all of them have."""
    if not curves:
        return []
    by_step = [{point.step: point for point in curve} for curve in curves]
    common = [point.step for point in curves[0] if all(point.step in points for points in by_step)]
    return [_mean_point([points[step] for points in by_step]) for step in common]


def _mean_point(points: Sequence[CurvePoint]) -> CurvePoint:
    losses = [point.eval_loss for point in points]
    return CurvePoint(
        step=points[0].step,
        raw_tokens=round(mean(point.raw_tokens for point in points)),
        latent_tokens=points[0].latent_tokens,
        seconds=mean(point.seconds for point in points),
        eval_loss=None if None in losses else mean(loss for loss in losses if loss is not None),
    )


def _summarize_arm(
    name: str, plan: ArmPlan, rates: list[RateSummary], baseline: RateSummary | None
) -> ArmSummary:
    best, reached, differences = best_rate(rates), None, []
    target = baseline.mean_loss if baseline else None
    if target is not None and len(best.curve) > 2:
        reached = next((p for p in best.curve if p.eval_loss is not None and p.eval_loss <= target), None)
    if baseline is not None and name != BASELINE:
        seeds = best.losses.keys() & baseline.losses.keys()
        differences = [best.losses[seed] - baseline.losses[seed] for seed in sorted(seeds)]
    return ArmSummary(name, plan, best, rates, reached, *_mean_and_sd(differences))


def _mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation of a sample; `None` where there are too few."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def _notes(arms: Sequence[ArmSummary], outcomes: Sequence[Outcome]) -> list[str]:
    notes = []
    for status in ("diverged", "missing"):
        names = [run.name for run in outcomes if run.status == status]
        if names:
            notes.append(f"{status}, and in no mean: {', '.join(names)}.")
    for arm in arms:
        tried = sorted(rate.learning_rate for rate in arm.rates)
        edge = {tried[0]: "lowest", tried[-1]: "highest"}.get(arm.best.learning_rate)
        if edge and len(tried) > 1 and arm.best.mean_loss is not None:
            notes.append(
                f"{arm.arm}: the best learning rate is the {edge} of those tried, so a better one may lie beyond it."
            )
    alone = [arm.arm for arm in arms if len(arm.best.losses) == 1]
    if alone:
        notes.append(f"{', '.join(alone)}: one run only, so nothing is said about the spread between seeds.")
    return notes


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for JSON. Losses in nats per token, times in seconds, memory in bytes."""

    def point(arm: ArmSummary, at: CurvePoint) -> dict[str, Any]:
        return {**asdict(at), "flops": arm.flops(at)}

    def rate(arm: ArmSummary, at: RateSummary) -> dict[str, Any]:
        return {
            "learning_rate": at.learning_rate,
            "mean_final_eval_loss": at.mean_loss,
            "sd_final_eval_loss": at.sd,
            "final_eval_losses": {str(seed): loss for seed, loss in at.losses.items()},
            "diverged_seeds": at.diverged,
            "missing_seeds": at.missing,
            "peak_memory_bytes": at.peak_memory_bytes,
            "memory_of": at.memory_of,
            "curve": [point(arm, p) for p in at.curve],
        }

    of_run = ("name", "arm", "learning_rate", "seed", "status")
    of_result = ("final_eval_loss", "initial_eval_loss", "hardware", "software")
    return {
        "budget": comparison.budget,
        "facts": dict(comparison.facts),
        "notes": comparison.notes,
        "grid": {name: dict(changes) for name, changes in comparison.grid.items()},
        "arms": [
            {
                "arm": arm.arm,
                "best": rate(arm, arm.best),
                "difference_to_baseline": arm.difference,
                "difference_to_baseline_sd": arm.difference_sd,
                "reached_baseline_loss": arm.reached and point(arm, arm.reached),
                "learning_rates": [rate(arm, at) for at in arm.rates],
            }
            for arm in comparison.arms
        ],
        "runs": [
            {name: getattr(run, name) for name in of_run}
            | {name: getattr(run.result, name, None) for name in of_result}
            for run in comparison.outcomes
        ],
    }
