"""A tiny model of every family of the installed transformers, with every kind of layer that the family mixes.

It knows how configurations name their sizes; it knows nothing of what is done with a model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

CAUSAL = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = frozenset(
    {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    }
)
VOCABULARY = 128
PLAIN_TOKENS = (3, 100)
"""Ids from the first to before the second are no special tokens of a tiny model."""
_LAYERS, _MOST_LAYERS = 4, 6
_HIDDEN, _HEADS, _KV_HEADS, _HEAD, _INNER, _EXPERT = 64, 4, 2, 16, 96, 32

_SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size encoder_hash_byte_group_vocab ngram_vocab_size audio_vocab_size "
    "vocab_size_per_layer_input text_vocab_size decoder_vocab_size unpadded_vocab_size"),
    (_HIDDEN, "hidden_size d_model n_embd emb_dim embed_dim dim embedding_dim embedding_size model_dim hidden_dim "
    "word_embed_proj_dim lru_width attention_hidden_size projection_dim output_dim text_hidden_size input_dim_out "
    "out_hidden_size projector_hidden_size hidden_size_global output_hidden_size moe_hidden_size "
    "adapter_out_dim encoder_hidden_size cross_hidden_size backbone_hidden_size vision_hidden_size merged_hidden_size "
    "projection_hidden_size audio_hidden_size conformer_hidden_size vision_output_dim_per output_embedding_size "
    "input_embedding_size patch_embed_hidden_size linear_attn_hidden_size"),
    (_INNER, "intermediate_size ffn_dim n_inner d_ff dff dim_ff d_inner ffn_hidden_size mlp_dim feed_forward_size "
    "decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dense_intermediate_size block_ff_dim "
    "projection_intermediate_size alignment_intermediate_size"),
    (_EXPERT, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size share_expert_dim "
    "shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size "
    "ple_embed_dim image_text_hidden_size moe_latent_size"),
    (_HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads "
    "linear_num_heads num_sliding_attention_heads swa_num_attention_heads index_n_heads resampler_n_heads "
    "conf_num_attention_heads resampler_heads n_routed_experts num_experts num_local_experts moe_num_experts "
    "num_global_attention_heads mamba_dt_rank d_rel num_positional_heads"),
    (_KV_HEADS, "num_key_value_heads num_kv_heads n_head_kv kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_query_groups num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "index_block_size num_expert_group_used sliding_num_key_value_heads"),
    (_HEAD, "head_dim qk_rope_head_dim mamba_d_head mamba_head_dim mamba_headdim d_head "
    "d_kv v_head_dim qk_nope_head_dim index_head_dim attention_head_dim attention_head_size "
    "kv_channels global_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim dim_head "
    "kv_lora_rank q_lora_rank o_lora_rank resampler_head_dim resampler_dim_head mamba_d_state ssm_state_size "
    "state_size query_pre_attn_scalar swa_v_head_dim moe_router_dim"),
    (8, "mamba_n_heads mamba_num_heads "
    "hidden_size_per_layer_input laurel_rank rotary_dim index_topk chunk_size mamba_chunk_size "
    "block_size adapter_rank dim_model_base router_dim"),
    (_LAYERS, "num_hidden_layers n_layer num_layers n_layers layers decoder_layers num_decoder_layers "
    "sliding_window sliding_window_size attention_window_size local_attention attention_chunk_size window_size "
    "max_window_layers"),
    (2, "depth encoder_layers num_encoder_layers num_global_layers conf_num_hidden_layers resampler_depth "
    "num_layers_per_stack no_rope_layer_interval layer_group_size interleave_moe_layer_step "
    "attn_layer_period expert_layer_period sliding_window_pattern _sliding_window_pattern n_layers_per_attn_res_block "
    "num_blocks num_kv_shared_layers index_topk_blocks index_local_blocks insert_layer_id "
    "moe_layer_interval full_attention_interval num_nextn_layers"),
    (1, "first_k_dense_replace num_dense_layers attn_layer_offset expert_layer_offset topk_group n_group "
    "moe_layer_start_index num_expert_group decoder_sparse_step"),
    (3, "moe_layer_end_index"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions model_max_length "
    "max_target_positions original_max_position_embeddings rel_extent position_bias_num_buckets"),
    (2 * _HEAD, "qk_head_dim"),
    (2 * _HIDDEN, "mamba_d_ssm"),
    (28, "image_size crop_size max_image_size"),
    (14, "patch_size"),
    (4096, "ngram_vocab_size_base"),
)  # fmt: skip
_OF_NAME = {name: size for size, names in _SIZES for name in names.split()}
_TOWER_SIZES = {"num_hidden_layers": 2, "num_layers": 2, "depth": 2, "layers": 2, "num_key_value_heads": _HEADS}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_TEXT = frozenset(("text_config", "llm_config", "language_config", "decoder", "decoder_config"))
_PER_LAYER_MAPPINGS = ("rope_parameters", "rope_scaling")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GLM_ROPE = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}

FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": {"vocabulary_map": {"<image>": 101}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note": {"text_config.num_key_value_heads": _HEADS, "vision_config.adapter_in_dim": _HIDDEN},
    "dots3_note_text": {"num_key_value_heads": _HEADS},
    "emu3": {"vocabulary_map": {"<image>": 101, "<|extra_200|>": 102}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]}},
    "fun_asr_nano": {"adaptor_config.intermediate_size": _HIDDEN // 4},
    "gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "glm46v": _GLM_ROPE,
    "glm4v": _GLM_ROPE,
    "glm4v_moe": {"text_config.rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm5_next": {"text_config.num_key_value_heads": _HEADS, "text_config.index_kpool": 4},
    "glm_ocr": _GLM_ROPE,
    "glmga": _GLM_ROPE,
    "hunyuan_v1_dense": {"head_dim": _HEAD},
    "hunyuan_v1_moe": {"head_dim": _HEAD},
    "hunyuan_vl": {"text_config.head_dim": _HEAD, **_GLM_ROPE},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2, "num_hidden_layers": 4},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [1, 2]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": _HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": _GLM_ROPE,
    "qwen2_5_omni_thinker": {**_GLM_ROPE, "vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "unlimited_ocr": {"text_config.num_key_value_heads": _HEADS},
    "xmod": {"default_language": "en_XX"},
    "mistral4": {"head_dim": 2 * _HEAD},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "qwen2_5_vl": _GLM_ROPE,
    "qwen2_vl": _GLM_ROPE,
    "qwen4_exp": {"text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 2},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "zamba": {
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HEAD,
        "num_key_value_heads": _HEADS,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HEAD,
        "num_key_value_heads": _HEADS,
        "num_query_groups": _HEADS,
        "num_hidden_layers": 6,
        "hybrid_layer_ids": [2, 5],
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "step3p7": {"text_config.sliding_window": 4},
}
"""What the names of a family's sizes do not tell."""


_NO_LAYER_INPUTS = {"text_config.hidden_size_per_layer_input": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4:12B": _NO_LAYER_INPUTS,
    "gemma4:26B": {
        **_NO_LAYER_INPUTS, "text_config.enable_moe_block": True, "text_config.num_experts": 4,
        "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": _EXPERT,
    },
    "gemma4:31B": {**_NO_LAYER_INPUTS, "text_config.attention_k_eq_v": True},
    "gemma4:E2B": {
        "text_config.num_kv_shared_layers": 2, "text_config.use_double_wide_mlp": True,
        "text_config.num_hidden_layers": 6, "text_config.layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "mistral3:ministral3": {"text_config": "ministral3"},
}  # fmt: skip
"""Sizes of a family that are built otherwise than its default: `FAMILY:SIZE` -> settings. A model type in place of a
part stands for that type's own tiny configuration."""


def families() -> list[str]:
    """Model types that transformers makes a causal or an image-text model of, and their variants."""
    return sorted(CAUSAL | IMAGE_TEXT | set(VARIANTS))


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's default configuration with every size made small, and one layer or more of each kind that it has."""
    model_type = family.partition(":")[0]
    others = {**FAMILY.get(model_type, {}), **VARIANTS.get(family, {})}
    for part, value in others.items():
        if part.endswith("_config") and isinstance(value, str):
            others[part] = {"model_type": value, **_small(AutoConfig.for_model(value)), **FAMILY.get(value, {})}
    return AutoConfig.for_model(model_type, **_merged(_small(AutoConfig.for_model(model_type)), others))


def make_tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the family, float32; no parameter is zero or one everywhere.

    An image-text family gives its whole model, towers and all.
    """
    config = tiny_config(family)
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(family).from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.nan_to_num(parameter).clamp_(-2, 2))
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save_tiny(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Write such a model as its family is saved on the hub."""
    model = make_tiny(family, seed)
    model.save_pretrained(folder)
    return model


def auto_class(family: str) -> Any:
    """transformers' auto class that makes the whole model of the family."""
    model_type = family.partition(":")[0]
    if model_type not in IMAGE_TEXT:
        return AutoModelForCausalLM
    import transformers

    named = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return transformers.AutoModelForImageTextToText if model_type in named else transformers.AutoModelForMultimodalLM


def _small(config: PreTrainedConfig, tower: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = {}
    settings = {name: value for name, value in vars(config).items() if name[0] != "_" or name in _OF_NAME}
    depth = settings.get("num_hidden_layers") or settings.get("n_layer") or settings.get("num_layers")
    kept = _kept_layers({n: v for n, v in settings.items() if isinstance(v, list | tuple)}, depth, tower)
    for name, value in settings.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = {"model_type": value.model_type, **_small(value, name not in _TEXT)}
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            found = _size(name, value, tower)
            if found is not None:
                values[name] = found
        elif isinstance(value, float) and ("drop" in name or "pdrop" in name or "noise" in name or "jitter" in name):
            values[name] = 0.0
        elif isinstance(value, list | tuple) and depth and len(value) == depth and kept:
            sized = [value[i] for i in kept]
            values[name] = [_size(name, v, tower) or v if type(v) is int else v for v in sized]
        elif name == "eos_token_id":
            values[name] = 2
        elif name in _PER_LAYER_MAPPINGS and isinstance(value, dict):
            values[name] = _small_rope(value)
    if "kv_lora_rank" in settings:  # latent attention has as many keys as queries
        values["num_key_value_heads"] = values.get("num_attention_heads", _HEADS)
    if kept:
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in values:
                values[name] = len(kept)
    return values


def _size(name: str, value: int, tower: bool) -> int | None:
    if name in _TOKENS:
        return _TOKENS[name]
    if name.endswith(("_token_id", "_token_index", "_start_id", "_end_id", "_newline_id", "_patch_id")):
        return PLAIN_TOKENS[1] + sum(map(ord, name)) % (VOCABULARY - PLAIN_TOKENS[1])
    if value <= 0 or name not in _OF_NAME:
        return None
    if tower and name in _TOWER_SIZES:
        return _TOWER_SIZES[name]
    return min(value, _OF_NAME[name]) if name in ("num_key_value_heads", "index_topk") else _OF_NAME[name]


def _kept_layers(lists: dict[str, Any], depth: int | None, tower: bool) -> list[int]:
    """Numbers of layers, as few as can be, that are of every kind there is; empty where no list tells kinds."""
    told = [value for value in lists.values() if depth and len(value) == depth]
    if not told or not depth:
        return []
    if tower:
        return list(range(min(depth, 2)))
    kinds = [tuple(map(str, kind)) for kind in zip(*told, strict=True)]
    found = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:_MOST_LAYERS]
    others = [i for i in range(depth) if i not in found]
    return sorted(found + others[: max(0, _LAYERS - len(found))])


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    made = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            made[name] = _small_rope(value)
        elif name == "mrope_section":
            half = _HEAD // 2
            half = math.ceil(half * rope.get("partial_rotary_factor", 1.0))
            made[name] = [half - 2 * (half // 3), half // 3, half // 3]
        elif name == "original_max_position_embeddings":
            made[name] = 32
        elif name in ("short_factor", "long_factor"):
            made[name] = list(value)[: _HEAD // 2]
    return made


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    made = dict(values)
    for path, value in others.items():
        first, _, rest = path.partition(".")
        made[first] = _merged(made.get(first, {}), {rest: value}) if rest else value
    return made
