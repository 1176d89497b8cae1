"""How many steps each arm takes within one budget: equal FLOPs, equal data or equal time. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..bags.phases import PhaseSchedule
from ..errors import TSTError
from ..models.shape import ModelShape
from ..mtp.heads import MTPKind
from ..planning.flops import flops_per_token

Budget = Literal["flops", "data", "time"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
UNITS: Mapping[Budget, str] = {"flops": "FLOPs", "data": "raw tokens", "time": "seconds"}
# How far from the budget whole steps may lie.
TOLERANCE = 0.01


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step takes of a budget, by phase: FLOPs, raw tokens, or seconds."""

    superposition: float
    recovery: float

    def of_run(self, schedule: PhaseSchedule) -> float:
        """What a whole run takes."""
        switch = schedule.switch_step
        return switch * self.superposition + (schedule.max_steps - switch) * self.recovery


def flops_per_step(
    shape: ModelShape, length: int, latent_tokens: int, heads: int = 1, kind: MTPKind = "parallel"
) -> StepCost:
    """FLOPs of a step of an arm, by phase, see [`step_flops`].

    Args:
        shape (`ModelShape`): The model.
        length (`int`): Latent positions per row, l.
        latent_tokens (`int`): Latent tokens per step, over all devices.
        heads (`int`, defaults to 1), kind (`str`): Heads of multi-token prediction, which train in recovery only.
    """
    return StepCost(
        superposition=latent_tokens * flops_per_token(shape, length, "superposition"),
        recovery=latent_tokens * flops_per_token(shape, length, "recovery", heads, kind),
    )


def raw_tokens_per_step(schedule: PhaseSchedule, latent_tokens: int) -> StepCost:
    """Raw tokens that a step reads, by phase, with `latent_tokens` latent tokens a step."""
    return StepCost(latent_tokens * schedule.blocks_per_row, latent_tokens)


def steps_within_budget(
    budget: Budget, costs: Mapping[str, StepCost], schedules: Mapping[str, PhaseSchedule]
) -> dict[str, int]:
    """Optimizer steps of every arm that take as much of the budget.

    The configured number of steps is that of the baseline (the first arm, if there is none), and with equal data that of
    the arm that reads most in so many steps. The others take more or fewer.

    Args:
        budget (`str`): `"flops"`, `"data"` or `"time"`.
        costs (`dict[str, StepCost]`): What a step takes of it, by arm.
        schedules (`dict[str, PhaseSchedule]`): The phases by arm, for the configured number of steps.

    Raises:
        TSTError: If whole steps of an arm cannot come within 1 % of the budget.
    """
    totals = {name: costs[name].of_run(schedule) for name, schedule in schedules.items()}
    reference = "baseline" if "baseline" in totals else next(iter(totals))
    if budget == "data":
        reference = max(totals, key=lambda name: totals[name])
    target = totals[reference]
    steps = {name: _nearest_steps(costs[name], schedule, target) for name, schedule in schedules.items()}
    for name, count in steps.items():
        total = costs[name].of_run(replace(schedules[name], max_steps=count))
        if abs(total - target) > TOLERANCE * target:
            raise TSTError(
                f"The arm {name} cannot be equal to {reference} in {UNITS[budget]}: {count} steps take {total:.4g}, and the "
                f"budget is {target:.4g}, more than {TOLERANCE:.0%} away. Raise max_steps, or leave the arm out."
            )
    return steps


def _nearest_steps(cost: StepCost, schedule: PhaseSchedule, target: float) -> int:
    ratio = schedule.phase_ratio
    about = round(target / (ratio * cost.superposition + (1 - ratio) * cost.recovery))
    near = [max(1, about + offset) for offset in range(-3, 4)]
    return min(near, key=lambda count: abs(cost.of_run(replace(schedule, max_steps=count)) - target))


def with_steps(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A configuration that takes `steps` optimizer steps, with the stages of its learning rate schedule as long in proportion.

    Warm-up, decay and stable stages that are counted in steps are scaled; fractions stay.
    """
    before = values["max_steps"]
    changed = {**values, "max_steps": steps}
    if steps == before:
        return changed

    def scale(count: float) -> int:
        return max(1, round(count * steps / before))

    warmup = values.get("warmup_steps") or 0
    if warmup >= 1:
        changed["warmup_steps"] = scale(warmup)
    options = values.get("lr_scheduler_kwargs") or {}
    changed["lr_scheduler_kwargs"] = {
        name: scale(value) if (name.endswith("_steps") or name == "timescale") and value else value
        for name, value in options.items()
    }
    return changed
