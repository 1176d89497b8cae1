"""What a run did, phase by phase, from the log history in its `trainer_state.json`: a table, and a plot of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .run_record import phase_of

LogHistory = Sequence[Mapping[str, Any]]
PHASE_COLUMNS = (
    "phase", "steps", "raw tokens", "latent tokens", "loss first", "loss last", "eval", "expert load first",
    "expert load last",
)  # fmt: skip


def phase_rows(log_history: LogHistory) -> list[tuple[str, ...]]:
    """The table of a run's phases, the header first.

    Losses are in nats: a bag's mean cross entropy in superposition, next-token in recovery. The load of experts, where it was
    logged, is the smallest and the largest of one logged interval, 1 being balance; see [`ExpertLoadMeter`]. The last load of
    superposition and the first of recovery are those on the two sides of the switch.

    Args:
        log_history: As in `TrainerState`, with [`TSTTrainer`]'s entries.
    """
    rows: list[tuple[str, ...]] = [PHASE_COLUMNS]
    step = raw_tokens = latent_tokens = 0
    last_phase = next((phase_of(entry) for entry in reversed(log_history) if phase_of(entry)), None)
    for phase in ("superposition", "recovery"):
        entries = [entry for entry in log_history if phase_of(entry) == phase]
        counted = [entry for entry in entries if "tst_raw_tokens" in entry]
        if not counted:
            continue
        first, last = (
            counted[0],
            counted[-1],
        )  # the last one may be Trainer's summary, beyond the last logged loss
        losses = [entry for entry in counted if "loss" in entry]
        ends = (losses[0], losses[-1]) if losses else ({}, {})
        # The evaluation after training belongs to no phase, so to the last one.
        phases = (phase, None) if phase == last_phase else (phase,)
        here = [
            entry for entry in log_history if phase_of(entry) in phases and entry["step"] >= first["step"]
        ]
        evaluations = [f"{entry['eval_loss']:.3f}" for entry in here if "eval_loss" in entry]
        row = (
            phase,
            f"{step}-{last['step'] - 1}",
            f"{last['tst_raw_tokens'] - raw_tokens:,}",
            f"{last['tst_latent_tokens'] - latent_tokens:,}",
            *(f"{_own_loss(entry):.3f}" if entry else "-" for entry in ends),
            evaluations[-1] if evaluations else "-",
            *map(_expert_load, ends),
        )
        rows.append(row)
        step, raw_tokens, latent_tokens = last["step"], last["tst_raw_tokens"], last["tst_latent_tokens"]
    has_loads = any(row[-2] != "-" for row in rows[1:])
    return rows if has_loads else [row[:-2] for row in rows]


def _own_loss(entry: Mapping[str, Any]) -> float:
    """The loss of the saved model, without the part of extra heads."""
    return entry["loss"] - entry.get("mtp_loss", 0.0)


def _expert_load(entry: Mapping[str, Any]) -> str:
    if "tst_expert_load_max" not in entry:
        return "-"
    return f"{entry['tst_expert_load_min']:.2f}-{entry['tst_expert_load_max']:.2f}"


def plot_loss_curve(log_history: LogHistory, path: str | Path, switch_step: int | None = None) -> Path:
    """Draw training and evaluation loss over steps as a PNG, with the phase switch marked.

    Args:
        log_history: As in `TrainerState`.
        path: Where to write the picture.
        switch_step (`int`, *optional*): First step of recovery.

    Raises:
        ImportError: If matplotlib is not installed (extra `plot`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = {"superposition": "training loss on bags", "recovery": "training loss, next token"}
    for phase, label in labels.items():
        trained = [e for e in log_history if "loss" in e and phase_of(e) == phase]
        if trained:
            axes.plot([e["step"] for e in trained], [_own_loss(e) for e in trained], label=label)
    evaluated = [e for e in log_history if "eval_loss" in e]
    if evaluated:
        steps, losses = [e["step"] for e in evaluated], [e["eval_loss"] for e in evaluated]
        axes.plot(steps, losses, "o--", color="black", markersize=4, label="evaluation loss, next token")
    if switch_step:
        axes.axvline(switch_step, color="grey", linestyle=":")
        axes.text(switch_step, 0.96, " switch", transform=axes.get_xaxis_transform(), va="top")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return Path(path)
