"""What users call the options of a request who know transformers, vLLM, OpenAI or others."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_ELSEWHERE = {
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
"""What transformers, vLLM, OpenAI and others call an option, and what does it here."""


def hint_for(name: str, known: Iterable[str]) -> str | None:
    """What does here what an unknown option was meant to do."""
    if name in _ELSEWHERE:
        return f"what you mean is {_ELSEWHERE[name]}"
    close = get_close_matches(name, known, 1, 0.7)
    return f"did you mean {close[0]!r}?" if close else None
