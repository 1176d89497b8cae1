"""The one configuration that all runs of a comparison change, and the facts known before any run."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batches.blocks import check_blocks
from ..errors import TSTError
from ..models.fused import check_fusable
from ..models.shape import ModelShape
from ..models.superposition import find_language_model
from ..mtp.heads import MTPHeads
from ..pretraining.options import TRAINING, micro_batches, pick
from ..pretraining.parts import load_parts
from ..training.arguments import TSTTrainingArguments
from .arms import Arm, check_arms, make_arm, setting
from .options import ExperimentArguments


@dataclass(frozen=True)
class Experiment:
    """One configuration, its arms, and the facts known before any run.

    Args:
        args (`ExperimentArguments`): How runs are planned and done.
        values (`dict`): The configuration, as a file holds it; missing values have their defaults.
        arms (`list[Arm]`): The arms.
        shape (`ModelShape`): The model.
        block_size (`int`): Tokens per block, L.
        rows_per_step (`int`, *optional*): Over all devices; `None` if a launcher decides it.
        blocks (`int`, *optional*): Of training data; `None` for a stream.
        inputs (`dict`): Fingerprints of the blocks of `"training data"` and `"evaluation data"`, and what [`describe_model`] returns.
    """

    args: ExperimentArguments
    values: Mapping[str, Any]
    arms: Sequence[Arm]
    shape: ModelShape
    block_size: int
    rows_per_step: int | None
    blocks: int | None
    inputs: Mapping[str, Any]

    @property
    def output_dir(self) -> Path:
        """Where the runs and the report go."""
        return Path(self.values["output_dir"])


def open_experiment(values: dict[str, Any], args: ExperimentArguments) -> Experiment:
    """Load data and model once, before any run: bad input is refused at once, and data is packed once.

    Args:
        values, args: What [`parse_experiment`] returns.

    Raises:
        TSTError: If a run would be refused, or there is no data to evaluate on.
    """
    changes = args.select_arms(values)
    check_arms(changes, values)
    model_args, data_args, training = (pick(values, part) for part in TRAINING)
    accumulated = micro_batches(Namespace(**vars(training) | vars(data_args)), world_size=1)
    parts, block_size = load_parts(model_args, data_args, training)
    if parts["eval_dataset"] is None:
        raise TSTError("There is no data to evaluate on: set validation_file or validation_split_percentage.")
    try:
        check_fusable(find_language_model(parts["model"])[1], "on")
    except TSTError:
        values["tst_fused_loss"] = "off"
    if any(arm.get("mtp_num_heads", 1) > 1 for arm in changes.values()):
        MTPHeads(parts["model"], 2, setting(values, "mtp_kind"))  # raises if the model does not support them
    shape = ModelShape.from_config(parts["model"].config, model_args.lora_config())
    arms = [make_arm(name, arm, values, shape, block_size) for name, arm in changes.items()]
    for arm in arms:
        pick(arm.values, TSTTrainingArguments)  # raises if the arm contradicts itself
    rows = training.per_device_train_batch_size * accumulated
    blocks = {"training": parts["train_dataset"], "evaluation": parts["eval_dataset"]}
    sized = {name: part for name, part in blocks.items() if hasattr(part, "__len__")}
    return Experiment(
        args=args,
        values=values,
        arms=arms,
        shape=shape,
        block_size=block_size,
        rows_per_step=rows if args.launcher is None or values.get("tokens_per_step") else None,
        blocks=len(sized["training"]) if "training" in sized else None,
        inputs={
            f"{name} data": check_blocks(part).data if name in sized else part.fingerprint
            for name, part in blocks.items()
        }
        | describe_model(parts["model"], has_weights=bool(model_args.model_name_or_path)),
    )


def describe_model(model: Any, has_weights: bool) -> dict[str, Any]:
    """The fields of a model's configuration and, of a trained model, a fingerprint of its input embeddings."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    del fields["transformers_version"]
    if has_weights:
        weights = model.get_input_embeddings().weight.detach().cpu().contiguous().view(torch.uint8)
        fields["weights"] = hashlib.sha256(weights.numpy()).hexdigest()[:16]
    return {f"model {name}": value for name, value in fields.items()}
