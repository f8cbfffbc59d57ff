"""For code that calls `model.generate`: `model.generate(**inputs, custom_generate=specgen.custom_generate)`.

transformers prepares everything (its config, its processors, its stopping criteria) and hands over; what comes back
has the shape that transformers would return.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from specgen.api import engine_of
from specgen.errors import ContextLengthExceeded, InvalidRequest
from specgen.params import SamplingParams
from specgen.types import Result, Speculation

_REFUSED = {
    "num_beams": (1, None),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "output_scores": (False, None),
    "output_logits": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "use_mtp": (False, None),
}
# What generate hands over besides, of which the engine has its own or whose value is checked.
_UNDERSTOOD = (
    "attention_mask",
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
)
_OFF: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "banned_token_ids": (),
    "min_tokens": 0,
    "ignore_eos": True,
}


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    speculation: Any = "auto",
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy or sampled decoding of int64[batch, length] through the engine of `model`.

    Give `speculation` to `model.generate` to choose how to draft. Sampling takes its seed from torch's global
    generator, so `torch.manual_seed` makes it repeatable; the coins differ from transformers' own.
    Returns int64[batch, longest], prompt included and padded on the right, or `GenerateDecoderOnlyOutput` if asked for.
    Raises InvalidRequest naming the option for what is not supported, ContextLengthExceeded where the engine's context
    ends before a text does.
    """
    _refuse_unsupported(generation_config, model_kwargs)
    paddings = _paddings(input_ids, model_kwargs)
    engine = engine_of(model)
    common = _common(generation_config, stopping_criteria, input_ids.shape[1], speculation)
    custom_criteria = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    streams = []
    for row, (ids, padding) in enumerate(zip(input_ids, paddings, strict=True)):
        params = SamplingParams(
            processors=_for_row(logits_processor, row, input_ids, padding),
            stopping_criteria=_for_row(custom_criteria, row, input_ids, padding),
            seed=int(torch.randint(2**63 - 1, ()).item()) if generation_config.do_sample else 0,
            **common,
        )
        streams.append(engine.stream(ids[padding:].tolist(), params))
    results = [_whole(stream.results()[0], common["max_tokens"], engine.context_length) for stream in streams]
    sequences = _padded(input_ids, [result.ids for result in results], generation_config)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences


def _refuse_unsupported(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    for name, allowed in _REFUSED.items():
        if getattr(config, name, allowed[0]) not in allowed:
            value = getattr(config, name)
            raise InvalidRequest(f"{name}={value!r} is not supported by specgen; leave it out", param=name)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InvalidRequest("past_key_values is not supported; give the whole prompt", param="past_key_values")
    if model_kwargs.get("inputs_embeds") is not None:
        raise InvalidRequest("inputs_embeds is not supported; give input_ids", param="inputs_embeds")
    for name, value in model_kwargs.items():
        if name not in _UNDERSTOOD and value is not None:
            raise InvalidRequest(f"{name} is not supported by specgen; leave it out", param=name)


def _paddings(prompts: Tensor, model_kwargs: Mapping[str, Any]) -> list[int]:
    """Length of the left padding of each row. Raises InvalidRequest where mask or positions say anything else."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    paddings = []
    for row, prompt in enumerate(prompts):
        padding = 0 if mask is None else int(mask[row].ne(0).to(torch.int64).argmax())
        if mask is not None and not mask[row, padding:].all():
            raise InvalidRequest(
                f"attention_mask hides tokens behind the first of row {row}; pad on the left", param="attention_mask"
            )
        if positions is not None:
            given = positions.expand(len(prompts), -1)[row, padding:].tolist()
            if given != list(range(len(prompt) - padding)):
                raise InvalidRequest("position_ids other than 0, 1, ... are not supported", param="position_ids")
        paddings.append(padding)
    return paddings


def _common(
    config: GenerationConfig, criteria: StoppingCriteriaList, prompt_length: int, speculation: Any
) -> dict[str, Any]:
    """What all rows share. The processors are transformers' own, so every setting that would add one is off.

    The ends are read from the criteria: the caller's own take the place of those that the config would make.
    """
    ends = [c.eos_token_id.flatten().tolist() for c in criteria if isinstance(c, EosTokenCriteria)]
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    return {
        "temperature": 1.0 if config.do_sample else 0.0,
        "stop_token_ids": tuple(chain.from_iterable(ends)),
        "max_tokens": max(1, min(lengths, default=config.max_length) - prompt_length),
        "speculation": Speculation.of(speculation),
        **_OFF,
    }


def _for_row(functions: Sequence[Any], row: int, prompts: Tensor, padding: int) -> tuple[_Padded, ...]:
    """transformers' batched processors or criteria as they act on one row; own copies, since they may keep state."""
    if len(prompts) > 1:
        functions = copy.deepcopy(list(functions))
    for function in functions:
        ignored = getattr(function, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor) and ignored.numel() == len(prompts):
            function.prompt_ignore_length = ignored[row : row + 1]
    return tuple(_Padded(function, prompts[row, :padding]) for function in functions)


class _Padded:
    """Calls a processor or criterion with the left padding put back, so that it sees what transformers would show."""

    def __init__(self, function: Any, padding: Tensor) -> None:
        self._function = function
        self._padding = padding[None]

    def __call__(self, ids: Tensor, scores: Tensor) -> Any:
        if self._padding.numel():
            ids = torch.cat([self._padding.to(ids.device), ids], dim=1)
        return self._function(ids, scores)


def _whole(result: Result, asked: int, context: int) -> Result:
    """The result, unless somebody else or the context ended it before its end: what `generate` returns has no place to
    say so."""
    if result.finish_reason == "cancelled" and result.error is not None:
        raise result.error
    if result.finish_reason == "length" and len(result.ids) < asked:
        raise ContextLengthExceeded(
            f"a prompt of {result.usage.prompt_tokens} tokens and {asked} new ones are longer than the engine's "
            f"context of {context}, and after {len(result.ids)} new ones the text had not ended",
            param="max_new_tokens",
        )
    return result


def _padded(prompts: Tensor, outputs: list[tuple[int, ...]], config: GenerationConfig) -> Tensor:
    pad = getattr(config, "_pad_token_tensor", None)
    fill = 0 if pad is None else int(pad)
    longest = max(map(len, outputs))
    tail = prompts.new_full((len(outputs), longest), fill)
    for row, ids in enumerate(outputs):
        tail[row, : len(ids)] = torch.tensor(ids)
    return torch.cat([prompts, tail], dim=1)
