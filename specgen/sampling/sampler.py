"""From one row of logits to one token: processors in order, then a draw whose randomness belongs to the position.

The draw is Gumbel-max (Maddison et al. 2014): the token with the largest `logit + Gumbel noise` has exactly the
softmax's law. The noise of token t at position i is a function of (seed, sample, i, t) alone: Philox4x64 (Salmon et
al. 2011) gives one 64-bit key per position, SplitMix64 (Steele et al. 2014) one uniform per token under that key.
So a seed gives the same text whatever drafts, whoever shares the batch, and wherever a step begins. An inverse CDF
would do so too in exact arithmetic; but its boundaries crowd in the tail, where rounding in the last bit of a logit
moves them past the uniform, while here only a near tie of the two best can flip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from specgen.errors import RequestFailed
from specgen.kernels import reference
from specgen.kernels.draws import Warp
from specgen.sampling.params import SamplingParams
from specgen.sampling.user_code import UserCode
from specgen.types import LogitsProcessor, Logprob

if TYPE_CHECKING:
    from torch import FloatTensor, LongTensor

_COLDEST = 1e-30
"""Below it logits overflow, and infinities tie; nobody can tell it from anything colder."""
_KEYS_PER_BLOCK = 512
_WORDS_PER_COUNTER = 4


class PositionKeys:
    """The random key of each absolute position of one sequence: word `position` of a Philox4x64 stream.

    seed: 0 to 2**64 - 1, sample: index among the n of a request; together the 128-bit key of the stream.
    """

    def __init__(self, seed: int, sample: int = 0) -> None:
        self._key = (sample << 64) | seed
        self._blocks: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        block, offset = divmod(position, _KEYS_PER_BLOCK)
        if block not in self._blocks:
            counter = block * (_KEYS_PER_BLOCK // _WORDS_PER_COUNTER)
            stream = np.random.Philox(key=self._key, counter=counter)
            self._blocks = {block: stream.random_raw(_KEYS_PER_BLOCK).astype(np.int64).tolist()}
        return self._blocks[block][offset]


def gumbel_argmax(scores: Tensor, key: int) -> int:
    """A token drawn from softmax(scores), float[vocab]; `-inf` is never drawn. Raises RequestFailed if all are."""
    if (token := reference.gumbel_argmax(scores, key)) < 0:
        raise RequestFailed("no token is left to draw: the processors of this request ban them all")
    return token


class Sampler:
    """How one sequence turns a row of logits into a token. Holds the sequence's own processors, stateful or not."""

    def __init__(self, processors: Sequence[LogitsProcessor], *, greedy: bool, keys: PositionKeys) -> None:
        self._processors = tuple(processors)
        self._greedy = greedy
        self._keys = keys
        self.warp = None if greedy else _warp(self._processors)
        """How a row is warped before the draw, if that is all that happens to it; so many can be drawn at once."""

    def key(self, position: int) -> int:
        """The random key of the token at an absolute position."""
        return self._keys[position]

    @property
    def is_argmax(self) -> bool:
        """Whether the token is the argmax of the row as it is, so that many rows can be drawn at once."""
        return self._greedy and not self._processors

    def draw(self, ids: Tensor, logits: Tensor) -> int:
        """The token after `ids` int64[1, n], given float32[1, vocab]. Calls each processor once.

        Raises RequestFailed when no token is left, and whatever a processor raises, UserCodeRaised for a caller's own.
        """
        if self._processors:
            # A tensor of their own: some write in place, and the row as it is has other readers.
            logits = logits.clone()
        for processor in self._processors:
            logits = processor(cast("LongTensor", ids), cast("FloatTensor", logits))
        if not self._greedy:
            return gumbel_argmax(logits[0], self._keys[ids.shape[1]])
        token = int(logits[0].argmax())
        if self._processors and logits[0, token] == -math.inf:
            raise RequestFailed("no token is left to draw: the processors of this request ban them all")
        return token


def processors(
    params: SamplingParams,
    *,
    prompt_length: int,
    end_ids: Sequence[int],
    encode: Callable[[str], list[list[int]]],
    custom: Sequence[LogitsProcessor],
    device: torch.device,
) -> list[LogitsProcessor]:
    """The processors of resolved `params`, in transformers' order, `custom` before the temperature.

    end_ids: tokens that min_tokens holds back. encode: a bad word as its tokenisations, in and at the start of text.
    """
    found: list[LogitsProcessor] = []
    if params.logit_bias:
        found.append(_Bias(params.logit_bias, device))
    if params.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        found.append(_CountPenalty(params.presence_penalty, params.frequency_penalty, prompt_length))
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.bad_words:
        found.append(NoBadWordsLogitsProcessor([ids for word in params.bad_words for ids in encode(word)]))
    if params.min_tokens and end_ids:
        found.append(
            MinNewTokensLengthLogitsProcessor(prompt_length, params.min_tokens, list(end_ids), device=str(device))
        )
    if params.banned_token_ids:
        found.append(SuppressTokensLogitsProcessor(list(params.banned_token_ids), device=str(device)))
    if params.allowed_token_ids is not None:
        found.append(_Allowed(params.allowed_token_ids, device))
    return [*found, *custom, *_warpers(params)]


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    if not params.temperature:
        return []
    found: list[LogitsProcessor] = []
    if params.temperature != 1.0:
        found.append(TemperatureLogitsWarper(max(float(params.temperature), _COLDEST)))
    if params.top_k:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(MinPLogitsWarper(params.min_p))
    if params.typical_p is not None and params.typical_p < 1.0:
        found.append(TypicalLogitsWarper(params.typical_p))
    return found


def _warp(found: Sequence[LogitsProcessor]) -> Warp | None:
    """The warpers' settings, if there is nothing else and they stand in `_warpers`' order."""
    fields: dict[str, Any] = {}
    names = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k"}
    names |= {TopPLogitsWarper: "top_p", MinPLogitsWarper: "min_p"}
    found = [one.function if isinstance(one, UserCode) else one for one in found]
    kinds = [type(one) for one in found]
    if kinds != [kind for kind in names if kind in kinds]:
        return None
    for one in found:
        # A caller's own may mark tokens otherwise, or keep several whatever their share.
        if getattr(one, "filter_value", -math.inf) != -math.inf or getattr(one, "min_tokens_to_keep", 1) != 1:
            return None
        fields[names[type(one)]] = getattr(one, names[type(one)])
    return Warp(**fields)


class _Bias:
    """OpenAI's logit_bias: added to the logits of single tokens."""

    def __init__(self, bias: Mapping[int, float], device: torch.device) -> None:
        self._ids = torch.tensor(list(bias), device=device)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_add(1, self._ids, self._values[None])


class _Allowed:
    """Everything but the allowed ids is banned."""

    def __init__(self, allowed: Sequence[int], device: torch.device) -> None:
        self._ids = torch.tensor(sorted(set(allowed)), device=device)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, -math.inf)
        kept[:, self._ids] = logits[:, self._ids]
        return kept


class _CountPenalty:
    """OpenAI's presence and frequency penalties, over the output alone."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_length = prompt_length

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        counts = torch.bincount(ids[0, self._prompt_length :], minlength=logits.shape[1])
        return logits - (counts * self._frequency + (counts > 0) * self._presence).to(logits.dtype)


def logprob(logits: Tensor, token: int, top: int) -> Logprob:
    """Log-probabilities of `token` and of the `top` most likely under softmax(logits), [vocab], in float32."""
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    best = torch.topk(scores, top) if top else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return Logprob(token, float(scores[token]), tuple(pairs))
