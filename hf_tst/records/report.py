"""What a run did, phase by phase, from the log history in its `trainer_state.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LogHistory = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PhaseSummary:
    """One phase of a run. Losses in nats: a bag's mean cross entropy in superposition, next-token in recovery.

    The load of experts is the smallest and the largest of one logged interval, 1 being balance; see
    [`ExpertLoadMeter`]. The last of superposition and the first of recovery lie on the two sides of the switch.
    """

    phase: str
    first_step: int
    last_step: int
    raw_tokens: int
    latent_tokens: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    first_expert_load: tuple[float, float] | None = None
    last_expert_load: tuple[float, float] | None = None


def summarize_phases(log_history: LogHistory) -> list[PhaseSummary]:
    """The phases of a run in order; `log_history` as in `TrainerState`, with [`TSTTrainer`]'s entries."""
    summaries: list[PhaseSummary] = []
    done_step = done_raw = done_latent = 0
    for phase in ("superposition", "recovery"):
        entries = [entry for entry in log_history if entry.get("tst_phase") == phase]
        losses = [entry for entry in entries if "loss" in entry and "tst_raw_tokens" in entry]
        if not losses:
            continue
        evals = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
        last = losses[-1]
        summaries.append(
            PhaseSummary(
                phase=phase,
                first_step=done_step,
                last_step=last["step"] - 1,
                raw_tokens=last["tst_raw_tokens"] - done_raw,
                latent_tokens=last["tst_latent_tokens"] - done_latent,
                first_loss=_own_loss(losses[0]),
                last_loss=_own_loss(last),
                eval_loss=evals[-1] if evals else None,
                first_expert_load=_expert_load(losses[0]),
                last_expert_load=_expert_load(last),
            )
        )
        done_step, done_raw, done_latent = last["step"], last["tst_raw_tokens"], last["tst_latent_tokens"]
    return summaries


def _own_loss(entry: Mapping[str, Any]) -> float:
    """The loss of the model that is saved: without what extra heads have added to it."""
    return entry["loss"] - entry.get("mtp_loss", 0.0)


def _expert_load(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    if "tst_expert_load_max" not in entry:
        return None
    return entry["tst_expert_load_min"], entry["tst_expert_load_max"]


def format_phases(summaries: Sequence[PhaseSummary]) -> str:
    """The summaries as a table of text."""
    return format_columns(phase_rows(summaries))


def format_columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table of Markdown, the header first."""
    header, *body = rows
    return "\n".join(
        f"| {' | '.join(map(escape_markdown, line))} |" for line in [header, ["---"] * len(header), *body]
    )


def escape_markdown(text: str) -> str:
    """Text in which Markdown and HTML read nothing."""
    return re.sub(r"([\\|*])", r"\\\1", text).replace("<", "&lt;")


def phase_rows(summaries: Sequence[PhaseSummary]) -> list[tuple[str, ...]]:
    """The table of the phases, the header first; with the load of experts, smallest and largest, where it was logged."""
    header = ("phase", "steps", "raw tokens", "latent tokens", "loss first", "loss last", "eval loss")
    rows: list[tuple[str, ...]] = [
        (
            summary.phase,
            f"{summary.first_step}-{summary.last_step}",
            f"{summary.raw_tokens:,}",
            f"{summary.latent_tokens:,}",
            f"{summary.first_loss:.3f}",
            f"{summary.last_loss:.3f}",
            "-" if summary.eval_loss is None else f"{summary.eval_loss:.3f}",
            *map(_format_load, (summary.first_expert_load, summary.last_expert_load)),
        )
        for summary in summaries
    ]
    rows.insert(0, (*header, "expert load first", "expert load last"))
    has_loads = any(summary.first_expert_load for summary in summaries)
    return rows if has_loads else [row[: len(header)] for row in rows]


def _format_load(load: tuple[float, float] | None) -> str:
    return "-" if load is None else f"{load[0]:.2f}-{load[1]:.2f}"


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
        trained = [e for e in log_history if "loss" in e and e.get("tst_phase") == phase]
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
