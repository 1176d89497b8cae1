"""Token Superposition Training for Hugging Face Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .arguments import TSTTrainingArguments
    from .bags import offset_weights
    from .collator import DataCollatorForTokenSuperposition
    from .errors import PreemptedError, RunError, TSTError
    from .linear_loss import linear_multi_hot_cross_entropy
    from .loss import count_target_bags, multi_hot_cross_entropy
    from .mtp import MTPHeads, multi_token_prediction
    from .phases import PhaseSchedule
    from .superposition import fused_evaluation_loss, fused_next_token_loss, token_superposition
    from .trainer import TSTTrainer

# Public name -> module. Modules are imported when a name is first used, so `import hf_tst` costs nothing.
_MODULES = {
    "DataCollatorForTokenSuperposition": "collator",
    "MTPHeads": "mtp",
    "PhaseSchedule": "phases",
    "PreemptedError": "errors",
    "RunError": "errors",
    "TSTError": "errors",
    "TSTTrainer": "trainer",
    "TSTTrainingArguments": "arguments",
    "count_target_bags": "loss",
    "fused_evaluation_loss": "superposition",
    "fused_next_token_loss": "superposition",
    "linear_multi_hot_cross_entropy": "linear_loss",
    "multi_hot_cross_entropy": "loss",
    "multi_token_prediction": "mtp",
    "offset_weights": "bags",
    "token_superposition": "superposition",
}

__all__ = [
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
    "fused_evaluation_loss",
    "fused_next_token_loss",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
    "multi_token_prediction",
    "offset_weights",
    "token_superposition",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
