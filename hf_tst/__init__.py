"""Token Superposition Training for Hugging Face Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .bags.collator import DataCollatorForTokenSuperposition as DataCollatorForTokenSuperposition
    from .bags.phases import PhaseSchedule as PhaseSchedule
    from .bags.weighting import input_weights as input_weights
    from .bags.weighting import offset_weights as offset_weights
    from .data.packing import pack_blocks as pack_blocks
    from .data.packing import tokenize_documents as tokenize_documents
    from .data.streams import BlockStream as BlockStream
    from .errors import PreemptedError as PreemptedError
    from .errors import RunError as RunError
    from .errors import TSTError as TSTError
    from .evaluation.scores import METRIC_FILE as METRIC_FILE
    from .evaluation.scores import evaluate_checkpoint as evaluate_checkpoint
    from .evaluation.scores import score_texts as score_texts
    from .losses.linear import linear_multi_hot_cross_entropy as linear_multi_hot_cross_entropy
    from .losses.multi_hot import count_target_bags as count_target_bags
    from .losses.multi_hot import multi_hot_cross_entropy as multi_hot_cross_entropy
    from .models.sharding import full_state_dict as full_state_dict
    from .models.sharding import left_out_of_optimizer as left_out_of_optimizer
    from .models.superposition import fused_evaluation_loss as fused_evaluation_loss
    from .models.superposition import fused_next_token_loss as fused_next_token_loss
    from .models.superposition import token_superposition as token_superposition
    from .mtp.heads import MTPHeads as MTPHeads
    from .mtp.heads import multi_token_prediction as multi_token_prediction
    from .planning.flops import step_flops as step_flops
    from .training.arguments import TSTArguments as TSTArguments
    from .training.arguments import TSTTrainingArguments as TSTTrainingArguments
    from .training.trainer import TSTTrainer as TSTTrainer

# Public names by module. A module is imported when one of its names is first used, so that `import hf_tst` costs nothing.
_NAMES = {
    "bags.collator": ["DataCollatorForTokenSuperposition"],
    "bags.phases": ["PhaseSchedule"],
    "bags.weighting": ["input_weights", "offset_weights"],
    "data.packing": ["pack_blocks", "tokenize_documents"],
    "data.streams": ["BlockStream"],
    "errors": ["PreemptedError", "RunError", "TSTError"],
    "evaluation.scores": ["METRIC_FILE", "evaluate_checkpoint", "score_texts"],
    "losses.linear": ["linear_multi_hot_cross_entropy"],
    "losses.multi_hot": ["count_target_bags", "multi_hot_cross_entropy"],
    "models.sharding": ["full_state_dict", "left_out_of_optimizer"],
    "models.superposition": ["fused_evaluation_loss", "fused_next_token_loss", "token_superposition"],
    "mtp.heads": ["MTPHeads", "multi_token_prediction"],
    "planning.flops": ["step_flops"],
    "training.arguments": ["TSTArguments", "TSTTrainingArguments"],
    "training.trainer": ["TSTTrainer"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
