"""Load weights that have other names in a checkpoint than in the model, such as experts. Trainer does not load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


class _View(torch.Tensor):
    """A tensor whose slices stay views: `contiguous` makes no copy."""

    def contiguous(self, *args: Any, **kwargs: Any) -> _View:
        return self


def load_renamed_weights(model: Any, folder: str | Path) -> None:
    """Load weights whose names in an ordinary checkpoint differ from the model's.

    `save_pretrained` writes experts one by one, but the model holds them as one tensor per layer. When `Trainer` resumes, or
    loads the best model, it skips them with a warning. Here each is copied into its slice of the model's tensor. If a weight is
    not a slice of one tensor, the whole checkpoint is loaded a second time.

    Args:
        model (`PreTrainedModel`): The model, not sharded.
        folder: A folder with `model.safetensors`, or its shards and their index.
    """
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    files = _files_of_weights(Path(folder))
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    renamed = set(state) - set(files) - set(tied)
    if not files or not renamed:
        return
    # By name in the checkpoint, the slice of the model's tensor.
    places = revert_weight_conversion(
        model, {name: state[name].as_subclass(_View) for name in sorted(renamed)}
    )
    storages = {state[name].untyped_storage().data_ptr() for name in renamed}
    if all(place.untyped_storage().data_ptr() in storages for place in places.values()):
        for path in sorted({files[name] for name in places if name in files}):
            with safe_open(path, framework="pt") as file:
                for name in places.keys() & set(file.keys()):
                    places[name].copy_(file.get_tensor(name))
        return
    # The dtype in the configuration may differ from that of the parameters. float32 holds the shorter ones exactly.
    is_full = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    dtype = torch.float32 if is_full else model.dtype
    loaded = type(model).from_pretrained(folder, config=model.config, dtype=dtype).state_dict()
    model.load_state_dict({name: loaded[name] for name in renamed}, strict=False)


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """The file of each weight, by the weight's name."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
