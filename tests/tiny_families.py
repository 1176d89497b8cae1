"""Tiny configurations of many causal families: one table for the family tests and for the table of `scripts/families.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB_SIZE = 97

DENSE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
HEAD: dict[str, Any] = {"head_dim": 8}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}
EXPERTS: dict[str, Any] = MOE | {"num_experts": 4, "moe_intermediate_size": 16}
LOCAL_EXPERTS: dict[str, Any] = MOE | {"num_local_experts": 4}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
HYBRID = DENSE | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A causal family and a configuration of it that is built in milliseconds.

    Args:
        name (`str`): As its authors write it.
        model_type (`str`): Its name in Transformers.
        config (`dict`): Sizes beside the vocabulary.
        note (`str`): What stands in the place of attention, if anything does.
        refused (`str`): What its refusal says, for a family that superposition cannot train.
        embeds_scale (`float`): What it multiplies its own embeddings with, but not `inputs_embeds`.
    """

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    refused: str = ""
    embeds_scale: float = 1.0


# fmt: off
FAMILIES = (
    Family("Llama", "llama", DENSE),
    Family("Llama 4", "llama4_text", DENSE | HEAD | LOCAL_EXPERTS | {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}),
    Family("Qwen2", "qwen2", DENSE),
    Family("Qwen3", "qwen3", DENSE | HEAD),
    Family("Mistral", "mistral", DENSE | HEAD),
    Family("Mixtral", "mixtral", DENSE | HEAD | LOCAL_EXPERTS),
    Family("Qwen2-MoE", "qwen2_moe", DENSE | EXPERTS | {"shared_expert_intermediate_size": 16}),
    Family("Qwen3-MoE", "qwen3_moe", DENSE | HEAD | EXPERTS),
    Family("Qwen3-Next", "qwen3_next", HYBRID | HEAD | EXPERTS | {"shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}, note="linear attention beside attention"),
    Family("Gemma", "gemma", DENSE | HEAD),
    Family("Gemma 2", "gemma2", DENSE | HEAD | {"final_logit_softcapping": 0.5}),
    Family("Gemma 3", "gemma3_text", DENSE | HEAD),
    Family("Gemma 3n", "gemma3n_text", DENSE | HEAD | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["full_attention"] * 2}, refused="also reads token ids outside its input embedding"),
    Family("Gemma 4 (31B)", "gemma4_text", DENSE | HEAD | {"hidden_size_per_layer_input": 0, "global_head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 97}),
    Family("Gemma 4 (E2B)", "gemma4_text", DENSE | HEAD | {"hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 97}, refused="also reads token ids outside its input embedding"),
    Family("Phi", "phi", DENSE),
    Family("Phi-3", "phi3", DENSE),
    Family("Phi-3.5-MoE", "phimoe", DENSE | LOCAL_EXPERTS),
    Family("OLMo", "olmo", DENSE),
    Family("OLMo 2", "olmo2", DENSE),
    Family("OLMo 3", "olmo3", DENSE),
    Family("OLMoE", "olmoe", DENSE | EXPERTS),
    Family("GPT-2", "gpt2", GPT),
    Family("GPT-J", "gptj", GPT | {"rotary_dim": 4}),
    Family("GPT-Neo", "gpt_neo", {"hidden_size": 16, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2, "max_position_embeddings": 64}),
    Family("GPT-NeoX", "gpt_neox", DENSE),
    Family("GPT-BigCode", "gpt_bigcode", GPT),
    Family("CodeGen", "codegen", GPT | {"rotary_dim": 2, "n_head": 4}),
    Family("OPT", "opt", DENSE | {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    Family("BLOOM", "bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    Family("MPT", "mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    Family("Falcon", "falcon", DENSE),
    Family("StableLM", "stablelm", DENSE),
    Family("StarCoder 2", "starcoder2", DENSE),
    Family("Cohere", "cohere", DENSE),
    Family("Cohere 2", "cohere2", DENSE | HEAD),
    Family("Granite", "granite", DENSE | {"embedding_multiplier": 12.0, "logits_scaling": 3.0}),
    Family("Granite-MoE", "granitemoe", DENSE | LOCAL_EXPERTS | {"embedding_multiplier": 12.0, "logits_scaling": 3.0}),
    Family("Granite-MoE-hybrid", "granitemoehybrid", DENSE | LOCAL_EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "embedding_multiplier": 12.0, "shared_intermediate_size": 16}, note="state space beside attention"),
    Family("DeepSeek-V2", "deepseek_v2", DENSE | LATENT | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    Family("DeepSeek-V3", "deepseek_v3", DENSE | LATENT | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    Family("SmolLM3", "smollm3", DENSE),
    Family("GPT-OSS", "gpt_oss", DENSE | HEAD | LOCAL_EXPERTS),
    Family("GLM-4", "glm4", DENSE | HEAD),
    Family("GLM-4-MoE", "glm4_moe", DENSE | HEAD | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    Family("MiniMax", "minimax", HYBRID | HEAD | LOCAL_EXPERTS | {"block_size": 8}, note="linear attention beside attention"),
    Family("Nemotron", "nemotron", DENSE),
    Family("EXAONE 4", "exaone4", DENSE),
    Family("ERNIE 4.5", "ernie4_5", DENSE | HEAD),
    Family("Seed-OSS", "seed_oss", DENSE | HEAD),
    Family("Apertus", "apertus", DENSE),
    Family("Helium", "helium", DENSE | HEAD),
    Family("Hunyuan", "hunyuan_v1_dense", DENSE | HEAD),
    Family("Persimmon", "persimmon", DENSE),
    Family("DiffLlama", "diffllama", DENSE | HEAD | {"num_key_value_heads": 2}),
    Family("Mamba", "mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, note="state space"),
    Family("Mamba 2", "mamba2", {"hidden_size": 16, "state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, note="state space"),
    Family("Falcon-Mamba", "falcon_mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, note="state space"),
    Family("Falcon-H1", "falcon_h1", DENSE | HEAD | MAMBA | {"mamba_d_ssm": 32, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.5}, note="state space beside attention", embeds_scale=5.0),
    Family("Bamba", "bamba", DENSE | MAMBA | {"attn_layer_indices": [1], "z_loss_coefficient": 0.1}, note="state space beside attention"),
    Family("Jamba", "jamba", DENSE | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}, note="state space beside attention"),
    Family("Zamba 2", "zamba2", DENSE | {"num_attention_heads": 2, "num_key_value_heads": 2, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4, "use_shared_attention_adapter": False}, note="state space beside attention"),
    Family("RecurrentGemma", "recurrent_gemma", DENSE | HEAD | {"lru_width": 16, "num_hidden_layers": 3, "attention_window_size": 32}, note="recurrent"),
    Family("RWKV", "rwkv", {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}, note="recurrent"),
    Family("LFM2", "lfm2", DENSE | {"layer_types": ["conv", "full_attention"]}, note="convolutions beside attention"),
    Family("VaultGemma", "vaultgemma", DENSE | HEAD),
    Family("DBRX", "dbrx", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}, "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    Family("JetMoE", "jetmoe", DENSE | LOCAL_EXPERTS | {"kv_channels": 8}),
    Family("nanochat", "nanochat", DENSE),
    Family("Arcee", "arcee", DENSE | HEAD),
    Family("BitNet", "bitnet", DENSE),
    Family("XGLM", "xglm", {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64}),
    Family("FlexOlmo", "flex_olmo", DENSE | EXPERTS),
    Family("GLM", "glm", DENSE | HEAD),
    Family("Ministral", "ministral", DENSE | HEAD),
    Family("Qwen3.5", "qwen3_5_text", HYBRID | HEAD | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}, note="linear attention beside attention"),
    Family("LFM2-MoE", "lfm2_moe", DENSE | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, note="convolutions beside attention"),
    Family("MiniMax-M2", "minimax_m2", DENSE | HEAD | LOCAL_EXPERTS),
    Family("Hunyuan-MoE", "hunyuan_v1_moe", DENSE | HEAD | {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 16}),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", DENSE | HEAD | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    Family("Nemotron-H", "nemotron_h", DENSE | HEAD | {"hybrid_override_pattern": "M*", "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}, note="state space beside attention"),
    Family("OLMo-Hybrid", "olmo_hybrid", HYBRID | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}, note="linear attention beside attention"),
    Family("Doge", "doge", DENSE),
    Family("AFMoE", "afmoe", DENSE | HEAD | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_shared_experts": 1, "num_dense_layers": 1, "mup_enabled": True}),
    Family("dots.llm1", "dots1", DENSE | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    Family("CTRL", "ctrl", {"n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    Family("GPT", "openai-gpt", GPT),
    Family("BioGPT", "biogpt", DENSE),
    Family("JAIS 2", "jais2", DENSE | HEAD),
    Family("XLM", "xlm", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True, "max_position_embeddings": 64}, refused="computes its loss itself"),
    Family("TrOCR", "trocr", {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 64}, refused="computes its loss itself"),
    Family("XLNet", "xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}, refused="computes its loss itself"),
)
# fmt: on


def make_family(family: Family, **overrides: Any) -> Any:
    """The family's model with fixed random weights; no dropout, and no special tokens but 0."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    options = {"vocab_size": VOCAB_SIZE, **special, **family.config, **overrides}
    config = CONFIG_MAPPING[family.model_type](**options)
    for name, value in vars(config).items():
        if name.endswith(("dropout", "dropout_prob", "pdrop", "jitter_noise")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config)
