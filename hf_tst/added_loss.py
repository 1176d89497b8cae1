"""Losses that a model adds to that of its targets: means over a micro-batch, which are no sum over targets."""

from __future__ import annotations

from typing import Any


def adds_to_loss(config: Any) -> bool:
    """Whether a model of this configuration adds a router's auxiliary loss, or a z-loss of its logits, to its loss.

    Args:
        config (`PretrainedConfig`): The model's configuration.
    """
    text_config = config.get_text_config()
    names = ("output_router_logits", "z_loss_coefficient")
    return any(bool(getattr(text_config, name, None)) for name in names)
