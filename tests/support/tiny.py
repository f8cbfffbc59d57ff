"""Tiny random models of every causal LM that transformers offers and that is worth a row in docs/models.md.

A name is transformers' `model_type`, with a variant in brackets where one type hides several ways to attend. Windows
and chunks are 8 tokens, so that they bite within the few dozen tokens of a test.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
WINDOW = 8
CONTEXT = 128

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # A random model with tied weights says what it just read.
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_SLIDING = {"sliding_window": WINDOW}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SHARED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_MAMBA: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "chunk_size": 8,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_NO_HEAD_DIM = {"head_dim": None}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _longrope(original: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **factors}


_PLAIN = """
    apertus arcee biogpt bitnet cohere ctrl diffllama doge ernie4_5 gemma glm glm4 gpt_neox gpt_neox_japanese granite
    helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama ministral3 nanochat nemotron olmo
    olmo2 openai-gpt persimmon phi phi3 qwen3 seed_oss stablelm xlm
"""
_PLAIN_EXPERTS = """
    aria_text ernie4_5_moe flex_olmo glm4_moe granitemoe granitemoeshared hunyuan_v1_moe hy_v3
    minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open
"""
_PLAIN_WINDOWS = "beam cwm gemma2 granite_swa mistral ministral starcoder2 vaultgemma"
_PLAIN_LATENT = "deepseek_v2 deepseek_v3 glm4_moe_lite youtu"

_CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    **dict.fromkeys(_PLAIN_EXPERTS.split(), _EXPERTS),
    **dict.fromkeys(_PLAIN_WINDOWS.split(), _SLIDING),
    **{name: {**_EXPERTS, **_LATENT} for name in _PLAIN_LATENT.split()},
    "afmoe": {**_EXPERTS, **_MIXED, "num_dense_layers": 1},
    "axk1": {**_EXPERTS, **_LATENT},
    "axk2": {**_EXPERTS, **_LATENT},
    "bailing_hybrid": {**_EXPERTS, **_LATENT, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
    },
    "bert": {"is_decoder": True},
    "big_bird": {"is_decoder": True},
    "bloom": {"n_layer": 3, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4, **_NO_HEAD_DIM},
    "cohere2": _MIXED,
    "cohere2_moe": {**_EXPERTS, **_MIXED},
    "cohere_compass_text": {**_MIXED, "rope_parameters": dict.fromkeys(_MIXED["layer_types"], _ROPE)},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "max_position_embeddings": None,
        "num_key_value_heads": None,
        **_NO_HEAD_DIM,
    },
    "deepseek_v32": {**_EXPERTS, **_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "deepseek_v4": _EXPERTS,
    "dots1": {**_EXPERTS, "n_shared_experts": 1},
    "dots3_note_text": {**_EXPERTS, **_LATENT},
    "exaone4": {**_MIXED, "sliding_window_pattern": 2},
    "exaone_moe": {**_EXPERTS, **_MIXED},
    "falcon": {"new_decoder_architecture": False, "num_kv_heads": 4, **_NO_HEAD_DIM},
    "falcon (ALiBi)": {"alibi": True, "num_kv_heads": 4, **_NO_HEAD_DIM},
    "falcon (new decoder)": {"new_decoder_architecture": True, "num_kv_heads": 2, **_NO_HEAD_DIM},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {**_MAMBA, "num_attention_heads": None, "num_key_value_heads": None},
    "flint": {**_EXPERTS, **_MIXED},
    "gemma3_text": _MIXED,
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": [48] * 5,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **_MIXED,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_text (shared KV)": {
        **_SHARED,
        "use_double_wide_mlp": True,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm_moe_dsa": {**_EXPERTS, **_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "num_hidden_layers": None,
        **_NO_HEAD_DIM,
    },
    "gpt_oss": {**_EXPERTS, **_MIXED},
    "gptj": {**_GPT, "rotary_dim": 4, **_NO_HEAD_DIM},
    "granitemoe_swa": {**_EXPERTS, **_SLIDING},
    "granitemoehybrid": {**_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {},
    "hy_v4": {**_EXPERTS, **_LATENT},
    "inkling2_text": {**_EXPERTS, **_SLIDING},
    "inkling_text": {**_EXPERTS, **_SLIDING},
    "jamba": {**_EXPERTS, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {**_EXPERTS, "kv_channels": 8, "num_key_value_heads": 2, "num_attention_heads": None, **_NO_HEAD_DIM},
    "kimi_linear": {
        **_EXPERTS,
        **_LATENT,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": _LINEAR["layer_types"],
    },
    "kolibri1": {**_EXPERTS, **_SLIDING},
    "laguna": {**_EXPERTS, **_MIXED, "num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {},
    "llama4_text": {
        **_EXPERTS,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1, 0],
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.5,
    },
    "longcat_flash": {**_EXPERTS, **_LATENT, "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48},
    "mamba": {**_MAMBA, "num_attention_heads": None, "num_key_value_heads": None},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "mellum": {**_EXPERTS, **_MIXED},
    "mimo_v2_flash": {**_EXPERTS, **_MIXED, "swa_head_dim": 8, "swa_v_head_dim": 8, "v_head_dim": 8},
    "minicpm3": _LATENT,
    "minimax": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 8},
    "minimax_m3_vl_text": {
        **_EXPERTS,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "rotary_dim": 4,
    },
    "modernbert-decoder": {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 3},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT},
    "nemotron_h": {
        **_EXPERTS,
        **_MAMBA,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": None,
    },
    "nemotron_h (attention)": {
        **_EXPERTS,
        "layers_block_type": ["attention", "moe", "attention"],
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": None,
    },
    "olmo3": _MIXED,
    "olmo_hybrid": _LINEAR,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3 (LongRoPE)": {"rope_parameters": _longrope(96), "original_max_position_embeddings": 96},
    "phi3 (windows)": _SLIDING,
    "qwen2": {},
    "qwen2 (windows)": {"use_sliding_window": True, "max_window_layers": 1, **_SLIDING},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_EXPERTS, **_LINEAR},
    "qwen3_next": {**_EXPERTS, **_LINEAR},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": WINDOW, **_NO_HEAD_DIM},
    "roberta": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 32},
    "smollm3": {"no_rope_layer_interval": 2},
    "xglm": {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    "zamba2": {**_MAMBA, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 8, "mamba_ngroups": 1},
    "zaya": {**_EXPERTS, "num_experts_per_tok": 1},
}
# Models that read more than text: the language model inside them is the tiny one.
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {"text": "gemma3_text", "vision_config": {**_VISION, "image_size": 28, "patch_size": 14}},
    "gemma4": {"text": "gemma4_text (shared KV)", "vision_config": {**_VISION, "head_dim": 8}},
    "llama4": {"text": "llama4_text", "vision_config": {**_VISION, "image_size": 28, "patch_size": 14}},
    "qwen3_5": {"text": "qwen3_5_text", "vision_config": {**_VISION, "depth": 1, "num_heads": 2}},
}
MODELS = tuple(sorted((*_CONFIGS, *_COMPOSITE)))


def build(name: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model of float32 noise, in eval mode; the same for the same name, seed and `settings` of its config."""
    config = AutoConfig.for_model(name.split(" ", maxsplit=1)[0], **{**_settings(name), **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _scatter(model)
    # Nothing ends a text early: tests compare a fixed number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _settings(name: str) -> dict[str, Any]:
    if name in _COMPOSITE:
        parts = dict(_COMPOSITE[name])
        return {"text_config": _settings(parts.pop("text")), **parts, "tie_word_embeddings": False}
    # A copy: some configs change the lists they are given.
    return deepcopy({key: value for key, value in {**_BASE, **_CONFIGS[name]}.items() if value is not None})


@torch.no_grad()
def _scatter(model: nn.Module) -> None:
    """Replace transformers' small weights by noise that decides, gates, sinks and learned positions included.

    With weights of 0.02 a random model says one token for ever, whatever its attention does.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_(0.0, 1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
