"""The model card of a run, written only from the record of the run; `templates/model_card.md` has its text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import TSTError
from .phase_table import phase_rows, plot_loss_curve
from .run_record import RunRecord, run_note, timed_steps
from .text_tables import markdown_table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

logger = logging.get_logger(__name__)

CURVE_FILE = "loss_curve.png"
# A card with this tag was written by a trainer, and may be overwritten.
GENERATED_TAG = "generated_from_trainer"


def write_model_card(
    folder: str | Path, record: RunRecord, *, repo_id: str | None = None, **metadata: Any
) -> Path:
    """Write `README.md`, and the loss curve it shows, into a model's folder.

    Args:
        folder: Where the model is saved.
        record (`RunRecord`): The run.
        repo_id (`str`, *optional*): Name of the model's repository; the folder by default.
        metadata: See [`make_model_card`].

    Returns:
        The card's path.

    Raises:
        TSTError: If the folder holds a card that no trainer wrote; it is not changed. The curve is written.
    """
    folder = Path(folder)
    path = folder / "README.md"
    curve: str | None = CURVE_FILE
    try:
        plot_loss_curve(record.log_history, folder / CURVE_FILE, record.switch_step)
    except ImportError:  # matplotlib is an extra
        curve = None
    if path.exists() and not _is_generated(path):
        raise TSTError(
            f"{path} was not written by a trainer, and is not overwritten: move it away to get the card of the run."
        )
    here = str(folder if folder.name else folder.absolute())
    make_model_card(record, repo_id=repo_id or here, curve=curve, **metadata).save(path)
    return path


def _is_generated(path: Path) -> bool:
    """Whether a trainer wrote the card, or PEFT an empty one. An unreadable card counts as the user's own."""
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    try:
        card = ModelCard.load(path)
    except (yaml.YAMLError, ValueError):
        return False
    # An adapter is saved with the empty template, and PEFT's version at its end.
    empty = ModelCard.from_template(ModelCardData()).text.splitlines()
    added = [line for line in card.text.splitlines() if line.strip() and line not in empty]
    is_empty = all(line.startswith(("### Framework versions", "- PEFT")) for line in added)
    return is_empty or GENERATED_TAG in (card.data.tags or [])


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

    model_name, evaluation = repo_id.split("/")[-1], _evaluation(record.evaluation)
    method_tags = ["token-superposition"] if record.switch_step > 0 else []
    source = ("text-generation", "evaluation-data", "evaluation data of the run")
    results = [EvalResult(*source, name, value, metric_name=name) for name, value in evaluation.items()]
    data = ModelCardData(
        model_name=model_name,
        library_name=record.library_name,
        pipeline_tag="text-generation",
        base_model=base_model or record.base_model,
        datasets=_listed(datasets) or None,
        language=language or None,
        license=license,
        tags=list(dict.fromkeys([*_listed(tags), GENERATED_TAG, *method_tags])),
        eval_results=results or None,
    )
    timed = timed_steps(record.log_history)
    measured = [(part.seconds, part.utilization) for part in timed if part.utilization is not None]
    used, seconds = sum(s * share for s, share in measured), sum(s for s, _ in measured)
    # The template also reads the metadata, such as `base_model`.
    return ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        model_name=model_name,
        repo_id=repo_id,
        record=record,
        phase_table=markdown_table(phase_rows(record.log_history)),
        curve=curve,
        seconds=sum(part.seconds for part in timed),
        utilization=used / seconds if measured else None,
        raw_tokens=max((entry.get("tst_raw_tokens", 0) for entry in record.log_history), default=0),
        evaluation=evaluation,
    )


def write_card_of_trainer(trainer: Any, *positional: Any, **kwargs: Any) -> None:
    """Write the card of a [`TSTTrainer`]'s run into its output folder; arguments as for `Trainer.create_model_card`."""
    from transformers import Trainer

    given = inspect.signature(Trainer.create_model_card).bind(trainer, *positional, **kwargs).arguments
    names = {"finetuned_from": "base_model", "dataset": "datasets"}
    names |= {name: name for name in ("language", "license", "tags")}
    metadata = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    repo_id = trainer.hub_model_id or given.get("model_name")
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    switch_step = trainer.schedule.switch_step if trainer.schedule else 0
    now = run_note(trainer.args, model, switch_step, trainer.get_total_train_batch_size(trainer.args))
    record = RunRecord.from_state(vars(trainer.state), now)
    try:
        write_model_card(output_dir, record, repo_id=repo_id, **metadata)
    except TSTError as error:
        logger.warning(error)
        return
    if now["library_name"] == "peft":
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
