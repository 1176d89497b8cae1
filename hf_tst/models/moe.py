"""Mixtures of experts: how evenly they spread positions over experts, and what a model adds to its loss.

In superposition the routers see averaged embeddings, so the load of the experts may change at the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class ExpertLoadMeter:
    """Adds up how many positions the routers of a model send to each expert.

    It reads the `router_logits` that a model returns with `output_router_logits=True`, and counts the experts
    with the largest logits of a position, as the auxiliary loss does. It needs no hooks, and does not
    synchronize before [`report`].
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def clear(self) -> None:
        """Forget what was counted."""
        self._counts = None

    def note_outputs(self, config: Any, outputs: Any, mask: Tensor | None = None) -> None:
        """Count the positions of one forward pass, if the model returns `router_logits`.

        Args:
            config (`PretrainedConfig`, *optional*): The model's configuration; without it nothing is counted.
            outputs: What the model returns.
            mask (`torch.Tensor` of shape `(B, l)`, *optional*): 0 for positions that do not count.
        """
        logits = outputs.get("router_logits") if isinstance(outputs, Mapping) else None
        if config is not None and logits is not None:
            self.add(logits, experts_per_position(config), mask)

    @torch.no_grad()
    def add(self, router_logits: Any, top_k: int | None, mask: Tensor | None = None) -> None:
        """Count the positions of one forward pass.

        Args:
            router_logits: One tensor of shape `(B·l, E)` or `(B, l, E)` per layer; anything else counts nothing.
            top_k (`int`, *optional*): Experts per position; without it nothing is counted.
            mask (`torch.Tensor` of shape `(B, l)`, *optional*): 0 for positions that do not count.
        """
        layers = [x.flatten(0, -2) for x in router_logits or () if isinstance(x, Tensor) and x.dim() > 1]
        if not layers or not top_k or len({layer.shape for layer in layers}) > 1:
            return
        logits = torch.stack(layers)
        sent = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.topk(top_k).indices, 1.0)
        if mask is not None and mask.dim() == 2 and mask.numel() == logits.shape[1]:
            sent *= mask.reshape(1, -1, 1)
        counts = sent.sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

    def report(self, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> dict[str, float]:
        """The load since the last report. Every rank must take part.

        Args:
            total: Adds up a tensor over all ranks; by default there is one process.

        Returns:
            `tst_expert_load_max` and `tst_expert_load_min`: largest and smallest share of an expert times the number
            of experts, averaged over the layers, so 1 is balance; `tst_experts_unused`: share of the experts that
            received no position. Empty if nothing was counted.
        """
        if self._counts is None:
            return {}
        counts, self._counts = total(self._counts), None
        load = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1) * counts.shape[-1]
        values = {
            "tst_expert_load_max": load.amax(-1).mean(),
            "tst_expert_load_min": load.amin(-1).mean(),
            "tst_experts_unused": (counts == 0).float().mean(),
        }
        return {name: round(value.item(), 4) for name, value in values.items()}


def experts_per_position(config: Any) -> int | None:
    """Experts that a model sends each position to, or `None` if its configuration has no such number."""
    return _first_number(config, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"))


def experts_in_layer(config: Any) -> int | None:
    """Experts of each layer that a position may be sent to, or `None` if the configuration has no such number."""
    return _first_number(config, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))


def _first_number(config: Any, names: Iterable[str]) -> int | None:
    """The first of some fields that a configuration, or its part for the feed-forward layers (DBRX), holds."""
    text_config = config.get_text_config()
    parts = (text_config, getattr(text_config, "ffn_config", None))
    values = [getattr(part, name, None) for part in parts for name in names]
    return next((value for value in values if isinstance(value, int)), None)


def adds_to_loss(config: Any) -> bool:
    """Whether a model of this configuration adds a router's auxiliary loss, or a z-loss of its logits, to its loss.

    Such losses are means over a micro-batch, not sums over targets.

    Args:
        config (`PretrainedConfig`): The model's configuration.
    """
    text_config = config.get_text_config()
    names = ("output_router_logits", "z_loss_coefficient")
    return any(bool(getattr(text_config, name, None)) for name in names)
