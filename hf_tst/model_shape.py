"""How large a model is, counted on the meta device, which builds a model of any size without holding its numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .expert_load import experts_per_position


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model. Letters as in `plan.py`.

    Args:
        parameters (`int`): All of them, tied ones once, P.
        active_parameters (`int`): Those that multiply a position's state: without embeddings that are only looked up,
            and with the experts of the position only.
        trainable_parameters (`int`): Those that have gradients; fewer with LoRA.
        layer_parameters (`int`): Of the largest layer.
        embedding_parameters (`int`): Of the embedding; the head has as many, or shares them.
        layers, hidden_size, vocab_size (`int`): As in the configuration; d and V.
        heads, kv_heads, head_dim (`int`): Of the attention.
        intermediate_size (`int`): Width of an MLP, or of one expert.
        experts_per_token (`int`, defaults to 0): Experts that a position is sent to; 0 in a dense model.
        norms_per_head (`bool`, defaults to `False`): Norms on queries and keys (Qwen3).
    """

    parameters: int
    active_parameters: int
    trainable_parameters: int
    layer_parameters: int
    embedding_parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    experts_per_token: int = 0
    norms_per_head: bool = False

    @classmethod
    def from_config(cls, config: Any, lora: Any = None) -> ModelShape:
        """The shape of the model that a configuration describes.

        Args:
            config (`PretrainedConfig`): Of a causal language model.
            lora (`peft.LoraConfig`, *optional*): Adapter that is trained instead of the model.

        Example:
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(vocab_size=128_256, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            ...                      num_attention_heads=9, num_key_value_heads=9)
            >>> f"{ModelShape.from_config(config).parameters:,}"
            '267,225,408'
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        looked_up_only = 0 if head is not None and head.weight is embedding else embedding.numel()
        embedding_parameters = embedding.numel()
        if lora is not None:
            from peft import get_peft_model

            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        text = config.get_text_config()
        heads = text.num_attention_heads
        top_k, experts = experts_per_position(config) or 0, _number_of_experts(text)
        parameters, layers, routed = 0, Counter[int](), 0
        for name, parameter in model.named_parameters():
            parameters += parameter.numel()
            if layer := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name):
                layers[int(layer[1])] += parameter.numel()
            if experts and ".experts." in name:
                routed += parameter.numel()
        idle = routed - routed * top_k // experts if routed else 0
        width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(
            parameters=parameters,
            active_parameters=parameters - looked_up_only - idle,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layer_parameters=max(layers.values(), default=0),
            embedding_parameters=embedding_parameters,
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate_size=(getattr(text, "moe_intermediate_size", None) or width) if routed else width,
            experts_per_token=top_k if routed else 0,
            norms_per_head=any(".q_norm." in name for name, _ in model.named_parameters()),
        )

    @property
    def trains_everything(self) -> bool:
        return self.trainable_parameters == self.parameters


def _number_of_experts(config: Any) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((value for name in names if (value := getattr(config, name, None))), 0)
