"""Size of a model, counted on the meta device, which needs no memory for the weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .moe import experts_in_layer, experts_per_position


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model. Letters as in `planning/estimate.py`.

    Args:
        parameters (`int`): All, tied ones counted once, P.
        active_parameters (`int`): Those that multiply a position's state: without input embeddings, and only the
            experts of the position. Weights shared by several layers count once per layer.
        active_trainable_parameters (`int`): Those of them that have gradients.
        trainable_parameters (`int`): All that have gradients; fewer with LoRA.
        layer_parameters (`int`): Of the largest layer.
        last_layer_parameters (`int`), active_last_layer_parameters (`int`): Of the last layer, all and active ones.
        embedding_parameters (`int`): Of the embedding; the head has as many, or shares them.
        layers, hidden_size, vocab_size (`int`): As in the configuration; d and V.
        heads, kv_heads, head_dim (`int`): Of the attention; 0 heads where there is none.
        score_width (`int`): Multiplications for a pair of positions: for each layer of softmax attention, its heads times the
            size of a query and of a value.
        last_layer_score_width (`int`): That of the last layer.
        intermediate_size (`int`): Width of an MLP, or of one expert.
        experts_per_position (`int`, *optional*, defaults to 0): Experts that a position is sent to; 0 in a dense model.
        norms_per_head (`bool`, *optional*, defaults to `False`): Norms on queries and keys (Qwen3).
    """

    parameters: int
    active_parameters: int
    active_trainable_parameters: int
    trainable_parameters: int
    layer_parameters: int
    last_layer_parameters: int
    active_last_layer_parameters: int
    embedding_parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    score_width: int
    last_layer_score_width: int
    intermediate_size: int
    experts_per_position: int = 0
    norms_per_head: bool = False

    @classmethod
    def from_config(cls, config: Any, lora: Any = None, model_class: Any = None) -> ModelShape:
        """The shape of the model that a configuration describes.

        Args:
            config (`PretrainedConfig`): Of a causal language model.
            lora (`peft.LoraConfig`, *optional*): Adapter that is trained instead of the model.
            model_class (`type`, *optional*): Class of the model; by default the one that Transformers has for the configuration.

        Example:
            >>> from transformers import LlamaConfig
            >>> config = LlamaConfig(vocab_size=128_256, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            ...                      num_attention_heads=9, num_key_value_heads=9)
            >>> f"{ModelShape.from_config(config).parameters:,}"
            '267,225,408'
        """
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = (model_class or AutoModelForCausalLM.from_config)(config)
        embedding = model.get_input_embeddings().weight
        if lora is not None:
            from peft import get_peft_model

            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 0
        head_dim = _own_value(text, "head_dim") or (text.hidden_size // heads if heads else 0)
        top_k, experts = experts_per_position(config) or 0, experts_in_layer(config) or 0
        of_experts = {
            id(parameter)
            for name, module in model.named_modules()
            if name.endswith(".experts") or "Experts" in type(module).__name__
            for parameter in module.parameters()
        }
        parameters, active, trained, scores = Counter[int](), Counter[int](), Counter[int](), Counter[int]()
        for name, parameter in model.named_parameters():
            parameters[_layer(name)] += parameter.numel()
        # A module shared by several layers is counted once per layer.
        for name, module in model.named_modules(remove_duplicate=False):
            layer = _layer(f"{name}.")
            scores[layer] += _score_width(module, text)
            if isinstance(module, torch.nn.Embedding):
                continue
            for parameter in module.parameters(recurse=False):
                used = parameter.numel()
                if experts and id(parameter) in of_experts:
                    used = used * top_k // experts
                active[layer] += used
                trained[layer] += used * parameter.requires_grad
        layers = [index for index in parameters if index >= 0]
        last = max(layers, default=-1)
        width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        width = getattr(getattr(text, "ffn_config", None), "ffn_hidden_size", width)  # DBRX
        is_mixture = bool(experts and of_experts)
        return cls(
            parameters=parameters.total(),
            active_parameters=active.total(),
            active_trainable_parameters=trained.total(),
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layer_parameters=max((parameters[index] for index in layers), default=0),
            last_layer_parameters=parameters[last] if layers else 0,
            active_last_layer_parameters=active[last] if layers else 0,
            embedding_parameters=embedding.numel(),
            layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            heads=heads,
            kv_heads=_own_value(text, "num_key_value_heads") or heads,
            head_dim=head_dim,
            score_width=scores.total(),
            last_layer_score_width=scores[last] if layers else 0,
            intermediate_size=(getattr(text, "moe_intermediate_size", None) or width)
            if is_mixture
            else width,
            experts_per_position=top_k if is_mixture else 0,
            norms_per_head=any(".q_norm." in name for name, _ in model.named_parameters()),
        )

    def with_mtp_heads(self, num_heads: int, kind: str = "parallel") -> ModelShape:
        """The shape while extra heads of multi-token prediction train with the model.

        Each is one more layer like the last, of sequential ones with a projection and two norms, and one more product
        with the model's head.

        Args:
            num_heads (`int`): Heads with the model's own, n; 1 changes nothing.
            kind (`str`, *optional*, defaults to `"parallel"`): `"parallel"` or `"sequential"`, as in [`MTPHeads`].
        """
        extra = num_heads - 1
        joined = 2 * self.hidden_size * (self.hidden_size + 1) if kind == "sequential" else 0
        added = extra * (self.last_layer_parameters + joined)
        active = extra * (self.active_last_layer_parameters + joined + self.embedding_parameters)
        return replace(
            self,
            parameters=self.parameters + added,
            trainable_parameters=self.trainable_parameters + added,
            active_parameters=self.active_parameters + active,
            active_trainable_parameters=self.active_trainable_parameters + active,
            score_width=self.score_width + extra * self.last_layer_score_width,
            layers=self.layers + extra,
        )

    @property
    def trains_everything(self) -> bool:
        """Whether no parameter is frozen."""
        return self.trainable_parameters == self.parameters


def embedding_size(model: Any) -> int | None:
    """Number of rows of a model's embedding; `None` if unknown."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def context_length(config: Any) -> int | None:
    """Positions that a model of this configuration can distinguish; `None` if unknown.

    Models with relative positions only, and recurrent models, have no limit.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
    values = (getattr(text, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _own_value(config: Any, name: str) -> Any:
    """A field of a configuration, read without the warning of Transformers for fields that differ by layer (Gemma 4)."""
    return vars(config).get(name) or getattr(config, name, None)


def _layer(name: str) -> int:
    """The number of the layer that a parameter or module of this name is in; -1 outside of layers."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _score_width(module: torch.nn.Module, config: Any) -> int:
    """Heads times the size of a query and of a value, if a module is softmax attention; else 0.

    Linear attention (MiniMax's lightning attention, RWKV) has no scores of pairs of positions.
    """
    name = type(module).__name__
    inside = any(type(part).__name__.endswith("Attention") for part in module.modules() if part is not module)
    if not name.endswith("Attention") or inside or re.search("Linear|Lightning|Rwkv", name):
        return 0

    def first(names: Sequence[str], default: int) -> int:
        values = (getattr(module, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    heads = first(("num_heads", "n_heads", "n_head"), config.num_attention_heads)
    query = first(("qk_head_dim", "head_dim", "head_size"), config.hidden_size // config.num_attention_heads)
    # Differential attention has scores for each half of its values.
    times = 2 if hasattr(module, "lambda_init") else 1
    return times * heads * (query + first(("v_head_dim",), query))
