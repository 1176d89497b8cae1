"""The model card of a run, written only from the record of the run; `templates/model_card.md` has its text."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
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
METHOD_TAG = "token-superposition"
_SEAL = re.compile(r"<!-- written by hf_tst from the record of the run: (\w+) -->")


def write_model_card(
    folder: str | Path, record: RunRecord, *, repo_id: str | None = None, **metadata: Any
) -> Path:
    """Write `README.md`, and the loss curve it shows, into a model's folder.

    Args:
        folder: Where the model is saved.
        record (`RunRecord`): The run.
        repo_id (`str`, *optional*): Name of the model's repository; the folder by default.
        metadata: See [`make_model_card`]. What is not given is kept from the card that is there.

    Returns:
        The card's path.

    Raises:
        TSTError: If the folder holds a card that no trainer wrote, or that was edited since; it is not changed. The curve is written.
    """
    folder = Path(folder)
    path = folder / "README.md"
    curve: str | None = CURVE_FILE
    try:
        plot_loss_curve(record.log_history, folder / CURVE_FILE, record.switch_step)
    except ImportError:  # matplotlib is an extra
        curve = None
    if path.exists():
        if (owner := why_kept(path)) is not None:
            raise TSTError(
                f"{path} {owner}, and is not overwritten: move it away to get the card of the run."
            )
        metadata = _kept_metadata(path, record) | {name: value for name, value in metadata.items() if value}
    here = str(folder if folder.name else folder.absolute())
    make_model_card(record, repo_id=repo_id or here, curve=curve, **metadata).save(path)
    return path


def why_kept(path: Path) -> str | None:
    """Why a card must not be overwritten, as the end of a sentence; `None` if a trainer wrote all of its text, or PEFT an empty one.

    An unreadable card counts as the user's own.
    """
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    own = "was not written by a trainer"
    try:
        card = ModelCard.load(path)
    except (yaml.YAMLError, ValueError):
        return own
    if (seal := _SEAL.search(card.text)) is not None:
        return None if seal[1] == _digest(card.text) else "was edited after it was written"
    # An adapter is saved with the empty template.
    empty = ModelCard.from_template(ModelCardData()).text.splitlines()
    is_empty = {*_lines(card.text)} <= {*empty}
    return None if is_empty or GENERATED_TAG in (card.data.tags or []) else own


def _lines(text: str) -> list[str]:
    """The lines of a card that are not empty, without the seal and the lines that PEFT adds to the card of an adapter."""
    added = ("### Framework versions", "- PEFT")
    return [line for line in _SEAL.sub("", text).splitlines() if line.strip() and not line.startswith(added)]


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(_lines(text)).encode()).hexdigest()[:16]


def _seal(card: ModelCard) -> ModelCard:
    """Put a hash of a card's text at its end, by which it is seen later whether the card was edited."""
    text = _SEAL.sub("", card.text).rstrip()
    card.text = f"{text}\n\n<!-- written by hf_tst from the record of the run: {_digest(text)} -->\n"
    return card


def _kept_metadata(path: Path, record: RunRecord) -> dict[str, Any]:
    """The metadata of a card that its next version keeps: what the record of the run does not have."""
    from huggingface_hub import ModelCard

    kept: dict[str, Any] = ModelCard.load(path).data.to_dict()
    kept["tags"] = [tag for tag in kept.get("tags") or [] if tag not in (GENERATED_TAG, METHOD_TAG)]
    of_record = ["model_name", "model-index", "eval_results", "library_name", "pipeline_tag"]
    if record.library_name == "peft":
        of_record.append("base_model")  # where PEFT writes a local folder
    return {name: value for name, value in kept.items() if name not in of_record}


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
    **others: Any,
) -> ModelCard:
    """The card itself.

    Args:
        record (`RunRecord`): The run.
        repo_id (`str`): Name of the model's repository, or of its folder.
        base_model (`str`, *optional*): Hub id of the model that training started from; the record's by default.
        datasets (`str` or `Sequence[str]`, *optional*): Hub ids of the training data.
        language, license, tags (*optional*): Further metadata.
        curve (`str`, *optional*): File name of the loss curve beside the card.
        others: Metadata under other names.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    model_name, evaluation = repo_id.split("/")[-1], _evaluation(record.evaluation)
    method_tags = [METHOD_TAG] if record.switch_step > 0 else []
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
        **others,
    )
    timed = timed_steps(record.log_history)
    measured = [(part.seconds, part.utilization) for part in timed if part.utilization is not None]
    used, seconds = sum(s * share for s, share in measured), sum(s for s, _ in measured)
    # The template also reads the metadata, such as `base_model`.
    card = ModelCard.from_template(
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
    return _seal(card)


def write_card_of_trainer(trainer: Any, *positional: Any, **kwargs: Any) -> None:
    """Write the card of a [`TSTTrainer`]'s run into its output folder; arguments as for `Trainer.create_model_card`."""
    from transformers import Trainer

    given = inspect.signature(Trainer.create_model_card).bind(trainer, *positional, **kwargs).arguments
    names = {"finetuned_from": "base_model", "dataset": "datasets"}
    names |= {name: name for name in ("language", "license", "tags")}
    metadata = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    repo_id = trainer.hub_model_id or given.get("model_name")
    output_dir = Path(trainer.args.output_dir)
    now = run_note(trainer)
    record = RunRecord.from_state(vars(trainer.state), now)
    try:
        path = write_model_card(output_dir, record, repo_id=repo_id, **metadata)
    except TSTError as error:
        logger.warning(error)
        return
    if now["library_name"] == "peft":
        from huggingface_hub import ModelCard

        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(output_dir))
        _seal(ModelCard.load(path)).save(path)  # PEFT may have added how the model is quantized


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
