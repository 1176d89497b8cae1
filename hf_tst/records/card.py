"""The model card of a run, written from the run's own record and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .report import markdown_table, phase_rows, plot_loss_curve, summarize_phases
from .run import RunRecord, run_entry, timed_steps

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

logger = logging.get_logger(__name__)

CURVE_FILE = "loss_curve.png"
# A card with this tag was written by a trainer, and may be written anew.
GENERATED_TAG = "generated_from_trainer"
LIMITS = (
    "The figures above are this run's own log. Nothing else was evaluated: no downstream task, no bias, no safety. "
    "Compare with a baseline of the same budget before concluding anything from them."
)


def write_model_card(
    folder: str | Path, record: RunRecord, *, repo_id: str | None = None, **metadata: Any
) -> Path | None:
    """Write `README.md`, and the loss curve it shows, into a model's folder.

    Args:
        folder: Where the model is saved.
        record (`RunRecord`): The run.
        repo_id (`str`, *optional*): Name of the model's repository; that of the folder by default.
        metadata: See [`make_model_card`].

    Returns:
        The card's path; `None` if the folder holds a card that no trainer wrote, which is left as it is.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not _is_generated(path):
        return None
    curve = _draw_curve(record, folder)
    make_model_card(record, repo_id=repo_id or folder.absolute().name, curve=curve, **metadata).save(path)
    return path


def _is_generated(path: Path) -> bool:
    """Whether a trainer wrote the card; one that cannot be read is somebody's own."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        return GENERATED_TAG in (ModelCard.load(path).data.tags or [])
    except (yaml.YAMLError, ValueError):
        return False


def make_model_card(
    record: RunRecord,
    *,
    repo_id: str,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    curve: str | None = None,
) -> ModelCard:
    """The card itself.

    Args:
        record (`RunRecord`): The run.
        repo_id (`str`): Name of the model's repository, or of its folder.
        base_model (`str`, *optional*): Hub id of the model that training started from; the record's by default.
        datasets (`str` or `Sequence[str]`, *optional*): Hub ids of the training data.
        language, license, tags (*optional*): Further metadata.
        curve (`str`, *optional*): File name of the loss curve beside the card.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    arguments, base_model = record.arguments, base_model or record.base_model
    superposed = record.switch_step > 0
    model_name = repo_id.split("/")[-1]
    evaluation = _evaluation(record.evaluation)
    data = ModelCardData(
        model_name=model_name,
        library_name=record.library_name,
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=_listed(datasets) or None,
        language=language or None,
        license=license,
        tags=list(
            dict.fromkeys([*_listed(tags), GENERATED_TAG, *(["token-superposition"] if superposed else [])])
        ),
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="evaluation-data",
                dataset_name="evaluation data of the run",
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in evaluation.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        model_name=model_name,
        repo_id=repo_id,
        library_name=record.library_name,
        base_model=base_model,
        superposed=superposed,
        switch_step=record.switch_step,
        max_steps=record.max_steps,
        steps_done=record.max_steps if record.global_step is None else record.global_step,
        phase_ratio=arguments.get("tst_phase_ratio"),
        bag_size=arguments.get("tst_bag_size"),
        mode=arguments.get("tst_mode"),
        offset_weighting=arguments.get("tst_offset_weighting"),
        input_weighting=arguments.get("tst_input_weighting", "uniform"),
        mtp_num_heads=arguments.get("mtp_num_heads", 1),
        mtp_kind=arguments.get("mtp_kind"),
        phase_table=markdown_table(phase_rows(summarize_phases(record.log_history))),
        curve=curve,
        facts=_facts(record),
        evaluation={name: f"{value:.4f}" for name, value in evaluation.items()},
        limits=LIMITS,
    )


def write_card_of_trainer(trainer: Any, **metadata: Any) -> None:
    """Write the card of a [`TSTTrainer`]'s run into its output folder; `metadata` as for [`make_model_card`]."""
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    switch_step = trainer.schedule.switch_step if trainer.schedule else 0
    now = run_entry(trainer.args, model, switch_step, trainer.get_total_train_batch_size(trainer.args))
    written = write_model_card(output_dir, RunRecord.from_state(vars(trainer.state), now), **metadata)
    if written is None:
        logger.warning(
            f"{output_dir / 'README.md'} is a card of your own and stays as it is: move it away to have one written "
            "from the run."
        )
    elif now["library_name"] == "peft":
        model.create_or_update_model_card(str(output_dir))


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _evaluation(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {
        name.removeprefix("eval_"): float(value)
        for name, value in metrics.items()
        if name.startswith("eval_")
        and isinstance(value, (int, float))
        and not name.endswith(("_runtime", "_per_second"))
    }
    if "loss" in found and found["loss"] < 700:
        found["perplexity"] = math.exp(found["loss"])
    return found


def _facts(record: RunRecord) -> dict[str, str]:
    arguments = record.arguments
    facts = {
        "parameters": f"{record.parameters:,}",
        "rows an optimizer step": f"{record.rows_per_step:,}",
        "optimizer": f"{arguments.get('optim')}, learning rate {arguments.get('learning_rate'):g}, "
        f"schedule {arguments.get('lr_scheduler_type')}",
        "seed": str(arguments.get("seed")),
        "FLOPs": f"{record.total_flos:.3g}",
        "hardware": record.hardware,
        "software": record.software,
    }
    timed = timed_steps(record.log_history)
    if timed:
        facts["seconds of training, without evaluation"] = f"{sum(part.seconds for part in timed):.0f}"
    measured = [part for part in timed if part.utilization is not None]
    if measured:
        seconds = sum(part.seconds for part in measured)
        mean = sum(part.seconds * (part.utilization or 0) for part in measured) / seconds
        facts["model FLOPs utilization"] = f"{mean:.1%} of {record.peak_tflops:g} TFLOP/s per device"
    return facts


def _draw_curve(record: RunRecord, folder: Path) -> str | None:
    try:
        plot_loss_curve(
            [dict(entry) for entry in record.log_history], folder / CURVE_FILE, record.switch_step
        )
    except ImportError:  # matplotlib is an extra
        return None
    return CURVE_FILE
