"""Token Superposition Training for Hugging Face Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .bags.collator import DataCollatorForTokenSuperposition
    from .bags.phases import PhaseSchedule
    from .bags.weighting import input_weights, offset_weights
    from .data.packing import BlockStream, pack_blocks, tokenize_documents
    from .errors import PreemptedError, RunError, TSTError
    from .evaluation.scores import METRIC_FILE, evaluate_checkpoint, evaluate_tasks, score_texts
    from .losses.linear import linear_multi_hot_cross_entropy
    from .losses.multi_hot import count_target_bags, multi_hot_cross_entropy
    from .models.sharding import full_state_dict, left_out_of_optimizer
    from .models.superposition import fused_evaluation_loss, fused_next_token_loss, token_superposition
    from .mtp.heads import MTPHeads, multi_token_prediction
    from .planning.flops import step_flops
    from .training.arguments import TSTTrainingArguments
    from .training.trainer import TSTTrainer

# Public name -> module. Modules are imported when a name is first used, so `import hf_tst` costs nothing.
_MODULES = {
    "BlockStream": "data.packing",
    "DataCollatorForTokenSuperposition": "bags.collator",
    "METRIC_FILE": "evaluation.scores",
    "MTPHeads": "mtp.heads",
    "PhaseSchedule": "bags.phases",
    "PreemptedError": "errors",
    "RunError": "errors",
    "TSTError": "errors",
    "TSTTrainer": "training.trainer",
    "TSTTrainingArguments": "training.arguments",
    "count_target_bags": "losses.multi_hot",
    "evaluate_checkpoint": "evaluation.scores",
    "evaluate_tasks": "evaluation.scores",
    "full_state_dict": "models.sharding",
    "fused_evaluation_loss": "models.superposition",
    "fused_next_token_loss": "models.superposition",
    "input_weights": "bags.weighting",
    "left_out_of_optimizer": "models.sharding",
    "linear_multi_hot_cross_entropy": "losses.linear",
    "multi_hot_cross_entropy": "losses.multi_hot",
    "multi_token_prediction": "mtp.heads",
    "offset_weights": "bags.weighting",
    "pack_blocks": "data.packing",
    "score_texts": "evaluation.scores",
    "step_flops": "planning.flops",
    "token_superposition": "models.superposition",
    "tokenize_documents": "data.packing",
}

__all__ = [
    "METRIC_FILE",
    "BlockStream",
    "DataCollatorForTokenSuperposition",
    "MTPHeads",
    "PhaseSchedule",
    "PreemptedError",
    "RunError",
    "TSTError",
    "TSTTrainer",
    "TSTTrainingArguments",
    "__version__",
    "count_target_bags",
    "evaluate_checkpoint",
    "evaluate_tasks",
    "full_state_dict",
    "fused_evaluation_loss",
    "fused_next_token_loss",
    "input_weights",
    "left_out_of_optimizer",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
    "multi_token_prediction",
    "offset_weights",
    "pack_blocks",
    "score_texts",
    "step_flops",
    "token_superposition",
    "tokenize_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
