"""For code that calls `model.generate`: `model.generate(**inputs, custom_generate=specgen.custom_generate)`.

transformers prepares everything (its config, its processors, its stopping criteria) and hands over; what comes back
has the shape that transformers would return. One row is decoded by the engine whatever its processors and criteria do,
since the walk calls them in the order of plain decoding. So are several rows whose processors and criteria treat each
row by itself. All other calls run in transformers' own loop, without drafts, and a warning says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal

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
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from specgen._base.log import Log
from specgen.api.dropin.arguments import keep_arguments_for
from specgen.api.dropin.inputs import left_paddings, not_read
from specgen.api.dropin.row import RowCalls, is_end, is_stateless, stateless_calls
from specgen.api.engine import Engine
from specgen.api.kept_engine import engine_of
from specgen.engine.request import PreparedRequest
from specgen.engine.stream import gather
from specgen.errors import ContextLengthExceeded, InvalidRequest
from specgen.sampling.params import SamplingParams
from specgen.types import AnyTokenizer, Result, Speculation

log = Log("specgen.dropin")

_REFUSED = {
    "num_beams": (1, None),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "use_mtp": (False, None),
}
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
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


@dataclass(frozen=True, slots=True)
class _Call:
    """What `generate` hands over: prompts int64[batch, length] and all that holds for them."""

    model: PreTrainedModel
    prompts: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None
    model_kwargs: Mapping[str, Any]

    @property
    def has_end_token(self) -> bool:
        """Whether rows that have ended are filled with padding, told as transformers tells it. Else they go on."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    def returns(self, *options: str) -> bool:
        """Whether a dictionary with one of these `output_` options is asked for."""
        return bool(self.config.return_dict_in_generate) and any(getattr(self.config, name) for name in options)


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    speculation: Literal["auto", "off"] | Mapping[str, object] | Speculation = "auto",
    streamer: BaseStreamer | None = None,
    tokenizer: AnyTokenizer | None = None,
    **model_kwargs: object,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Greedy or sampled decoding of int64[batch, length] through the engine of `model`.

    Give `speculation` to `model.generate` to choose how to draft; its `assistant_model` and `prompt_lookup_num_tokens`,
    which choose how transformers drafts, change nothing. Sampling takes its seed from torch's global generator, so
    `torch.manual_seed` makes it repeatable; the coins differ from transformers' own. `streamer` gets every token, and
    its end even when something raises. `tokenizer` is what `generate` made criteria of `stop_strings` with.
    Returns int64[batch, longest], prompt included and padded on the right, or `GenerateDecoderOnlyOutput` if asked for,
    which holds no cache where the engine decoded.
    Raises what a processor, a criterion or the streamer raises, InvalidRequest naming the option for what is not
    supported, ContextLengthExceeded where the engine's context ends before a text does.
    """
    call = _Call(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    try:
        _refuse_other_modes(generation_config)
        chosen = Speculation.of(speculation)
        paddings, why = left_paddings(input_ids, model_kwargs), _why_not_drafted(call)
        if why or paddings is None:
            return _step_by_step(call, why or "attention_mask or position_ids are not those of left padding")
        found = _engine_output(call, paddings, chosen)
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise
    if streamer is not None:
        streamer.end()
    return found


keep_arguments_for(custom_generate)


def _refuse_other_modes(config: GenerationConfig) -> None:
    for name, allowed in _REFUSED.items():
        if (value := getattr(config, name, allowed[0])) not in allowed:
            raise InvalidRequest(f"{name}={value!r} is not supported by specgen; leave it out", param=name)
    if (mode := config.get_generation_mode()) not in _MODES:
        raise InvalidRequest(
            f"the generation mode {mode.value!r} is not supported by specgen; choices: greedy, sampled"
        )


def _why_not_drafted(call: _Call) -> str | None:
    """Why only transformers' own loop does exactly what it does in this call; None where the engine does too."""
    device = call.model.device.type
    # Offloaded weights are meta tensors between two forwards; loading refuses them by name.
    if device != "meta" and torch.is_autocast_enabled(device):
        return "autocast is on"
    if name := not_read(call.model_kwargs, call.config):
        return f"{name} is given to the model"
    if call.returns("output_attentions", "output_hidden_states"):
        return "attentions or hidden states are asked for"
    if call.has_end_token and getattr(call.config, "_pad_token_tensor", None) is None:
        return "there is an end token and no padding token"
    return _why_rows_need_one_another(call) if len(call.prompts) > 1 else None


def _why_rows_need_one_another(call: _Call) -> str | None:
    """Why the rows of a batch have to be decoded in step with one another."""
    for function in (*call.processors, *call.criteria):
        if not is_stateless(function, len(call.prompts)):
            return f"{type(function).__name__} sees all rows of the batch at once"
    if not call.has_end_token and not all(is_end(criterion) for criterion in call.criteria):
        return "without an end token rows go on until all have ended"
    if call.returns("output_scores", "output_logits"):
        return "scores of all rows are asked for, of those that have ended too"
    return "a streamer gets the tokens of all rows at once" if call.streamer is not None else None


def _step_by_step(call: _Call, why: str) -> Tensor | GenerateDecoderOnlyOutput:
    """What transformers' own loop answers."""
    _warn(why)
    loop: Any = call.model._sample
    found: Tensor | GenerateDecoderOnlyOutput = loop(
        call.prompts,
        logits_processor=call.processors,
        stopping_criteria=call.criteria,
        generation_config=call.config,
        streamer=call.streamer,
        **call.model_kwargs,
    )
    return found


@cache
def _warn(why: str) -> None:
    """Once for each reason."""
    log.warning("model.generate decodes without drafts", why=why)


def _engine_output(call: _Call, paddings: list[int], speculation: Speculation) -> Tensor | GenerateDecoderOnlyOutput:
    engine = engine_of(call.model)
    calls = _row_calls(call, paddings[0])
    prepared = []
    for row, (prompt, padding) in enumerate(zip(call.prompts, paddings, strict=True)):
        chosen = _of_row(calls) if calls else _of_stateless(call, row, padding, engine.target.vocab_size)
        params = SamplingParams(
            **_OFF,
            **chosen,
            temperature=1.0 if call.config.do_sample else 0.0,
            max_tokens=_max_tokens(call),
            seed=int(torch.randint(2**63 - 1, ()).item()) if call.config.do_sample else 0,
            speculation=speculation,
        )
        prepared.append(engine.prepare(prompt[padding:].tolist(), params))
    results = _results(engine, prepared, calls, _max_tokens(call))
    sequences = _padded(call.prompts, [result.ids for result in results], call.config)
    if not call.config.return_dict_in_generate:
        return sequences
    scores, logits = (calls.scores, calls.logits) if calls else (None, None)
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]


def _row_calls(call: _Call, padding: int) -> RowCalls | None:
    """How the functions of a single row are called; None where they are stateless and nobody looks on."""
    if len(call.prompts) > 1:
        return None
    watched = call.streamer is not None or call.returns("output_scores", "output_logits")
    if not watched and all(is_stateless(function, 1) for function in (*call.processors, *call.criteria)):
        return None
    return RowCalls(call.processors, call.criteria, call.prompts[:, :padding], call.config, call.streamer)


def _of_row(calls: RowCalls) -> dict[str, Any]:
    return {"processors": (calls.process,), "stopping_criteria": (calls.stop,)}


def _of_stateless(call: _Call, row: int, length: int, vocab_size: int) -> dict[str, Any]:
    padding = call.prompts[row : row + 1, :length]
    ends = [c.eos_token_id.flatten().tolist() for c in call.criteria if isinstance(c, EosTokenCriteria)]
    return {
        "processors": stateless_calls(call.processors, row, padding),
        "stopping_criteria": stateless_calls([c for c in call.criteria if not is_end(c)], row, padding),
        # transformers takes any number, -1 for none; one that is no token ends nothing.
        "stop_token_ids": tuple(end for end in chain.from_iterable(ends) if 0 <= end < vocab_size),
    }


def _max_tokens(call: _Call) -> int:
    """The ends are read from the criteria: the caller's own take the place of those that the config would make."""
    lengths = [c.max_length for c in call.criteria if isinstance(c, MaxLengthCriteria)]
    return max(1, min(lengths, default=call.config.max_length) - call.prompts.shape[1])


def _results(engine: Engine, prepared: list[PreparedRequest], calls: RowCalls | None, asked: int) -> list[Result]:
    """Run all rows; where one fails, or the caller is interrupted, the others are cancelled."""
    streams = engine.start(*prepared)
    try:
        return [_whole(result, asked, engine.context_length) for (result,) in gather(streams)]
    except Exception:
        if calls is None or calls.error is None:
            raise
    finally:
        for stream in streams:
            stream.cancel()
    raise calls.error


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
