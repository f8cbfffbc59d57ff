"""What transformers, vLLM, OpenAI, llama.cpp and others call options, and what to use instead."""

from __future__ import annotations

from typing import Final

_LOADING = "give it in model_options of Engine.from_pretrained"
_QUANTISED = "use quantization_config of Engine.from_pretrained, such as TorchAoConfig"
_OF_FROM_PRETRAINED = "it is an argument of Engine.from_pretrained; here the model is loaded already"
_ATTENTION = "specgen attends by a function of its own; leave it out"
_OF_A_REQUEST = "it belongs to a request: give it to generate() or stream()"

ENGINE: Final = {
    "torch_dtype": "use dtype of Engine.from_pretrained",
    "dtype": _OF_FROM_PRETRAINED,
    "device": _OF_FROM_PRETRAINED,
    "quantization_config": _OF_FROM_PRETRAINED,
    "model_options": _OF_FROM_PRETRAINED,
    "gguf_file": _OF_FROM_PRETRAINED,
    "device_map": f"use device, or {_LOADING}",
    "attn_implementation": _ATTENTION,
    "attention_backend": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "quantization": _QUANTISED,
    **dict.fromkeys(
        (
            *("trust_remote_code", "revision", "token", "use_auth_token", "cache_dir", "subfolder", "variant"),
            *("local_files_only", "low_cpu_mem_usage", "use_safetensors", "max_memory", "offload_folder"),
            *("force_download", "proxies", "tokenizer_revision", "experts_implementation"),
        ),
        _LOADING,
    ),
    "tokenizer": "give it to specgen.wrap(model, tokenizer)",
    "assistant_model": "use draft_model",
    "speculative_model": "use draft_model",
    "speculative_config": "use drafters, draft_model and speculation",
    "num_speculative_tokens": "use speculation={'max_nodes': N}",
    "prompt_lookup_num_tokens": "the drafter 'prompt-lookup' does it; use speculation={'max_nodes': N}",
    **dict.fromkeys(("max_model_len", "max_seq_len", "max_length", "context_length", "n_ctx"), "use max_context"),
    **dict.fromkeys(
        ("gpu_memory_utilization", "mem_fraction_static", "num_gpu_blocks_override", "max_total_tokens"),
        "use kv_tokens, the tokens that the KV pool holds",
    ),
    "swap_space": "use host_cache_bytes",
    **dict.fromkeys(("max_batch_size", "max_running_requests", "n_parallel"), "use max_num_seqs"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size", "n_batch"), "use max_prefill_tokens"),
    **dict.fromkeys(("kv_cache_dtype", "cache_implementation", "type_k", "type_v"), "use kv_format"),
    **dict.fromkeys(("enable_prefix_caching", "disable_radix_cache"), "use prefix_cache"),
    **dict.fromkeys(("enforce_eager", "torch_compile"), "use compile and gpu_graphs"),
    **dict.fromkeys(
        ("enable_lora", "max_loras", "max_lora_rank", "lora_paths"), "use adapters and engine.adapters.load"
    ),
    **dict.fromkeys(("chat_template", "tokenizer_mode"), "set it on the tokenizer"),
    **dict.fromkeys(("max_tokens", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop"), _OF_A_REQUEST),
    **dict.fromkeys(
        ("tensor_parallel_size", "tp_plan", "pipeline_parallel_size"), "specgen runs a model on one device; see device"
    ),
}
"""An option of an engine elsewhere -> what to do here."""

REQUEST: Final = {
    "assistant_model": "draft_model of the engine",
    "bad_words_ids": "bad_words, as strings",
    "best_of": "n",
    "do_sample": "temperature; 0 is greedy",
    "eos_token_id": "stop_token_ids",
    "force_words_ids": "constraint",
    "grammar": 'constraint={"grammar": ...}',
    "guided_choice": 'constraint={"choice": ...}',
    "guided_grammar": 'constraint={"grammar": ...}',
    "guided_json": 'constraint={"json_schema": ...}',
    "guided_regex": 'constraint={"regex": ...}',
    "logits_processor": "processors",
    "logits_processors": "processors",
    "max_completion_tokens": "max_tokens",
    "max_gen_len": "max_tokens",
    "max_length": "max_tokens, which counts the output alone",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "messages": "the prompt, the first argument",
    "min_length": "min_tokens, which counts the output alone",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "num_beams": "nothing: there is no beam search",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "output_scores": "logprobs",
    "prompt": "the prompt, the first argument",
    "prompt_lookup_num_tokens": "speculation",
    "repeat_penalty": "repetition_penalty",
    "response_format": 'constraint={"json_schema": ...}',
    "return_dict_in_generate": "nothing: what comes back is a Result",
    "sequence_bias": "logit_bias",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_words": "stop",
    "stream": "the method `stream`",
    "streamer": "the method `stream`",
    "structured_outputs": "constraint",
    "suppress_tokens": "banned_token_ids",
    "tokenizer": "nothing: the engine has its own",
    "top_logprobs": "logprobs",
}
"""An option of a request elsewhere -> what does it here."""
