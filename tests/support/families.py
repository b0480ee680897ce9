"""Tiny random models of every family that must pass by gradients."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SLIDING = {"sliding_window": 4}
_DROPOUT_OFF = {
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip

FIRST_GROUP: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SLIDING,
    "qwen2": {**_SLIDING, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {**_SLIDING, "head_dim": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": _SLIDING,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
    "starcoder2": _SLIDING,
    "mixtral": {**_MOE, **_SLIDING},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "gpt_oss": {**_MOE, **_SLIDING, "head_dim": 8},
}  # fmt: skip

SECOND_GROUP: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "phi": {},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 24},
    "olmo3": _SLIDING,
    "stablelm": {},
    "cohere2": {**_SLIDING, "head_dim": 8, "logit_scale": 0.25},
    "smollm3": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "qwen3_next": {**_MOE, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24},
    "lfm2": {"block_ff_dim": 48, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "exaone4": _SLIDING,
    "minimax": {**_MOE, "head_dim": 8, "block_size": 4},
    "seed_oss": {"head_dim": 8},
    "nemotron": {},
}  # fmt: skip

FAMILIES = {**FIRST_GROUP, **SECOND_GROUP}

MIXING: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4,
                  "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1, 3]},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "use_mamba_kernels": False},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "num_experts_per_tok": 2,
                         "layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 4,
                         "shared_intermediate_size": 32},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "attention_window_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "num_hidden_layers": 2, "chunk_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
    "bloom": {},
    "mpt": {},
    "biogpt": {},
}  # fmt: skip
"""Families that mix tokens beside attention, or tell positions in another way than by `position_ids`."""

_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
           "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
_TURNS = ["sliding_attention", "full_attention"] * 3

HANDING_ON: dict[str, dict[str, Any]] = {
    "gemma3n_text": {**_SLIDING, "num_hidden_layers": 6, "layer_types": _TURNS, "num_kv_shared_layers": 2,
                     "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99,
                     "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, *[0.0] * 5]},
    "gemma4_text": {**_SLIDING, "num_hidden_layers": 6, "layer_types": _TURNS, "num_kv_shared_layers": 2,
                    "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 99},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "num_mem_blocks": 2,
               "n_mamba_heads": 8, "mamba_ngroups": 1, "attention_head_dim": 16, "use_mem_rope": True,
               "use_shared_attention_adapter": True, "adapter_rank": 4, "num_key_value_heads": 4, "mamba_d_state": 8,
               "mamba_expand": 2, "chunk_size": 4},
    "glm_moe_dsa": {**_LATENT, **_ROUTED, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4},
}  # fmt: skip
"""Families whose layers give later ones more than hidden states: keys and values, choices, weights."""

MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "glm4_moe": {**_ROUTED, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "head_dim": 8, "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4, **_ROUTED,
                   "moe_shared_expert_intermediate_size": 24},
}  # fmt: skip

TRANSFORMING: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True, "attention_probs_dropout_prob": 0.0},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "electra": {"is_decoder": True, "attention_probs_dropout_prob": 0.0, "embedding_size": 16},
}
"""Families with modules of their own between decoder and head."""

_OWN = {**FAMILIES, **MIXING, **HANDING_ON, **MIXTURES, **TRANSFORMING}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of a few thousand parameters; all dropout off."""
    values = {**_SMALL, **_DROPOUT_OFF, **_OWN.get(family, {}), **overrides}
    default = AutoConfig.for_model(family)
    wanted = {*_OWN.get(family, {}), *overrides}  # of some a default may not be asked: they differ by layer
    known = {name for name in values if name in wanted or hasattr(default, name)}
    return AutoConfig.for_model(family, **{name: values[name] for name in known})


def save_tiny(family: str, folder: Any, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a tiny random model of the family; no parameter is zero or one everywhere."""
    config = tiny_config(family, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model
