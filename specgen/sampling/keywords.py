"""The keywords of `generate` and `stream`, as users write them: the fields of `SamplingParams`, lists for tuples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from specgen.types import Constraint, LogitsProcessor, Speculation, StoppingCriterion


class SamplingOptions(TypedDict, total=False):
    """What each means, and what happens without it, `SamplingParams` says."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    banned_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    no_repeat_ngram_size: int | None
    min_tokens: int | None
    max_tokens: int | None
    ignore_eos: bool | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    stopping_criteria: Sequence[StoppingCriterion] | None
    seed: int | None
    n: int | None
    logprobs: int | None
    processors: Sequence[LogitsProcessor] | None
    plugin_processors: Mapping[str, Mapping[str, object]] | None
    constraint: str | Mapping[str, object] | Constraint | None
    speculation: Literal["auto", "off"] | Mapping[str, object] | Speculation | None
    prediction: str | Sequence[int] | None
    cache_salt: str | None
    adapter: str | None
    trace: bool | None
