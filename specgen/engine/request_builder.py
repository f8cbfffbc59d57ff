"""From what a user wrote to a request that the engine can run: everything is checked here, on the caller's thread."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from specgen._base.torch_state import plain_torch
from specgen.context.length_bound import check_fits
from specgen.context.pipeline import ContextPipeline
from specgen.context.stage import Context
from specgen.engine.detokenizer import Decoder, IncrementalDetokenizer
from specgen.engine.request import PreparedRequest, Request, SampleSpec, StopRules
from specgen.errors import InvalidRequest, SpecgenError, UnknownName
from specgen.lora.adapter import Adapter
from specgen.sampling.constraint import Constrained, Constraints, Matcher
from specgen.sampling.params import SamplingParams, check_ids
from specgen.sampling.sampler import PositionKeys, Sampler, processors
from specgen.sampling.user_code import UserCode
from specgen.types import AnyTokenizer, LogitsProcessor, LogitsProcessorFactory, Prompt, Speculation, Tokenizer

FunctionT = TypeVar("FunctionT")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBuilder:
    """What an engine knows about its model, as far as building requests needs it.

    model: whose generation config is read at each request, as `generate` does.
    drafters: the names of those that the engine has. adapter_named: finds a loaded adapter, or raises.
    speculation: how requests draft that do not say it themselves.
    """

    tokenizer: AnyTokenizer | None
    model: PreTrainedModel
    vocab_size: int
    context_length: int
    device: torch.device
    pipeline: ContextPipeline
    drafters: Collection[str]
    plugin_processors: Mapping[str, LogitsProcessorFactory]
    constraints: Constraints
    adapter_named: Callable[[str], Adapter]
    speculation: Speculation

    @property
    def defaults(self) -> GenerationConfig:
        """What the model's `generation_config` says now."""
        config: GenerationConfig = self.model.generation_config
        return config

    @plain_torch()
    def build(self, prompt: Prompt, params: SamplingParams, *, copies: bool) -> PreparedRequest:
        """The request and how each of its `params.n` samples draws.

        copies: whether sequences of other requests share the processors in `params`, so that each needs its own.
        Raises InvalidRequest or one of its kinds, naming the value and the choices.
        """
        params.check_vocabulary(self.vocab_size)
        self._check_text_needs(params)
        speculation = self.speculation if params.speculation is None else params.speculation
        self._check_drafters(speculation)
        params = params.resolved(self.defaults)
        ids = self.encode(prompt)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        adapter = None if params.adapter is None else self.adapter_named(params.adapter)
        prediction = self._prediction(params)
        request = Request(f"req-{secrets.token_hex(8)}", ids, params, seed, speculation, prediction, adapter)
        copies = copies or params.n > 1
        matcher = self.constraints.compile(params.constraint) if params.constraint else None
        samples = [self._sample(request, index, matcher, copies=copies) for index in range(params.n)]
        return PreparedRequest(request, samples)

    @plain_torch()
    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt, checked."""
        ids = self.pipeline.run(Context.of(prompt, max_prompt_tokens=self.context_length - 1))
        check_ids(ids, self.vocab_size, "prompt")
        return ids

    def _check_drafters(self, speculation: Speculation) -> None:
        for name in speculation.drafters or ():
            if name not in self.drafters:
                raise UnknownName("drafter", name, self.drafters, param="speculation")

    def _sample(self, request: Request, index: int, matcher: Matcher | None, *, copies: bool) -> SampleSpec:
        params = request.params
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= set(model_ends(self.defaults, self.tokenizer, self.vocab_size))
        constraint = Constrained(matcher.copy(), ends) if matcher is not None else None
        room = self.context_length - len(request.ids)
        sampler = Sampler(
            processors(
                params,
                prompt_length=len(request.ids),
                end_ids=sorted(ends),
                encode=self._spellings,
                custom=[
                    *(UserCode(_own(p, "processors", copies=copies)) for p in params.processors),
                    *self._offered(params),
                    # The last of them: what others make of a forbidden token does not matter then.
                    *([constraint.mask] if constraint else ()),
                ],
                device=self.device,
            ),
            greedy=not params.temperature,
            keys=PositionKeys(request.seed, index),
        )
        cursor = IncrementalDetokenizer.after(
            request.ids,
            cast(Decoder | None, self.tokenizer),
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
            min_tokens=params.min_tokens or 0,
        )
        prompt = len(request.ids)
        longest, shortest = prompt + min(room, params.max_tokens or room), prompt + (params.min_tokens or 0)
        criteria = tuple(UserCode(_own(c, "stopping_criteria", copies=copies)) for c in params.stopping_criteria)
        return SampleSpec(sampler, StopRules(ends, longest, shortest, criteria), cursor, constraint)

    def _check_text_needs(self, params: SamplingParams) -> None:
        for name in ("stop", "bad_words"):
            if self.tokenizer is None and getattr(params, name):
                raise InvalidRequest(f"{name} needs a tokenizer, and this engine has none", param=name)

    def _prediction(self, params: SamplingParams) -> tuple[int, ...]:
        if not isinstance(params.prediction, str):
            check_ids(params.prediction, self.vocab_size, "prediction")
            return params.prediction
        if self.tokenizer is None:
            raise InvalidRequest("prediction as text needs a tokenizer; give token ids", param="prediction")
        # No answer is longer than the context.
        check_fits(self.tokenizer, params.prediction, self.context_length, param="prediction")
        return tuple(self._spelt(params.prediction, "prediction"))

    def _spellings(self, word: str) -> list[list[int]]:
        """A bad word in a text and at the beginning of one."""
        spellings = [self._spelt(text, "bad_words") for text in (word, f" {word}")]
        if not any(spellings):
            raise InvalidRequest(f"bad_words holds {word!r}, which the tokenizer makes no token of", param="bad_words")
        return [ids for ids in spellings if ids]

    def _spelt(self, text: str, param: str) -> list[int]:
        """The ids of a text that a request holds. A tokenizer may know tokens that the model has no logits for."""
        ids = cast(Tokenizer, self.tokenizer).encode(text, add_special_tokens=False)
        if beyond := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise InvalidRequest(
                f"{param} holds {text!r}, which the tokenizer spells with token id {beyond[0]}; "
                f"token ids of this model are 0 to {self.vocab_size - 1}",
                param=param,
            )
        return ids

    def _offered(self, params: SamplingParams) -> list[LogitsProcessor]:
        found = []
        for name, options in (params.plugin_processors or {}).items():
            factory: Callable[..., LogitsProcessor] | None = self.plugin_processors.get(name)
            if factory is None:
                raise UnknownName("logits processor", name, self.plugin_processors, param="plugin_processors")
            try:
                found.append(factory(self.tokenizer, **options))
            except SpecgenError:
                raise
            except Exception as error:
                message = f"logits processor {name!r} refuses {dict(options)!r}: {error}"
                raise InvalidRequest(message, param="plugin_processors") from error
        return found


def model_ends(defaults: GenerationConfig, tokenizer: AnyTokenizer | None, vocab_size: int) -> tuple[int, ...]:
    """The model's own end tokens: what its generation config says, else the tokenizer's; of those the ones that the
    model can say."""
    eos = defaults.eos_token_id
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return ()
    ends = eos if isinstance(eos, Sequence) else (int(eos),)
    return tuple(end for end in ends if 0 <= end < vocab_size)


def _own(function: FunctionT, param: str, *, copies: bool) -> FunctionT:
    """A processor or criterion of the caller's, or a copy where other sequences use it too: it may keep state."""
    if not copies:
        return function
    try:
        return copy.deepcopy(function)
    except Exception as error:
        raise InvalidRequest(
            f"{param} holds {function!r}, which cannot be copied, and several sequences need their own: {error}",
            param=param,
        ) from error


def with_options(params: SamplingParams | None, options: Mapping[str, object]) -> SamplingParams:
    """The params of a call: `params`, or keywords as users write them. Both at once is an error."""
    if params is not None:
        if options:
            raise InvalidRequest(f"give params or keywords, not both: {', '.join(options)}", param="params")
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params is {params!r}; it must be SamplingParams, or keywords", param="params")
        return params
    return SamplingParams.of(options)
