"""Which models are supported, and how each of the others is refused."""

from __future__ import annotations

from tests.support.tiny import MODELS

NEW_TOKENS = 48
KV_TOKENS = 640
PROMPTS = (
    (5, 17, 40, 8, 8, 61, 33, 90, 12, 77, 29, 3, 54, 66, 21, 80, 9, 35, 48, 4),
    (70, 11, 4, 59, 26, 88, 41),
)
_RECURRENT = "(linear_attention) keeps a LinearAttentionLayer, which cannot be rolled back"
_HYBRID = "(hybrid) keeps a LinearAttentionAndFullAttentionLayer, which cannot be rolled back"
_CONV = "layer 0 (conv) keeps a LinearAttentionLayer, which cannot be rolled back"
_INDEXED = "layer 0 (indexed_attention) keeps a DynamicIndexedLayer, which cannot be rolled back"
_HYBRID_SLIDING = "layer 0 (hybrid_sliding) keeps a LinearAttentionAndSlidingWindowAttentionLayer"
_OWN_ATTENTION = "computes attention itself, not through transformers' attention interface"
_NO_CACHE = "keeps no KV cache, so that a rejected draft cannot be rolled back"
REFUSED = {
    "axk2": _INDEXED,
    "bailing_hybrid": _RECURRENT,
    "bamba": _RECURRENT,
    "bart": "layer 2 (attention) keeps no keys and values",  # the cross-attention's share of the cache
    "big_bird": _OWN_ATTENTION,
    "bloom": _OWN_ATTENTION,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": "layer 0 (heavily_compressed_attention) keeps a DeepseekV4HCACache",
    "doge": "layer 0 (DogeAttention) builds an attention mask of its own",
    "dots3_note_text": _INDEXED,
    "falcon (ALiBi)": "layer 0 (FalconDecoderLayer) adds a bias that grows with distance (ALiBi)",
    "falcon_h1": _HYBRID,
    "falcon_mamba": _RECURRENT,
    "glm_moe_dsa": _INDEXED,
    "gpt_neo": _OWN_ATTENTION,
    "granitemoehybrid": _RECURRENT,
    "hy_v4": _INDEXED,
    "inkling2_text": _HYBRID_SLIDING,
    "inkling_text": _HYBRID_SLIDING,
    "jamba": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "lfm3": _CONV,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minimax": "layer 0 (MiniMaxDecoderLayer) keeps its state in MiniMaxCache",
    "minimax_m3_vl_text": "layer 1 (minimax_m3_sparse) keeps a MiniMaxM3VLSparseCacheLayer",
    "mpt": _OWN_ATTENTION,
    "nemotron_h": _RECURRENT,
    "olmo_hybrid": _RECURRENT,
    "openai-gpt": "layer 0 (Block) " + _NO_CACHE,
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": "layer 0 (RecurrentGemmaDecoderLayer) " + _NO_CACHE,
    "roberta": "its packed forward differs from its own",  # positions start behind the padding id
    "roformer": _OWN_ATTENTION,
    "rwkv": "layer 0 (RwkvBlock) " + _NO_CACHE,
    "xlm": "layer 0 (MultiHeadAttention) " + _NO_CACHE,
    "zamba2": _RECURRENT,
    "zaya": _HYBRID,
}
SUPPORTED = tuple(name for name in MODELS if name not in REFUSED)
