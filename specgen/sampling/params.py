"""A request: what it may ask of the sampler and of the stop rules, checked when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from transformers import GenerationConfig

from specgen._base.option_names import REQUEST
from specgen._base.ranges import check_ranges, is_finite, plain
from specgen.errors import InvalidRequest, UnknownName, check_text
from specgen.types import Constraint, LogitsProcessor, Speculation, StoppingCriterion

_SAMPLING_ONLY = ("top_k", "top_p", "min_p", "typical_p")
_FROM_GENERATION_CONFIG = ("temperature", *_SAMPLING_ONLY)
_NOT_FOLLOWED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}
"""What of a `generation_config.json` would change texts and is not followed, and its values that change none."""
_SEVERAL = (
    "allowed_token_ids",
    "banned_token_ids",
    "bad_words",
    "processors",
    "stop",
    "stop_token_ids",
    "stopping_criteria",
)
_IDS = ("allowed_token_ids", "banned_token_ids", "stop_token_ids", "prediction")
_LAST_SEED = 2**64 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one request. `None` means: what the model's `generation_config.json` says, else off.

    Sampling. temperature 0 is greedy and what a model without sampling defaults gets; asking for top_k, top_p, min_p
    or typical_p without a temperature means temperature 1. They act in transformers' order and with transformers'
    arithmetic. top_k 0 is off. seed makes a request repeatable: the text is a function of the seed, the sample's
    index and the prompt, whatever drafts and whoever shares the batch.

    Penalties. repetition_penalty acts on prompt and output (transformers), presence_penalty and frequency_penalty
    on the output (OpenAI).

    Tokens. logit_bias adds to logits; allowed_token_ids and banned_token_ids (`suppress_tokens` in
    `generation_config.json`) restrict the draw; bad_words bans strings; no_repeat_ngram_size bans repeating n-grams.

    Ends. stop strings and stop_token_ids end the text, as do the model's own end tokens unless ignore_eos;
    max_tokens bounds the output, `None` leaves it to the context length. stopping_criteria are transformers'.
    min_tokens (`min_new_tokens` of `generation_config.json`) is vLLM's rule: the first so many tokens are none that
    end the text, and no stop string ends in theirs. What else ends it does so earlier too: a criterion, a constraint
    that lets nothing follow, the context length.

    processors: `transformers.LogitsProcessor` objects or alike, after the penalties and before the temperature.
    With several sequences (n, or a list of prompts) each gets its own copy.
    plugin_processors: name -> options of processors that plugins offer.
    logprobs: log-probabilities of committed tokens under the unprocessed model, with that many alternatives, 0 to 20
    and at most the vocabulary.
    constraint: what the text must look like: one kind that a plugin offers and its value, `{"json_schema": {...}}`.
    speculation: how to draft, as `Speculation.of` reads it; `None` is what the engine does by itself.
    prediction: text that the caller expects to see, drafted where it fits.
    cache_salt: requests share cached prefixes only with requests of the same salt.
    adapter: name of a loaded adapter to run under; `None` is the model as it is.
    trace: each output of a stream tells which tree was verified, and who guessed what.

    Raises InvalidRequest naming the field, its value and the choices.
    """

    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    no_repeat_ngram_size: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    seed: Annotated[int, Meta(ge=0, le=_LAST_SEED)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    plugin_processors: Mapping[str, Mapping[str, object]] | None = None
    constraint: Constraint | None = None
    speculation: Speculation | None = None
    prediction: str | tuple[int, ...] = ()
    cache_salt: str = ""
    adapter: str | None = None
    trace: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object]) -> SamplingParams:
        """Build from keywords as users write them: lists for tuples, one string for `stop`, "off" for speculation."""
        known = cls.__struct_fields__
        for name in options:
            if name not in known:
                hint = f"what you mean is {REQUEST[name]}" if name in REQUEST else None
                raise UnknownName("option", name, known, param=name, hint=hint)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if value is not None
        }
        return cls(**values)

    def __post_init__(self) -> None:
        for name, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            if default is not None and getattr(self, name) is None:
                raise InvalidRequest(f"{name} is None; leave it out for its default, {default!r}", param=name)
        for name in ("stop", "bad_words"):
            if isinstance(text := getattr(self, name), str):
                msgspec.structs.force_setattr(self, name, (text,))
        if self.speculation is not None:
            msgspec.structs.force_setattr(self, "speculation", Speculation.of(self.speculation))
        if self.constraint is not None:
            msgspec.structs.force_setattr(self, "constraint", Constraint.of(self.constraint))
        for name in _SEVERAL:
            _several(self, name)
        if isinstance(self.prediction, str):
            check_text(self.prediction, "prediction holds", param="prediction")
        else:
            _several(self, "prediction")
        for name in _IDS:
            _plain_ids(self, name)
        check_ranges(self)
        for name in ("stop", "bad_words"):
            _strings(self, name)
        for name in ("processors", "stopping_criteria"):
            _callables(self, name)
        if not isinstance(self.adapter, str | None):
            raise InvalidRequest(f"adapter is {self.adapter!r}; it must be the name of one", param="adapter")
        for name in ("logit_bias", "plugin_processors"):
            _mapping(name, getattr(self, name) or {})
        _plain_bias(self)
        for name, options in (self.plugin_processors or {}).items():
            _mapping("plugin_processors", options, of=f"the options of {name!r}")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", param="min_tokens"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest if a token id lies outside the vocabulary, or more tokens are asked for than it has."""
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            check_ids(getattr(self, name) or (), vocab_size, name)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids is empty; no token could be drawn", param="allowed_token_ids")
        if (self.logprobs or 0) > vocab_size:
            message = f"logprobs is {self.logprobs}; the vocabulary has {vocab_size} tokens"
            raise InvalidRequest(message, param="logprobs")

    def resolved(self, defaults: GenerationConfig) -> SamplingParams:
        """The same with the defaults of `generation_config.json` filled in: `temperature` and so on are set after it.

        As in transformers, its temperature and filters count only where it says `do_sample`; anything the request
        says itself wins. Its lengths are not followed, and `not_followed` names what else is not.
        """
        filled: dict[str, object] = {}
        asked = self.temperature is not None or any(getattr(self, name) is not None for name in _SAMPLING_ONLY)
        if defaults.do_sample and self.temperature != 0:
            for name in _FROM_GENERATION_CONFIG:
                if getattr(self, name) is None and (value := getattr(defaults, name, None)) is not None:
                    filled[name] = value
        if self.temperature is None and "temperature" not in filled:
            filled["temperature"] = 1.0 if asked or defaults.do_sample else 0.0
        for name in ("repetition_penalty", "no_repeat_ngram_size"):
            if getattr(self, name) is None and (value := getattr(defaults, name, None)) is not None:
                filled[name] = value
        if self.banned_token_ids is None and defaults.suppress_tokens is not None:
            filled["banned_token_ids"] = tuple(defaults.suppress_tokens)
        if self.min_tokens is None and defaults.min_new_tokens is not None:
            filled["min_tokens"] = min(defaults.min_new_tokens, self.max_tokens or defaults.min_new_tokens)
        return msgspec.structs.replace(self, **filled)


def not_followed(defaults: GenerationConfig) -> dict[str, object]:
    """What a `generation_config.json` says that would change texts in transformers and changes none here."""
    said = {name: getattr(defaults, name, None) for name in _NOT_FOLLOWED}
    return {name: value for name, value in said.items() if value is not None and value not in _NOT_FOLLOWED[name]}


def check_ids(ids: Iterable[object], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest, naming the first that is not a token id of a vocabulary of `vocab_size`."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidRequest(f"{param} holds {token!r}; token ids are 0 to {vocab_size - 1}", param=param)


def _plain_ids(params: SamplingParams, name: str) -> None:
    value = getattr(params, name)
    if value is not None and not isinstance(value, str) and any(type(token) is not int for token in value):
        msgspec.structs.force_setattr(params, name, tuple(map(plain, value)))


def _plain_bias(params: SamplingParams) -> None:
    if not params.logit_bias:
        return
    biases = {plain(token): plain(bias) for token, bias in params.logit_bias.items()}
    for token, bias in biases.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not isinstance(token, int) or not number or not is_finite(bias):
            raise InvalidRequest(f"logit_bias {token!r}: {bias!r} is not token id: finite number", param="logit_bias")
    msgspec.structs.force_setattr(params, "logit_bias", biases)


def _several(params: SamplingParams, name: str) -> None:
    value = getattr(params, name)
    if value is not None and (isinstance(value, str | bytes) or not isinstance(value, Sequence | Set)):
        hint = ": give its tolist()" if hasattr(value, "tolist") else ""
        raise InvalidRequest(f"{name} is {value!r}; it must be a list{hint}", param=name)


def _mapping(name: str, value: object, *, of: str = "it") -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name}: {of} must be a mapping, not {value!r}", param=name)


def _callables(params: SamplingParams, name: str) -> None:
    for value in getattr(params, name):
        if not callable(value):
            raise InvalidRequest(f"{name} holds {value!r}; it must hold callables", param=name)


def _strings(params: SamplingParams, name: str) -> None:
    for value in getattr(params, name):
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"{name} holds {value!r}; it must hold non-empty strings", param=name)
        check_text(value, f"{name} holds", param=name)
